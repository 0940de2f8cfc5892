"""From a step's plan to the tensors of one forward pass, through buffers that are allocated once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pdray.engine.limits import EngineLimits
from pdray.engine.sequence import uses_penalties
from pdray.engine.step_plan import BlockCopy, StepPlan
from pdray.kernels.attention import AttentionMetadata
from pdray.kernels.sampling import SamplingMetadata, SamplingRow

GREEDY = SamplingMetadata()


class StepInputs(NamedTuple):
    """One forward pass over T tokens of B sequences, and S draws from its logits.

    Attributes:
        input_ids, positions: [T] int64.
        logit_rows: [S] int64, the token whose logits each draw uses; a row may occur more than once.
        num_logprobs: for each draw, how many most likely tokens are asked for; None: not even the drawn one.
    """

    copies: list[BlockCopy]
    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    logit_rows: torch.Tensor
    sampling: SamplingMetadata
    num_logprobs: list[int | None]


class InputBuffers:
    """Static inputs of the model, host side and device side. Results of fill() are views, valid until the next fill().

    On CUDA the host side is pinned and goes over in two copies on the current stream, which the caller must have
    passed before it fills again. On CPU both sides are the same memory.
    """

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        num_tokens, num_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        max_blocks = limits.num_blocks_for(limits.max_model_len)
        self.block_size = limits.block_size
        self.device = device
        self._longs = (num_seqs, num_tokens, num_tokens, num_tokens)
        self._ints = (num_seqs + 1, num_seqs, num_seqs * max_blocks)
        pinned = device.type == "cuda"
        self._host_longs = torch.zeros(sum(self._longs), dtype=torch.int64, pin_memory=pinned)
        self._host_ints = torch.zeros(sum(self._ints), dtype=torch.int32, pin_memory=pinned)
        self._device_longs = self._host_longs if not pinned else self._host_longs.to(device)
        self._device_ints = self._host_ints if not pinned else self._host_ints.to(device)

        rows, ids, positions, slots = (part.numpy() for part in self._host_longs.split(self._longs))
        self._rows, self._ids, self._positions, self._slots = rows, ids, positions, slots
        starts, lens, tables = (part.numpy() for part in self._host_ints.split(self._ints))
        self._starts, self._lens, self._tables = starts, lens, tables.reshape(num_seqs, max_blocks)
        self._arange = np.arange(limits.max_model_len, dtype=np.int64)

    def fill(self, plan: StepPlan) -> StepInputs:
        """The plan's tokens, block tables and sampling parameters. Reads the sequences: under the engine's lock."""
        rows: list[int] = []
        query_lens, kv_lens = [], []
        token, max_blocks = 0, 0
        for i, chunk in enumerate(plan.chunks):
            sequence, start, end = chunk.sequence, chunk.start, chunk.end
            num_blocks = -(-end // self.block_size)
            self._tables[i, :num_blocks] = sequence.block_row[:num_blocks]
            last = token + chunk.num_tokens
            if chunk.num_tokens == 1:
                self._ids[token] = sequence.token_ids[start]
                self._positions[token] = start
                block = sequence.block_table[start // self.block_size]
                self._slots[token] = block * self.block_size + start % self.block_size
            else:
                self._ids[token:last] = sequence.token_ids[start:end]
                positions = self._arange[start:end]
                self._positions[token:last] = positions
                blocks = sequence.block_row[positions // self.block_size].astype(np.int64)
                self._slots[token:last] = blocks * self.block_size + positions % self.block_size
            token = last
            rows += [token - 1] * len(chunk.samplers)
            query_lens.append(chunk.num_tokens)
            kv_lens.append(end)
            max_blocks = max(max_blocks, num_blocks)
        num_seqs = len(plan.chunks)
        self._rows[: len(rows)] = rows
        self._starts[0] = 0
        self._starts[1 : num_seqs + 1] = np.cumsum(query_lens)
        self._lens[:num_seqs] = kv_lens
        return self._views(plan, query_lens, kv_lens, len(rows), max_blocks)

    def _views(
        self, plan: StepPlan, query_lens: list[int], kv_lens: list[int], num_rows: int, max_blocks: int
    ) -> StepInputs:
        """Copy to the device where there is one, and cut the static tensors to this step's sizes."""
        num_seqs, num_tokens = len(plan.chunks), plan.num_tokens
        if self._device_longs is not self._host_longs:
            self._device_longs.copy_(self._host_longs, non_blocking=True)
            used = self._ints[0] + self._ints[1] + num_seqs * self._tables.shape[1]
            self._device_ints[:used].copy_(self._host_ints[:used], non_blocking=True)
        rows, ids, positions, slots = self._device_longs.split(self._longs)
        starts, lens, tables = self._device_ints.split(self._ints)
        attention = AttentionMetadata(
            slot_mapping=slots[:num_tokens],
            block_tables=tables.view(self._tables.shape)[:num_seqs, :max_blocks],
            cu_seqlens_q=starts[: num_seqs + 1],
            seq_lens=lens[:num_seqs],
            query_lens=query_lens,
            kv_lens=kv_lens,
        )
        sampling, num_logprobs = self._sampling(plan)
        return StepInputs(
            plan.copies, ids[:num_tokens], positions[:num_tokens], attention, rows[:num_rows], sampling, num_logprobs
        )

    def _sampling(self, plan: StepPlan) -> tuple[SamplingMetadata, list[int | None]]:
        """How to draw; a batch of plain greedy rows builds nothing."""
        samplers = [sampler for chunk in plan.chunks for sampler in chunk.samplers]
        num_logprobs = [sampler.request.params.logprobs for sampler in samplers]
        if all(sampler.request.is_plain_greedy for sampler in samplers):
            return GREEDY, num_logprobs
        rows = []
        for sampler in samplers:
            params, num_outputs = sampler.request.params, sampler.num_output_tokens
            has_penalty = uses_penalties(params)
            rows.append(
                SamplingRow(
                    params,
                    sampler.seed,
                    num_outputs,
                    sampler.request.prompt_token_ids if has_penalty else (),
                    sampler.token_ids[sampler.num_prompt_tokens :] if has_penalty else (),
                    sampler.request.end_token_ids if num_outputs < params.min_tokens else (),
                )
            )
        return SamplingMetadata.build(rows, self.device), num_logprobs
