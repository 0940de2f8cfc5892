"""A GGUF file's metadata, read as the gguf package reads them, and files that are none."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models import load_model_config
from pdray.models.gguf_file import ArrayReader, GGUFFile


def metadata_file(file: Path, endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> None:
    """One field of each kind, among them arrays, and no tensors."""
    writer = gguf.GGUFWriter(file, "llama", endianess=endianess)
    writer.add_array("a.strings", ["", "one", "zwölf", "x" * 300])
    writer.add_array("a.integers", [3, -4, 5])
    writer.add_array("a.floats", [0.5, -1.25])
    writer.add_array("a.truths", [True, False])
    writer.add_string("a.text", "behind the arrays")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("endianess", gguf.GGUFEndian)
def test_metadata_are_read_as_by_the_gguf_package(endianess: gguf.GGUFEndian, tmp_path: Path) -> None:
    metadata_file(tmp_path / "model.gguf", endianess)
    expected, found = gguf.GGUFReader(tmp_path / "model.gguf"), ArrayReader(tmp_path / "model.gguf")
    assert {key: field.contents() for key, field in found.fields.items()} == {
        key: field.contents() for key, field in expected.fields.items()
    }
    assert found.fields["a.strings"].contents() == ["", "one", "zwölf", "x" * 300]


@pytest.mark.parametrize("key", [b"a.strings", b"a.integers"])
def test_an_array_that_is_longer_than_its_file_is_no_metadata(key: bytes, tmp_path: Path) -> None:
    """However long it says it is, that is found out at once."""
    file = tmp_path / "model.gguf"
    metadata_file(file)
    content = bytearray(file.read_bytes())
    count = content.index(key) + len(key) + 8  # behind two types of four bytes
    content[count : count + 8] = (2**62).to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"cannot read .*model\.gguf as GGUF: an array of .* the file ends"):
        GGUFFile(file)


@pytest.mark.parametrize("content", [b"", b"GG", b"nothing of the kind", b"GGUF\x03\x00\x00\x00"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match="cannot read .*model.gguf"):
        load_model_config(Config(model=str(tmp_path / "model.gguf")))
