"""Which JSON Schemas can be held to: every keyword that means something is enforced, or refused by name.

Drafts 4 to 2020-12 are read alike. A keyword that no draft has is refused too: it may be a typing error, and what it
was to mean would not hold. Names that begin with "x-" are the user's own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from pdray.errors import InvalidRequestError
from pdray.structured_outputs import FIELD

ENFORCED = frozenset(
    {
        *("$ref", "allOf", "anyOf", "const", "enum", "oneOf", "type"),
        *("additionalItems", "items", "maxItems", "minItems", "prefixItems"),
        *("additionalProperties", "maxProperties", "minProperties", "patternProperties", "properties", "required"),
        *("format", "maxLength", "minLength", "pattern"),
        *("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
    }
)
# They say nothing about which values are valid; "discriminator" (OpenAPI) repeats what oneOf says.
ANNOTATIONS = frozenset(
    {
        *("$comment", "$defs", "$id", "$schema", "definitions", "id"),
        *("default", "deprecated", "description", "example", "examples", "readOnly", "title", "writeOnly"),
        *("contentEncoding", "contentMediaType", "contentSchema", "discriminator"),
    }
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SCHEMAS = ("items", "additionalItems", "additionalProperties")

Schema = dict[str, Any] | bool


def check_keywords(schema: Any) -> None:
    """Refuse a schema with a keyword that is not enforced and does mean something.

    Raises:
        InvalidRequestError: names the keyword and where it stands.
    """
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(f"the JSON Schema is {_shown(schema)}; it must be an object", FIELD)
    for path, part in subschemas(schema):
        for keyword in part:
            is_known = keyword in ENFORCED or keyword in ANNOTATIONS
            if not is_known or (keyword in ("$id", "id") and path != "#"):  # within, it changes what a $ref means
                _check_unknown(keyword, path)
        _check_names(path, part)


def _check_names(path: str, part: dict[str, Any]) -> None:
    """Refuse what an object's other properties could get round: they may be named several times, and write control
    characters in two ways."""
    properties, required = part.get("properties"), part.get("required")
    names = [*(properties if isinstance(properties, dict) else ()), *(required if isinstance(required, list) else ())]
    if (name := next((n for n in names if isinstance(n, str) and CONTROL.search(n)), None)) is not None:
        raise InvalidRequestError(
            f"the JSON Schema's property {_shown(name)} (at {path}, in properties or required) is not supported: its "
            "name has a control character",
            FIELD,
        )
    least = part.get("minProperties")
    num_required = len({name for name in names if isinstance(required, list) and name in required})
    if isinstance(least, int | float) and least > num_required + 1:
        raise InvalidRequestError(
            f"the JSON Schema's minProperties {_shown(least)} (at {path}) is not supported beyond one more than the "
            f"required properties ({num_required}): others might have one name; require them by name",
            FIELD,
        )


def _check_unknown(keyword: str, path: str) -> None:
    if keyword.startswith("x-") and keyword != "x-guidance":
        return
    guess = difflib.get_close_matches(keyword[:64], ENFORCED, 1, 0.8)
    advice = f"; did you mean {guess[0]!r}?" if guess else "; leave it out"
    raise InvalidRequestError(f"the JSON Schema's keyword {keyword!r} (at {path}) is not supported{advice}", FIELD)


def subschemas(schema: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object schema within, itself first, each with its JSON pointer."""
    left: list[tuple[str, Any]] = [("#", schema)]
    while left:
        path, part = left.pop()
        if not isinstance(part, dict):
            continue
        yield path, part
        for keyword in SCHEMAS_BY_NAME:
            if isinstance(by_name := part.get(keyword), dict):
                left += [(f"{path}/{keyword}/{name}", each) for name, each in by_name.items()]
        for keyword in SCHEMA_LISTS:
            if isinstance(each_of := part.get(keyword), list):
                left += [(f"{path}/{keyword}/{index}", each) for index, each in enumerate(each_of)]
        left += [(f"{path}/{keyword}", part[keyword]) for keyword in SCHEMAS if isinstance(part.get(keyword), dict)]


def has_only_exclusive_one_of(schema: Schema) -> bool:
    """Whether the branches of every oneOf exclude each other, so that it says what anyOf says.

    Seen by const or enum, of the branches or of one property that all of them are objects with, and require.
    """
    return all(_are_exclusive(schema, part["oneOf"]) for _, part in subschemas(schema) if "oneOf" in part)


def _are_exclusive(root: Schema, branches: Any) -> bool:
    if not isinstance(branches, list):
        return False
    resolved = [resolve(root, branch) for branch in branches]
    if len(resolved) < 2 or _are_disjoint([_values(branch) for branch in resolved]):
        return True
    if not all(isinstance(branch, dict) and branch.get("type") == "object" for branch in resolved):
        return False
    common = set.intersection(*(_tags(branch) for branch in resolved))
    return any(
        _are_disjoint([_values(resolve(root, branch["properties"][name])) for branch in resolved])
        for name in sorted(common)
    )


def _tags(branch: dict[str, Any]) -> set[str]:
    """Properties that an object must have."""
    required, properties = branch.get("required"), branch.get("properties")
    if not isinstance(required, list) or not isinstance(properties, dict):
        return set()
    return {name for name in required if isinstance(name, str) and name in properties}


def _values(schema: Any) -> list[str] | None:
    """The only values that it allows; None if they are not listed."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [_same(schema["const"])]
    values = schema.get("enum")
    return [_same(value) for value in values] if isinstance(values, list) else None


def _same(value: Any) -> str:
    """Equal for values that JSON Schema takes for equal, as 1 and 1.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _are_disjoint(groups: list[list[str] | None]) -> bool:
    seen: set[str] = set()
    for group in groups:
        if group is None or not seen.isdisjoint(group):
            return False
        seen.update(group)
    return True


def resolve(root: Schema, schema: Any) -> Any:
    """What a $ref into the same schema stands for, if nothing stands beside it; others as they are."""
    for _ in range(16):
        if not isinstance(schema, dict) or set(schema) - ANNOTATIONS != {"$ref"}:
            return schema
        reference = schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        found: Any = root
        for name in reference[2:].split("/"):
            found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        schema = found
    return schema


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
