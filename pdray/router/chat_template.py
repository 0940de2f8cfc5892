"""A model's chat template, and the prompts that it makes of conversations without losing a message.

Templates differ in what they take: content as a string or as a list of parts, a system message or none, a role
`developer` or not; and what they do not take, many drop silently. So each shape of conversation (roles, parts, names)
is first rendered with marks for texts. The form in which every mark comes out is used for the conversation itself.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pdray.errors import InvalidRequestError
from pdray.router.conversation import REASONING_FIELDS, Message
from pdray.router.prompt import CompleteText
from pdray.router.template_facts import renderer_options, template_facts
from pdray.router.template_plan import (
    COMPLETE,
    ArgumentsForm,
    Attempt,
    MessageShape,
    Plan,
    as_dict,
    attempt,
    calls,
    candidates,
    content,
    strings,
)
from pdray.router.tool_prompt import with_tool_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PLANS = 256
MAX_PLANNED_MESSAGES = 256  # longer conversations are planned each time, so that the plans' memory is bounded


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation becomes a prompt.

    Attributes:
        add_generation_prompt: end with the header of the assistant's next message.
        continue_final_message: leave the last message open, for the model to continue.
        variables: for the template, e.g. Qwen3's enable_thinking.
        tools: in OpenAI's form, that the model may call.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    tools: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Variables:
    """A template's variables, compared by their JSON."""

    as_json: str
    values: dict[str, Any] = field(compare=False)


class ChatTemplate:
    """The chat template of a tokenizer. Thread-safe.

    Args:
        tokenizer: None, or one without a template, refuses every conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._cached_plan = functools.lru_cache(MAX_PLANS)(self._make_plan)

    def render(self, messages: Sequence[Message], options: ChatOptions) -> CompleteText:
        """The prompt's text.

        Raises:
            InvalidRequestError: there is no template, it refuses the conversation, or it would drop a message.
        """
        source = self._source()
        self._check_options(options)
        tools = list(options.tools)
        if not self.shows_tools and (tools or any(m.tool_calls or m.role == "tool" for m in messages)):
            messages, tools = with_tool_prompt(messages, tools), []
        shapes = tuple(
            MessageShape(
                m.role,
                min(len(m.texts), 2),
                m.in_parts,
                m.name is not None,
                not m.text.strip(),
                min(len(m.tool_calls), 2),
            )
            for m in messages
        )
        make_plan = self._cached_plan if len(messages) <= MAX_PLANNED_MESSAGES else self._make_plan
        plan = make_plan(source, shapes, _as_json(options.variables), options.add_generation_prompt, bool(tools))
        end = secrets.token_hex(16) if options.continue_final_message else ""
        chat: list[dict[str, Any]] = []
        for index, (message, role, form) in enumerate(zip(messages, plan.roles, plan.forms, strict=True)):
            texts = list(message.texts)
            if index == len(messages) - 1:
                texts[-1] += end  # whatever the template puts behind the message, its text ends here
            chat.append(
                as_dict(role, message.name, content(form, texts))
                | calls(message.tool_calls, plan.arguments)
                | ({} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id})
                | ({} if message.reasoning is None else dict.fromkeys(REASONING_FIELDS, message.reasoning))
            )
        try:
            prompt = self._apply(source, chat, tools, options.add_generation_prompt, options.variables)
        except Exception as error:  # templates are programs of the model's authors
            raise _refused(error) from error
        if not end:
            return CompleteText(prompt)
        if (at := prompt.rfind(end)) < 0:
            raise InvalidRequestError(
                "the model's chat template does not show the end of the last message, so it cannot be continued",
                "continue_final_message",
            )
        return CompleteText(prompt[:at])

    def _source(self) -> str:
        """The template's text; of several, the one that transformers takes."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InvalidRequestError(
                "this model has no chat template; send a prompt instead (/v1/completions, LLM.generate)", "messages"
            )
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:
            raise InvalidRequestError(f"this model has no default chat template: {error}", "messages") from error

    @property
    def source(self) -> str:
        """The template's text; empty if there is none."""
        return self._source() if self.tokenizer is not None and self.tokenizer.chat_template else ""

    @property
    def shows_tools(self) -> bool:
        """Whether the template has a place for tools; see pdray.router.tool_prompt for those that have none."""
        return "tools" in template_facts(self._source()).variables

    @property
    def variables(self) -> frozenset[str]:
        """Names that a request may set with chat_template_kwargs."""
        return template_facts(self._source()).variables - renderer_options()

    def _check_options(self, options: ChatOptions) -> None:
        if options.add_generation_prompt and options.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=false", "continue_final_message"
            )
        if not options.variables:
            return
        known = self.variables
        for name in options.variables:
            if name not in known:
                raise InvalidRequestError(
                    f"{name!r} is no variable of the model's chat template; it has {sorted(known) or 'none'}",
                    "chat_template_kwargs",
                )

    def _apply(
        self,
        source: str,
        chat: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        add_prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        assert self.tokenizer is not None
        prompt = self.tokenizer.apply_chat_template(
            chat,
            tools=[*tools] or None,
            chat_template=source,
            add_generation_prompt=add_prompt,
            tokenize=False,
            **variables,
        )
        assert isinstance(prompt, str)
        return prompt

    def _make_plan(
        self,
        source: str,
        shapes: tuple[MessageShape, ...],
        variables: Variables,
        add_prompt: bool,
        with_tools: bool,
    ) -> Plan:
        """The first form in which the template shows every message, or all but those without a text."""
        knows_developer = "developer" in template_facts(source).strings
        roles = tuple("system" if s.role == "developer" and not knows_developer else s.role for s in shapes)
        arguments: tuple[ArgumentsForm, ...] = ("object", "json") if any(s.num_calls for s in shapes) else ("object",)
        tried: dict[Plan, Attempt] = {}

        def apply(chat: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
            return self._apply(source, chat, tools, add_prompt, variables.values)

        def try_plan(plan: Plan) -> Attempt:
            if plan not in tried:
                tried[plan] = attempt(shapes, plan, apply, with_tools=with_tools)
            return tried[plan]

        for form in arguments:
            plan_of = functools.partial(Plan, roles, arguments=form)
            for forms in candidates(shapes, lambda forms, plan_of=plan_of: try_plan(plan_of(forms))):  # type: ignore[misc]
                if try_plan(plan_of(forms)) == COMPLETE:
                    return plan_of(forms)
        missed: list[list[int]] = []
        for plan, (all_lost, error, lost_calls, lost_tools) in tried.items():
            lost = sorted({*lost_calls, *(index for index in all_lost if not shapes[index].empty)})
            if error is None and not lost and not lost_tools:
                return plan
            missed.append(lost)
        plain = try_plan(Plan(roles, strings(shapes), arguments[-1]))
        if plain.error is not None:
            raise _refused(plain.error) from plain.error
        if any(each.lost_tools and not each.lost and not each.lost_calls for each in tried.values()):
            raise InvalidRequestError("the model's chat template does not show the tools it is given", "tools")
        first = min(filter(None, missed), key=len)[0]
        was = shapes[first].role
        sent_as = "" if was == roles[first] else f", sent as {roles[first]!r}"
        raise InvalidRequestError(
            f"the model's chat template drops messages[{first}] (role {was!r}{sent_as}): its text would not be in the "
            "prompt; use a role that the template knows, in a place where it takes it",
            "messages",
        )


def _as_json(variables: dict[str, Any]) -> Variables:
    try:
        return Variables(json.dumps(variables), variables)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"chat_template_kwargs cannot be written as JSON: {error}", "chat_template_kwargs"
        ) from error


def _refused(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"the model's chat template refuses these messages: {error}", "messages")
