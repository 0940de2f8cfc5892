"""NcclGroup over a communicator that is none; sums themselves are for GPUs: see tests/gpu/ranks.py."""

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from pdray.kernels.collective.nccl import NcclGroup


def test_a_communicator_is_never_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL may wait for ever as it does so, in whichever thread lets go of the group."""
    destroyed: list[int] = []

    class Communicator:
        def __init__(self, *args: Any) -> None:
            self.args = args

        def __del__(self) -> None:
            destroyed.append(1)

    cupy, cuda, nccl = (ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.nccl"))
    vars(nccl).update(NcclCommunicator=Communicator, groupStart=print, groupEnd=print)
    vars(cuda)["nccl"], vars(cupy)["cuda"] = nccl, cuda
    for module in (cupy, cuda, nccl):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: None)
    group = NcclGroup(0, 1, b"id", torch.device("cuda", 0))
    assert group._inner.args == (1, b"id", 0)
    del group
    gc.collect()
    assert not destroyed
