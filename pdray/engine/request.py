"""Inputs and outputs of the engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pdray.outputs import SampledToken
from pdray.prompt_scores import PromptScores
from pdray.sampling_params import SamplingParams


class Reservation(NamedTuple):
    """Blocks held for a request that is not being computed yet.

    Attributes:
        block_ids: the blocks that hold prompt and earlier outputs, in order.
        num_cached_tokens: leading tokens whose KV those blocks already hold (whole blocks).
    """

    block_ids: list[int]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt to complete, ``len(indices)`` times.

    Attributes:
        key: unique among the engine's live requests.
        params: with a seed, unless greedy. Completion i draws with seed + i.
        indices: which of the request's completions to run here.
        output_token_ids: tokens that the single completion has already produced elsewhere;
            positions of new tokens go on from there.
        prefill_only: stop after the first token of each index and keep the blocks until release().
        alone: its first steps compute nothing else, so that one that fails says whose fault it is.
        given: the blocks to compute it in, of an engine without blocks of its own; see GivenBlocks.
        whole: nobody reads the answer before its end. The engine only passes it on to updates.
    """

    key: Hashable
    prompt_token_ids: list[int]
    params: SamplingParams
    indices: tuple[int, ...] = (0,)
    output_token_ids: tuple[int, ...] = ()
    priority: int = 0
    prefill_only: bool = False
    alone: bool = False
    given: Reservation | None = None
    whole: bool = False


class LayerGroupReady(NamedTuple):
    """KV of some layers that is final and may be copied out.

    Attributes:
        key: the prefill_only request.
        layers: half-open range of layers.
        first_block: index, in the request's block list, of block_ids[0].
        block_ids: source blocks; the last one is partial only at the prompt's end.
        ready: on CUDA, the torch.cuda.Event after which the KV is there; None: it is there.
    """

    key: Hashable
    layers: range
    first_block: int
    block_ids: list[int]
    ready: Any = None


@dataclass(slots=True)
class RequestUpdate:
    """One request's news from one step. A duration is set once, on the update that first knows it.

    Attributes:
        finished: no completion of this request runs any more.
        num_cached_tokens: tokens found in this engine's prefix cache when it was first scheduled.
        prefill_queue: from add()/start_prefill() until first scheduled, s.
        prefill: from first scheduled until the first token was sampled, s.
        join_wait: from start_decode() until the first step that contains it began, s.
        first_decode_step: that step's duration, s. first_launch: of it, until the step was launched.
        failure: why the step that was to compute it failed; the engine knows the request no more.
        suspects: keys of all requests of the step that failed.
        param: the request's own field that made it fail.
        prompt_scores: with the first tokens, where they are asked for.
        whole: the request's own.
    """

    key: Hashable
    tokens: list[SampledToken] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int | None = None
    prefill_queue: float | None = None
    prefill: float | None = None
    join_wait: float | None = None
    first_decode_step: float | None = None
    first_launch: float | None = None
    failure: str | None = None
    suspects: tuple[Hashable, ...] = ()
    param: str | None = None
    prompt_scores: PromptScores | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's state between two steps, and its counters since the start.

    Attributes:
        free_blocks: allocatable now (free, or cached and unreferenced).
        preempted: queued sequences that gave their blocks back; while there are any, nothing is reserved.
        reserved: requests that hold a Reservation and have not started.
        queued_tokens: prompt tokens waiting to be computed.
        free_places: sequences that could still be admitted (max_num_seqs less all live ones).
        decode_sms: see SplitState; 0 where there is no split. num_split_changes, num_prompt_pieces: likewise.
    """

    num_blocks: int
    free_blocks: int
    free_places: int
    running: int
    waiting: int
    preempted: int
    reserved: int
    queued_tokens: int
    num_steps: int
    num_preemptions: int
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    num_prompt_tokens: int  # computed
    num_output_tokens: int  # sampled
    decode_sms: int = 0
    num_split_changes: int = 0
    num_prompt_pieces: int = 0
    num_pipelined_steps: int = 0  # decode steps in micro-batches


class EngineRoom(NamedTuple):
    """What an engine could still take, and how busy it is. The attributes are those of EngineStats."""

    free_blocks: int
    free_places: int
    running: int
    waiting: int
    preempted: int


class SplitState(NamedTuple):
    """How prompts and decodes share an engine's device.

    Attributes:
        decode_sms: SMs of the decodes' lane while both sides wait; None: both are computed in one step, on every SM.
        chunk: tokens of such a step.
        num_sms: of the device. ready: numbers that decode_sms may be.
        num_changes: of the choice. num_pieces: of prompts, computed beside decodes.
        unavailable: why there are no partitions; None: there are.
    """

    decode_sms: int | None
    chunk: int | None
    num_sms: int
    ready: tuple[int, ...]
    num_changes: int
    num_pieces: int
    unavailable: str | None
