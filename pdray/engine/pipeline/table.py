"""Which way of computing a decode step is fastest, by its batch size and context; kept from one start to the next."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pdray.cache import cache_folder, make_folder
from pdray.errors import PdrayError

logger = logging.getLogger(__name__)

FOLDER = "decode_pipeline"


class Cell(NamedTuple):
    """Steps of so many sequences, padding included, of ``context`` tokens each."""

    num_seqs: int
    context: int


class Found(NamedTuple):
    """What was measured of a cell.

    Attributes:
        best: name of the fastest way but the plain one. wins: it is faster than plain by more than noise.
    """

    plain_ms: float
    best: str
    best_ms: float
    wins: bool


@dataclass(slots=True)
class Table:
    """Attributes:
    cells: that were measured.
    """

    cells: dict[Cell, Found] = field(default_factory=dict)

    def is_of(self, grid: Iterable[Cell], names: Iterable[str]) -> bool:
        """Whether it holds these cells and no others, and knows no other ways."""
        return set(self.cells) == set(grid) and {found.best for found in self.cells.values()} <= set(names)

    def winner(self, num_seqs: int, mean_len: float) -> str | None:
        """Name of the way for a step of so many sequences, by the nearest context that was measured; None: plain.

        Between two batch sizes that were measured it is a way that wins at both.
        """
        sizes = {cell.num_seqs for cell in self.cells}
        around = {
            max((size for size in sizes if size <= num_seqs), default=None),
            min((size for size in sizes if size >= num_seqs), default=None),
        }
        names = {None if size is None else self._winner_at(size, mean_len) for size in around}
        return names.pop() if len(names) == 1 else None

    def _winner_at(self, size: int, mean_len: float) -> str | None:
        contexts = [cell.context for cell in self.cells if cell.num_seqs == size]
        nearest = min(contexts, key=lambda context: abs(math.log(context / max(mean_len, 1.0))))
        found = self.cells[Cell(size, nearest)]
        return found.best if found.wins else None

    def won_sizes(self, sizes: Iterable[int]) -> dict[str, list[int]]:
        """Those of ``sizes`` at which each way wins in some context, by its name."""
        contexts = {cell.context for cell in self.cells}
        won = {size: {self.winner(size, context) for context in contexts} - {None} for size in sizes}
        names = sorted({name for each in won.values() for name in each if name is not None})
        return {name: [size for size, each in won.items() if name in each] for name in names}

    @property
    def num_won(self) -> int:
        """Cells in which some way wins."""
        return sum(found.wins for found in self.cells.values())


class TableFile:
    """A table in pdray's cache folder.

    Args:
        key: all that durations depend on: device, model, versions, what is to be measured.
    """

    def __init__(self, key: dict[str, Any]) -> None:
        self._key = json.loads(json.dumps(key))
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self._name = f"{digest}.json"

    def load(self) -> Table | None:
        """None: there is none yet. One that cannot be read is measured again, and a line says so."""
        try:
            path = cache_folder() / FOLDER / self._name
            if not path.is_file():
                return None
            held = json.loads(path.read_text())
            if held["key"] != self._key:
                raise ValueError("it is of another device or model")
            return Table({Cell(*cell): Found(*found) for cell, found in held["cells"]})
        except (OSError, PdrayError, ValueError, TypeError, KeyError) as error:
            logger.warning("the decode pipeline is measured again, for what was found before cannot be read: %s", error)
            return None

    def save(self, table: Table) -> None:
        """Where that fails a line says so, and the next start measures again."""
        try:
            folder = cache_folder() / FOLDER
            make_folder(folder)
            text = json.dumps({"key": self._key, "cells": list(table.cells.items())}, indent=1)
            whole = folder / self._name
            part = Path(f"{whole}.{os.getpid()}")
            part.write_text(text + "\n")
            part.replace(whole)
        except (OSError, PdrayError) as error:
            logger.warning("what was found of the decode pipeline is not kept for the next start: %s", error)
