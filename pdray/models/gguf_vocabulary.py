"""A GGUF file's tokenizer data: tokens and their kinds, special ids, tokens added around a text.

Where a key is absent, what llama.cpp assumes (llama-vocab.cpp). A key or kind that is not known is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pdray.errors import ModelLoadError
from pdray.models.gguf_file import GGUFFile

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"  # values of tokenizer.ggml.model
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
NO_VOCABULARY = ("no_vocab", "none")

SPECIAL_IDS = ("bos", "eos", "unknown", "padding")
DEFAULT_IDS = {SENTENCEPIECE: {"bos": 1, "eos": 2, "unknown": 0}}
# Ends of a turn, a message or a text in the families' chat formats, by which llama.cpp ends a generation, too.
END_TOKENS = {
    "</s>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|end|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<EOT>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "[EOT]",
}

READ = {
    *(f"{name}_token_id" for name in (*SPECIAL_IDS, "eot", "eom")),
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "added_tokens",
    "merges",
    "model",
    "pre",
    "remove_extra_whitespaces",
    "scores",
    "token_type",
    "tokens",
}
WITHOUT_EFFECT = {
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"{name}_token_id" for name in ("cls", "mask", "middle", "prefix", "separator", "seperator", "suffix")),
    "token_type_count",
}
# Beside the tokenizer.ggml keys: the chat template, others that a request would have to name, and the same tokenizer
# in another form.
OTHER_KEYS = re.compile(r"tokenizer\.(chat_templates?|chat_template\..+|huggingface\.json)")
REFUSED_UNLESS_EMPTY = {"add_sep_token", "precompiled_charsmap", "suppress_tokens"}


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """Attributes:
    kind: SENTENCEPIECE or BYTE_LEVEL.
    pre: name of a byte-level vocabulary's split.
    kinds: token_type of every token.
    scores, merges: None where the file has none.
    special_ids: by the names of SPECIAL_IDS, those there are.
    add_bos, add_eos: None where the file does not say.
    """

    kind: str
    pre: str | None
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]] | None
    special_ids: dict[str, int]
    add_bos: bool | None
    add_eos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool

    def special(self, name: str) -> str | None:
        """The special token of a name of SPECIAL_IDS."""
        token_id = self.special_ids.get(name)
        return None if token_id is None else self.tokens[token_id]


def read_vocabulary(file: GGUFFile) -> GGUFVocabulary:
    """Read everything under tokenizer.ggml.

    Raises:
        ModelLoadError: there is no vocabulary, its kind or a key is not known, or it contradicts itself.
    """
    kind = file.field("tokenizer.ggml.model", None)
    if kind is None or kind in NO_VOCABULARY:
        raise ModelLoadError(f"{file.path} holds no vocabulary; set tokenizer, or skip_tokenizer_init=true")
    if kind not in (SENTENCEPIECE, BYTE_LEVEL):
        raise ModelLoadError(
            f"tokenizer.ggml.model in {file.path} is {kind!r}; pdray knows {SENTENCEPIECE} and {BYTE_LEVEL}; "
            "set tokenizer, or skip_tokenizer_init=true"
        )
    _refuse_unknown_keys(file)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(file.field("tokenizer.ggml.tokens"))]
    if len(set(tokens)) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise ModelLoadError(f"{file.path} has the token {twice!r} twice in its vocabulary")
    merges = _field(file, "merges", None)
    return GGUFVocabulary(
        kind=kind,
        pre=_field(file, "pre", None),
        tokens=tokens,
        kinds=_kinds(file, tokens),
        scores=_aligned(file, "scores", len(tokens)),
        merges=None if merges is None else [_pair(file, merge) for merge in merges],
        special_ids=_special_ids(file, kind, len(tokens)),
        add_bos=_field(file, "add_bos_token", None),
        add_eos=_field(file, "add_eos_token", False),
        add_space_prefix=_field(file, "add_space_prefix", kind == SENTENCEPIECE),
        remove_extra_whitespaces=_field(file, "remove_extra_whitespaces", False),
    )


def end_token_ids(file: GGUFFile) -> list[int]:
    """End of sequence, of turn and of message: what the file names, and special tokens that are known as such."""
    tokens = _field(file, "tokens", None) or []
    defaults = DEFAULT_IDS.get(_field(file, "model", None), {}) if tokens else {}
    ids = [_field(file, f"{name}_token_id", defaults.get(name)) for name in ("eos", "eot", "eom")]
    found = [token_id for token_id in ids if token_id is not None]
    for token_id, kind in enumerate(_aligned(file, "token_type", len(tokens)) or []):
        if kind in (CONTROL, USER_DEFINED) and tokens[token_id] in END_TOKENS:
            found.append(token_id)
    return list(dict.fromkeys(found))


def _refuse_unknown_keys(file: GGUFFile) -> None:
    prefix = "tokenizer.ggml."
    named = [key for key in file.keys if key.startswith("tokenizer.") and not OTHER_KEYS.fullmatch(key)]
    keys = {key.removeprefix(prefix) for key in named}
    unknown = [key for key in named if key.removeprefix(prefix) not in READ | WITHOUT_EFFECT | REFUSED_UNLESS_EMPTY]
    if unknown:
        raise ModelLoadError(
            f"{file.path} says of its tokenizer what pdray does not know: {', '.join(unknown)}; set tokenizer"
        )
    for key in sorted(REFUSED_UNLESS_EMPTY & keys):
        if _field(file, key):
            raise ModelLoadError(f"{prefix}{key} in {file.path} is in use, which pdray does not support; set tokenizer")


def _kinds(file: GGUFFile, tokens: list[str]) -> list[int]:
    """token_type of every token, all normal where the file does not say; added tokens are user-defined at least."""
    kinds = _aligned(file, "token_type", len(tokens)) or [NORMAL] * len(tokens)
    unknown = set(kinds) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    if unknown:
        raise ModelLoadError(
            f"tokenizer.ggml.token_type in {file.path} has values that are not known: {sorted(unknown)}"
        )
    for token in _field(file, "added_tokens", None) or []:
        if token not in tokens:
            raise ModelLoadError(
                f"tokenizer.ggml.added_tokens in {file.path} names {token!r}, which is no token of its vocabulary"
            )
        index = tokens.index(token)
        kinds[index] = USER_DEFINED if kinds[index] == NORMAL else kinds[index]
    return kinds


def _special_ids(file: GGUFFile, kind: str, num_tokens: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in SPECIAL_IDS:
        given = _field(file, f"{name}_token_id", None)
        token_id = DEFAULT_IDS.get(kind, {}).get(name) if given is None else given
        if given is not None and given >= num_tokens:
            raise ModelLoadError(
                f"tokenizer.ggml.{name}_token_id in {file.path} is {given}, but the vocabulary has {num_tokens} tokens"
            )
        if token_id is not None and token_id < num_tokens:
            found[name] = token_id
    return found


def _aligned(file: GGUFFile, key: str, length: int) -> list[Any] | None:
    """An array with an element for each token; None where the file has none."""
    values: list[Any] | None = _field(file, key, None)
    if values is not None and len(values) != length:
        raise ModelLoadError(
            f"tokenizer.ggml.{key} in {file.path} has {len(values)} elements for {length} tokens; the file is damaged"
        )
    return values


def _pair(file: GGUFFile, merge: str) -> tuple[str, str]:
    """Both sides of a merge; the first character may be a space of its own."""
    middle = merge.find(" ", 1)
    if middle < 0 or middle == len(merge) - 1:
        raise ModelLoadError(f"tokenizer.ggml.merges in {file.path} has {merge!r}, which is no pair")
    return merge[:middle], merge[middle + 1 :]


def _field(file: GGUFFile, key: str, *default: Any) -> Any:
    return file.field(f"tokenizer.ggml.{key}", *default)
