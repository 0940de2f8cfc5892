"""Runs steps on a device: block copies, the model, sampling, and the one late read of what was drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch

from pdray.engine.kv.pool import KVPool
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.plan import SampledRow, StepPlan
from pdray.engine.step.graphs import StepGraphs
from pdray.engine.step.inputs import InputBuffers, StepInputs, StepShape
from pdray.engine.step.layer_groups import WORTH_BYTES, OnGroup, layer_groups
from pdray.kernels.kv.blocks import copy_blocks
from pdray.kernels.sampling.draw import draw_tokens
from pdray.kernels.sampling.mask import TokenMasks
from pdray.kernels.sampling.sample import SampleOutput, sample
from pdray.models.decoder import Decoder
from pdray.outputs import Logprob


class Draws(NamedTuple):
    """Draws of a launched step.

    Attributes:
        packed: on the host, and on CUDA only once ``done`` has passed.
        num_logprobs: see StepInputs.
        num_top: most likely tokens that each asking row has in ``packed``; None if no row asked.
    """

    packed: torch.Tensor
    num_logprobs: list[int | None]
    num_top: int | None
    done: torch.cuda.Event | None = None

    def read(self) -> list[SampledRow]:
        """One row for each draw, in order. Waits for the step."""
        if self.done is not None:
            self.done.synchronize()
        if self.num_top is None:
            return [SampledRow(token_id) for token_id in self.packed.tolist()]
        return unpack_samples(self.packed, self.num_logprobs, self.num_top)


class Undrawn(NamedTuple):
    """A step that was launched up to its logits."""

    inputs: StepInputs
    logits: torch.Tensor


class Lane:
    """Launches plans one after the other: input buffers, padding, graphs. For one thread.

    Several lanes may serve one pool. Draws that the host has not read are looked up in ``sampled``, so lanes whose
    plans continue each other's share it.

    Args:
        sampled: [max_num_seqs] int64 on the device; default: its own.
        largest_group: layers that are told of together at most; see layer_groups().
        capture: make CUDA graphs, and load what launched steps need.

    Attributes:
        sampled: the last launched step's draws.
        graphs: of decode steps and short prompts; None: every step is launched kernel by kernel.
        on_logits: sees every step's logits [S, vocab_size] before sampling; for tests and tools.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        limits: EngineLimits,
        *,
        sampled: torch.Tensor | None = None,
        largest_group: int = 16,
        capture: bool = False,
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        device = pool.device
        self.sampled = (
            torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=device) if sampled is None else sampled
        )
        self.graphs: StepGraphs | None = None
        self.on_logits: Callable[[torch.Tensor], None] | None = None
        self._largest_group = largest_group
        self._relay = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._decode_buffers = InputBuffers(limits, limits.max_num_seqs, device)
        self._buffers = InputBuffers(limits, limits.max_num_batched_tokens, device)
        if capture:
            self._capture(limits.max_num_batched_tokens)

    def _capture(self, max_num_batched_tokens: int) -> None:
        shape = (len(self.sampled), self.decoder.config.vocab_size)
        logits = torch.empty(shape, dtype=self.decoder.dtype, device=self.pool.device)
        self.graphs = StepGraphs(logits, max_num_batched_tokens)
        self.graphs.capture(self.compute, self._decode_buffers, self._buffers, self.groups)
        for num_tokens in self.graphs.launched_sizes:
            self.decoder.run_products(num_tokens)

    def prepare(self, plan: StepPlan) -> StepInputs:
        """The plan's inputs, padded for a graph where one can run it. Reads the sequences: under the engine's lock."""
        padded = None if self.graphs is None else self.graphs.shape_for(plan)
        return (self._decode_buffers if plan.is_decode else self._buffers).fill(plan, padded)

    def groups(self, shape: StepShape) -> list[range]:
        """Layers of such a step that are told of together."""
        layout = self.pool.layout
        worth_bytes = 0 if self._relay is None else WORTH_BYTES  # a CPU takes longer for a layer than for a message
        layer_bytes = shape.num_tokens * layout.token_bytes // layout.num_layers
        return layer_groups(layout.num_layers, layer_bytes, self._largest_group, worth_bytes)

    @torch.inference_mode()
    def launch(self, inputs: StepInputs, on_group: OnGroup | None) -> Draws | Undrawn:
        """Start the step, which reads ``sampled`` and then overwrites it; on CPU, compute it.

        Args:
            on_group: called when a group's KV is stored; on CUDA, when the work is launched that does so.

        Returns:
            Undrawn if its draws have masks: then draw() is to follow, before the next launch.
        """
        copy_blocks(self.pool.tensor, list(inputs.copies))
        num_draws = len(inputs.num_logprobs)
        if self.graphs is not None and inputs.shape in self.graphs:
            logits = self.graphs.replay(inputs.shape)
            if on_group is not None:
                for layers, stored in self.graphs.stored(inputs.shape):
                    on_group(layers, self._event_after(stored))
        else:
            logits = self.compute(inputs, None if on_group is None else self._on_layer(inputs.shape, on_group))
        if self.on_logits is not None and num_draws:
            self.on_logits(logits[:num_draws].float())
        undrawn = Undrawn(inputs, logits)
        return undrawn if inputs.has_masks else self.draw(undrawn, None)

    @torch.inference_mode()
    def draw(self, undrawn: Undrawn, masks: TokenMasks | None) -> Draws:
        """Start the draws of the step launched last."""
        inputs, logits = undrawn
        num_draws = len(inputs.num_logprobs)
        if inputs.sampling is None:
            return self._to_host(self.sampled[:num_draws], inputs)
        output = sample(logits[:num_draws], replace(inputs.sampling, masks=masks))
        self.sampled[:num_draws] = output.token_ids
        return self._to_host(pack_samples(output), inputs, output)

    def _on_layer(self, shape: StepShape, on_group: OnGroup) -> Callable[[int], None]:
        by_last_layer = {group.stop - 1: group for group in self.groups(shape)}

        def on_layer(layer: int) -> None:
            if layer in by_last_layer:
                on_group(by_last_layer[layer], self._event_after(None))

        return on_layer

    def _event_after(self, stored: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """An event of this launch alone, after ``stored`` or else after what was launched so far; None on CPU.

        A graph's own event is recorded again by its next replay, which may be launched before whoever hears of this one
        has made a stream wait. The relay stream waits at once, and records what can be waited for at any time.
        """
        if self._relay is None:
            return None
        event = torch.cuda.Event()
        if stored is None:
            event.record()
        else:
            self._relay.wait_event(stored)
            event.record(self._relay)
        return event

    @torch.inference_mode()
    def compute(
        self,
        inputs: StepInputs,
        on_layer: Callable[[int], None] | None = None,
        logits_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the step's draws; plain draws go to ``sampled``. Can be captured."""
        tokens = inputs.input_ids, inputs.positions
        rows = None if inputs.shape.is_decode else inputs.logit_rows
        hidden = self.decoder.forward(*tokens, self.pool.tensor, inputs.attention, on_layer, self.sampled, rows)
        logits = self.decoder.compute_logits(hidden, logits_out)
        if inputs.draws is not None and len(logits):
            draw_tokens(logits, *inputs.draws, out=self.sampled[: len(logits)])
        return logits

    def _to_host(self, packed: torch.Tensor, inputs: StepInputs, output: SampleOutput | None = None) -> Draws:
        logprobs = None if output is None else output.logprobs
        num_top = None if logprobs is None else logprobs.top_token_ids.shape[1]
        if packed.device.type == "cpu":
            return Draws(packed, inputs.num_logprobs, num_top)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Draws(host, inputs.num_logprobs, num_top, done)


def pack_samples(output: SampleOutput) -> torch.Tensor:
    """Pack the output into one int64 tensor: ids, ranks, top ids, then float64 bits of the log-probabilities."""
    if output.logprobs is None:
        return output.token_ids
    _, sampled, ranks, top_ids, top_logprobs = output.logprobs
    floats = torch.cat((sampled, top_logprobs.flatten())).double().view(torch.int64)
    return torch.cat((output.token_ids, ranks, top_ids.flatten(), floats))


def unpack_samples(packed: torch.Tensor, num_logprobs: list[int | None], num_top: int) -> list[SampledRow]:
    """Rows from what pack_samples() made, on the host.

    Args:
        num_logprobs: see StepInputs; must be what the output was computed with.
    """
    num_rows, num_asked = len(num_logprobs), sum(number is not None for number in num_logprobs)
    integers, floats = packed.split((num_rows + num_asked * (1 + num_top), num_asked * (1 + num_top)))
    integer, value = iter(integers.tolist()), iter(floats.view(torch.float64).tolist())
    token_ids = list(islice(integer, num_rows))
    sampled_ranks, sampled_logprobs = list(islice(integer, num_asked)), list(islice(value, num_asked))

    rows = []
    asked = iter(zip(sampled_ranks, sampled_logprobs, strict=True))
    for token_id, number in zip(token_ids, num_logprobs, strict=True):
        if number is None:
            rows.append(SampledRow(token_id))
            continue
        rank, logprob = next(asked)
        entries = {token_id: Logprob(logprob, rank)}
        tops = zip(islice(integer, num_top), islice(value, num_top), strict=True)
        for place, (top_id, top_logprob) in enumerate(tops, start=1):
            if place <= number:
                entries.setdefault(top_id, Logprob(top_logprob, place))
        rows.append(SampledRow(token_id, entries))
    return rows
