"""What a prompt and its parameters must be before a request may wait for a place."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pdray.engine.schedule.limits import are_token_ids, check_token_ids
from pdray.errors import InvalidRequestError
from pdray.prompt_scores import check_size
from pdray.router.grammars import check_grammar
from pdray.router.prompt import CompleteText
from pdray.router.tokenization import beside_loop, encoder_of, over_context
from pdray.sampling_params import SamplingParams
from pdray.thinking import REASONING_OFF, think_tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULTS = SamplingParams()
# Parameters that say something about the text, and what to do without one.
NEED_TOKENIZER = {
    "stop": "use stop_token_ids",
    "include_stop_str_in_output": "leave it out",
    "skip_special_tokens": "leave it out",
    "structured_outputs": "leave it out",
    "bad_words": "use bad_words_token_ids",
    "thinking_token_budget": "leave it out",
}


class WorkerLimits(NamedTuple):
    """Attributes:
    max_model_len: tokens of prompt and output. max_num_seqs: of one worker. vocab_size: None where it is not known.
    """

    max_model_len: int
    max_num_seqs: int
    vocab_size: int | None


async def check_request(
    prompt: str | list[int],
    params: SamplingParams,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: WorkerLimits,
    reasoning_parser: str,
    default_max_tokens: int | None = None,
) -> tuple[list[int], SamplingParams]:
    """A prompt's token ids, and the parameters with nothing left open.

    Args:
        reasoning_parser: see Config. default_max_tokens: see complete_params().

    Raises:
        InvalidRequestError: it can never be served.
    """
    max_model_len, max_num_seqs, vocab_size = limits
    if params.n > max_num_seqs:
        raise InvalidRequestError(
            f"n is {params.n}, but a worker runs {max_num_seqs} sequences (max_num_seqs); lower n", "n"
        )
    check_tokenizer(params, tokenizer)
    await check_grammar(params, tokenizer)
    params = tokenize_bad_words(params, tokenizer, vocab_size)
    ids = await tokenize(tokenizer, prompt, max_model_len, vocab_size)
    params = note_thoughts(params, ids, tokenizer, reasoning_parser)
    return ids, complete_params(params, len(ids), max_model_len, default_max_tokens)


async def tokenize(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | list[int],
    max_model_len: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Token ids of a prompt; see tokenize_all."""
    [ids] = await tokenize_all(tokenizer, [prompt], max_model_len, vocab_size)
    return ids


async def tokenize_all(
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str | list[int]],
    max_model_len: int | None = None,
    vocab_size: int | None = None,
    keep_last: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt. All are looked at before any is tokenized, and those of a call are tokenized in turn.

    Args:
        keep_last: of each prompt, only so many tokens at its end; whatever else it has may be too long.
        vocab_size: the model's, which may be larger than the tokenizer's: a model can draw the ids that pad it. None
            where it is not known.

    Raises:
        InvalidRequestError: a prompt is empty, no text or ids, has ids outside of the vocabulary, or is too long for
            max_model_len.
    """
    longest = max_model_len if keep_last is None else None
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise InvalidRequestError(
                    "this server has no tokenizer (skip_tokenizer_init); send token ids", "prompt"
                )
            if longest is not None:
                encoder_of(tokenizer).check_length(prompt, longest)
        else:
            limit = vocab_size or (2**31 if tokenizer is None else len(tokenizer))
            _check_ids(prompt, limit, longest)
    abandoned = threading.Event()

    def encode(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            assert tokenizer is not None
            add_special_tokens = not isinstance(prompt, CompleteText)
            ids = encoder_of(tokenizer).encode(prompt, longest, add_special_tokens=add_special_tokens)
            if vocab_size is not None and (largest := max(ids, default=0)) >= vocab_size:
                raise InvalidRequestError(
                    f"the prompt has the token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), which the "
                    f"model's vocabulary of {vocab_size} has not; leave it out",
                    "prompt",
                )
            return ids
        return list(prompt)

    def encode_all() -> list[list[int]]:
        return [encode(prompt)[-(keep_last or 0) :] for prompt in prompts if not abandoned.is_set()]

    try:
        result = await beside_loop(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), encode_all)
    finally:
        abandoned.set()
    if not all(result):
        raise InvalidRequestError("the prompt is empty; it must have at least one token", "prompt")
    return result


def _check_ids(ids: list[int], limit: int, max_model_len: int | None) -> None:
    if max_model_len is not None and len(ids) >= max_model_len:
        raise over_context(len(ids), max_model_len)
    if are_token_ids(ids, limit):
        return
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < limit:
            raise InvalidRequestError(
                f"prompt token id {token_id!r} is not in [0, {limit}), the model's vocabulary", "prompt"
            )


def check_tokenizer(params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse what looks at text where there is none.

    Raises:
        InvalidRequestError: names the parameter.
    """
    if tokenizer is not None:
        return
    for name, instead in NEED_TOKENIZER.items():
        if getattr(params, name) != getattr(DEFAULTS, name):
            raise InvalidRequestError(
                f"{name} needs a tokenizer, and this server has none (skip_tokenizer_init); {instead}", name
            )


def tokenize_bad_words(
    params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None
) -> SamplingParams:
    """The parameters with the token ids of bad_words, and every token id that they name in the vocabulary.

    Raises:
        InvalidRequestError: one is not.
    """
    if params.bad_words and tokenizer is not None:
        encoder = encoder_of(tokenizer)
        texts = [text for word in params.bad_words for text in (word.lstrip(), " " + word.lstrip())]
        words = dict.fromkeys(tuple(encoder.encode(text, add_special_tokens=False)) for text in texts)
        params = msgspec.structs.replace(params, bad_words_token_ids=tuple(word for word in words if word))
    if vocab_size is not None:
        check_token_ids(params, vocab_size)
    return params


def note_thoughts(
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
    reasoning_parser: str,
) -> SamplingParams:
    """The parameters with what workers need to know of the model's thoughts, where they look at them.

    Args:
        reasoning_parser: see Config.

    Raises:
        InvalidRequestError: the model has none that could be counted, or structured_outputs leave no place for them.
    """
    budget = params.thinking_token_budget
    if budget is None and not params.structured_outputs_after_thinking:
        return params
    name = "structured_outputs_after_thinking" if budget is None else "thinking_token_budget"
    tags = None if reasoning_parser == REASONING_OFF else think_tags(tokenizer)
    if tags is None:
        raise InvalidRequestError(
            f"{name} needs a model whose <think> and </think> are tokens of its vocabulary, and a reasoning_parser; "
            "leave it out",
            name,
        )
    if budget is not None and params.structured_outputs is not None and not params.structured_outputs_after_thinking:
        raise InvalidRequestError(
            f"thinking_token_budget is {budget}, but the structured output leaves no place for thoughts; leave one out",
            name,
        )
    return msgspec.structs.replace(params, thinking=tags.after(prompt_token_ids))


def complete_params(
    params: SamplingParams, num_prompt_tokens: int, max_model_len: int, default_max_tokens: int | None = None
) -> SamplingParams:
    """The parameters with max_tokens and, unless greedy, a seed.

    Args:
        default_max_tokens: instead of all that the context length leaves, and never more.

    Raises:
        ContextLengthError: prompt, or prompt and max_tokens, do not fit max_model_len.
    """
    check_size(params, num_prompt_tokens)
    left = max_model_len - num_prompt_tokens
    if left < 1 or (params.max_tokens or 1) > left:
        raise over_context(num_prompt_tokens, max_model_len, params.max_tokens)
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
