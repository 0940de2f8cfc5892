"""The turns of a pipelined step on a pretended clock: what runs beside what, and how long memory lasts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch

from pdray.engine.pipeline.halves import Halves
from pdray.engine.pipeline.micro_batches import pipelined_forward
from pdray.engine.step.inputs import StepShape
from pdray.kernels.attention.paged import AttentionMetadata


class Event(NamedTuple):
    """Attributes:
    at: when the turn ends. reads: what it reads.
    """

    at: int
    reads: list[weakref.ref[torch.Tensor]]


class Half:
    """A stream whose turns take one unit of time each."""

    def __init__(self, name: str, log: list[tuple[int, str]]) -> None:
        self.name, self.log = name, log
        self.stream = self
        self.free_at = 0
        self.reading: list[weakref.ref[torch.Tensor]] = []
        self.lost = 0  # turns whose input was given up before the stream that made it had waited for them

    @contextmanager
    def turn(self, before: Event) -> Iterator[Event]:
        self.lost += sum(tensor() is None for tensor in before.reads)
        began = max(self.free_at, before.at)
        self.free_at = began + 1
        self.log.append((began, self.name))
        self.reading = []
        event = Event(self.free_at, self.reading)
        yield event


class PretendedHalves(Halves):
    """Halves whose fork and join keep the pretended time."""

    def fork(self) -> Any:
        return Event(0, [])

    def join(self, turns: Any) -> None:
        self.attention.joined_at = max(turn.at for turn in turns)  # type: ignore[attr-defined]

    def rejoin(self) -> None:
        self.attention.log.append((-1, "rejoined"))  # type: ignore[attr-defined]


class Layer:
    """Notes what each of its halves reads, and returns new tensors."""

    def __init__(self, attention: Half, ffn: Half, *, fails: bool = False) -> None:
        self.attention, self.ffn, self.fails = attention, ffn, fails

    def attend(self, hidden: torch.Tensor, positions: torch.Tensor, kv: torch.Tensor, meta: Any) -> torch.Tensor:
        assert len(hidden) == len(positions) == len(meta.slot_mapping) == meta.num_decodes
        self.attention.reading.append(weakref.ref(hidden))
        return hidden + positions[:, None]

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.ffn.reading.append(weakref.ref(hidden))
        if self.fails:
            raise torch.OutOfMemoryError("out of memory")
        return hidden * 2


def run(
    num_layers: int, size: int, number: int, *, fails: bool = False, log: list[tuple[int, str]] | None = None
) -> tuple[PretendedHalves, list[tuple[int, str]], torch.Tensor]:
    log = [] if log is None else log
    attention, ffn = Half("attention", log), Half("ffn", log)
    halves = PretendedHalves(cast(Any, attention), cast(Any, ffn))
    decoder = SimpleNamespace(
        embed_tokens=lambda ids, sampled: ids[:, None].float(),
        layers=[Layer(attention, ffn, fails=fails and i == 1) for i in range(num_layers)],
        norm=lambda hidden: hidden,
    )
    rows = torch.arange(size)
    meta = AttentionMetadata(rows, rows[:, None], torch.arange(size + 1), rows, [1] * size, [9] * size, size)
    inputs = SimpleNamespace(
        input_ids=rows, positions=rows + 1, attention=meta, shape=StepShape(size, size, size, True)
    )
    kv = torch.zeros(num_layers, 1)
    return halves, log, pipelined_forward(cast(Any, decoder), cast(Any, inputs), kv, rows, number, halves)


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_both_halves_are_busy_but_for_the_first_turn_and_the_last(num_layers: int, number: int) -> None:
    """A layer of each micro-batch takes one unit in each half. One after the other they would take twice as long."""
    halves, log, _ = run(num_layers, 8, number)
    assert halves.attention.joined_at == num_layers * number + 1  # type: ignore[attr-defined]
    for name, first in (("attention", 0), ("ffn", 1)):
        assert [at for at, half in log if half == name] == list(range(first, first + num_layers * number))


def test_what_one_micro_batch_cannot_overlap_takes_its_time() -> None:
    halves, _, _ = run(5, 1, 2)
    assert halves.attention.joined_at == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [2, 3, 4])
def test_what_a_turn_reads_lasts_until_its_maker_waits_for_the_turn(number: int) -> None:
    halves, _, _ = run(4, 8, number)
    assert cast(Any, halves.attention).lost == cast(Any, halves.ffn).lost == 0


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_row_goes_through_every_layer_in_order(size: int) -> None:
    _, _, result = run(3, size, 2)
    expected = torch.arange(size)[:, None].float()
    for _ in range(3):
        expected = (expected + torch.arange(1, size + 1)[:, None]) * 2
    assert torch.equal(result, expected)


def test_a_turn_that_fails_is_joined_too() -> None:
    """Or the capture could not end, and would say that in place of why."""
    log: list[tuple[int, str]] = []
    with pytest.raises(torch.OutOfMemoryError):
        run(3, 8, 2, fails=True, log=log)
    assert log[-1] == (-1, "rejoined") and log.count(log[-1]) == 1
