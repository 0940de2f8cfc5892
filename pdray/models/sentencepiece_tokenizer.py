"""Sentencepiece vocabularies as `tokenizers` computes them, from a GGUF file or from a tokenizer.model.

Sentencepiece merges the pair whose result has the best score, leftmost first; here that is BPE whose merges are all
splits of a piece into two pieces, ordered by the piece's score (Kudo and Richardson, 2018, arXiv:1808.06226).
"""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pdray.errors import ModelLoadError
from pdray.models.resolve import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces; GGUF numbers them alike
UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
SPACE = "▁"
MODEL_FILE = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class SentencePieceVocabulary:
    """Attributes:
    scores: of every piece; None where merges say all.
    kinds: of every piece.
    merges: None where scores say all.
    unknown_id: None where every character is a piece or falls back to bytes.
    add_space_prefix: a text begins with a space.
    prefix_after_special: what follows a special token begins with one, too.
    charsmap: sentencepiece's compiled normalisation; may be empty.
    unigram: the most likely segmentation instead of merges.
    """

    pieces: list[str]
    scores: list[float] | None
    kinds: list[int]
    unknown_id: int | None
    merges: list[tuple[str, str]] | None = None
    add_space_prefix: bool = True
    prefix_after_special: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    unigram: bool = False


def build_tokenizer(vocabulary: SentencePieceVocabulary) -> Tokenizer:
    """Build the tokenizer, except for the tokens added around a text."""
    tokenizer = Tokenizer(_model(vocabulary))
    steps: list[Any] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.add_space_prefix and not vocabulary.prefix_after_special:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend(SPACE)] if vocabulary.add_space_prefix else []
        steps.append(normalizers.Replace(" ", SPACE))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        decoding.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoding)
    add_special_tokens(tokenizer, vocabulary.pieces, vocabulary.kinds)
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Make control, unknown and user-defined tokens match as a whole; all but the last are special."""
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
    plain = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])


def add_around(tokenizer: Tokenizer, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
    """Begin and end every text with these tokens (name and id)."""
    around = [token for token in (bos, eos) if token is not None]
    if not around:
        return
    single = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
    second = [f"{name}:1" if name != "$A" else "$B:1" for name in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *second], special_tokens=list(dict(around).items())
    )


def _model(vocabulary: SentencePieceVocabulary) -> models.Model:
    unknown = None if vocabulary.unknown_id is None else vocabulary.pieces[vocabulary.unknown_id]
    if vocabulary.unigram:
        assert vocabulary.scores is not None
        scored = list(zip(vocabulary.pieces, vocabulary.scores, strict=True))
        return models.Unigram(scored, vocabulary.unknown_id, BYTE in vocabulary.kinds)
    merges = vocabulary.merges
    if merges is None:
        merges = merges_by_score(vocabulary)
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def merges_by_score(vocabulary: SentencePieceVocabulary) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best first. Only normal pieces take part: others are never found in text."""
    assert vocabulary.scores is not None
    scores = {
        piece: score
        for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True)
        if kind == NORMAL
    }
    pairs = [
        (-score, piece[:middle], piece[middle:])
        for piece, score in scores.items()
        for middle in range(1, len(piece))
        if piece[:middle] in scores and piece[middle:] in scores
    ]
    pairs.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in pairs]


def convert_folder(folder: Path, target: Path) -> None:
    """Write a tokenizer.json made of a folder's tokenizer.model to ``target``, beside the folder's other settings.

    Raises:
        ModelLoadError: a library that reads the file is missing, or it is not sentencepiece's.
    """
    for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        shutil.copy(file, target)
    settings = _read_settings(folder)
    proto = parse_model(folder / MODEL_FILE)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        raise ModelLoadError(
            f"{folder / MODEL_FILE} is sentencepiece of model_type {trainer.model_type}; "
            "pdray knows unigram (1) and bpe (2)"
        )
    # a user-defined piece is found in the text as it stands, where spaces are spaces
    pieces = [p.piece.replace(SPACE, " ") if p.type == USER_DEFINED else p.piece for p in proto.pieces]
    kinds = [piece.type for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    for piece, token_id in sorted(_added_tokens(folder).items(), key=lambda item: item[1]):
        if piece not in pieces:
            if token_id != len(pieces):
                raise ModelLoadError(
                    f"added_tokens.json in {folder} gives {piece!r} the id {token_id}, but {len(pieces)} would be next"
                )
            pieces.append(piece)
            kinds.append(USER_DEFINED)
            scores.append(0.0)
    tokenizer = build_tokenizer(
        SentencePieceVocabulary(
            pieces=pieces,
            scores=scores,
            kinds=kinds,
            unknown_id=trainer.unk_id if trainer.unk_id >= 0 else None,
            add_space_prefix=settings.get("add_prefix_space", normalizer.add_dummy_prefix),
            prefix_after_special=settings.get("legacy", True),
            remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
            charsmap=normalizer.precompiled_charsmap,
            unigram=trainer.model_type == UNIGRAM,
        )
    )
    for name, token_id in (("bos_token", trainer.bos_id), ("eos_token", trainer.eos_id), ("unk_token", trainer.unk_id)):
        if settings.get(name) is None and token_id >= 0:
            settings[name] = pieces[token_id]
    bos, eos = (_with_id(settings.get(name), pieces) for name in ("bos_token", "eos_token"))
    add_around(
        tokenizer,
        bos if settings.get("add_bos_token", True) else None,
        eos if settings.get("add_eos_token", False) else None,
    )
    tokenizer.save(str(target / "tokenizer.json"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "tokenizer_config.json").write_text(json.dumps(settings))


def token_name(value: Any) -> str | None:
    """A special token of a tokenizer_config.json, which may be its text or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _with_id(value: Any, pieces: list[str]) -> tuple[str, int] | None:
    name = token_name(value)
    return (name, pieces.index(name)) if name is not None and name in pieces else None


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and what special_tokens_map.json has besides."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    return settings


def _added_tokens(folder: Path) -> dict[str, int]:
    file = folder / "added_tokens.json"
    return read_json(file) if file.is_file() else {}


def parse_model(file: Path) -> Any:
    """A tokenizer.model as sentencepiece's ModelProto.

    Raises:
        ModelLoadError: a library that reads it is missing, or it is not sentencepiece's.
    """
    try:
        import sentencepiece  # noqa: F401 (the module below is its own)
        from google.protobuf.message import DecodeError

        messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise ModelLoadError(
            f"{file} is a sentencepiece model, and its folder has no tokenizer.json: reading it needs the packages "
            f"sentencepiece and protobuf ({error}); pip install sentencepiece protobuf, or set tokenizer"
        ) from error
    proto = messages.ModelProto()
    content = file.read_bytes()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        what = "tiktoken's" if is_tiktoken(content) else "not sentencepiece's"
        raise ModelLoadError(
            f"{file} is {what}, and its folder has no tokenizer.json, which pdray needs then; "
            "add it, or set tokenizer to a folder that has one"
        )
    return proto


def is_tiktoken(content: bytes) -> bool:
    """Whether a file begins as tiktoken's vocabularies do: a token in base64 and its rank."""
    first = content[:256].split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].isdigit()
