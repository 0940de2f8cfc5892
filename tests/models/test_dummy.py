"""Dummy weights depend on seed and name alone, so that every worker, and transformers, can have the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pdray.config import Config
from pdray.models import load_model
from pdray.models.dummy import fill_dummy

CPU = torch.device("cpu")


def dummy_config(folder: Path, seed: int = 0) -> Config:
    return Config(model=str(folder / "config.json"), load_format="dummy", skip_tokenizer_init=True, seed=seed)


@pytest.fixture
def config_folder(tmp_path: Path, hf_model: Any) -> Path:
    hf_model("Qwen2ForCausalLM").config.save_pretrained(tmp_path)
    return tmp_path


def test_a_transformers_model_can_have_the_same_weights(
    config_folder: Path, hf_model: Any, paged: Any, tokens: Any, reference_logits: Any
) -> None:
    decoder = load_model(dummy_config(config_folder), CPU).decoder
    model = hf_model("Qwen2ForCausalLM")
    with torch.no_grad():
        fill_dummy(dict(model.named_parameters()), 0, model.config.initializer_range)
    prompt = tokens(12)
    torch.testing.assert_close(paged(decoder).run(prompt), reference_logits(model, prompt), atol=1e-5, rtol=1e-4)


def test_same_seed_same_weights_another_seed_others(config_folder: Path) -> None:
    first, again, other = (load_model(dummy_config(config_folder, seed), CPU) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for name, tensor in first.decoder.parameters().items():
        assert torch.equal(tensor, again.decoder.parameters()[name]), name


def test_values_are_what_the_config_says(config_folder: Path) -> None:
    config_file = config_folder / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "initializer_range": 0.5}))
    parameters = load_model(dummy_config(config_folder), CPU).decoder.parameters()
    names = list(parameters)
    for name in names:
        if name.endswith("norm.weight"):
            assert torch.equal(parameters[name], torch.ones_like(parameters[name])), name
        else:
            assert 0.3 < parameters[name].std() < 0.7 and abs(parameters[name].mean()) < 0.3, name
    weights = [parameters[name] for name in names if "q_proj.weight" in name]
    assert not torch.equal(weights[0], weights[1])
    assert any(name.endswith("bias") for name in names)
