"""One .gguf file: its metadata as Python's values, its tensors dequantised.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from gguf.gguf_reader import ReaderTensor

from pdray.errors import ModelLoadError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class ArrayReader(GGUFReader):
    """A GGUFReader that takes a vocabulary's arrays whole, where the other looks at each element: 0.1 s for 1.5.

    Over a plain array: np.memmap's subclass hooks make parsing 3.5 times slower.
    """

    @property  # type: ignore[override]
    def data(self) -> npt.NDArray[Any]:
        return self._data

    @data.setter
    def data(self, memory_map: npt.NDArray[Any]) -> None:
        self._data = memory_map.view(np.ndarray)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        """Bytes, parts, which of them are the value, and types. Raises ValueError if the file ends before."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_kind, raw_count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, count, first = GGUFValueType(raw_kind[0]), int(raw_count[0]), orig_offs + 12
        if kind is GGUFValueType.STRING:
            parts, end = self._strings(first, count)
        elif kind in self.gguf_scalar_to_np:
            dtype = np.dtype(self.gguf_scalar_to_np[kind])
            end = first + count * dtype.itemsize
            if end > len(self.data):
                raise ValueError(f"an array of {count} numbers at byte {first}, within which the file ends")
            parts = [self._get(first, dtype, count)]
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return (
            end - orig_offs,
            [raw_kind, raw_count, *parts],
            list(range(2, 2 + len(parts))),
            [GGUFValueType.ARRAY, kind],
        )

    def _strings(self, first: int, count: int) -> tuple[list[npt.NDArray[np.uint8]], int]:
        """The bytes of so many strings, each behind its length in eight bytes, and where they end."""
        is_swapped = self.byte_order == "S"
        order: Literal["little", "big"] = "big" if is_swapped == (sys.byteorder == "little") else "little"
        memory, strings, place = self.data.data, list[npt.NDArray[np.uint8]](), first
        for _ in range(count):
            start = place + 8
            place = start + int.from_bytes(memory[start - 8 : start], order)
            if start > len(memory) or place > len(memory):
                raise ValueError(f"an array of {count} strings at byte {first}, within which the file ends")
            strings.append(self.data[start:place])
        return strings, place


class GGUFFile:
    """One memory-mapped .gguf file.

    Attributes:
        architecture: general.architecture, which is also the prefix of the model's own keys.
        tensors: by GGUF's names, still quantised.

    Raises:
        ModelLoadError: from the constructor: not a GGUF file, not a model, or of an architecture that pdray does not
            know.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = ArrayReader(path)
        except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read {path} as GGUF: {error}") from error
        self.path = path
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.field("general.architecture", ""))
        kind = self.field("general.type", "model")
        if kind != "model":
            raise ModelLoadError(f"{path} has general.type {kind!r}; pdray serves whole models ('model')")
        if self.architecture not in ARCHITECTURES:
            raise ModelLoadError(
                f"{path} has general.architecture {self.architecture!r}; pdray knows {', '.join(ARCHITECTURES)}"
            )
        if self.field("split.count", 1) > 1:
            raise ModelLoadError(
                f"{path} is one of {self.field('split.count')} parts; merge them with llama-gguf-split"
            )

    @property
    def keys(self) -> list[str]:
        """Names of all metadata fields."""
        return list(self._reader.fields)

    def field(self, key: str, *default: Any) -> Any:
        """A metadata value as Python's own types; ModelLoadError if it is absent and there is no default."""
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if not default:
            raise ModelLoadError(f"{self.path} lacks the metadata field {key}")
        return default[0]

    def model_field(self, key: str, *default: Any) -> Any:
        """A field under the architecture's prefix."""
        return self.field(f"{self.architecture}.{key}", *default)

    def tensor(self, name: str) -> ReaderTensor:
        """A tensor by GGUF's name, still quantised; ModelLoadError if there is none."""
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name]

    def dequantized(self, name: str) -> torch.Tensor:
        """A tensor's values.

        Raises:
            ModelLoadError: there is none, or its quantisation is unknown.
        """
        tensor = self.tensor(name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelLoadError(f"{name} in {self.path} is {tensor.tensor_type.name}: {error}") from error
        return torch.from_numpy(values if values.flags.writeable else values.copy())
