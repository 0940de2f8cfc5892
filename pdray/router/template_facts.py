"""What the source of a chat template says about it."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, NamedTuple

from pdray.errors import InvalidRequestError

if TYPE_CHECKING:
    from jinja2.nodes import Template


class TemplateFacts(NamedTuple):
    """What a template's source says.

    Attributes:
        variables: names that it reads and does not set.
        strings: its string constants.
    """

    variables: frozenset[str]
    strings: frozenset[str]


@functools.lru_cache(8)
def template_facts(source: str) -> TemplateFacts:
    """Raises InvalidRequestError if the template cannot be parsed."""
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
