"""JSON Schemas whose masks follow from earlier ones or do not, and a vocabulary for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from grammar_rules import PIECES, VOCAB_SIZE

from pdray.engine.grammar.matcher import GrammarMatcher

MORE = (
    [("aéb " * 3)[:num] for num in range(2, 13)]
    + [" " * num for num in range(3, 42)]
    + ["\n\t", "\n  ", 'é"', 'ab",', "\\n", "a\\", '":\n']
)
VOCABULARY = [
    piece or (MORE[i - 113].encode() if 113 <= i < 113 + len(MORE) else b"") for i, piece in enumerate(PIECES)
]
SHORT = {"type": "string", "maxLength": 5}
NODE = {
    "type": "object",
    "properties": {
        "v": {"type": "string", "minLength": 1, "maxLength": 6},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["v", "next"],
    "additionalProperties": False,
}
NAMES = {
    "type": "object",
    "properties": {"é": {"type": "string"}, "a": {"type": "string"}},
    "required": ["a", "é"],
    "additionalProperties": False,
}


def listed(items: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 40, "items": items}


FREE: dict[str, Any] = {
    "limited": listed(SHORT),
    "with a least length": listed({"type": "string", "minLength": 3, "maxLength": 7}),
    "unlimited": listed({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}),
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "several types": listed({"anyOf": [SHORT, {"type": "null"}, {"type": "integer"}]}),
    "open": {"type": "object", "properties": {"a": SHORT}, "required": ["a"], "additionalProperties": SHORT},
    "date": listed(
        {"type": "object", "properties": {"a": SHORT, "b": {"type": "string", "format": "date"}}, "required": ["a"]}
    ),
}
# A walk alone knows what may follow in their strings: what follows depends on more than how many characters are left.
NOT_FREE: dict[str, Any] = {
    "pattern": listed({"type": "string", "pattern": "^[a-zé]{3,9}$"}),
    "two lengths": listed({"anyOf": [SHORT, {"type": "string", "enum": ["name ab name ab", "12"]}]}),
    "two objects": listed(
        {
            "anyOf": [
                {"type": "object", "properties": {"a": SHORT, "b": {"const": 1}}, "required": ["a", "b"]},
                {"type": "object", "properties": {"a": {"type": "string", "maxLength": 12}}, "required": ["a"]},
            ]
        }
    ),
    "all of": listed({"allOf": [SHORT, {"type": "string", "minLength": 2}]}),
}
OTHERS: dict[str, Any] = {
    "any names": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "string"}},
        "required": ["name"],
    },
    "any names within": {"type": "object", "properties": {"a": True}, "required": ["a"], "additionalProperties": False},
    "the witness in a name": NAMES,
    "spaces in a value": listed({"enum": ["a  ", "a  b", "a   ab"]}),
}


def walked(matcher: GrammarMatcher) -> np.ndarray[Any, Any]:
    """The mask of this place, by a copy that has taken the same tokens and derives nothing."""
    copy = matcher._matcher.deep_copy()
    assert not matcher._untold or copy.consume_tokens(matcher._untold)
    words = np.zeros(-(-(VOCAB_SIZE + 1) // 32), dtype=np.int32)
    copy.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    matcher.narrow(words)
    return words
