"""What a check on a GPU found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """One line of the table. ok is None where the machine lacks what the check needs; figure then says what."""

    name: str
    figure: str
    limit: str
    ok: bool | None


def print_header() -> None:
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| check | figure | limit | ok | s |\n|---|---|---|---|---|")


def print_rows(rows: Iterator[Row]) -> bool:
    """Print each as it comes; returns whether all held."""
    held, started = True, time.monotonic()
    for row in rows:
        took, started = time.monotonic() - started, time.monotonic()
        ok = {True: "yes", False: "**no**", None: "skipped"}[row.ok]
        print(f"| {row.name} | {row.figure} | {row.limit} | {ok} | {took:.0f} |", flush=True)
        held &= row.ok is not False
    return held
