"""Which parser a model's answers need, by name or by its chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection

from pdray.serve.parsers.events import Parser
from pdray.serve.parsers.hermes import HermesParser
from pdray.serve.parsers.llama3_json import Llama3JsonParser
from pdray.serve.parsers.pythonic import PythonicParser

MakeToolParser = Callable[[Collection[str]], Parser]

# Names are vLLM's, and SGLang's where they differ.
TOOL_PARSERS: dict[str, MakeToolParser] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "qwen25": HermesParser,
    "smollm2": HermesParser,
    "llama3_json": Llama3JsonParser,
    "llama3": Llama3JsonParser,
    "pythonic": PythonicParser,
}
REASONING_PARSERS = ("think", "qwen3", "deepseek_r1", "deepseek-r1")  # one format, known by these names


def tool_parser_of(template: str, *, reads_tools: bool) -> str | None:
    """The name of the parser for a model with this chat template; None if the calls that it asks for are unknown.

    Args:
        reads_tools: the template shows tools. Where it does not, pdray does, and asks for SmolLM2's form.
    """
    if not reads_tools:
        return "smollm2"
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"  # XML in the same tag
    if "[func_name1(params_name1=" in template or "<|python_start|>" in template:
        return "pythonic"
    if "python_tag" in template or '{"name": function name, "parameters":' in template:
        return "llama3_json"
    return None
