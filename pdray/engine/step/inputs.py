"""The tensors of one forward pass, made from a step's plan in buffers that are allocated once."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pdray.engine.ranks.shared_memory import SharedMemory
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.plan import BlockCopy, StepPlan
from pdray.engine.step.draw_inputs import DrawNeeds, LastRecords, fill_records
from pdray.engine.step.histories import Histories
from pdray.engine.step.host_inputs import HostInputs, lay_out
from pdray.engine.step.mask_buffer import MaskBuffer
from pdray.engine.step.scores import ScoreInputs
from pdray.kernels.attention.paged import AttentionMetadata, FreshSplit, find_fresh
from pdray.kernels.elementwise.embedding import pending_id
from pdray.kernels.sampling.rows import DrawTable


class StepShape(NamedTuple):
    """The sizes that a step's launches depend on, padding included.

    Attributes:
        is_decode: one token and one draw for each sequence, in the same order.
        is_split: of a graph: FlashAttention computes its fresh sequences; see FreshSplit.
    """

    num_tokens: int
    num_seqs: int
    num_draws: int
    is_decode: bool
    is_split: bool = False

    @classmethod
    def of(cls, plan: StepPlan) -> StepShape:
        """Without padding."""
        return cls(plan.num_tokens, len(plan.chunks), plan.num_draws, plan.is_decode)


class Spans(NamedTuple):
    """A step's sequences, as the host knows them, without padding.

    Attributes:
        query_lens: tokens of each in this step. kv_lens: of each up to and including this step.
        num_decodes: leading sequences of one token.
    """

    query_lens: list[int]
    kv_lens: list[int]
    num_decodes: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> Spans:
        chunks = plan.chunks
        return cls([chunk.num_tokens for chunk in chunks], [chunk.end for chunk in chunks], plan.num_decodes)


class StepInputs(NamedTuple):
    """One forward pass over T tokens of B sequences, and S draws from its logits.

    Attributes:
        input_ids: [T] int64; pending_id(i) stands for the token that draw i of the step before has drawn.
        positions: [T] int64.
        logit_rows: [S] int64, the token whose logits each draw uses; a row may occur more than once.
        draws: how each is made. needs: what the draws need beyond that.
        num_logprobs: for each draw, how many most likely tokens are asked for; None: not even the drawn one.
        shape: of the tensors; what is beyond the plan's own is padding.
        spans: of the sequences. host: which of the host buffers the tensors were filled from.
        scores: prompt tokens to score; put in by the lane.
    """

    copies: list[BlockCopy]
    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    logit_rows: torch.Tensor
    draws: DrawTable
    needs: DrawNeeds
    num_logprobs: list[int | None]
    shape: StepShape
    spans: Spans
    host: int = 0
    scores: ScoreInputs | None = None


class InputBuffers:
    """Static inputs of the model, host side and device side. Results of fill() are views, valid until the next fill().

    On CUDA the host side is pinned, and there are two of it: one is filled while the copy from the other may still run.
    What was filled before the last fill() must have been used. On CPU both sides are the same memory.

    Args:
        memory: for the host side, shared with other ranks' buffers of the same size.
        follows: another rank fills them; the device side is then this process's own on CPU, too.
    """

    def __init__(
        self,
        limits: EngineLimits,
        num_tokens: int,
        device: torch.device,
        histories: Histories,
        masks: MaskBuffer,
        *,
        memory: SharedMemory | None = None,
        follows: bool = False,
    ) -> None:
        self._histories, self._masks, self._last_records = histories, masks, LastRecords()
        self.block_size = limits.block_size
        self.device = device
        self._sections = lay_out(num_tokens, limits.max_num_seqs, limits.num_blocks_for(limits.max_model_len))
        size = max(section.end for section in self._sections.values())
        on_gpu = device.type == "cuda"
        buffers = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) if memory is None else memory.take(size)
            for _ in range(2 if on_gpu else 1)
        ]
        self._hosts = [HostInputs(buffer, self._sections) for buffer in buffers]
        self._next = 0  # of the host buffers
        device_buffer = torch.zeros(size, dtype=torch.uint8, device=device) if on_gpu or follows else buffers[0]
        self._device_buffer = device_buffer
        self._device = {name: section.of(device_buffer) for name, section in self._sections.items()}
        self._arange = np.arange(max(limits.max_model_len, limits.max_num_seqs + 1), dtype=np.int64)

    def clear(self) -> None:
        """Forget what the device holds: all slots are the dummy block's. Nothing may be in flight that uses it."""
        self._device_buffer.zero_()

    def fill_alike(self, num_seqs: int, kv_len: int, num_blocks: int) -> StepInputs:
        """A decode step of sequences that are all ``kv_len`` tokens long, for measuring; nothing may be in flight.

        They read the pool's blocks one after the other, whatever those hold, and write to the dummy block.

        Args:
            num_blocks: of the pool, the dummy block included.
        """
        shape, part = StepShape(num_seqs, num_seqs, num_seqs, True), self._device
        self._device_buffer.zero_()
        for host in self._hosts:
            host.forget_tables()
        per_sequence = -(-kv_len // self.block_size)
        blocks = torch.arange(num_seqs * per_sequence, dtype=torch.int32, device=self.device) % (num_blocks - 1) + 1
        part["tables"][:num_seqs, :per_sequence] = blocks.view(num_seqs, per_sequence)
        part["positions"][:num_seqs] = kv_len - 1
        part["lens"][:num_seqs] = kv_len
        part["rows"][:num_seqs] = torch.arange(num_seqs, device=self.device)
        part["starts"][: num_seqs + 1] = torch.arange(num_seqs + 1, device=self.device)
        inputs = self.views(shape, Spans([], []))
        tables = part["tables"][:num_seqs]  # views() cuts them to the plan's on CPU
        query_lens, kv_lens = [1] * num_seqs, [kv_len] * num_seqs
        attention = replace(inputs.attention, block_tables=tables, query_lens=query_lens, kv_lens=kv_lens)
        return inputs._replace(attention=attention)

    def fill(self, plan: StepPlan, padded: StepShape | None = None) -> StepInputs:
        """The plan's tokens, block tables and sampling parameters. Reads the sequences: under the engine's lock.

        Args:
            padded: at least the plan's own shape: what is beyond it holds no KV, and writes to the dummy block.
        """
        index, self._next = self._next, (self._next + 1) % len(self._hosts)
        host = self._hosts[index]
        shape = padded or StepShape.of(plan)
        if plan.is_decode:
            self._fill_decodes(host, plan)
        else:
            self._fill_chunks(host, plan)
        if padded is not None:
            _pad(host, plan, padded)
        spans = Spans.of(plan)
        if shape.is_split:
            host.split(find_fresh(*spans), shape.num_seqs)
        draws = [draw for chunk in plan.chunks for draw in chunk.draws]
        needs = fill_records(host.records, draws, shape.num_draws, self._histories, self._last_records)
        self._send(host, shape)
        num_logprobs = [draw.sequence.request.params.logprobs for draw in draws]
        inputs = self.views(shape, spans)
        return inputs._replace(copies=plan.copies, needs=needs, num_logprobs=num_logprobs, host=index)

    def take_back(self) -> None:
        """What the last fill() returned is not used: what is filled next may take its place on the host, too."""
        self._next = (self._next - 1) % len(self._hosts)

    def receive(self, index: int, shape: StepShape, spans: Spans) -> StepInputs:
        """What rank 0 has filled, in the host buffer ``index``; without draws."""
        self._send(self._hosts[index], shape)
        return self.views(shape, spans)

    def _send(self, host: HostInputs, shape: StepShape) -> None:
        """Copy what such a step uses to the device, on the current stream."""
        if self._device_buffer is not host.buffer:
            used = self._sections["tables"].start + shape.num_seqs * host.tables.shape[1] * host.tables.itemsize
            self._device_buffer[:used].copy_(host.buffer[:used], non_blocking=True)

    def _fill_decodes(self, host: HostInputs, plan: StepPlan) -> None:
        """One token for each sequence, most of it without a loop in Python."""
        chunks, num = plan.chunks, len(plan.chunks)
        for row, chunk in enumerate(chunks):
            host.set_table(row, chunk.sequence, -(-chunk.end // self.block_size))
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, num)
        host.ids[:num] = [
            chunk.sequence.token_ids[chunk.start] if chunk.late_row is None else pending_id(chunk.late_row)
            for chunk in chunks
        ]
        host.positions[:num] = starts
        blocks = host.tables[self._arange[:num], starts // self.block_size].astype(np.int64)
        host.slots[:num] = blocks * self.block_size + starts % self.block_size
        host.lens[:num] = starts + 1
        host.rows[:num] = self._arange[:num]
        host.starts[: num + 1] = self._arange[: num + 1]

    def _fill_chunks(self, host: HostInputs, plan: StepPlan) -> None:
        rows: list[int] = []
        query_lens = []
        token = 0
        for i, chunk in enumerate(plan.chunks):
            sequence, start, end = chunk.sequence, chunk.start, chunk.end
            host.set_table(i, sequence, -(-end // self.block_size))
            last = token + chunk.num_tokens
            positions = self._arange[start:end]
            host.ids[token:last] = (
                sequence.token_ids[start:end] if chunk.late_row is None else pending_id(chunk.late_row)
            )
            host.positions[token:last] = positions
            blocks = sequence.block_row[positions // self.block_size].astype(np.int64)
            host.slots[token:last] = blocks * self.block_size + positions % self.block_size
            host.lens[i] = end
            token = last
            rows += [token - chunk.num_tokens + draw.row for draw in chunk.draws]
            query_lens.append(chunk.num_tokens)
        host.rows[: len(rows)] = rows
        host.starts[0] = 0
        host.starts[1 : len(query_lens) + 1] = np.cumsum(query_lens)

    def views(self, shape: StepShape, spans: Spans) -> StepInputs:
        """The static tensors, cut to a shape, without what fill() adds."""
        part, on_gpu = self._device, self.device.type == "cuda"
        tables = part["tables"]
        if not on_gpu:
            max_blocks = -(-max(spans.kv_lens, default=1) // self.block_size)
            tables = tables[:, :max_blocks]
        num_tokens, num_seqs, num_draws, is_decode, is_split = shape
        split = FreshSplit(part["older"], part["older_starts"][: num_seqs + 1], part["fresh_starts"][: num_seqs + 1])
        attention = AttentionMetadata(
            slot_mapping=part["slots"][:num_tokens],
            block_tables=tables[:num_seqs],
            cu_seqlens_q=part["starts"][: num_seqs + 1],
            seq_lens=part["lens"][:num_seqs],
            query_lens=spans.query_lens,
            kv_lens=spans.kv_lens,
            num_decodes=num_seqs if is_decode else spans.num_decodes,
            fresh_from=find_fresh(*spans),
            split=split if is_split else None,
        )
        return StepInputs(
            copies=[],
            input_ids=part["ids"][:num_tokens],
            positions=part["positions"][:num_tokens],
            attention=attention,
            logit_rows=part["rows"][:num_draws],
            draws=DrawTable(part["records"][:num_draws], self._histories.words, self._masks.words),
            needs=DrawNeeds(),
            num_logprobs=[],
            shape=shape,
            spans=spans,
        )


def _pad(host: HostInputs, plan: StepPlan, shape: StepShape) -> None:
    """Tokens of no sequence; sequences without tokens (a decode step's have one, and no KV); draws from row 0."""
    for padding in (host.ids, host.positions, host.slots):
        padding[plan.num_tokens : shape.num_tokens] = 0
    num_seqs = len(plan.chunks)
    host.lens[num_seqs : shape.num_seqs] = 0
    host.rows[plan.num_draws : shape.num_draws] = 0
    last = host.starts[num_seqs]
    host.starts[num_seqs + 1 : shape.num_seqs + 1] = last
    if shape.is_decode:
        host.starts[num_seqs + 1 : shape.num_seqs + 1] += np.arange(1, shape.num_seqs - num_seqs + 1, dtype=np.int32)
