"""A model's sampling defaults: read, checked, and neutral where the configuration says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest

from pdray.config import Config
from pdray.errors import ConfigError, ModelLoadError
from pdray.models.generation_config import NEUTRAL, load_sampling_defaults
from pdray.sampling_params import SamplingParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write(folder: Path, **fields: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


def test_what_the_file_says(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, temperature=0.6, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.05, max_new_tokens=2048)
    defaults = load_sampling_defaults(Config(model=str(folder)))
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05}
    assert (defaults.values, defaults.max_tokens) == (given, 2048)
    assert defaults.params() == SamplingParams(**given, max_tokens=2048)
    assert "generation_config.json: temperature 0.6, top_k 20, top_p 0.95" in caplog.text


def test_fields_that_are_not_sampling_defaults_are_left_alone(folder: Path) -> None:
    write(folder, do_sample=False, temperature=None, num_beams=1, eos_token_id=[1, 2], transformers_version="5.0.0")
    defaults = load_sampling_defaults(Config(model=str(folder)))
    assert (defaults.values, defaults.max_tokens) == ({}, None)
    assert defaults.params() == SamplingParams()


def test_neutral_defaults(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pdray"):
        assert load_sampling_defaults(Config(model=str(folder))) == NEUTRAL
        write(folder, temperature=0.1)
        assert load_sampling_defaults(Config(model=str(folder), generation_config="vllm")) == NEUTRAL
    assert caplog.text.count("get neutral ones") == 2 and "temperature" not in caplog.text
    assert NEUTRAL.params() == SamplingParams()


def test_another_file_or_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("generation")
    write(folder, temperature=0.1)
    write(other, temperature=0.2)
    for given in (other, other / "generation_config.json"):
        defaults = load_sampling_defaults(Config(model=str(folder), generation_config=str(given)))
        assert defaults.values == {"temperature": 0.2}
    with pytest.raises(ConfigError, match="generation_config is 'nowhere', but there is no file .*nowhere; give auto"):
        load_sampling_defaults(Config(model=str(folder), generation_config="nowhere"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -1}, "generation_config.json: temperature is -1.*set generation_config=vllm"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 2.5}, "top_k is 2.5 in .*generation_config.json"),
        ({"temperature": "hot"}, "temperature is 'hot' in"),
        ({"min_p": True}, "min_p is True in"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_values_that_cannot_be_are_named(fields: dict[str, Any], named: str, folder: Path) -> None:
    write(folder, **fields)
    with pytest.raises(ModelLoadError, match=named):
        load_sampling_defaults(Config(model=str(folder)))


def test_a_ggufs_own_sampling_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, value in {"temp": 0.7, "top_p": 0.9, "penalty_repeat": 1.1, "mirostat_tau": 5.0}.items():
        writer.add_float64(f"general.sampling.{name}", value)
    writer.add_int32("general.sampling.top_k", 40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    defaults = load_sampling_defaults(Config(model=str(tmp_path / "model.gguf")))
    assert defaults.values == {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "top_k": 40}
    assert "not applied: general.sampling.mirostat_tau" in caplog.text
    assert load_sampling_defaults(Config()).params() == SamplingParams()  # the default model has none
