"""The end-of-sequence token that a tokenizer's files name, read without loading the tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pdray.config import Config
from pdray.errors import ModelLoadError
from pdray.models.gguf_file import GGUFFile
from pdray.models.gguf_vocabulary import end_token_ids
from pdray.models.resolve import ModelSource, SourceKind, read_json, resolve_tokenizer
from pdray.models.sentencepiece_tokenizer import MODEL_FILE, parse_model, token_name

logger = logging.getLogger(__name__)


def tokenizer_end_ids(config: Config, model: ModelSource) -> list[int]:
    """Ids at which, by its tokenizer, a sequence ends; none where the model's folder has no tokenizer.

    Args:
        model: its own end ids are known already.

    Raises:
        ModelLoadError: the tokenizer is not found, or cannot be read.
    """
    if config.skip_tokenizer_init:
        return []
    source = resolve_tokenizer(config)
    if source.kind is SourceKind.GGUF:
        return [] if source == model else end_token_ids(GGUFFile(source.path))
    return _folder_end_ids(source.path) if source.kind is SourceKind.FOLDER else []


def _folder_end_ids(folder: Path) -> list[int]:
    name = None
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if name is None and file.is_file():
            name = token_name(read_json(file).get("eos_token"))
    token_id = _sentencepiece_end(folder) if name is None else _token_id(folder, name)
    if name is not None and token_id is None:
        logger.warning("%s names the end-of-sequence token %r, which its vocabulary does not have", folder, name)
    return [] if token_id is None else [token_id]


def _token_id(folder: Path, token: str) -> int | None:
    """The token's id, from whichever of the tokenizer's files has it."""
    for name in ("added_tokens.json", "vocab.json"):
        ids: dict[str, Any] = read_json(folder / name) if (folder / name).is_file() else {}
        if token in ids:
            return int(ids[token])
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for token_id, value in added.items():
            if token_name(value) == token:
                return int(token_id)
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
        except Exception as error:  # what tokenizers raises has no narrower class
            raise ModelLoadError(f"cannot read {folder / 'tokenizer.json'}: {error}") from error
    if (folder / MODEL_FILE).is_file():
        pieces = [piece.piece for piece in parse_model(folder / MODEL_FILE).pieces]
        return pieces.index(token) if token in pieces else None
    return None


def _sentencepiece_end(folder: Path) -> int | None:
    """The end-of-sequence id of sentencepiece's own file, where nothing beside it names the token."""
    if (folder / "tokenizer.json").is_file() or not (folder / MODEL_FILE).is_file():
        return None
    token_id = int(parse_model(folder / MODEL_FILE).trainer_spec.eos_id)
    return token_id if token_id >= 0 else None
