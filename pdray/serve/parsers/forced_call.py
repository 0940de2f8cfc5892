"""What a grammar must force for a choice of tools: the JSON Schema of the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pdray.engine.grammar.keywords import subschemas
from pdray.serve.tools import Tool, ToolChoice


def forced_call(tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool) -> dict[str, Any] | None:
    """The schema of the answer: one tool's arguments (NamedCallParser), an array of calls (RequiredCallsParser), or
    None where nothing is forced.

    Args:
        tools: those that may be called.
        parallel: more than one call may be made.
    """
    if choice.mode != "required":
        return None
    if choice.named is not None:
        return _arguments(tools[0])
    schemas = {f"tool{index}": _moved(_arguments(tool), f"#/$defs/tool{index}") for index, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool, name in zip(tools, schemas, strict=True)
    ]
    array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": schemas}
    return array if parallel else array | {"maxItems": 1}


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object, whether it says so or not; without parameters, {}."""
    if tool.parameters is None:
        return tool.schema | {"additionalProperties": False}
    return {"type": "object", **tool.schema}


def _moved(schema: Any, place: str) -> Any:
    """The same schema where it is not the root: references within it lead there."""
    moved = msgspec.json.decode(msgspec.json.encode(schema))  # a copy
    for _, part in subschemas(moved):
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            part["$ref"] = place + reference[1:]
    return moved
