"""What of Lark's notation, as llguidance extends it, is taken: all but what would be ignored, or end a text midway."""

from __future__ import annotations

import json
import re

from pdray.engine.grammar.keywords import check_keywords
from pdray.engine.grammar.multiples import check_multiples
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import FIELD

# Strings, regexes and comments come first, so that nothing within them is found.
PART = re.compile(
    r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*'
    r"|(?P<token><[^<>\s]+>)|(?P<schema>%json)\s*|\[[^\[\]\n]*?(?P<attribute>temperature)\s*=",
)


def check_lark(grammar: str) -> None:
    """Refuse tokens by name or id, which are no text; sampling attributes, which the request has; and a JSON Schema's
    keywords that are not enforced.

    Raises:
        InvalidRequestError: names it.
    """
    at = 0
    while (part := PART.search(grammar, at)) is not None:
        at = part.end()
        if (token := part["token"]) is not None:
            raise _refusal(f"the grammar has {token[:80]}; tokens are no text, so write a string")
        if part["attribute"] is not None:
            raise _refusal("the grammar sets temperature; set it in the request")
        if part["schema"] is not None:
            at = _check_schema(grammar, at)


def _check_schema(grammar: str, at: int) -> int:
    """The schema at a place in the grammar; returns where it ends."""
    try:
        schema, at = json.JSONDecoder().raw_decode(grammar, at)
    except (ValueError, RecursionError):
        return at  # the compiler says what is wrong with it
    check_keywords(schema)
    check_multiples(schema)
    return at


def _refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, FIELD)
