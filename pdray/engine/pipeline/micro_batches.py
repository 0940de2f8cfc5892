"""The forward pass of a decode step in micro-batches, layer by layer.

While one micro-batch is in a layer's feed-forward the next is in the same layer's attention, or the first in the next
layer's:

    attention     A0 B0 A1 B1 A2 …
    feed-forward     A0 B0 A1 B1 …

Each micro-batch goes through the decoder's own parts in the decoder's own order. Only the number of rows of its matrix
products differs from a plain step's: on CPU a row's result does not depend on it (pdray/kernels/linear/linear.py), on
CUDA it may differ in its last bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdray.engine.pipeline.halves import Halves
from pdray.engine.step.inputs import StepInputs
from pdray.kernels.attention.paged import AttentionMetadata
from pdray.models.decoder import Decoder


@dataclass(slots=True, eq=False)
class MicroBatch:
    """Some consecutive sequences of a decode step on their way through the layers.

    Attributes:
        hidden: [M, hidden_size], of the turn that was launched last.
        held: what that turn reads, made on the other half's stream. Memory of a stream is given out again as soon as
            nobody holds it, so it must last until that stream has waited for the turn: until the next one.
        ready: recorded behind that turn; on CPU None.
    """

    positions: torch.Tensor
    attention: AttentionMetadata
    hidden: torch.Tensor
    held: torch.Tensor
    ready: torch.cuda.Event | None

    def pass_on(self, result: torch.Tensor, done: torch.cuda.Event | None) -> None:
        """A turn was launched."""
        self.hidden, self.held, self.ready = result, self.hidden, done


def cut_rows(num_rows: int, num_parts: int) -> list[slice]:
    """Consecutive slices, the first ones longer by a row where it does not divide; fewer where there are fewer rows."""
    num_parts = min(num_parts, num_rows)
    size, longer = divmod(num_rows, num_parts)
    starts = [part * size + min(part, longer) for part in range(num_parts + 1)]
    return [slice(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def cut_attention(meta: AttentionMetadata, rows: slice) -> AttentionMetadata:
    """The metadata of some sequences of a decode step. Query lengths are all 1, so that starts count from 0 again."""
    size = rows.stop - rows.start
    return AttentionMetadata(
        slot_mapping=meta.slot_mapping[rows],
        block_tables=meta.block_tables[rows],
        cu_seqlens_q=meta.cu_seqlens_q[: size + 1],
        seq_lens=meta.seq_lens[rows],
        query_lens=meta.query_lens[rows],
        kv_lens=meta.kv_lens[rows],
        num_decodes=size,
    )


def pipelined_forward(
    decoder: Decoder, inputs: StepInputs, kv: torch.Tensor, sampled: torch.Tensor, number: int, halves: Halves
) -> torch.Tensor:
    """As Decoder.forward() of a decode step, in ``number`` micro-batches. Can be captured.

    The caller's current stream forks to both halves and has joined them on return.
    """
    assert inputs.shape.is_decode, "other steps have rows of several tokens"
    whole = decoder.embed_tokens(inputs.input_ids, sampled)
    forked = halves.fork()
    batches = [
        MicroBatch(inputs.positions[rows], cut_attention(inputs.attention, rows), whole[rows], whole, forked)
        for rows in cut_rows(len(whole), number)
    ]
    try:
        for i, layer in enumerate(decoder.layers):
            for batch in batches:
                with halves.attention.turn(batch.ready) as done:
                    attended = layer.attend(batch.hidden, batch.positions, kv[i], batch.attention)
                batch.pass_on(attended, done)
                with halves.ffn.turn(batch.ready) as done:
                    fed = layer.feed_forward(batch.hidden)
                batch.pass_on(fed, done)
    except BaseException:
        halves.rejoin()
        raise
    halves.join(batch.ready for batch in batches)
    return decoder.norm(torch.cat([batch.hidden for batch in batches]))
