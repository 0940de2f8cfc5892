"""The tokenizer inside a GGUF file, in Hugging Face's form.

Byte-level BPE ("gpt2" in GGUF's words) is assembled here: transformers 5's conversion takes seconds, makes the
beginning-of-sequence token the end-of-sequence token of Llama models, and uses GPT-2's pre-tokenizer for all. Other
kinds go through it, with the special tokens set right afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pdray.errors import ModelLoadError
from pdray.models.gguf_loader import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTE_LEVEL])


PRE_TOKENIZERS = {
    "default": GPT2,
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": _split(WORDS % "{1,3}"),
    "qwen2": _split(WORDS % ""),
}


def convert_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file, chat template included, to ``folder`` in Hugging Face's format.

    Raises:
        ModelLoadError: the file holds none, or one that transformers cannot convert.
    """
    file = GGUFFile(path)
    byte_level = file.field("tokenizer.ggml.model", None) == "gpt2"
    if byte_level and file.field("tokenizer.ggml.pre", "default") in PRE_TOKENIZERS:
        tokenizer = _wrap(_byte_level_bpe(file))
    else:
        tokenizer = _converted_by_transformers(path)
    tokens = file.field("tokenizer.ggml.tokens")
    for name, gguf_name in SPECIAL_TOKENS.items():
        token_id = file.field(f"tokenizer.ggml.{gguf_name}_token_id", None)
        setattr(tokenizer, name, None if token_id is None else tokens[token_id])
    tokenizer.chat_template = file.field("tokenizer.chat_template", None)
    tokenizer.clean_up_tokenization_spaces = False  # it would change decoded text
    tokenizer.save_pretrained(folder)


def _byte_level_bpe(file: GGUFFile) -> Tokenizer:
    tokens: list[str] = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    pre = file.field("tokenizer.ggml.pre", "default")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()

    kinds: list[int] = file.field("tokenizer.ggml.token_type")
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        named = [token for token, token_kind in zip(tokens, kinds, strict=True) if token_kind == kind]
        add([AddedToken(token, normalized=False, special=kind == CONTROL) for token in named])
    if file.field("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos_id = file.field("tokenizer.ggml.bos_token_id")
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return wrapped


def _converted_by_transformers(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
        raise ModelLoadError(
            f"cannot convert the tokenizer in {path}: {error}; set tokenizer, or skip_tokenizer_init=true"
        ) from error
