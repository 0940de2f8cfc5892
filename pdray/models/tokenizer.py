"""The model's tokenizer, chat template included; one inside a GGUF file is converted once and cached."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pdray.cache import cache_folder, make_folder
from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models.resolve import SourceKind, resolve_tokenizer
from pdray.models.sentencepiece_tokenizer import MODEL_FILE, convert_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIKTOKEN_FILES = ("*.tiktoken", "tiktoken.model")
CONVERSION_VERSION = 2  # raise it when the conversion changes what it writes


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer of Config.tokenizer, or the model's own; None with skip_tokenizer_init.

    Raises:
        ModelLoadError: there is none, or it cannot be read.
    """
    if config.skip_tokenizer_init:
        return None
    source = resolve_tokenizer(config)
    if source.kind is SourceKind.CONFIG_FILE:
        raise ModelLoadError(
            f"{source.path} is a model's configuration and has no tokenizer; set tokenizer, or skip_tokenizer_init=true"
        )
    if source.kind is SourceKind.GGUF:
        return read_tokenizer(converted_tokenizer(source.path))
    return read_tokenizer(source.path)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer. Code that comes with a model is never run.

    A tokenizer.json is taken as it stands: AutoTokenizer keeps only its vocabulary where tokenizer_config.json names
    a class, and splits a byte-level vocabulary as sentencepiece's if that class is LlamaTokenizer.

    Raises:
        ModelLoadError: there is none, or of a kind that cannot be read.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        if (folder / MODEL_FILE).is_file():
            with tempfile.TemporaryDirectory(prefix="pdray-tokenizer-") as converted:
                convert_folder(folder, Path(converted))
                return PreTrainedTokenizerFast.from_pretrained(converted)
        if found := sorted(file.name for kind in TIKTOKEN_FILES for file in folder.glob(kind)):
            raise ModelLoadError(
                f"{folder} has a tiktoken vocabulary ({', '.join(found)}) and no tokenizer.json, which pdray needs "
                "then; add it, or set tokenizer to a folder that has one"
            )
        from transformers import AutoTokenizer  # imports every model: two seconds

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ModelLoadError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise ModelLoadError(
            f"cannot read a tokenizer from {folder}: {error}; set tokenizer, or skip_tokenizer_init=true"
        ) from error


def converted_tokenizer(gguf_file: Path) -> Path:
    """Folder in the cache with the tokenizer inside a GGUF file, converted if it is not there yet.

    Written to a temporary folder and renamed, so that processes that race all find a whole one.
    """
    stat = gguf_file.stat()
    key = f"{CONVERSION_VERSION}:{gguf_file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    target = cache_folder() / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    from pdray.models.gguf_tokenizer import convert_tokenizer

    make_folder(target.parent)
    work = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        convert_tokenizer(gguf_file, work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
