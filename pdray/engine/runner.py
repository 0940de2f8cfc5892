"""Runs one step on the device: block copies, the model, sampling, and the one read of the results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from pdray.engine.batch import StepInputs
from pdray.engine.step_plan import SampledRow
from pdray.kernels.kv_store import copy_blocks
from pdray.kernels.sampling import SampleOutput, sample
from pdray.models.decoder import Decoder
from pdray.outputs import Logprob


class Runner:
    """The model over one KV pool. For the engine's thread alone.

    Attributes:
        on_logits: sees every step's logits [S, vocab_size] float32 before sampling; for tests and tools.
    """

    def __init__(self, decoder: Decoder, kv: torch.Tensor) -> None:
        self.decoder = decoder
        self.kv = kv
        self.on_logits: Callable[[torch.Tensor], None] | None = None

    @torch.inference_mode()
    def run(self, inputs: StepInputs, on_layer: Callable[[int], None] | None) -> list[SampledRow]:
        """Compute the step; returns one row for each draw, in order."""
        copy_blocks(self.kv, list(inputs.copies))
        hidden = self.decoder.forward(inputs.input_ids, inputs.positions, self.kv, inputs.attention, on_layer)
        if not len(inputs.logit_rows):
            return []
        logits = self.decoder.compute_logits(hidden[inputs.logit_rows])
        if self.on_logits is not None:
            self.on_logits(logits)
        return read_samples(sample(logits, inputs.sampling), inputs.num_logprobs)


def read_samples(output: SampleOutput, num_logprobs: list[int | None]) -> list[SampledRow]:
    """Bring drawn tokens, and logprobs where asked, to the host in one read.

    Args:
        num_logprobs: see StepInputs; must be what the output was computed with.
    """
    if output.logprobs is None:
        return [SampledRow(token_id) for token_id in output.token_ids.tolist()]
    _, sampled, ranks, top_ids, top_logprobs = output.logprobs
    num_rows, num_asked, width = len(output.token_ids), len(sampled), top_ids.shape[1]
    floats = torch.cat((sampled, top_logprobs.flatten())).double().view(torch.int64)
    packed = torch.cat((output.token_ids, ranks, top_ids.flatten(), floats)).cpu()
    integers, floats = packed.split((num_rows + num_asked * (1 + width), num_asked * (1 + width)))
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
        tops = zip(islice(integer, width), islice(value, width), strict=True)
        for place, (top_id, top_logprob) in enumerate(tops, start=1):
            if place <= number:
                entries.setdefault(top_id, Logprob(top_logprob, place))
        rows.append(SampledRow(token_id, entries))
    return rows
