"""Which device an engine gets, and what is said of one it cannot have."""

from __future__ import annotations

import pytest
import torch

from pdray.config import Config
from pdray.engine import device
from pdray.errors import ConfigError


def test_auto_is_what_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device.select_device(Config(device="auto")).type == expected
    assert device.select_device(Config(device="cpu")).type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"torch \S+ (is built without CUDA|sees no GPU)"):
        device.select_device(Config(device="cuda"))


@pytest.mark.parametrize(
    "torch_cuda,installed,wanted",
    [
        ("12.8", {"cupy-cuda12x"}, None),
        ("13.0", {"cupy-cuda13x"}, None),
        ("13.0", set(), None),
        ("12.8", {"cupy-cuda13x"}, r"pdray\[cuda12\]"),
        ("13.0", {"cupy-cuda12x"}, r"pdray\[cuda13\]"),
    ],
)
def test_cupy_must_be_of_torchs_cuda(
    monkeypatch: pytest.MonkeyPatch, torch_cuda: str, installed: set[str], wanted: str | None
) -> None:
    monkeypatch.setattr(device, "_is_installed", installed.__contains__)
    if wanted is None:
        device.check_cupy(torch_cuda)
    else:
        with pytest.raises(ConfigError, match=wanted):
            device.check_cupy(torch_cuda)
