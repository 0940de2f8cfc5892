"""The whole of pdray on this machine: one actor prefills, another decodes, an openai client asks.

It asks for answers, for one that matches a schema, and for a call of a function.

Starts a Ray cluster of its own on free ports, serves the default model, asks, prints the answers and where each
request's time went, and ends everything that it started. Exits 1 if the model does not know the capital of France or
a process is left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psutil
import ray
from openai import OpenAI
from pydantic import BaseModel, Field
from ray import serve

from pdray.bench.timings import breakdown_table, timings_of_response
from pdray.cli import wait_until_ready
from pdray.config import Config
from pdray.interrupts import interrupts_ignored
from pdray.ray_cluster import start_local
from pdray.serve import build

PARIS = "What is the capital of France?"
TOGETHER = [
    "What is 2 + 2?",
    "Name the largest planet of the solar system.",
    "Which ocean lies between Europe and America?",
    "What color do you get when you mix blue and yellow?",
]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
EXIT_TIMEOUT_S = 30.0


class City(BaseModel):
    """What an answer must look like."""

    name: str = Field(max_length=30)
    country: str = Field(max_length=30)


class Answer(NamedTuple):
    """timings: seconds by part, as the server measured them."""

    text: str
    timings: dict[str, float]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(client: OpenAI, model: str, question: str) -> Answer:
    """One chat request, answered whole."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=40, temperature=0
    )
    return Answer((answer.choices[0].message.content or "").strip(), timings_of_response(answer.to_dict()["timings"]))


def ask_streaming(client: OpenAI, model: str, question: str) -> Answer:
    """One chat request, printed as it comes."""
    text, timings = "", None
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            text += piece
            print(piece, end="", flush=True)
        timings = chunk.to_dict().get("timings") or timings
    print()
    if timings is None:
        raise RuntimeError("the stream ended without its timings")
    return Answer(text.strip(), timings_of_response(timings))


def ask_for_city(client: OpenAI, model: str, question: str) -> City | None:
    """An answer that matches City's schema, whatever the model would rather say."""
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": question}],
        response_format=City,
        max_tokens=80,
        temperature=0,
    )
    return answer.choices[0].message.parsed


def ask_for_call(client: OpenAI, model: str, question: str) -> str:
    """The call of a function that the model chooses and fills in."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=80,
        temperature=0,
    )
    call = (answer.choices[0].message.tool_calls or [])[0]
    city = json.loads(call.function.arguments)["city"]
    return f"{call.function.name}(city={city!r})"


def ask_everything(url: str, timeout_s: float) -> bool:
    """Send the demo's requests. Returns whether the model knows the capital of France.

    Raises:
        pydantic.ValidationError, openai.LengthFinishReasonError: an answer does not match its schema.
    """
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout_s)
    model = client.models.list().data[0].id

    print(f"\n> {PARIS}")
    whole = ask(client, model, PARIS)
    print(whole.text)
    print(f"\n> {PARIS} (streamed)")
    streamed = ask_streaming(client, model, PARIS)
    print("\nFour at once:")
    with ThreadPoolExecutor(len(TOGETHER)) as pool:
        together = list(pool.map(lambda question: ask(client, model, question), TOGETHER))
    for question, answer in zip(TOGETHER, together, strict=True):
        print(f"> {question}\n{answer.text}")
    about = "Tell me about Paris."
    print(f"\n> {about} (as JSON, by a schema)\n{ask_for_city(client, model, about)!r}")
    weather = "What is the weather in Paris?"
    print(f"\n> {weather} (with a tool)\n{ask_for_call(client, model, weather)}")

    columns = {"first": whole.timings, "streamed": streamed.timings}
    columns |= {f"4x #{index}": answer.timings for index, answer in enumerate(together, 1)}
    print("\nWhere the time went")
    print(breakdown_table(columns))
    return "Paris" in whole.text and "Paris" in streamed.text


def processes_left(started: list[psutil.Process]) -> list[str]:
    """What of `started` still runs after a grace period."""
    _, alive = psutil.wait_procs(started, timeout=EXIT_TIMEOUT_S)
    return [f"{process.pid} {process.name()}" for process in alive]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["disaggregated", "colocated"], default="disaggregated")
    parser.add_argument("--model", default=Config().model)
    args = parser.parse_args()
    config = Config(model=args.model, mode=args.mode, device="cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    began = time.monotonic()
    started: list[psutil.Process] = []
    knows_paris = deployed = False
    try:
        print("Starting Ray ...", flush=True)
        start_local(include_dashboard=False)
        url = f"http://127.0.0.1:{free_port()}"
        serve.start(http_options={"host": "127.0.0.1", "port": int(url.rsplit(":", 1)[1])})
        print(f"Loading {config.model}, {config.mode}, on CPU ...", flush=True)
        deployed = True
        serve.run(build(config), name="demo", route_prefix="/")
        wait_until_ready(url, config.start_timeout_s)
        print(f"Ready after {time.monotonic() - began:.0f} s at {url}/v1")
        knows_paris = ask_everything(url, config.start_timeout_s)
    except KeyboardInterrupt:
        print("\nInterrupted", file=sys.stderr)
    finally:
        started = psutil.Process().children(recursive=True)
        with interrupts_ignored():
            try:
                if deployed:
                    serve.delete("demo")
            finally:
                ray.shutdown()
    left = processes_left(started)
    for process in left:
        print(f"still running: {process}", file=sys.stderr)
    print(f"\nDone in {time.monotonic() - began:.0f} s; no process left." if not left else "\nProcesses were left.")
    return 0 if knows_paris and not left else 1


if __name__ == "__main__":
    sys.exit(main())
