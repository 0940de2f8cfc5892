"""Texts to token ids: no further than the context reaches, and long ones beside the event loop, few at once."""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from pdray.errors import ContextLengthError
from pdray.models.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

THREAD_FROM_CHARS = 4096  # shorter texts take less than the thread costs
LONG_FROM_CHARS = 128 * 1024  # a tenth of a second
MIN_SLICE_CHARS = 64 * 1024
SLICE_CHARS_PER_TOKEN = 10
MAX_SHRINK = 3  # NFC composes as much: three bytes of KELVIN SIGN to one, three jamo to one syllable

# One long text at a time: six of them wait for each other, and nobody else for them.
_LANE = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2)), "pdray-tokenizer")
_LONG_LANE = ThreadPoolExecutor(1, "pdray-long-tokenizer")


async def beside_loop(num_chars: int, work: Callable[[], T]) -> T:
    """Run work on texts of so many characters: here if they are short, else on a thread of those that such work has.

    Cancelling the call takes work that has not begun out of its queue.
    """
    if num_chars <= THREAD_FROM_CHARS:
        return work()
    lane = _LANE if num_chars <= LONG_FROM_CHARS else _LONG_LANE
    return await asyncio.wrap_future(lane.submit(work))


def over_context(
    num_prompt_tokens: int, max_model_len: int, max_tokens: int | None = None, *, at_least: bool = False
) -> ContextLengthError:
    """The error of a prompt, or prompt and output, longer than the context.

    litellm, aider and others know it by its first words, and read the numbers of OpenAI's wording out of it.

    Args:
        at_least: the prompt was not counted to its end.
    """
    left = max_model_len - num_prompt_tokens
    about = "at least " if at_least else ""
    advice = "Please reduce the length of the prompt"
    if left >= 1:
        advice = (
            f"max_tokens is {max_tokens}, but the prompt's {num_prompt_tokens} tokens leave {left}. "
            "Please reduce max_tokens or the length of the prompt"
        )
    return ContextLengthError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{about}{num_prompt_tokens + (max_tokens or 1)} tokens ({about}{num_prompt_tokens} in the prompt, "
        f"{max_tokens or 'at least 1'} in the completion). {advice} (the limit is max_model_len).",
        "prompt" if left < 1 else "max_tokens",
    )


class TextEncoder:
    """A tokenizer for texts that may be far too long. Its methods may be called from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = tokenizer.backend_tokenizer
        # As the tokenizer's own encode(), which sets these, and holds the interpreter's lock for long.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        self._token_reach = _token_reach(tokenizer)

    def check_length(self, text: str, max_model_len: int) -> None:
        """Refuse, without looking at it, what no tokens of this vocabulary can make fit.

        Raises:
            ContextLengthError: the text is too long.
        """
        if self._token_reach is None or len(text) <= self._token_reach * max_model_len:
            return
        is_ascii = text.isascii()
        num_bytes = len(text) if is_ascii else len(text.encode(errors="replace")) // MAX_SHRINK
        if num_bytes > self._token_reach * max_model_len:
            least = -(-num_bytes // self._token_reach)
            raise over_context(least, max_model_len, at_least=True)

    def encode(self, text: str, max_model_len: int | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. What does not fit costs about as much as what does.

        A text that is long for max_model_len is tried by its beginning: when that alone has more than twice as many
        tokens, the rest is not looked at. (Twice: a cut may change how what stands before it is divided.)

        Raises:
            ContextLengthError: the text is too long.
        """
        if max_model_len is not None:
            self.check_length(text, max_model_len)
            num_chars = max(MIN_SLICE_CHARS, SLICE_CHARS_PER_TOKEN * max_model_len)
            while num_chars < len(text):
                if self._count(text[:num_chars]) > 2 * max_model_len:
                    raise over_context(max_model_len + 1, max_model_len, at_least=True)
                num_chars *= 4
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if max_model_len is not None and len(encoding) >= max_model_len:
            raise over_context(len(encoding), max_model_len)
        return list(encoding.ids)

    def _count(self, text: str) -> int:
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)


@functools.lru_cache(maxsize=4)
def encoder_of(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """The tokenizer's encoder; made once, for it looks through the vocabulary."""
    return TextEncoder(tokenizer)


def _token_reach(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Bytes of ASCII text that one token stands for at most; None where a token may stand for any number of them.

    That is so where something is dropped or collapsed before the vocabulary is asked, or is unknown to it.
    """
    backend = tokenizer.backend_tokenizer
    vocabulary = vocabulary_of(tokenizer)
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # it takes all spaces beside it
    for step in _flat(backend.normalizer, "normalizers"):
        match step:
            case {"type": "Prepend" | "NFC"}:
                pass
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                return None
    kinds = set()
    for step in _flat(backend.pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel" | "Digits" | "Metaspace"}:
                pass
            case {"type": "Split" | "Punctuation", "behavior": behavior} if behavior != "Removed":
                pass
            case _:
                return None
        kinds.add(step["type"])
    model: Any = backend.model
    knows_bytes = type(model).__name__ == "BPE" and ("ByteLevel" in kinds or model.byte_fallback)
    pieces = [vocabulary.piece(token_id) for token_id in backend.get_vocab().values()]
    if not knows_bytes or len({piece for piece in pieces if len(piece) == 1}) < 256:
        return None  # whatever is unknown may become one token, or none
    return max(len(piece) for piece in pieces)


def _flat(part: Any, parts: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of its steps."""

    def steps(value: dict[str, Any]) -> list[dict[str, Any]]:
        return [each for inner in value[parts] for each in steps(inner)] if value["type"] == "Sequence" else [value]

    return [] if part is None else steps(json.loads(part.__getstate__()))
