"""Types of a configuration's fields: what a value of each may be."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field

from pdray.partition_settings import SM_GROUP
from pdray.transfer.registry import KINDS

CHANNELS = ["auto", *KINDS]
TOOL_CALL_PARSERS = ("auto", "none", "hermes", "qwen", "qwen25", "smollm2", "llama3_json", "llama3", "pythonic")
REASONING_PARSERS = ("auto", "none", "think", "qwen3", "deepseek_r1", "deepseek-r1")

Names = Annotated[list[str], Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
SmCount = Annotated[int, Field(ge=SM_GROUP)]
ToolCallParser = Annotated[
    str, Field(pattern=f"^({'|'.join(TOOL_CALL_PARSERS)})$", json_schema_extra={"enum": [*TOOL_CALL_PARSERS]})
]
ReasoningParser = Annotated[
    str, Field(pattern=f"^({'|'.join(REASONING_PARSERS)})$", json_schema_extra={"enum": [*REASONING_PARSERS]})
]
Channel = Annotated[str, Field(pattern=f"^({'|'.join(CHANNELS)})$", json_schema_extra={"enum": CHANNELS})]


def is_number(annotation: Any) -> bool:
    """Whether a field of that type takes numbers."""
    return annotation in (int, float) or any(map(is_number, get_args(annotation)))
