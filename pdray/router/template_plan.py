"""How the messages of a conversation are given to a chat template: forms to try, and what marks tell of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from pdray.router.tool_calls import ToolCall

Form = Literal["string", "parts", "part"]  # "part": a list of one part, which holds the joined text

ArgumentsForm = Literal["object", "json"]

MARK = re.compile(r"zqx(\d+)x(\d+)xqz")
LIST = 9  # where marks count texts, that of the list around them
CALLS = 10  # from here on they count the names and the arguments of calls


class MessageShape(NamedTuple):
    """What of a message decides how a template treats it. More than two texts, or calls, count as two."""

    role: str
    num_texts: int
    in_parts: bool
    named: bool
    empty: bool
    num_calls: int = 0


class Plan(NamedTuple):
    """How each message is given to the template, and the arguments of calls: templates print them as JSON, or take
    JSON.
    """

    roles: tuple[str, ...]
    forms: tuple[Form, ...]
    arguments: ArgumentsForm = "object"


class Attempt(NamedTuple):
    """What became of the marks in one form: the messages whose texts were lost, those whose calls were, and whether the
    tools were; or why the template refused them all.
    """

    lost: list[int]
    error: Exception | None
    lost_calls: list[int]
    lost_tools: bool = False


COMPLETE = Attempt([], None, [])

Apply = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]


def attempt(shapes: Sequence[MessageShape], plan: Plan, apply: Apply, *, with_tools: bool) -> Attempt:
    """Render marks in the place of texts, calls and tools.

    Args:
        apply: makes the prompt of a chat and its tools.
    """
    chat = []
    for index, (shape, role, form) in enumerate(zip(shapes, plan.roles, plan.forms, strict=True)):
        given = content(form, [_mark(index, part) for part in range(shape.num_texts)])
        if isinstance(given, list):
            given[0][_mark(index, LIST)] = ""  # shows where a template prints the list as Python does
        made = [
            ToolCall(_mark(index, part), {"x": _mark(index, part + 1)}, "call")
            for part in range(CALLS, CALLS + 2 * shape.num_calls, 2)
        ]
        chat.append(as_dict(role, "Ann" if shape.named else None, given) | calls(made, plan.arguments))
    tools = [_marked_tool(len(shapes))] if with_tools else []
    try:
        prompt = apply(chat, tools)
    except Exception as error:  # reported, unless another form is taken
        return Attempt([], error, [])
    # A mark in single quotes is in an object that the template prints as Python does.
    found = {
        (int(each[1]), int(each[2]))
        for each in MARK.finditer(prompt.lower())
        if int(each[2]) < CALLS or prompt[max(0, each.start() - 1)] != "'"
    }
    lost = [
        index
        for index, shape in enumerate(shapes)
        if (index, LIST) in found or any((index, part) not in found for part in range(shape.num_texts))
    ]
    lost_calls = [
        index
        for index, shape in enumerate(shapes)
        if any((index, part) not in found for part in range(CALLS, CALLS + 2 * shape.num_calls))
    ]
    return Attempt(lost, None, lost_calls, with_tools and (len(shapes), 0) not in found)


def candidates(
    shapes: Sequence[MessageShape], try_forms: Callable[[tuple[Form, ...]], Attempt]
) -> Iterator[tuple[Form, ...]]:
    """Forms to try, best first: lists of several parts as they are, strings, and lists where strings are lost."""
    if any(shape.in_parts and shape.num_texts > 1 for shape in shapes):
        yield tuple("parts" if shape.in_parts and shape.num_texts > 1 else "string" for shape in shapes)
    yield strings(shapes)
    lost = try_forms(strings(shapes)).lost
    lists: tuple[Form, ...] = ("parts", "part")
    for form in lists:
        yield tuple(form if index in lost else "string" for index in range(len(shapes)))
    for form in lists:
        yield (form,) * len(shapes)


def strings(shapes: Sequence[MessageShape]) -> tuple[Form, ...]:
    """Every content as a string."""
    return tuple("string" for _ in shapes)


def content(form: Form, texts: list[str]) -> str | list[dict[str, str]]:
    """A message's content."""
    if form == "string":
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in (texts if form == "parts" else ["\n".join(texts)])]


def as_dict(role: str, name: str | None, content: str | list[dict[str, str]]) -> dict[str, Any]:
    """A message as templates take it."""
    message: dict[str, Any] = {"role": role, "content": content}
    return message if name is None else message | {"name": name}


def calls(made: Sequence[ToolCall], form: ArgumentsForm) -> dict[str, Any]:
    """The field of an assistant's message, if it has calls."""
    return {"tool_calls": [call.as_dict(as_json=form == "json") for call in made]} if made else {}


def _marked_tool(index: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}}
    function = {"name": _mark(index, 0), "description": "Does it.", "parameters": parameters}
    return {"type": "function", "function": function}


def _mark(index: int, part: int) -> str:
    """A text that no template holds."""
    return f"zqx{index}x{part}xqz"
