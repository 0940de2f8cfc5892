"""How the answers to a chat request are written: from the request, the model's template and the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pdray.config import Config
from pdray.errors import InvalidRequestError
from pdray.router.chat_template import ChatTemplate
from pdray.serve.parsers.answer import AnswerFormat
from pdray.serve.parsers.events import Parser
from pdray.serve.parsers.forced import NamedCallParser, RequiredCallsParser
from pdray.serve.parsers.reasoning import ThinkParser, ends_in_thoughts, has_closed_thoughts
from pdray.serve.parsers.registry import TOOL_PARSERS, tool_parser_of
from pdray.serve.tools import Tool, ToolChoice
from pdray.thinking import has_thoughts, think_tags, thinks

THINKING = ("enable_thinking", "thinking")  # what templates call the variable that switches it


def answer_format(
    config: Config,
    template: ChatTemplate,
    *,
    tools: Sequence[Tool],
    choice: ToolChoice,
    parallel: bool,
    thinking: Thinks | None,
) -> AnswerFormat:
    """Args:
        tools: those that may be called.
        thinking: where thoughts may stand; None: nowhere, or they are left in the text.

    Raises:
        InvalidRequestError: this server does not know how the model calls tools.
    """
    names = frozenset(tool.name for tool in tools)
    reasoning: Callable[[], Parser] | None = None
    if thinking is not None:
        is_open = thinking.is_open

        def reasoning() -> Parser:
            return ThinkParser(thinking=is_open)

    if (named := choice.named) is not None:
        return AnswerFormat(reasoning, lambda: NamedCallParser(named), named=True)
    if choice.mode == "required":
        return AnswerFormat(reasoning, lambda: RequiredCallsParser(names), single_call=not parallel)
    if not tools:
        return AnswerFormat(reasoning)
    make = TOOL_PARSERS[_tool_parser(config, template)]
    return AnswerFormat(reasoning, lambda: make(names), single_call=not parallel)


class Thinks(NamedTuple):
    """A model that may think before it answers. is_open: the prompt has opened its thoughts."""

    is_open: bool


def where_it_thinks(
    config: Config, template: ChatTemplate, prompt: str, *, separate: bool, is_formed: bool
) -> Thinks | None:
    """Where an answer's thoughts may stand; None if they are not told apart.

    Args:
        separate: the request wants them apart.
        is_formed: a grammar holds for the answer. There is a place before it for thoughts where their tags are tokens,
            by which the engine sees them, and the prompt has not closed them.
    """
    if not separate or not has_thoughts(config.reasoning_parser, template.source):
        return None
    if is_formed and (think_tags(template.tokenizer) is None or has_closed_thoughts(prompt)):
        return None
    return Thinks(ends_in_thoughts(prompt))


def check_tools(config: Config, template: ChatTemplate) -> None:
    """Raises:
    InvalidRequestError: this server takes no tools.
    """
    _tool_parser(config, template)


def _tool_parser(config: Config, template: ChatTemplate) -> str:
    if config.tool_call_parser == "none":
        raise InvalidRequestError("this server takes no tools (tool_call_parser is 'none')", "tools")
    if config.tool_call_parser != "auto":
        return config.tool_call_parser
    name = tool_parser_of(template.source, reads_tools=template.shows_tools)
    if name is None:
        raise InvalidRequestError(
            "the model's chat template asks for tool calls in a form that is not known here; set tool_call_parser to "
            f"one of {', '.join(TOOL_PARSERS)} if the model writes that",
            "tools",
        )
    return name


def effort_variables(effort: str | None, given: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """The template's variables, with what reasoning_effort stands for. Those given win.

    Raises:
        InvalidRequestError: the model's template has no such switch.
    """
    if effort is None:
        return dict(given)
    known = template.variables
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort, **given}
    for name in THINKING:
        if name in known:
            return {name: effort != "none", **given}
    if effort == "none" and not thinks(template.source):
        return dict(given)
    raise InvalidRequestError(
        f"reasoning_effort is {effort!r}, but the model's chat template has no switch for thoughts; leave it out",
        "reasoning_effort",
    )
