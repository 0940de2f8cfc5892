"""What a grammar must force for a choice of tools: the JSON Schema of the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        return tools[0].schema
    schemas = {f"tool{index}": _moved(tool.schema, f"#/$defs/tool{index}") for index, tool in enumerate(tools)}
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


def _moved(schema: Any, place: str) -> Any:
    """The same schema where it is not the root: references within it lead there."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(each, place) for name, each in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
