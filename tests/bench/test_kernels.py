"""`pdray bench kernels` on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pdray import cli
from pdray.bench.kernel_cases import Case, KernelCases, Lengths
from pdray.bench.kernels import KERNELS, Rates, measure
from pdray.models.model_config import ModelConfig

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
CPU = torch.device("cpu")


def cases(**shape: int) -> KernelCases:
    return KernelCases(ModelConfig.from_hf(SHAPE | shape), torch.float32, CPU, [1, 3], working_set=1e5)


def test_every_kernel_is_measured_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPE))
    words = ["bench", "kernels", str(config), "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
    assert cli.main([*words, "--batch-size", "1", "3", "--save-result", str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out").read_text())
    assert {row["kernel"] for row in saved["rows"]} == set(KERNELS)
    assert all(row["us"] > 0 and row["share"] > 0 for row in saved["rows"])
    assert min(saved["rates"].values()) > 0
    printed = capsys.readouterr().out
    assert printed.count("| qkv |") == 2 and "| o | 3 x 64 to 64 |" in printed


def test_an_unknown_kernel_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--kernels", "qkv", "softmax"]) == 2
    assert "no kernel is called softmax; there are: all, qkv" in capsys.readouterr().err


def test_least_bytes_and_operations() -> None:
    one, three = cases().kinds()["gate_up"]()
    weights, x, out = 2 * 96 * 64, 64, 96
    assert one.num_bytes == 4 * (weights + x + out) and three.num_bytes == 4 * (weights + 3 * (x + out))
    assert one.operations == 2 * weights and three.operations == 3 * one.operations
    prompt = cases(max_position_embeddings=64)._attention(Lengths("", [5, 2], [5, 9]))
    assert prompt.operations == 4 * (15 + 8 + 9) * 64
    assert prompt.num_bytes == 4 * (2 * 14 * 2 * 16 + 2 * 7 * 64)
    assert all(call().isfinite().all() for call in prompt.calls)  # type: ignore[attr-defined]


def test_the_larger_floor_limits() -> None:
    limits = Rates(1e9, 1e12)
    row = measure("norm", Case("", [lambda: None], 1e6, 1e8), limits, CPU)
    assert (row.limit, row.floor_us) == ("bytes", pytest.approx(1000))
    assert measure("norm", Case("", [lambda: None], 1e6, 1e10), limits, CPU).limit == "operations"
