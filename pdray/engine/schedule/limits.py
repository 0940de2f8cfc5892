"""The limits of one engine: requests beyond them are refused at once, with the setting to change."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from pdray.engine.request import EngineRequest
from pdray.engine.schedule.demand import Demand, lease_demand, num_blocks_for, num_reserved_tokens, num_start_blocks
from pdray.errors import InvalidRequestError
from pdray.prompt_scores import check_size
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pdray.config import Config
    from pdray.engine.kv.pool import KVPool
    from pdray.models.model_config import ModelConfig


@functools.lru_cache(maxsize=4)
def _ids_below(limit: int) -> Any:
    return list[Annotated[int, msgspec.Meta(ge=0, lt=limit)]]


def are_token_ids(ids: Sequence[int], vocab_size: int) -> bool:
    """Whether all are integers in [0, vocab_size), without a step of Python's for each of many thousand."""
    try:
        msgspec.convert(ids, _ids_below(vocab_size))
    except msgspec.ValidationError:
        return False
    return True


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters that name tokens which the model has not.

    Raises:
        InvalidRequestError: names the field and the id.
    """
    for name, token_ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words", [token_id for word in params.bad_words_token_ids for token_id in word]),
    ):
        if (largest := max(token_ids, default=0)) >= vocab_size:
            raise InvalidRequestError(
                f"{name} has token id {largest}, which is outside the vocabulary of {vocab_size} tokens (0 to "
                f"{vocab_size - 1})",
                name,
            )
    if params.bad_words and not params.bad_words_token_ids:
        raise InvalidRequestError("bad_words were not tokenized; give bad_words_token_ids", "bad_words")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Fixed when the engine starts.

    Attributes:
        num_blocks: allocatable blocks, without the dummy block.
        max_model_len: tokens, prompt and output.
        headroom_tokens: output tokens whose blocks a reservation holds from the start.
    """

    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    headroom_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, config: Config, model: ModelConfig, pool: KVPool, max_model_len: int) -> EngineLimits:
        """The limits of an engine with this configuration, model and pool."""
        return cls(
            block_size=pool.layout.block_size,
            num_blocks=pool.num_blocks - 1,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            headroom_tokens=config.decode_headroom_tokens,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        )

    def end_token_ids(self, request: EngineRequest) -> tuple[int, ...]:
        """Ids of the vocabulary that end the request's completions."""
        ids = {*self.eos_token_ids, *request.params.stop_token_ids}
        return tuple(sorted(i for i in ids if 0 <= i < self.vocab_size))

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return num_blocks_for(num_tokens, self.block_size)

    def max_total_tokens(self, request: EngineRequest) -> int:
        """Length, prompt included, at which each completion of the request ends at the latest."""
        if request.params.max_tokens is None:
            return self.max_model_len
        return min(len(request.prompt_token_ids) + request.params.max_tokens, self.max_model_len)

    def num_reserved_tokens(self, request: EngineRequest) -> int:
        """Tokens whose KV a reservation of the request has room for."""
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        return num_reserved_tokens(num_tokens, self.max_total_tokens(request), self.headroom_tokens)

    def demand(self, request: EngineRequest) -> Demand:
        """The most that a reservation of the request takes."""
        return lease_demand(
            len(request.prompt_token_ids) + len(request.output_token_ids),
            self.max_total_tokens(request),
            len(request.indices),
            block_size=self.block_size,
            headroom_tokens=self.headroom_tokens,
        )

    def check(self, request: EngineRequest, reserved: bool) -> None:
        """Refuse what can never be served here.

        Args:
            reserved: it is to hold head-room from the start.

        Raises:
            InvalidRequestError: names the value, the limit, and the settings to change.
        """
        prompt, outputs = request.prompt_token_ids, request.output_token_ids
        if not prompt:
            raise InvalidRequestError("the prompt is empty; it must have at least 1 token", "prompt")
        for ids in (prompt, outputs):
            if not are_token_ids(ids, self.vocab_size):
                wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
                if wrong is not None:
                    raise InvalidRequestError(
                        f"token id {wrong} is outside the vocabulary (0 to {self.vocab_size - 1})", "prompt"
                    )
        if not request.indices or len(set(request.indices)) != len(request.indices):
            raise InvalidRequestError(f"indices are {request.indices}; they must be distinct, and at least one", "n")
        if outputs and len(request.indices) != 1:
            raise InvalidRequestError(
                f"{len(request.indices)} completions cannot go on from one completion's outputs", "n"
            )
        if len(request.indices) > self.max_num_seqs:
            raise InvalidRequestError(
                f"n is {len(request.indices)}, but max_num_seqs is {self.max_num_seqs}; lower n or raise it",
                "n",
            )
        check_token_ids(request.params, self.vocab_size)
        check_size(request.params, len(prompt))
        self._check_length(request)
        self._check_blocks(request, reserved)

    def _check_length(self, request: EngineRequest) -> None:
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if num_tokens >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens, which leaves no room for output in max_model_len "
                f"({self.max_model_len}); shorten it",
                "prompt",
            )
        max_tokens = request.params.max_tokens
        if max_tokens is not None and len(request.output_token_ids) >= max_tokens:
            raise InvalidRequestError(
                f"{len(request.output_token_ids)} tokens were produced already, and max_tokens is {max_tokens}",
                "max_tokens",
            )

    def _check_blocks(self, request: EngineRequest, reserved: bool) -> None:
        """Whether one completion at its full length, and the start of all of them, fit an empty pool."""
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        num_completions = len(request.indices)
        # A prefill_only request outputs one token, whose KV is stored elsewhere.
        longest = num_tokens if request.prefill_only else self.max_total_tokens(request) - 1
        if reserved:
            num_start = self.demand(request).blocks
        else:
            num_owners = 1 if request.prefill_only else num_completions
            num_start = num_start_blocks(num_tokens, num_tokens, num_owners, self.block_size)
        for what, num_needed, remedy, param in (
            ("one completion at full length", self.num_blocks_for(longest), "lower max_tokens", "max_tokens"),
            (f"the start of {num_completions} completions", num_start, "lower n or shorten the prompt", "n"),
        ):
            if num_needed > self.num_blocks:
                raise InvalidRequestError(
                    f"{what} needs KV cache for {num_needed * self.block_size} tokens (prompt "
                    f"{len(request.prompt_token_ids)}, max_tokens {request.params.max_tokens}, n {num_completions}), "
                    f"but the pool holds {self.num_blocks * self.block_size}; {remedy}",
                    param,
                )
