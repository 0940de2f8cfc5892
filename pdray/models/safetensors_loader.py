"""Weights from safetensors files, one or sharded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pdray.errors import ModelLoadError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_NAMES_IN_ERROR = 5


def load_safetensors(folder: Path, parameters: dict[str, torch.Tensor]) -> None:
    """Copy every tensor of the folder's safetensors files into the parameter of its name, one at a time.

    The files are memory-mapped: beside the parameters, no more than one tensor is held.

    Raises:
        ModelLoadError: a file cannot be read, or tensors are missing, unexpected or of another shape.
    """
    loaded: set[str] = set()
    unexpected: list[str] = []
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in parameters:
                        copy_checked(name, tensors.get_tensor(name), parameters[name], file)
                        loaded.add(name)
                    elif not is_ignorable(name):
                        unexpected.append(name)
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"cannot read {file}: {error}") from error
    check_complete(folder, parameters, loaded, unexpected)


def weight_files(folder: Path) -> list[Path]:
    """The index's shards, or the single file, or whatever .safetensors there is."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelLoadError(f"cannot read {index}: {error!r}") from error
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise ModelLoadError(f"{index} names {name_some(absent)}, not found in that folder")
        return [folder / name for name in shards]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(
            f"{folder} holds no .safetensors file; give a folder or Hugging Face id that does, or set load_format=dummy"
        )
    return files


def is_ignorable(name: str) -> bool:
    """Buffers that old checkpoints carry, and the copy of tied embeddings."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def copy_checked(name: str, tensor: torch.Tensor, target: torch.Tensor, file: Path) -> None:
    """Copy into the parameter, converting dtype and device."""
    if tensor.shape != target.shape:
        raise ModelLoadError(
            f"{name} in {file} has shape {tuple(tensor.shape)}; "
            f"the model's configuration makes it {tuple(target.shape)}"
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
