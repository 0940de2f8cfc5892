"""The tokenizer inside a GGUF file, in Hugging Face's form, whatever lies beside the file.

It is assembled from the file's own vocabulary: transformers' conversion looks at the folder, drops what the file says
of special tokens, and splits every byte-level vocabulary as GPT-2's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pdray.errors import ModelLoadError
from pdray.models.gguf_file import GGUFFile
from pdray.models.gguf_vocabulary import SENTENCEPIECE, GGUFVocabulary, read_vocabulary
from pdray.models.sentencepiece_tokenizer import (
    SentencePieceVocabulary,
    add_around,
    add_special_tokens,
    build_tokenizer,
)
from pdray.models.splits import SPLITS, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def convert_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file, chat template included, to ``folder`` in Hugging Face's format.

    Raises:
        ModelLoadError: the file holds none, or one of a kind that is not known.
    """
    file = GGUFFile(path)
    vocabulary = read_vocabulary(file)
    try:
        if vocabulary.kind == SENTENCEPIECE:
            tokenizer, add_bos = _sentencepiece(vocabulary, path), True
        else:
            split = _split(vocabulary, path)
            tokenizer, add_bos = _byte_level(vocabulary, split, path), split.add_bos
    except ModelLoadError:
        raise
    except Exception as error:  # what tokenizers raises has no narrower class
        raise ModelLoadError(f"the vocabulary in {path} contradicts itself: {error}; set tokenizer") from error
    if vocabulary.add_bos is not None:
        add_bos = vocabulary.add_bos
    add_around(
        tokenizer,
        _added(vocabulary, "bos", path) if add_bos else None,
        _added(vocabulary, "eos", path) if vocabulary.add_eos else None,
    )
    _wrap(tokenizer, vocabulary, file.field("tokenizer.chat_template", None)).save_pretrained(folder)


def _split(vocabulary: GGUFVocabulary, path: Path) -> Split:
    """Raises rather than guesses: a wrong split changes the tokens of nearly every text."""
    if vocabulary.pre is None:
        raise ModelLoadError(
            f"{path} lacks tokenizer.ggml.pre, so that the split of its byte-level vocabulary is not known; convert "
            "the model again with a present llama.cpp, or set tokenizer"
        )
    if vocabulary.pre not in SPLITS:
        raise ModelLoadError(
            f"tokenizer.ggml.pre in {path} is {vocabulary.pre!r}; pdray knows {', '.join(sorted(SPLITS))}; "
            "set tokenizer"
        )
    return SPLITS[vocabulary.pre]


def _byte_level(vocabulary: GGUFVocabulary, split: Split, path: Path) -> Tokenizer:
    if vocabulary.merges is None:
        raise ModelLoadError(f"{path} lacks the metadata field tokenizer.ggml.merges")
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        if getattr(vocabulary, name):
            raise ModelLoadError(
                f"tokenizer.ggml.{name} in {path} is true, which pdray does not know of byte-level vocabularies; "
                "set tokenizer"
            )
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    model = models.BPE(
        ids, vocabulary.merges, unk_token=vocabulary.special("unknown"), ignore_merges=split.ignore_merges
    )
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, BYTE_LEVEL])
    tokenizer.decoder = decoders.ByteLevel()
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    add_special_tokens(tokenizer, vocabulary.tokens, vocabulary.kinds)
    return tokenizer


def _sentencepiece(vocabulary: GGUFVocabulary, path: Path) -> Tokenizer:
    scores, merges = vocabulary.scores, vocabulary.merges
    ranked = scores is not None and len(set(scores)) > 1
    if not ranked and merges is None:
        raise ModelLoadError(
            f"{path} has no tokenizer.ggml.scores that differ, and no merges: nothing says which pieces to merge "
            "first; set tokenizer"
        )
    return build_tokenizer(
        SentencePieceVocabulary(
            pieces=vocabulary.tokens,
            scores=scores,
            kinds=vocabulary.kinds,
            merges=None if ranked else merges,
            unknown_id=vocabulary.special_ids.get("unknown"),
            add_space_prefix=vocabulary.add_space_prefix,
            remove_extra_whitespaces=vocabulary.remove_extra_whitespaces,
        )
    )


def _added(vocabulary: GGUFVocabulary, name: str, path: Path) -> tuple[str, int]:
    """A token that is put around every text."""
    token = vocabulary.special(name)
    if token is None:
        raise ModelLoadError(
            f"{path} says that every text begins or ends with its {name} token, but has no "
            f"tokenizer.ggml.{name}_token_id; set tokenizer"
        )
    return token, vocabulary.special_ids[name]


def _wrap(tokenizer: Tokenizer, vocabulary: GGUFVocabulary, chat_template: str | None) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    special = {name: vocabulary.special(gguf_name) for name, gguf_name in SPECIAL_TOKENS.items()}
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name, token in special.items() if token is not None},
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,  # it would change decoded text
    )
    return wrapped
