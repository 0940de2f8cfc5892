"""What an answer must look like, in OpenAI's words and in vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator

from pdray.errors import InvalidRequestError
from pdray.serve.values import Format
from pdray.structured_outputs import StructuredOutputsParams

Schema = dict[str, Any] | StrictBool


class JsonSchema(BaseModel):
    """Attributes:
    strict: taken whatever it says: the schema is always enforced.
    """

    model_config = ConfigDict(extra="forbid")

    name: StrictStr
    description: StrictStr | None = None
    json_schema: Annotated[Schema, Field(alias="schema")]
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's response_format."""

    model_config = ConfigDict(extra="forbid")

    type: Format
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            wanted = "needs json_schema" if self.type == "json_schema" else "takes no json_schema"
            raise InvalidRequestError(f"response_format of type {self.type!r} {wanted}", "response_format")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs; pdray.structured_outputs checks it."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[Schema | StrictStr | None, Field(alias="json")] = None
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = None
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None
    disable_any_whitespace: StrictBool | None = False
    whitespace_pattern: StrictStr | None = None


def structured_outputs(
    response_format: ResponseFormat | None, given: StructuredOutputs | None
) -> StructuredOutputsParams | None:
    """What both fields together ask for.

    Raises:
        InvalidRequestError: see StructuredOutputsParams, or both ask for something.
    """
    wanted = None
    if given is not None:
        wanted = StructuredOutputsParams(
            json=given.json_,
            regex=given.regex,
            choice=None if given.choice is None else tuple(given.choice),
            grammar=given.grammar,
            json_object=given.json_object,
            disable_any_whitespace=bool(given.disable_any_whitespace),
            whitespace_pattern=given.whitespace_pattern,
        )
    if response_format is None or response_format.type == "text":
        return wanted
    if wanted is not None:
        raise InvalidRequestError(
            "response_format and structured_outputs are both given; leave one out", "structured_outputs"
        )
    try:
        if response_format.json_schema is None:
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=response_format.json_schema.json_schema)
    except InvalidRequestError as error:
        error.param = "response_format"
        raise
