"""What a prompt and its parameters must be before a request may wait for a place."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

import msgspec

from pdray.errors import InvalidRequestError
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THREAD_FROM_CHARS = 4096  # longer texts are tokenized beside the event loop


async def tokenize(tokenizer: PreTrainedTokenizerBase | None, prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt.

    Raises:
        InvalidRequestError: empty, not text or ids, or ids outside of the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError("this server has no tokenizer (skip_tokenizer_init); send token ids", "prompt")
        encode = tokenizer.encode
        ids = await asyncio.to_thread(encode, prompt) if len(prompt) > THREAD_FROM_CHARS else encode(prompt)
    else:
        ids = list(prompt)
        limit = 2**31 if tokenizer is None else len(tokenizer)
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < limit:
                raise InvalidRequestError(f"prompt token id {token_id!r} is not in [0, {limit})", "prompt")
    if not ids:
        raise InvalidRequestError("the prompt is empty; it must have at least one token", "prompt")
    return ids


def complete_params(
    params: SamplingParams, num_prompt_tokens: int, max_model_len: int, default_max_tokens: int | None = None
) -> SamplingParams:
    """The parameters with max_tokens and, unless greedy, a seed.

    Args:
        default_max_tokens: instead of all that the context length leaves, and never more.

    Raises:
        InvalidRequestError: prompt, or prompt and max_tokens, do not fit max_model_len.
    """
    left = max_model_len - num_prompt_tokens
    if left < 1:
        raise InvalidRequestError(
            f"the prompt has {num_prompt_tokens} tokens, but the context length (max_model_len) is {max_model_len} "
            "for prompt and output; shorten the prompt",
            "prompt",
        )
    if params.max_tokens is not None and params.max_tokens > left:
        raise InvalidRequestError(
            f"max_tokens is {params.max_tokens}, but the prompt's {num_prompt_tokens} tokens leave {left} of "
            f"the context length (max_model_len) of {max_model_len}; lower max_tokens",
            "max_tokens",
        )
    changes: dict[str, int] = {}
    if params.max_tokens is None:
        changes["max_tokens"] = max_tokens = left if default_max_tokens is None else min(left, default_max_tokens)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}, but max_tokens, which was left out, is {max_tokens} here (the "
                f"context length leaves {left}); lower min_tokens, or give max_tokens",
                "min_tokens",
            )
    if params.seed is None and not params.greedy:
        changes["seed"] = secrets.randbits(63)
    return msgspec.structs.replace(params, **changes) if changes else params
