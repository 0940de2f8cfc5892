"""What an output must look like. Names, defaults and meaning follow vLLM's StructuredOutputsParams."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from pdray.errors import InvalidRequestError

FIELD = "structured_outputs"
MAX_SCHEMA_BYTES = 128 * 1024
MAX_GRAMMAR_BYTES = 32 * 1024
MAX_CHOICES = 4096
Kind = Literal["json", "regex", "choice", "grammar", "json_object"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABELS: dict[Kind, str] = {
    "json": "the JSON Schema",
    "regex": "the regex",
    "choice": "the choice",
    "grammar": "the grammar",
    "json_object": "a JSON object",
}


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """One of the first five; immutable, and a wire type as it stands.

    Attributes:
        json: a JSON Schema, as a dict or its JSON text; kept as text, properties in the order given.
        regex: matches the whole output; the syntax is that of Rust's regex crate, without look-around.
        choice: the output is one of these texts.
        grammar: in Lark's or in GBNF's notation.
        json_object: any JSON object.
        disable_any_whitespace: JSON is written without whitespace between its tokens.
        whitespace_pattern: a regex of what may stand between JSON's tokens, instead of up to 40 spaces and line ends.

    Raises:
        InvalidRequestError: from ``__post_init__``; none or several are given, or one is empty or too large.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            msgspec.structs.force_setattr(self, "json_object", None)
        if isinstance(self.choice, list):
            msgspec.structs.force_setattr(self, "choice", tuple(self.choice))
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            what = " and ".join(given) if given else "none of them"
            raise InvalidRequestError(f"{FIELD} has {what}; it must have exactly one of {', '.join(KINDS)}", FIELD)
        if self.json is not None and not isinstance(self.json, str):
            msgspec.structs.force_setattr(self, "json", _encode(self.json))
        self._check_types()
        self._check_sizes()
        if self.whitespace_pattern is not None and (
            self.disable_any_whitespace or self.kind not in ("json", "json_object")
        ):
            raise InvalidRequestError(
                f"{FIELD}.whitespace_pattern says what stands between JSON's tokens; it needs json or json_object, and "
                "no disable_any_whitespace",
                FIELD,
            )

    def _check_types(self) -> None:
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidRequestError(f"{FIELD}.{name} is a {type(value).__name__}; it must be a string", FIELD)
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise InvalidRequestError(f"{FIELD}.{name} is {getattr(self, name)!r}; it must be true or false", FIELD)
        if self.choice is not None:
            choices = self.choice
            if not isinstance(choices, tuple) or not all(isinstance(each, str) and each for each in choices):
                raise InvalidRequestError(f"{FIELD}.choice must be a list of non-empty strings", FIELD)
            if not 1 <= len(choices) <= MAX_CHOICES:
                raise InvalidRequestError(
                    f"{FIELD}.choice has {len(choices)} texts; it must have between 1 and {MAX_CHOICES}", FIELD
                )

    def _check_sizes(self) -> None:
        text = "".join(self.choice) if self.choice is not None else self.text
        limit = MAX_SCHEMA_BYTES if self.kind in ("json", "choice") else MAX_GRAMMAR_BYTES
        size = len(text.encode(errors="replace")) + len(self.whitespace_pattern or "")
        if size > limit:
            raise InvalidRequestError(f"{self.label} has {size} bytes; it may have at most {limit}", FIELD)

    @property
    def kind(self) -> Kind:
        """Which of the five it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def label(self) -> str:
        """What errors call it."""
        return LABELS[self.kind]

    @property
    def text(self) -> str:
        """Schema, regex or grammar; empty for the others."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else ""


def _encode(schema: Any) -> str:
    try:
        return msgspec.json.encode(schema).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{FIELD}.json is no JSON Schema: {error}", FIELD) from None
