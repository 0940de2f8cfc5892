"""How to sample one request. Names, defaults and meaning follow vLLM's SamplingParams."""

from __future__ import annotations

import msgspec

from pdray.errors import InvalidRequestError

MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters of one request; immutable, and a wire type as it stands.

    Order of application: penalties, min_tokens, temperature, min_p, top_k, top_p. Reported
    logprobs are those of the raw logits (vLLM's ``raw_logprobs``).

    Attributes:
        n: independent completions of one prompt; the prompt is prefilled once.
        temperature: 0 is greedy.
        top_k: 0 or -1 switches it off.
        seed: None draws one at the router. Completion ``i`` uses ``seed + i`` (mod 2**63).
        max_tokens: None means as many as ``max_model_len`` leaves.
        min_tokens: end-of-sequence and stop token ids are masked before this many tokens.
        stop: strings that end the text; cut from it unless include_stop_str_in_output.
        stop_token_ids: token ids that end generation, besides the model's own.
        logprobs: None, or the number of most likely tokens to report beside the sampled one.
        skip_special_tokens: leave special tokens out of the text.

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
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            msgspec.structs.force_setattr(self, "stop", tuple(self.stop or ()))
        if not isinstance(self.stop_token_ids, tuple):
            msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check("n", 1 <= self.n <= MAX_N, f"between 1 and {MAX_N}")
        self._check("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        self._check("top_k", self.top_k >= -1, "-1 or 0 (off), or at least 1")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        self._check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]")
        self._check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]")
        self._check("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "in (0, 100]")
        self._check("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"in [0, {MAX_SEED}]")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._check("min_tokens", self.min_tokens >= 0, "at least 0")
        self._check(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        self._check(
            "stop",
            len(self.stop) <= MAX_STOP_STRINGS and all(self.stop),
            f"at most {MAX_STOP_STRINGS} non-empty strings",
        )
        self._check(
            "logprobs",
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"between 0 and {MAX_LOGPROBS}",
        )

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise InvalidRequestError(f"{name} is {getattr(self, name)!r}; it must be {allowed}", name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0
