"""Real clients against a running server: `python examples/clients.py --base-url http://127.0.0.1:8000/v1`.

Tries openai (chat, streaming helpers, parse(), tools, responses), litellm, langchain-openai and anthropic; what is not
installed is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import openai
from pydantic import BaseModel, Field

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS}
TOOLS: list[Any] = [{"type": "function", "function": TOOL}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class City(BaseModel):
    """What an answer must look like."""

    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


class Clients:
    """One method a client; each returns what it has seen, and raises if that is wrong.

    Args:
        model: the first that is served.
    """

    def __init__(self, client: openai.OpenAI, model: str, base_url: str, key: str) -> None:
        self.client, self.model, self.base_url, self.key = client, model, base_url, key

    def openai_chat(self) -> str:
        ask: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
        with self.client.chat.completions.stream(model=self.model, messages=ask, temperature=0) as stream:
            text = stream.get_final_completion().choices[0].message.content
        assert text
        return text

    def openai_tools(self) -> str:
        answer = self.client.chat.completions.create(
            model=self.model, messages=ASK, tools=TOOLS, tool_choice=NAMED, max_tokens=64, temperature=0
        )
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        history = [*ASK, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 C"}]
        said = self.client.chat.completions.create(
            model=self.model, messages=history, tools=TOOLS, max_tokens=32, temperature=0
        )
        return f"{call.function.name}({call.function.arguments}), then {said.choices[0].message.content!r}"

    def openai_parse(self) -> str:
        answer = self.client.chat.completions.parse(
            model=self.model, messages=ASK, response_format=City, max_tokens=64, temperature=0
        )
        assert isinstance(answer.choices[0].message.parsed, City)
        return repr(answer.choices[0].message.parsed)

    def openai_responses(self) -> str:
        answer = self.client.responses.create(model=self.model, input="Say hello.", max_output_tokens=16)
        assert answer.output_text
        return answer.output_text

    def litellm_overflow(self) -> str:
        import litellm

        try:
            litellm.completion(
                model=f"openai/{self.model}",
                messages=[{"role": "user", "content": "word " * 200_000}],
                base_url=self.base_url,
                api_key=self.key,
            )
        except litellm.ContextWindowExceededError as error:
            return type(error).__name__
        raise AssertionError("litellm did not see that the context overflows")

    def langchain_tools(self) -> str:
        from langchain_openai import ChatOpenAI

        model = ChatOpenAI(model=self.model, base_url=self.base_url, api_key=self.key, max_tokens=64, temperature=0)
        answer = model.bind_tools(TOOLS, tool_choice="get_weather").invoke(ASK[0]["content"])
        assert answer.tool_calls
        return str(answer.tool_calls[0]["args"])

    def langchain_structured(self) -> str:
        from langchain_openai import ChatOpenAI

        model = ChatOpenAI(model=self.model, base_url=self.base_url, api_key=self.key, max_tokens=64, temperature=0)
        answer = model.with_structured_output(City, method="json_schema").invoke(ASK[0]["content"])
        assert isinstance(answer, City)
        return repr(answer)

    def anthropic_messages(self) -> str:
        import anthropic

        client = anthropic.Anthropic(base_url=self.base_url.removesuffix("/v1"), api_key=self.key)
        tool: Any = {"name": "get_weather", "input_schema": PARAMETERS}
        ask: dict[str, Any] = {"model": self.model, "max_tokens": 64, "tools": [tool], "extra_body": {"temperature": 0}}
        ask |= {"tool_choice": {"type": "tool", "name": "get_weather"}}
        with client.messages.stream(messages=ASK, **ask) as stream:
            answer = stream.get_final_message()
        [use] = answer.content
        assert use.type == "tool_use" and use.input == client.messages.create(messages=ASK, **ask).content[0].input
        result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny, 21 C"}
        history: list[Any] = [*ASK, {"role": "assistant", "content": answer.content}]
        history += [{"role": "user", "content": [result]}]
        counted = client.messages.count_tokens(model=self.model, messages=history, tools=[tool])
        said = client.messages.create(model=self.model, messages=history, tools=[tool], max_tokens=32)
        assert said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0) == counted.input_tokens
        return f"{use.name}({use.input}), then {said.content!r}"


NEEDS = {
    "litellm_overflow": "litellm",
    "langchain_tools": "langchain_openai",
    "langchain_structured": "langchain_openai",
    "anthropic_messages": "anthropic",
}
ALL = ("openai_chat", "openai_parse", "openai_tools", "openai_responses", *NEEDS)


def main() -> int:
    """Returns 1 if a client fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    key = os.environ.get("PDRAY_API_KEY") or "none"
    client = openai.OpenAI(base_url=args.base_url, api_key=key)
    clients = Clients(client, client.models.list().data[0].id, args.base_url, key)
    failed = False
    for name in ALL:
        if (module := NEEDS.get(name)) and importlib.util.find_spec(module) is None:
            print(f"{name}: not tried, {module} is not installed")
            continue
        run: Callable[[], str] = getattr(clients, name)
        try:
            print(f"{name}: {run()}")
        except Exception as error:
            failed = True
            print(f"{name}: FAILED: {type(error).__name__}: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
