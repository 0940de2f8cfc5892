"""Sampling parameters. Names, defaults and meaning follow vLLM's SamplingParams."""

from __future__ import annotations

import operator
import struct
from typing import Any, NamedTuple

import msgspec

from pdray.errors import InvalidRequestError
from pdray.structured_outputs import StructuredOutputsParams
from pdray.thinking import Thinking

MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 256
MAX_LOGIT_BIAS = 1000  # the device keeps up to 1,023 different numbers; see kernels/sampling/history.py
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 1024
MAX_SALT_CHARS = 1024
MAX_INT32 = 2**31 - 1  # what the kernels count with
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
RANDOM_SEED = NO_BUDGET = -1  # as in vLLM
SMALLEST_FLOAT32 = 2.0**-126  # the smallest normal one: what is below may count as 0 on a GPU, and has no reciprocal


class Range(NamedTuple):
    """Values that a number may have once it is what the kernels use: a float32, or an int.

    Attributes:
        allowed: the same in words, for errors.
    """

    lowest: float
    highest: float
    allowed: str


FLOATS = {
    "temperature": Range(0.0, 100.0, "between 0 and 100"),
    "top_p": Range(SMALLEST_FLOAT32, 1.0, "in (0, 1], and at least 1.2e-38, the smallest float32"),
    "min_p": Range(0.0, 1.0, "in [0, 1]"),
    "presence_penalty": Range(-2.0, 2.0, "in [-2, 2]"),
    "frequency_penalty": Range(-2.0, 2.0, "in [-2, 2]"),
    "repetition_penalty": Range(SMALLEST_FLOAT32, 100.0, "in (0, 100], and at least 1.2e-38, the smallest float32"),
}
INTEGERS = {
    "n": Range(1, MAX_N, f"between 1 and {MAX_N}"),
    "top_k": Range(-1, MAX_INT32, f"-1 or 0 (off), or between 1 and {MAX_INT32}"),
    "seed": Range(MIN_SEED, MAX_SEED, f"in [{MIN_SEED}, {MAX_SEED}]"),
    "max_tokens": Range(0, MAX_INT32, f"between 0 and {MAX_INT32}"),
    "min_tokens": Range(0, MAX_INT32, f"between 0 and {MAX_INT32}"),
    "logprobs": Range(0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "prompt_logprobs": Range(0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "thinking_token_budget": Range(-1, MAX_INT32, f"-1 (no limit), or between 0 and {MAX_INT32}"),
}
MAY_BE_NONE = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "thinking_token_budget")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters of one request; immutable, and a wire type as it stands.

    Order of application: logit_bias, penalties, masks, temperature, min_p, top_k, top_p. Masks are those of
    structured_outputs, allowed_token_ids, bad_words and min_tokens. Reported
    logprobs are those of the raw logits (vLLM's ``raw_logprobs``).

    Numbers are what is computed with: a float is rounded to float32 and holds the rounded value, an int fits 32 bits
    (a seed 64), and what leaves its range thereby is refused.

    Attributes:
        n: independent completions of one prompt; the prompt is prefilled once.
        temperature: 0 is greedy.
        top_k: 0 or -1 switches it off.
        seed: any 64-bit integer; None or -1 draws one at the router. Completion ``i`` uses ``seed + i``, wrapped to
            64 bits.
        max_tokens: None means as many as ``max_model_len`` leaves. With 0 nothing but the prompt is computed.
        min_tokens: end-of-sequence and stop token ids are masked before this many tokens.
        stop: strings that end the text; cut from it unless include_stop_str_in_output.
        stop_token_ids: token ids that end generation, besides the model's own.
        logprobs: None, or the number of most likely tokens to report beside the sampled one.
        prompt_logprobs: the same for each token of the prompt but the first. All of it is computed then, whatever part
            of it is cached.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: what the text must look like. It ends where nothing may follow, whatever ignore_eos and
            min_tokens say.
        logit_bias: numbers in [-100, 100] that are added to the logits of these token ids.
        allowed_token_ids: no other tokens are drawn. End-of-sequence ids are others unless they are listed.
        bad_words: texts whose tokens are not drawn one after the other; each as it is written after a space, and not.
        bad_words_token_ids: the same as token ids; the router tokenizes bad_words.
        cache_salt: cached prefixes are shared only among requests that have the same.
        thinking_token_budget: after so many tokens of thoughts, those of the prompt's end included, they are ended.
            None or -1 sets no limit.
        structured_outputs_after_thinking: the output may begin with thoughts, and structured_outputs hold behind them.
        thinking: the model's tags of thoughts; the router knows them.

    Raises:
        InvalidRequestError: from ``__post_init__``, naming field, value and range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    cache_salt: str | None = None
    thinking_token_budget: int | None = None
    structured_outputs_after_thinking: bool = False
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            msgspec.structs.force_setattr(self, "stop", tuple(self.stop or ()))
        if not isinstance(self.stop_token_ids, tuple):
            msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check(
            "structured_outputs",
            isinstance(self.structured_outputs, StructuredOutputsParams | None),
            "a pdray.StructuredOutputsParams",
        )
        check_controls(self)
        for name, default in DEFAULT_NUMBERS:
            value = getattr(self, name)
            if value is default or (value == default and type(value) is type(default)):
                continue  # nearly always; every request passes here twice
            if name in FLOATS:
                self._set(name, _to_float32(value), FLOATS[name])
            else:
                self._set(name, _to_int(value), INTEGERS[name])
        if self.seed == RANDOM_SEED:
            msgspec.structs.force_setattr(self, "seed", None)
        if self.thinking_token_budget == NO_BUDGET:
            msgspec.structs.force_setattr(self, "thinking_token_budget", None)
        self._check(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; it may have at most {MAX_STOP_STRINGS}", "stop"
            )
        self._check("stop", all(isinstance(each, str) and each for each in self.stop), "non-empty strings")
        msgspec.structs.force_setattr(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))

    def _set(self, name: str, number: float | None, allowed: Range) -> None:
        """Keep the number that a field's value stands for."""
        value = getattr(self, name)
        if value is None and name in MAY_BE_NONE:
            return
        self._check(name, number is not None and allowed.lowest <= number <= allowed.highest, allowed.allowed)
        msgspec.structs.force_setattr(self, name, number)

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise InvalidRequestError(f"{name} is {_shown(getattr(self, name))}; it must be {allowed}", name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


DEFAULT_NUMBERS = [(f.name, f.default) for f in msgspec.structs.fields(SamplingParams) if f.name in FLOATS | INTEGERS]


def check_controls(params: SamplingParams) -> None:
    """What says which tokens may be drawn, with numbers as they are computed with.

    Raises:
        InvalidRequestError: names the field.
    """
    put = msgspec.structs.force_setattr
    if not params.logit_bias:
        put(params, "logit_bias", None)
    else:
        put(params, "logit_bias", _logit_bias(params.logit_bias))
    if params.allowed_token_ids is not None:
        allowed = _token_ids("allowed_token_ids", params.allowed_token_ids)
        if not allowed:
            raise InvalidRequestError("allowed_token_ids is empty; it must have at least one id", "allowed_token_ids")
        put(params, "allowed_token_ids", allowed)
    words = (params.bad_words,) if isinstance(params.bad_words, str) else tuple(params.bad_words or ())
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequestError(f"bad_words has {len(words)} words; it may have at most {MAX_BAD_WORDS}", "bad_words")
    if not all(isinstance(word, str) and len(word.strip()) > 0 and len(word) <= MAX_BAD_WORD_CHARS for word in words):
        raise InvalidRequestError(
            f"bad_words must be texts of 1 to {MAX_BAD_WORD_CHARS} characters, not all of them spaces", "bad_words"
        )
    put(params, "bad_words", words)
    salt = params.cache_salt
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT_CHARS):
        raise InvalidRequestError(f"cache_salt must be a text of 1 to {MAX_SALT_CHARS} characters", "cache_salt")


def _logit_bias(bias: dict[int, float]) -> dict[int, float]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(f"logit_bias has {len(bias)} ids; it may have at most {MAX_LOGIT_BIAS}", "logit_bias")
    numbers = {token_id: _to_float32(value) for token_id, value in bias.items()}
    for token_id, number in numbers.items():
        if number is None or not -100 <= number <= 100:
            raise InvalidRequestError(
                f"logit_bias of token id {token_id} is {_shown(bias[token_id])}; it must be in [-100, 100]",
                "logit_bias",
            )
    ids = _token_ids("logit_bias", tuple(bias))
    return dict(zip(ids, (number or 0.0 for number in numbers.values()), strict=True))


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    token_ids = tuple(_to_int(value) for value in values)
    if not all(token_id is not None and 0 <= token_id <= MAX_INT32 for token_id in token_ids):
        raise InvalidRequestError(f"{name} is {_shown(values)}; it must be token ids, between 0 and {MAX_INT32}", name)
    return tuple(token_id for token_id in token_ids if token_id is not None)


def wrap_seed(seed: int) -> int:
    """The low 64 bits as an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _shown(value: Any) -> str:
    """The value for an error's text; Python writes no integer of more than some thousand digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _to_float32(value: Any) -> float | None:
    """The float32 nearest to a number, an infinity beyond all of them; None of what is no number."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    except (struct.error, TypeError):
        return None
    return rounded


def _to_int(value: Any) -> int | None:
    """The integer that a value is, also as a whole float; None of anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None
