"""A model's chat template, and the prompts that it makes of conversations without losing a message.

Templates differ in what they take: content as a string or as a list of parts, a system message or none, a role
`developer` or not; and what they do not take, many drop silently. So each shape of conversation (roles, parts, names)
is first rendered with marks for texts. The form in which every mark comes out is used for the conversation itself.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pdray.errors import InvalidRequestError
from pdray.router.conversation import Message
from pdray.router.prompt import CompleteText

if TYPE_CHECKING:
    from jinja2.nodes import Template
    from transformers import PreTrainedTokenizerBase

Form = Literal["string", "parts", "part"]  # "part": a list of one part, which holds the joined text

MARK = re.compile(r"zqx(\d+)x(\d+)xqz")
LIST = 9  # where marks count texts, that of the list around them
MAX_PLANS = 256
MAX_PLANNED_MESSAGES = 256  # longer conversations are planned each time, so that the plans' memory is bounded


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation becomes a prompt.

    Attributes:
        add_generation_prompt: end with the header of the assistant's next message.
        continue_final_message: leave the last message open, for the model to continue.
        variables: for the template, e.g. Qwen3's enable_thinking.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = field(default_factory=dict)


class MessageShape(NamedTuple):
    """What of a message decides how a template treats it. More than two texts count as two."""

    role: str
    num_texts: int
    in_parts: bool
    named: bool
    empty: bool


@dataclass(frozen=True, slots=True)
class Variables:
    """A template's variables, compared by their JSON."""

    as_json: str
    values: dict[str, Any] = field(compare=False)


class Plan(NamedTuple):
    """How each message is given to the template."""

    roles: tuple[str, ...]
    forms: tuple[Form, ...]


class Attempt(NamedTuple):
    """What became of the marks in one form: the messages that were lost, or why the template refused them all."""

    lost: list[int]
    error: Exception | None


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
        self._check_options(source, options)
        shapes = tuple(
            MessageShape(m.role, min(len(m.texts), 2), m.in_parts, m.name is not None, not m.text.strip())
            for m in messages
        )
        make_plan = self._cached_plan if len(messages) <= MAX_PLANNED_MESSAGES else self._make_plan
        plan = make_plan(source, shapes, _as_json(options.variables), options.add_generation_prompt)
        end = secrets.token_hex(16) if options.continue_final_message else ""
        chat: list[dict[str, Any]] = []
        for index, (message, role, form) in enumerate(zip(messages, plan.roles, plan.forms, strict=True)):
            texts = list(message.texts)
            if index == len(messages) - 1:
                texts[-1] += end  # whatever the template puts behind the message, its text ends here
            chat.append(_as_dict(role, message.name, _content(form, texts)))
        try:
            prompt = self._apply(source, chat, options.add_generation_prompt, options.variables)
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

    def _check_options(self, source: str, options: ChatOptions) -> None:
        if options.add_generation_prompt and options.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=false", "continue_final_message"
            )
        if not options.variables:
            return
        known = _template_facts(source).variables - renderer_options()
        for name in options.variables:
            if name not in known:
                raise InvalidRequestError(
                    f"{name!r} is no variable of the model's chat template; it has {sorted(known) or 'none'}",
                    "chat_template_kwargs",
                )

    def _apply(self, source: str, chat: list[dict[str, Any]], add_prompt: bool, variables: dict[str, Any]) -> str:
        assert self.tokenizer is not None
        prompt = self.tokenizer.apply_chat_template(
            chat, chat_template=source, add_generation_prompt=add_prompt, tokenize=False, **variables
        )
        assert isinstance(prompt, str)
        return prompt

    def _make_plan(self, source: str, shapes: tuple[MessageShape, ...], variables: Variables, add_prompt: bool) -> Plan:
        """The first form in which the template shows every message, or all but those without a text."""
        knows_developer = "developer" in _template_facts(source).strings
        roles = tuple("system" if s.role == "developer" and not knows_developer else s.role for s in shapes)
        tried: dict[tuple[Form, ...], Attempt] = {}

        def attempt(forms: tuple[Form, ...]) -> Attempt:
            if forms not in tried:
                tried[forms] = self._try(source, shapes, Plan(roles, forms), variables.values, add_prompt)
            return tried[forms]

        for forms in _candidates(shapes, attempt):
            if attempt(forms) == Attempt([], None):
                return Plan(roles, forms)
        missed: list[list[int]] = []
        for forms, (all_lost, error) in tried.items():
            lost_texts = [index for index in all_lost if not shapes[index].empty]
            if error is None and not lost_texts:
                return Plan(roles, forms)
            missed.append(lost_texts)
        plain = attempt(_strings(shapes))
        if plain.error is not None:
            raise _refused(plain.error) from plain.error
        lost = min(filter(None, missed), key=len)[0]
        was = shapes[lost].role
        sent_as = "" if was == roles[lost] else f", sent as {roles[lost]!r}"
        raise InvalidRequestError(
            f"the model's chat template drops messages[{lost}] (role {was!r}{sent_as}): its text would not be in the "
            "prompt; use a role that the template knows, in a place where it takes it",
            "messages",
        )

    def _try(
        self, source: str, shapes: tuple[MessageShape, ...], plan: Plan, variables: dict[str, Any], add_prompt: bool
    ) -> Attempt:
        chat = []
        for index, (shape, role, form) in enumerate(zip(shapes, plan.roles, plan.forms, strict=True)):
            content = _content(form, [_mark(index, part) for part in range(shape.num_texts)])
            if isinstance(content, list):
                content[0][_mark(index, LIST)] = ""  # shows where a template prints the list as Python does
            chat.append(_as_dict(role, "Ann" if shape.named else None, content))
        try:
            prompt = self._apply(source, chat, add_prompt, variables)
        except Exception as error:  # reported, unless another form is taken
            return Attempt([], error)
        found = {(int(index), int(part)) for index, part in MARK.findall(prompt.lower())}
        lost = [
            index
            for index, shape in enumerate(shapes)
            if (index, LIST) in found or any((index, part) not in found for part in range(shape.num_texts))
        ]
        return Attempt(lost, None)


def _candidates(
    shapes: Sequence[MessageShape], attempt: Callable[[tuple[Form, ...]], Attempt]
) -> Iterator[tuple[Form, ...]]:
    """Forms to try, best first: lists of several parts as they are, strings, and lists where strings are lost."""
    if any(shape.in_parts and shape.num_texts > 1 for shape in shapes):
        yield tuple("parts" if shape.in_parts and shape.num_texts > 1 else "string" for shape in shapes)
    yield _strings(shapes)
    lost = attempt(_strings(shapes)).lost
    lists: tuple[Form, ...] = ("parts", "part")
    for form in lists:
        yield tuple(form if index in lost else "string" for index in range(len(shapes)))
    for form in lists:
        yield (form,) * len(shapes)


def _strings(shapes: Sequence[MessageShape]) -> tuple[Form, ...]:
    return tuple("string" for _ in shapes)


def _content(form: Form, texts: list[str]) -> str | list[dict[str, str]]:
    if form == "string":
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in (texts if form == "parts" else ["\n".join(texts)])]


def _as_dict(role: str, name: str | None, content: str | list[dict[str, str]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": content}
    return message if name is None else message | {"name": name}


def _mark(index: int, part: int) -> str:
    """A text that no template holds."""
    return f"zqx{index}x{part}xqz"


def _as_json(variables: dict[str, Any]) -> Variables:
    try:
        return Variables(json.dumps(variables), variables)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"chat_template_kwargs cannot be written as JSON: {error}", "chat_template_kwargs"
        ) from error


def _refused(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"the model's chat template refuses these messages: {error}", "messages")


class TemplateFacts(NamedTuple):
    """What a template's source says.

    Attributes:
        variables: names that it reads and does not set.
        strings: its string constants.
    """

    variables: frozenset[str]
    strings: frozenset[str]


@functools.lru_cache(8)
def _template_facts(source: str) -> TemplateFacts:
    from jinja2 import meta
    from jinja2.nodes import Const

    tree = _parse(source)
    strings = frozenset(node.value for node in tree.find_all(Const) if isinstance(node.value, str))
    return TemplateFacts(frozenset(meta.find_undeclared_variables(tree)), strings)


def _parse(source: str) -> Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # its environment has tags of its own

    try:
        return _compile_jinja_template(source).environment.parse(source)
    except Exception as error:
        raise InvalidRequestError(f"the model's chat template cannot be read: {error}", "messages") from error


@functools.lru_cache(1)
def renderer_options() -> frozenset[str]:
    """Arguments of transformers' renderer. A request must not set them as variables of the template."""
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({*parameters, "messages"})
