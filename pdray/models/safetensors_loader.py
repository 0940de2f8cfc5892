"""Weights from safetensors files, one or sharded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pdray.errors import ModelLoadError
from pdray.models.shards import Cut

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
PREFIX = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_NAMES_IN_ERROR = 5


def load_safetensors(folder: Path, parameters: dict[str, torch.Tensor], cuts: dict[str, Cut]) -> None:
    """Copy every tensor of the folder's safetensors files into the parameter of its name, one at a time.

    The files are memory-mapped: beside the parameters, no more than one tensor is held. Names may lack the prefix
    ``model.`` (a model saved without its head), and a tied matrix may stand under either of its names.

    Args:
        cuts: see Part.cuts(). Of a tensor that is cut, no more is read.

    Raises:
        ModelLoadError: a file cannot be read, or tensors are missing, unexpected, there twice or of another shape.
    """
    loaded: dict[str, Path] = {}
    unexpected: list[str] = []
    tied = HEAD not in parameters
    files = weight_files(folder)
    has_embedding = any(EMBEDDING in (name, PREFIX + name) for file in files for name in _names(file))
    for file in files:
        with _opened(file) as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (not a dict)
                if tied and stored == HEAD and has_embedding:
                    continue  # the same values: see has_head_of_its_own()
                name = EMBEDDING if tied and stored == HEAD else parameter_name(stored, parameters)
                if name is None:
                    unexpected += [] if is_ignorable(stored) else [stored]
                    continue
                if name in loaded:
                    raise ModelLoadError(f"{name} is in {loaded[name]} and as {stored} in {file}; remove one of them")
                copy_checked(name, tensors.get_slice(stored), parameters[name], file, cuts.get(name))
                loaded[name] = file
    check_complete(folder, parameters, set(loaded), unexpected)


def has_head_of_its_own(folder: Path) -> bool:
    """Whether the files hold an output matrix that differs from the embeddings, whatever config.json says of them.

    transformers, too, ties the two only if they are equal.
    """
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with _opened(file) as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (not a dict)
                name = PREFIX + stored if PREFIX + stored == EMBEDDING else stored
                if name in (HEAD, EMBEDDING):
                    found[name] = tensors.get_tensor(stored)
    return len(found) == 2 and not torch.equal(found[HEAD], found[EMBEDDING])


def weight_files(folder: Path) -> list[Path]:
    """The single file, as transformers prefers it, or the index's shards, or whatever .safetensors there is."""
    if (folder / ADAPTER_FILE).is_file():
        raise ModelLoadError(
            f"{folder} holds a LoRA adapter ({ADAPTER_FILE}), which pdray does not apply; merge it into the weights"
        )
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"cannot read {index}: {error!r}") from error
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise ModelLoadError(f"{index} names {name_some(absent)}, not found in that folder")
        return [folder / name for name in shards]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for kind in OTHER_FORMATS for file in folder.glob(kind))
        found = f" (it has {name_some(others)}, which pdray does not read there)" if others else ""
        raise ModelLoadError(
            f"{folder} holds no .safetensors file{found}; give a folder or Hugging Face id that does, a .gguf file, "
            "or set load_format=dummy"
        )
    return files


def parameter_name(stored: str, parameters: Container[str]) -> str | None:
    """The parameter that a stored tensor belongs to."""
    return next((name for name in (stored, PREFIX + stored) if name in parameters), None)


def is_ignorable(name: str) -> bool:
    """Buffers that old checkpoints carry; they are computed from the configuration."""
    return name.endswith("rotary_emb.inv_freq")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"cannot read {file}: {error}") from error


def _names(file: Path) -> list[str]:
    with _opened(file) as tensors:
        return list(tensors.keys())


def copy_checked(name: str, stored: Any, target: torch.Tensor, file: Path, cut: Cut | None = None) -> None:
    """Copy into the parameter, converting dtype and device.

    Args:
        stored: a tensor, or one of a safetensors file that is yet to be read (get_slice).
        cut: what the parameter is of it.
    """
    shape = tuple(stored.shape if isinstance(stored, torch.Tensor) else stored.get_shape())
    expected = tuple(target.shape) if cut is None else cut.whole_shape(target.shape)
    if shape != expected:
        raise ModelLoadError(f"{name} in {file} has shape {shape}; the model's configuration makes it {expected}")
    tensor: torch.Tensor = stored[:] if cut is None else stored[cut.indices]
    if tensor.dtype not in DTYPES:
        raise ModelLoadError(
            f"{name} in {file} is {str(tensor.dtype).removeprefix('torch.')}, so the weights are quantised; "
            "pdray reads float16, bfloat16, float32 and float64 safetensors, and GGUF"
        )
    target.copy_(tensor)


def check_complete(source: Path, expected: Iterable[str], loaded: set[str], unexpected: list[str]) -> None:
    """Raise unless every expected tensor was loaded and nothing else was there."""
    missing = [name for name in expected if name not in loaded]
    if missing:
        raise ModelLoadError(f"{source} lacks {len(missing)} of the model's tensors: {name_some(missing)}")
    if unexpected:
        raise ModelLoadError(
            f"{source} holds {len(unexpected)} tensors that the model does not have: {name_some(unexpected)}"
        )


def name_some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES_IN_ERROR} more" if len(names) > MAX_NAMES_IN_ERROR else ""
    return ", ".join(names[:MAX_NAMES_IN_ERROR]) + more
