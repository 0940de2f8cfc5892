"""What was measured of pipelined steps: what wins, which steps go by it, and how it is kept for the next start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdray.engine.pipeline.measure import Timing
from pdray.engine.pipeline.table import Cell, Found, Table, TableFile
from pdray.engine.pipeline.tuner import PLAIN, judge


def test_a_gain_within_noise_or_below_two_percent_does_not_win() -> None:
    plain = Timing(0.010, 0.0001)
    assert judge({PLAIN: plain, "a": Timing(0.0097, 0.0001), "b": Timing(0.0100, 0.0)}) == Found(10.0, "a", 9.7, True)
    assert not judge({PLAIN: plain, "a": Timing(0.0097, 0.0003)}).wins
    assert not judge({PLAIN: Timing(0.010, 0.0), "a": Timing(0.00985, 0.0)}).wins
    assert judge({PLAIN: plain, "a": Timing(0.020, 0.0), "b": Timing(0.012, 0.0)}) == Found(10.0, "b", 12.0, False)


def table() -> Table:
    """Way a wins with 32 at 8,192, and with 16 at both contexts; b with 64."""
    won, lost = Found(2.0, "a", 1.0, True), Found(2.0, "a", 2.0, False)
    cells = {Cell(64, 512): Found(2.0, "b", 1.0, True), Cell(32, 512): lost, Cell(32, 8192): won}
    return Table(cells | {Cell(16, 512): won, Cell(16, 8192): won, Cell(8, 512): lost})


@pytest.mark.parametrize(
    ("num_seqs", "mean_len", "way"),
    [(32, 9000.0, "a"), (32, 2100.0, "a"), (32, 2000.0, None), (32, 1.0, None), (16, 1.0, "a"), (64, 99999.0, "b")]
    + [
        (24, 8000.0, "a"),
        (24, 600.0, None),
        (48, 8000.0, None),
        (12, 512.0, None),
        (4, 512.0, None),
        (72, 512.0, None),
    ],
)
def test_a_step_goes_by_the_nearest_context_and_by_both_batch_sizes_around_it(
    num_seqs: int, mean_len: float, way: str | None
) -> None:
    assert table().winner(num_seqs, mean_len) == way


def test_sizes_that_get_graphs() -> None:
    assert table().won_sizes([2, 8, 16, 24, 32, 40, 64]) == {"a": [16, 24, 32], "b": [64]}
    assert table().num_won == 4 and Table().won_sizes([2, 8]) == {} and Table().winner(8, 512) is None


def test_a_table_of_other_cells_or_ways_is_another() -> None:
    cells = list(table().cells)
    assert table().is_of(reversed(cells), ["a", "b", "c"])
    assert (
        not table().is_of(cells, ["a"]) and not table().is_of(cells[1:], ["a", "b"]) and not Table().is_of(cells, "a")
    )


def test_a_table_is_kept_for_its_key_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path))
    file = TableFile({"device": ["H100", 132], "grid": [Cell(2, 512)]})
    assert file.load() is None
    file.save(table())
    assert TableFile({"device": ("H100", 132), "grid": ((2, 512),)}).load() == table()
    assert TableFile({"device": ["H100", 114], "grid": [Cell(2, 512)]}).load() is None
    assert not caplog.records
    (held,) = (tmp_path / "decode_pipeline").iterdir()
    for text in ("{", "[]", json.dumps(json.loads(held.read_text()) | {"key": 1}), '{"key": {}}'):
        held.write_text(text)
        assert file.load() is None
        assert "measured again" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 4


def test_a_table_that_cannot_be_kept_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path / "file"))
    TableFile({}).save(table())
    assert len(caplog.records) == 1 and "PDRAY_CACHE" in caplog.text
