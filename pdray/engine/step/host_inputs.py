"""The host side of a step's inputs: one buffer, in which each of them has its place."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pdray.engine.schedule.sequence import Sequence
from pdray.kernels.sampling.rows import WORDS


class HostInputs:
    """The host side of a step's inputs: numpy views of one buffer, with the block tables last.

    Attributes:
        owners: which block_row each row of the block tables was filled from, and with how many blocks.
    """

    def __init__(self, buffer: torch.Tensor, sections: dict[str, Section]) -> None:
        self.buffer = buffer
        arrays = {name: section.of(buffer).numpy() for name, section in sections.items()}
        self.ids, self.positions, self.slots = arrays["ids"], arrays["positions"], arrays["slots"]
        self.rows, self.starts, self.lens = arrays["rows"], arrays["starts"], arrays["lens"]
        self.records = arrays["records"]
        self.tables = arrays["tables"]
        self.num_older = arrays["older"]
        self.older_starts, self.fresh_starts = arrays["older_starts"], arrays["fresh_starts"]
        self.owners: list[tuple[np.ndarray[Any, Any] | None, int]]
        self.forget_tables()

    def forget_tables(self) -> None:
        """The block tables hold something else now."""
        self.owners = [(None, 0)] * len(self.tables)

    def set_table(self, row: int, sequence: Sequence, num_blocks: int) -> None:
        """Copy what is new of a sequence's block table; ``owners`` knows what is there already."""
        owner, known = self.owners[row]
        if owner is not sequence.block_row:
            known = 0
        if known < num_blocks:
            self.tables[row, known:num_blocks] = sequence.block_row[known:num_blocks]
            self.owners[row] = (sequence.block_row, num_blocks)

    def split(self, num_older: int, num_seqs: int) -> None:
        """Fill what tells older sequences from fresh ones, of which the first is ``num_older``; see FreshSplit."""
        starts, end = self.starts[: num_seqs + 1], self.starts[num_older]
        self.num_older[0] = num_older
        np.minimum(starts, end, out=self.older_starts[: num_seqs + 1])
        np.maximum(starts, end, out=self.fresh_starts[: num_seqs + 1])


class Section(NamedTuple):
    """A tensor inside a buffer of bytes. start: in bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + int(np.prod(self.shape)) * self.dtype.itemsize

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)


def lay_out(num_tokens: int, num_seqs: int, max_blocks: int) -> dict[str, Section]:
    """Sections of a step's buffer, each aligned to 16 bytes."""
    long, int_ = torch.int64, torch.int32
    wanted = {
        **{name: (long, (num_tokens,)) for name in ("ids", "positions", "slots")},
        "rows": (long, (num_seqs,)),
        "records": (int_, (num_seqs, WORDS)),
        "starts": (int_, (num_seqs + 1,)),
        "lens": (int_, (num_seqs,)),
        "older": (int_, (1,)),
        "older_starts": (int_, (num_seqs + 1,)),
        "fresh_starts": (int_, (num_seqs + 1,)),
        "tables": (int_, (num_seqs, max_blocks)),
    }
    sections: dict[str, Section] = {}
    start = 0
    for name, (dtype, shape) in wanted.items():
        sections[name] = Section(start, dtype, shape)
        start = -(-sections[name].end // 16) * 16
    return sections
