"""What each token of a vocabulary stands for: its piece of text, as bytes."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from pdray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # sentencepiece's tokens for bytes
REPLACE_EACH_BYTE = "pdray.replace_each_byte"  # sentencepiece's way with broken UTF-8; see pdray.router.text_stream


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte (Radford et al. 2019, bytes_to_unicode), the other way round."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_level_alphabet()


class Strip(NamedTuple):
    """Up to `times` times `content` is dropped where a text begins."""

    content: str
    times: int


class Vocabulary:
    """The pieces of a tokenizer, by its decoder's own rules, applied to one token.

    The pieces of a text's tokens, joined, are the text's bytes, but for the space that some decoders drop where a text
    begins (`strip`). Added tokens are taken verbatim where the decoder would read them as byte-level characters, which
    breaks those with letters such as é.

    Attributes:
        errors: how bytes that are no UTF-8 become text (a codec error handler).

    Raises:
        ConfigError: the decoder is of a kind that does not work token by token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content for token in added.values()}
        self._special = {token.content for token in added.values() if token.special}
        self.strip = Strip("", 0)
        self._steps = self._decoder_steps()
        self._pieces: dict[int, bytes] = {}
        self._is_special: dict[int, bool] = {}
        kinds = {step["type"] for step in self._steps}
        self.errors = "replace" if "ByteLevel" in kinds or "ByteFallback" not in kinds else REPLACE_EACH_BYTE

    def piece(self, token_id: int) -> bytes:
        """A token within a text; empty for an id that the tokenizer does not have."""
        if (piece := self._pieces.get(token_id)) is None:
            piece = self._pieces[token_id] = self._convert(token_id, first=False)
        return piece

    def first_piece(self, token_id: int) -> bytes:
        """A token where a text begins."""
        return self._convert(token_id, first=True)

    def is_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether the token is part of the text at all."""
        if (special := self._is_special.get(token_id)) is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                return False
            special = self._is_special[token_id] = token in self._special
        return not (special and skip_special_tokens)

    def shown(self, token_id: int) -> str:
        """A token by itself, special ones too. One that is not whole UTF-8 as in OpenAI's API: bytes:\\xe2\\x9c."""
        piece = self.piece(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(
                chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}" for byte in piece
            )

    def _convert(self, token_id: int, *, first: bool) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        is_added = token in self._added
        for step in self._steps:
            match step:
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                    token = token.replace(pattern, content)
                case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                    token = token.replace(mark, "" if first and scheme != "never" else " ")
                case {"type": "ByteFallback"}:
                    if (byte := BYTE_TOKEN.fullmatch(token)) is not None:
                        return bytes.fromhex(byte[1])
                case {"type": "ByteLevel"} if not is_added and all(char in BYTE_OF_CHAR for char in token):
                    return bytes(BYTE_OF_CHAR[char] for char in token)
                case {"type": "Separate"} if not first:
                    token = " " + token
        return token.encode()

    def _decoder_steps(self) -> list[dict[str, Any]]:
        """The decoder as steps that each look at one token; self.strip is set on the way."""
        if self._backend.decoder is None:
            return [{"type": "Separate"}]  # then the library joins tokens with spaces
        steps: list[dict[str, Any]] = []
        is_fused = False
        for step in _flat(json.loads(self._backend.decoder.__getstate__())):
            match step:
                case {"type": "Fuse"}:
                    is_fused = True
                case {"type": "Strip", "content": content, "start": times, "stop": 0} if is_fused:
                    self.strip = Strip(content, times)
                case {"type": "Replace", "pattern": {"String": pattern}} if len(pattern) == 1 or not is_fused:
                    steps.append(step)
                case {"type": "Metaspace" | "ByteFallback" | "ByteLevel"}:
                    steps.append(step)
                case _:
                    raise ConfigError(
                        f"the tokenizer's decoder has the step {json.dumps(step, ensure_ascii=False)}, which does not "
                        "work token by token; supported are ByteLevel, ByteFallback, Metaspace, Replace of a string, "
                        "Fuse, and Strip at the start after Fuse; set tokenizer to one with such a decoder"
                    )
        return steps


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [each for part in step["decoders"] for each in _flat(part)]


@functools.lru_cache(maxsize=4)
def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The tokenizer's vocabulary; made once, for its pieces are kept.

    Raises:
        ConfigError: see Vocabulary.
    """
    return Vocabulary(tokenizer)
