"""Splits of a text before merging, for byte-level vocabularies: GGUF's tokenizer.ggml.pre as regular expressions.

The expressions are those that the model families publish in their tokenizer.json; which name means which is listed in
llama.cpp's llama-vocab.cpp, as is what a file means that does not say whether texts begin with a special token.
"""

from __future__ import annotations

from typing import NamedTuple


class Split(NamedTuple):
    """Attributes:
    patterns: applied one after the other; what matches, and what lies between, is never merged across.
    ignore_merges: a piece that is a token as a whole is that token, whatever the merges would make of it.
    add_bos: texts begin with the beginning-of-sequence token unless the file says otherwise.
    nfc: texts are brought into Unicode's composed form first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, contraction: str = CONTRACTION + "|") -> str:
    """The split of GPT-4 and later models: a letter, sign or space before a word belongs to it."""
    return rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def _cased_words(digits: str, contraction: str = "") -> str:
    """The split of GPT-4o: words end where small letters meet a capital."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    )


LLAMA3 = _words(r"\p{N}{1,3}")
QWEN2 = _words(DIGIT)
CJK = "[一-龥ࠀ-一가-퟿]+"
# Letters that have a case, as DeepSeek lists them.
CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌ"
    "ῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{CASED}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    CJK,
    DIGIT,
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
NORDIC = " ?[^(\\s|.,!?…。，、।۔،)]+"
SEED_CODER = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

SPLITS: dict[str, Split] = {
    "default": Split(DEFAULT),
    **dict.fromkeys(
        ("falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral"),
        Split((LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("chatglm-bpe", "dbrx", "glm4", "smaug-bpe"), Split((LLAMA3,))),
    "minicpm5": Split((r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
    "qwen2": Split((QWEN2,), nfc=True),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "f2llmv2", "grok-2", "hunyuan", "kormo", "megrez", "solar-open", "stablelm2"),
        Split((QWEN2,)),
    ),
    "tekken": Split((_cased_words(DIGIT),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(
        ("gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie"),
        Split((_cased_words(r"\p{N}{1,3}", CONTRACTION + "?"),)),
    ),
    **dict.fromkeys(
        (
            "a.x-4.0",
            "exaone4",
            "gigachat",
            "gpt-2",
            "granite-docling",
            "jais",
            "mellum",
            "mpt",
            "olmo",
            "phi-2",
            "trillion",
        ),
        Split((GPT2,)),
    ),
    **dict.fromkeys(
        ("codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder"),
        Split((DIGIT, GPT2)),
    ),
    "deepseek-llm": Split(DEEPSEEK_LLM),
    "deepseek-coder": Split(DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Split(DEEPSEEK_V3)),
    "seed-coder": Split((SEED_CODER,)),
    "viking": Split((NORDIC, DIGIT)),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), Split((NORDIC,))),
}
