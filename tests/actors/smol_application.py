"""The application of test_application.py: its configuration, its workers, and a story that it tells."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import openai
import psutil

from pdray.actors.client import describe
from pdray.config import Config
from pdray.testing.patience import PATIENCE_S

APP = "pdray-test"
QUEUE_BOUND = 8
CONFIG = Config(
    device="cpu",
    served_model_name="smol",
    max_model_len=1024,
    num_kv_blocks=512,
    max_num_seqs=8,
    max_queue_size=QUEUE_BOUND,
    restart_backoff_s=0.5,
    worker_timeout_s=5.0,  # a loaded machine is no failure
    graceful_shutdown_timeout_s=60.0,
)
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


def workers() -> list[dict[str, Any]]:
    state: list[dict[str, Any]] = describe(APP)["workers"]
    return state


def wait_for(condition: Any, timeout_s: float = PATIENCE_S) -> None:
    """Poll until true; every wait on something remote has a deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.1)


def nothing_in_use() -> bool:
    state = workers()
    return all(
        w["free_blocks"] == w["num_blocks"] - 1 and w["running"] == w["waiting"] == 0 for w in state
    ) and not any(w.get("leases") for w in state)


def stream_text(client: openai.OpenAI, seed: int, started: threading.Event | None = None, num_tokens: int = 48) -> str:
    """A seeded story, streamed; `started` is set at its fourth piece."""
    stream = client.completions.create(
        model="smol",
        prompt=f"{seed} children went into the woods",
        max_tokens=num_tokens,
        temperature=0.8,
        seed=seed,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    for pieces, chunk in enumerate(stream, 1):
        text += chunk.choices[0].text
        if started is not None and pieces == 4:
            started.set()
    return text


def tells(client: openai.OpenAI, story: str) -> bool:
    """Whether the first story begins as it did undisturbed."""
    text = stream_text(client, 0, num_tokens=12)
    return len(text) > 20 and story.startswith(text)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 2}
CALLED = {"type": "object", "properties": {"people": PEOPLE}, "required": ["people"], "additionalProperties": False}
FORMS: list[dict[str, Any]] = [
    {"extra_body": {"structured_outputs": {"json": PEOPLE, "disable_any_whitespace": True}}},
    {
        "tools": [{"type": "function", "function": {"name": "invite", "parameters": CALLED}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "extra_body": {},
    },
]


def stream_form(client: openai.OpenAI, number: int, started: threading.Event | None = None) -> str:
    """A seeded answer in a form that a grammar forces, streamed, with its token ids and its end."""
    fields = FORMS[number] | {"extra_body": FORMS[number]["extra_body"] | {"return_token_ids": True}}
    stream = client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Name two people."}],
        max_tokens=120,
        temperature=0.8,
        seed=number,
        stream=True,
        **fields,
    )
    text, ids, reason = "", list[int](), None
    for pieces, chunk in enumerate(stream, 1):
        [choice] = chunk.choices
        text += choice.delta.content or "".join(call.function.arguments for call in choice.delta.tool_calls or ())
        ids += choice.to_dict().get("token_ids") or []
        reason = choice.finish_reason or reason
        if started is not None and pieces == 4:
            started.set()
    people = json.loads(text)
    assert len(people if isinstance(people, list) else people["people"]) == 2 and len(ids) > 20
    return f"{text} {ids} {reason}"


def stream_story(client: openai.OpenAI, number: int, started: threading.Event | None = None) -> str:
    """Four stories, then the forms."""
    return stream_text(client, number, started) if number < 4 else stream_form(client, number - 4, started)


NUM_STORIES = 4 + len(FORMS)


def is_controller(process: psutil.Process) -> bool:
    """Whether it is Serve's; other tests' children may have ended meanwhile, and have no command line."""
    try:
        return any(part.startswith("ray::ServeController") for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False
