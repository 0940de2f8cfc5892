"""Which JSON Schemas have strings that nothing but their length limits; see runs.py."""

from __future__ import annotations

from typing import Any

import msgspec

from pdray.engine.grammar.keywords import ANNOTATIONS, SCHEMA_LISTS, SCHEMAS_BY_NAME, Schema, resolve, subschemas
from pdray.engine.grammar.runs import RunFinder, Runs
from pdray.structured_outputs import StructuredOutputsParams

ASCII_FORMATS = frozenset({"date", "time", "date-time", "hostname", "uuid", "ipv4", "ipv6"})
TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


def find_runs(runs: Runs, params: StructuredOutputsParams) -> RunFinder | None:
    """For a grammar that has been compiled; None if masks cannot be derived."""
    if params.kind not in ("json", "json_object") or params.whitespace_pattern is not None:
        return None
    witness, is_limited = None, False
    if params.kind == "json":
        schema: Schema = msgspec.json.decode(params.text)
        is_limited = any("maxLength" in part for _, part in subschemas(schema))
        if has_free_strings(schema) and (is_limited or has_closed_objects(schema)):
            characters = set(msgspec.json.encode(schema).decode())
            witness = next((i for character, i in runs.witnesses.items() if character not in characters), None)
    return RunFinder(runs, witness, is_limited=is_limited, has_whitespace=not params.disable_any_whitespace)


def has_free_strings(schema: Schema) -> bool:
    """Whether no text of this schema can be read in two ways, and no string that may have any character outside of
    ASCII is limited by anything but its length, but for names of properties. The schema's keywords have been checked.
    """
    for _, part in subschemas(schema):
        if not part.keys().isdisjoint(("pattern", "patternProperties", "allOf")):
            return False
        if part.get("format", "date") not in ASCII_FORMATS:
            return False
        combining = part.keys() & {"anyOf", "oneOf", "$ref"}
        if combining and (part.keys() - ANNOTATIONS != combining or len(combining) > 1):
            return False
        seen: set[str] = set()
        for branch in part.get("anyOf") or part.get("oneOf") or ():
            types = _types(resolve(schema, branch))
            if not seen.isdisjoint(types):
                return False
            seen |= types
    return True


def has_closed_objects(schema: Schema) -> bool:
    """Whether all names of properties are listed; others may be any but these, and so are not free."""
    if not isinstance(schema, dict):
        return False
    for _, part in subschemas(schema):
        if any(each is True for each in _inner(part)):
            return False
        if not part.keys().isdisjoint(("anyOf", "oneOf", "$ref", "const", "enum")):
            continue
        types = _types(part)
        if "object" in types and part.get("additionalProperties") is not False:
            return False
        if "array" in types and not isinstance(part.get("items"), dict):
            return False
    return True


def _inner(part: dict[str, Any]) -> list[Any]:
    """The schemas right under this one, but for those of items and of other properties."""
    named = [each for keyword in SCHEMAS_BY_NAME for each in part.get(keyword, {}).values()]
    listed = [part[keyword] for keyword in SCHEMA_LISTS if isinstance(part.get(keyword), list)]
    return [*named, *(each for several in listed for each in several)]


def _types(schema: Any) -> set[str]:
    """Of the values that it allows, and maybe more."""
    named = schema.get("type") if isinstance(schema, dict) else None
    types = {named} if isinstance(named, str) else set(named) if isinstance(named, list) else set(TYPES)
    return types | {"integer"} if "number" in types else types
