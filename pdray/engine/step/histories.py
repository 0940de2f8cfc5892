"""Which sequences the device remembers the tokens of, and where."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pdray.engine.schedule.plan import Draw
from pdray.engine.schedule.sequence import Sequence, SequenceStatus
from pdray.kernels.sampling.history import Join, Joins, no_history, pack_joins


class Histories:
    """One slot for each sequence of a full batch, from its first draw until its last.

    A sequence that is preempted keeps its slot: it keeps its place, and its draws add to the slot whatever becomes of
    its blocks. Where it goes on elsewhere, its first draw there writes a slot from prompt and outputs so far. Slots are
    written in the order of the steps, so one may be given to a new sequence while a step that draws for the old one is
    in flight.

    Attributes:
        words: see no_history(); on the device. Part of what profile_model() measures.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.words = no_history(max_num_seqs, vocab_size, device)
        self._slots: dict[Sequence, int] = {}
        self._free = list(range(max_num_seqs))

    def release_ended(self, draws: Iterable[Draw] = ()) -> None:
        """Free the slots of sequences that draw no more.

        Args:
            draws: of the next step. A sequence that was released after that was planned still adds to its slot.
        """
        ended = [s for s in self._slots if s.status in (SequenceStatus.FINISHED, SequenceStatus.HELD)]
        if ended:
            drawn = {draw.sequence for draw in draws}
            self._free += [self._slots.pop(sequence) for sequence in ended if sequence not in drawn]

    def join(self, draw: Draw) -> Join:
        """A slot for a sequence whose first draw this is, and what is to be written there before it."""
        sequence = draw.sequence
        assert draw.position == sequence.num_output_tokens, "its tokens are not all known"
        slot = self._slots[sequence] = self._free.pop()
        request = sequence.request
        outputs = sequence.token_ids[sequence.num_prompt_tokens :]
        return Join(slot, request.prompt_array, outputs, request.end_token_ids, request.params.logit_bias)

    def pack(self, joins: list[Join]) -> Joins | None:
        """For remember(); None if there are none."""
        return pack_joins(joins, pin_memory=self.words.is_cuda) if joins else None
