"""docs/api.md, from the code's own lists: `python -m pdray.serve.reference > docs/api.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from pdray.config import Config
from pdray.metric_table import TABLE
from pdray.serve import messages_body, responses_body
from pdray.serve.api import create_app
from pdray.serve.fields import FIELDS, Ignored, Refused
from pdray.serve.messages_body import CountTokensBody, MessagesBody
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.responses_body import ResponsesBody
from pdray.serve.tokens_api import DetokenizeBody, TokenizeBody
from pdray.vllm_flags import FLAGS, Renamed

BODIES: dict[str, tuple[type[BaseModel], Mapping[str, Ignored | Refused]]] = {
    "/v1/chat/completions": (ChatBody, {}),
    "/v1/completions": (CompletionBody, {}),
    "/v1/responses": (ResponsesBody, responses_body.FIELDS),
    "/v1/messages": (MessagesBody, messages_body.FIELDS),
    "/v1/messages/count_tokens": (CountTokensBody, messages_body.FIELDS),
    "/tokenize": (TokenizeBody, {}),
    "/detokenize": (DetokenizeBody, {}),
}
INTRODUCTION = """# The API

Made by `python -m pdray.serve.reference > docs/api.md`; a test compares. Names and meanings are OpenAI's, and vLLM's
where OpenAI has none. A field that is refused is answered with 400, its name in `error.param`, unless its value asks
for nothing: null, or what its row names. An unknown field is refused, too.
"""
CHAT_NOTES = """## Tools and thoughts
- Calls are found by `tool_call_parser`, which by itself goes by the model's chat template: Hermes and Qwen
  (`<tool_call>`), Llama 3's JSON, pythonic lists, SmolLM2. Only calls of the request's tools count; what only looks
  like a call stays text. A model whose template has no place for tools gets them in its system message.
- `finish_reason` is `tool_calls` if every call is complete, `length` if max_tokens cut one, and `stop` for a named
  `tool_choice`, as OpenAI's.
- `tool_choice` required, and a named one, are forced by a grammar, and so are the tools' schemas then, `strict` or not;
  with auto the model is only told of them.
- `tool_choice` none leaves the tools out of the prompt. `parallel_tool_calls: false` keeps the first call.
- Thoughts between `<think>` tags are `reasoning_content`, and the same as `reasoning`. `reasoning_effort` goes to a
  template that knows it; where the template only switches thinking, `none` is off and every other value on; where it
  does neither, it is refused.
- `thinking_token_budget` counts the tokens behind the tag that opens the thoughts; then the tag that ends them is
  forced, whatever else the request bans. A model whose tags are not tokens of its vocabulary, or with
  `reasoning_parser: none`, gets 400.
- A form (`response_format`, `structured_outputs`, a forced call) holds for the answer behind the thoughts. With
  `separate_reasoning: false`, where the prompt has closed the thoughts, and on `/v1/completions`, it holds at once.
- `/tokenize` takes `messages` with every field of a chat request, instead of `prompt`.
- `/v1/responses` keeps nothing: send the whole conversation as `input`, of items message, function_call,
  function_call_output and reasoning.
- `/v1/messages` is Anthropic's, with its errors and events; a key may come as `x-api-key`. Blocks are text, thinking,
  tool_use and tool_result, whose `is_error` puts "Error:" before it. Thoughts have an empty signature. A call that
  max_tokens has cut is left out of a whole answer.
"""


def api_reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Endpoints\n", *_endpoints(), "", CHAT_NOTES]
    for path, (body, own) in BODIES.items():
        parts += [f"## Fields of {path}\n", *_fields(body, own), ""]
    parts += ["## Metrics\n", *_metrics(), "", "## vLLM's flags of `pdray serve`\n", *_flags()]
    return "\n".join(parts) + "\n"


def _endpoints() -> Iterator[str]:
    yield from ("| path | methods | needs a key, if there is one | |", "|---|---|---|---|")
    paths = create_app(Config.model_validate({"api_key": "key"}), lambda: None).openapi()["paths"]
    for path, operations in paths.items():
        methods = sorted({method.upper() for method in operations} | ({"HEAD"} if "get" in operations else set()))
        operation = next(iter(operations.values()))
        needs_key = "yes" if "security" in operation else "no"
        yield f"| `{path}` | {', '.join(methods)} | {needs_key} | {_first_sentence(operation.get('description'))} |"


def _fields(body: type[BaseModel], own: Mapping[str, Ignored | Refused]) -> Iterator[str]:
    texts: dict[str, str] = {}
    for kind in reversed(body.__mro__):
        texts |= _attributes(kind.__doc__ or "")
    yield from ("| field | | |", "|---|---|---|")
    for name in sorted(body.model_fields):
        yield f"| `{name}` | supported | {texts.get(name, '')} |"
    for name, entry in sorted({**FIELDS, **own}.items()):
        if name in body.model_fields:
            continue
        if isinstance(entry, Ignored):
            yield f"| `{name}` | ignored | {entry.why} |"
        else:
            neutral = "" if entry.neutral is None else "unless " + " or ".join(f"`{value}`" for value in entry.neutral)
            yield f"| `{name}` | refused | {'; '.join(filter(None, (neutral, entry.instead)))} |"


def _metrics() -> Iterator[str]:
    yield "`/metrics` shows this router's, with vLLM's names while `vllm_metrics` is on.\n"
    yield from ("| pdray | vLLM | | |", "|---|---|---|---|")
    for metric in TABLE.values():
        names = [f"`{name}`" if name else "" for name in (metric.pdray, metric.vllm)]
        yield f"| {names[0]} | {names[1]} | {metric.kind} | {metric.description} |"


def _flags() -> Iterator[str]:
    yield "Those that are also fields of Config are not listed.\n"
    yield from ("| flag | |", "|---|---|")
    for name, flag in sorted(FLAGS.items()):
        if isinstance(flag, Renamed):
            yield f"| `--{name}` | is `--{flag.option}` |"
        elif flag.values:
            values = ["off" if value == "false" else "on" if value == "true" else value for value in flag.values]
            yield f"| `--{name}` | only {', '.join(f'`{value}`' for value in values if value)}: {flag.instead} |"
        else:
            yield f"| `--{name}` | taken, changes nothing |"


def _attributes(text: str) -> dict[str, str]:
    """Names and descriptions of a docstring's section Attributes."""
    section = re.split(r"\n\s*\n", text.partition("Attributes:")[2])[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if entry := re.match(r"\s*((?:\w+, )*\w+): (.*)", line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2].strip())
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()))[0]


if __name__ == "__main__":
    print(api_reference(), end="")
