"""Launch grids: only x may grow with tokens, blocks or requests, for y and z end at 65,535."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

MAX_YZ = 65_535
MANY = 70_000

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


class RecordingKernel:
    """In a kernel's place: keeps the grids and launches nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: int | tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid if isinstance(grid, tuple) else (grid,))
        return lambda *args, **kwargs: None


def copy_many_blocks(module: Any) -> None:
    pool = torch.zeros(2, MANY, 2, 1, 1, 1)
    module.triton_scatter_blocks(pool, torch.arange(MANY), module.triton_gather_blocks(pool, torch.arange(MANY)))


def decode_many_sequences(module: Any) -> None:
    from pdray.kernels.attention.paged import AttentionMetadata

    ones = torch.ones(MANY, dtype=torch.int32)
    meta = AttentionMetadata(
        slot_mapping=torch.zeros(MANY, dtype=torch.int64),
        block_tables=ones[:, None],
        cu_seqlens_q=torch.arange(MANY + 1, dtype=torch.int32),
        seq_lens=ones,
        num_decodes=MANY,
        query_lens=[1] * MANY,
        kv_lens=[1] * MANY,
    )
    for num_splits in (1, 2):
        q = torch.zeros(MANY, 2, 8)
        module.launch_decode(q, torch.zeros(2, 2, 16, 1, 8), meta, 1.0, torch.empty_like(q), num_splits, None)


@pytest.mark.parametrize(
    ("name", "kernels", "launch"),
    [
        ("kv.blocks_triton", ["copy_kernel"], copy_many_blocks),
        ("attention.decode_triton", ["decode_kernel", "merge_kernel"], decode_many_sequences),
    ],
)
def test_no_dimension_but_x_grows(
    name: str, kernels: list[str], launch: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__(f"pdray.kernels.{name}", fromlist=["launch"])
    recorders = [RecordingKernel() for _ in kernels]
    for kernel, recorder in zip(kernels, recorders, strict=True):
        monkeypatch.setattr(module, kernel, recorder)
    launch(module)
    for recorder in recorders:
        assert recorder.grids, kernels
        for grid in recorder.grids:
            assert grid[0] >= MANY and all(size <= MAX_YZ for size in grid[1:]), (name, grid)
