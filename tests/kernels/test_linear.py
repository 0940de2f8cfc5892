"""linear against torch, and its promise that a row's result does not depend on the number of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pdray.kernels.cpu_rows import steady_rows
from pdray.kernels.linear.linear import linear, pack_weight

SHAPES = [(960, 576), (576, 1536), (96, 33), (7, 16), (2048, 1024)]


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_rows_do_not_depend_on_their_number(out_features: int, in_features: int, packed: bool) -> None:
    weight, bias = torch.randn(out_features, in_features) * 0.05, torch.randn(out_features)
    x = torch.randn(300, in_features)
    used = pack_weight(weight) if packed else weight
    whole = linear(x, used, bias)
    torch.testing.assert_close(whole, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    for rows in [*range(1, 26), 64, 100, 255]:
        for start in (0, 5):
            assert torch.equal(linear(x[start : start + rows], used, bias), whole[start : start + rows]), rows


@pytest.mark.parametrize("packed", [False, True])
def test_strided_rows_and_no_bias(packed: bool) -> None:
    weight, x = torch.randn(24, 40), torch.randn(30, 80)
    used = pack_weight(weight) if packed else weight
    for view in (x[::3, :40], x[2:5, 40:], x[:0, :40]):
        out = linear(view, used)
        assert out.shape == (len(view), 24)
        torch.testing.assert_close(out, view @ weight.t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_residual_is_added_last(packed: bool, rows: int) -> None:
    weight, bias, x, residual = torch.randn(24, 40), torch.randn(24), torch.randn(rows, 40), torch.randn(rows, 24)
    used = pack_weight(weight) if packed else weight
    assert torch.equal(linear(x, used, bias, residual.clone()), linear(x, used, bias) + residual)


@pytest.mark.parametrize("packed", [False, True])
def test_a_result_lies_where_it_is_asked_for(packed: bool) -> None:
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(5, 40)
    used, whole = pack_weight(weight) if packed else weight, torch.full((8, 24), torch.nan)
    out = linear(x, used, bias, out=whole[3:])
    assert out.data_ptr() == whole[3:].data_ptr() and whole[:3].isnan().all()
    assert torch.equal(out, linear(x, used, bias))


def test_packing_keeps_the_values_and_leaves_other_dtypes_alone() -> None:
    weight = torch.randn(33, 47)
    assert torch.equal(pack_weight(weight).to_dense(), weight)
    half = weight.bfloat16()
    assert pack_weight(half) is half
    x = torch.randn(3, 47).bfloat16()
    assert linear(x, half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("facts", "before", "asked"),
    [
        ("vendor_id : GenuineIntel\nflags : fma avx2", None, "AUTO,STRICT"),
        ("vendor_id : GenuineIntel\nflags : fma avx2", "COMPATIBLE", "COMPATIBLE"),
        ("vendor_id : GenuineIntel\nflags : fma avx2 avx512f", None, None),
        ("vendor_id : AuthenticAMD\nflags : fma avx2", None, None),
        (None, None, None),
    ],
    ids=["intel without avx-512", "set already", "intel", "amd", "another system"],
)
def test_mkl_is_asked_for_steady_rows_where_it_must_be(
    facts: str | None, before: str | None, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MKL_CBWR", before or "")
    if before is None:
        monkeypatch.delenv("MKL_CBWR")
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    steady_rows(tmp_path / "cpuinfo")
    assert os.environ.get("MKL_CBWR") == asked
