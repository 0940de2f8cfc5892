"""The command line: options against the fields they set, messages, and exit status."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pdray import cli
from pdray.bench.client import authorization
from pdray.cluster_commands import format_status
from pdray.config import Config
from pdray.engine.request import SplitState
from pdray.errors import ConfigError, InvalidRequestError, PdrayError
from pdray.health import wait_until_ready, why_not_ready
from pdray.options import (
    NOT_SAMPLING_OPTIONS,
    add_config_arguments,
    add_sampling_arguments,
    config_from_args,
    option_name,
    sampling_from_args,
)
from pdray.outputs import CompletionOutput, RequestOutput, RequestTimings
from pdray.sampling_params import SamplingParams


def parse_config(*words: str) -> Config:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, skip=())
    return config_from_args(parser.parse_args(words))


def another_value(field: str) -> Any:
    """A valid value that is not the field's default."""
    schema = Config.model_json_schema()["properties"][field]
    kind = next(s for s in schema.get("anyOf", [schema]) if s.get("type") != "null")
    default = schema.get("default")
    if kind["type"] == "boolean":
        return not default
    if "enum" in kind:
        return next((choice for choice in reversed(kind["enum"]) if choice != default), default)
    if kind["type"] == "array":
        return ["other", "another"]
    if kind["type"] == "string":
        return "other"
    if kind["type"] == "number":
        return 0.625
    if kind["type"] == "object":
        return {"NAME": "a=b"} if kind["additionalProperties"]["type"] == "string" else {"NAME": 0.5}
    return 1024


NEEDED = {  # fields that are refused without others
    "sm_partition": {"mode": "colocated"},
    "decode_sms": {"mode": "colocated", "sm_partition": "on"},
    "target_ttft_ms": {"mode": "colocated", "sm_partition": "auto"},
}


@pytest.mark.parametrize("field", sorted(Config.model_fields))
def test_every_field_of_config_has_its_option(field: str) -> None:
    value = another_value(field)
    if isinstance(value, dict):
        words = [option_name(field), *(f"{name}={text}" for name, text in value.items())]
    elif isinstance(value, bool):
        words = [option_name(field) if value else option_name(field).replace("--", "--no-", 1)]
    elif isinstance(value, list):
        words = [option_name(field), *value]
    else:
        words = [option_name(field), str(value)]
    needed = NEEDED.get(field, {})
    words += [word for name, text in needed.items() for word in (option_name(name), text)]
    assert parse_config(*words) == Config(**{field: value}, **needed)


def test_no_option_leaves_every_default() -> None:
    assert parse_config() == Config()
    assert not parse_config().model_fields_set


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs: .*greater than or equal to 1.*given: 0"),
        (["--weights-seed", "-1"], "--weights-seed: "),
        (["--prefill-num-gpus", "2"], "tensor parallelism is not there yet"),
    ],
)
def test_bad_value_names_the_option(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(*words)


def parse_sampling(*words: str) -> SamplingParams:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    return sampling_from_args(parser.parse_args(words))


def test_sampling_options_set_their_fields() -> None:
    words = [
        "--n",
        "2",
        "--temperature",
        "0.5",
        "--top-k",
        "5",
        "--seed",
        "7",
        "--max-tokens",
        "9",
        "--min-tokens",
        "3",
    ]
    words += ["--stop", "a b", "c", "--ignore-eos", "--logprobs", "2", "--repetition-penalty", "1.5"]
    assert parse_sampling(*words) == SamplingParams(
        n=2,
        temperature=0.5,
        top_k=5,
        seed=7,
        max_tokens=9,
        min_tokens=3,
        stop=("a b", "c"),
        ignore_eos=True,
        logprobs=2,
        repetition_penalty=1.5,
    )
    assert parse_sampling() == SamplingParams()


def test_every_sampling_field_is_an_option_or_named_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="x")
    add_sampling_arguments(parser)
    for field in set(SamplingParams.__struct_fields__) - set(NOT_SAMPLING_OPTIONS):
        assert f"--{field.replace('_', '-')}" in parser.format_help()


def test_bad_sampling_value_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="top_p is 2.0"):
        parse_sampling("--top-p", "2")


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "generate",
        "status",
        "stop",
        "wait",
        "bench serve",
        "bench offline",
        "bench transfer",
        "bench handover",
        "bench shapes",
    ],
)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*command.split(), "--help"])
    assert exit_info.value.code == 0
    assert f"usage: pdray {command}" in capsys.readouterr().out


def test_wrong_option_value_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--max-num-seqs", "0"]) == 2
    assert cli.main(["serve", "--num-routers", "0"]) == 2
    assert "pdray serve: --max-num-seqs" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--api-key", "two words"], ["--api-key", "key", "--max-num-batched-tokens", "1"]])
def test_errors_do_not_show_the_api_key(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *words]) == 2
    shown = capsys.readouterr().err
    assert words[1] not in shown.replace("api_key", "")


@pytest.mark.parametrize(
    ("pdray_key", "openai_key", "sent"),
    [("", "", None), ("a", "", "a"), ("", "b", "b"), ("a", "b", "a"), (" a\n", "", "a")],
)
def test_bench_sends_the_environments_key(
    pdray_key: str, openai_key: str, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDRAY_API_KEY", pdray_key)
    monkeypatch.setenv("OPENAI_API_KEY", openai_key)
    assert authorization() == ({} if sent is None else {"Authorization": f"Bearer {sent}"})


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom pdray.cli import build_parser\nbuild_parser().format_help()\n"
        "sys.exit([m for m in ('torch', 'ray', 'transformers') if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


class FakeLLM:
    """Answers each prompt with itself; remembers how it was made and asked."""

    made: dict[str, Any] = {}
    asked: list[Any] = []

    def __init__(self, **config: Any) -> None:
        FakeLLM.made = config

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None: ...

    def generate(self, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
        FakeLLM.asked = [prompts, params]
        done = [CompletionOutput(0, text=f"<{prompt}>", finish_reason="stop") for prompt in prompts]
        return [RequestOutput("r", None, [], [output], True, timings=RequestTimings(ttft=0.5)) for output in done]

    def chat(self, conversations: list[list[dict[str, str]]], params: SamplingParams) -> list[RequestOutput]:
        return self.generate([c[0]["content"] + "!" for c in conversations], params)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module = types.ModuleType("pdray.llm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pdray.llm", module)
    return FakeLLM


def test_generate_passes_options_on(fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "one", "two", "--model", "m", "--device", "cpu", "--temperature", "0", "--timings"]
    assert cli.main([*words, "--seed", "3", "--weights-seed", "4"]) == 0
    assert fake_llm.made == {"ray_address": None, "model": "m", "device": "cpu", "seed": 4}
    assert fake_llm.asked == [["one", "two"], SamplingParams(temperature=0.0, max_tokens=128, seed=3)]
    printed = capsys.readouterr().out
    assert "Answer: '<two>' (stop)" in printed
    assert "500.0" in printed


def test_generate_chat_uses_the_template(fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "hi", "--chat"]) == 0
    assert "Answer: '<hi!>'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"), [(PdrayError("no"), 1), (ConfigError("no"), 2), (KeyboardInterrupt(), 130)]
)
def test_errors_become_exit_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "wait_until_ready", wait)
    assert cli.main(["wait"]) == status
    assert ("pdray wait: no" in capsys.readouterr().err) == isinstance(error, PdrayError)


class HealthServer(ThreadingHTTPServer):
    """Says 503 to the first `num_refusals` questions and 200 afterwards; with the reasons of a list."""

    def __init__(self, num_refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), HealthHandler)
        self.num_refusals = num_refusals
        self.reasons = ["loading weights"]
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HealthHandler(BaseHTTPRequestHandler):
    server: HealthServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        ready = len(self.server.paths) > self.server.num_refusals
        reason = self.server.reasons[min(len(self.server.paths), len(self.server.reasons)) - 1]
        body = b"" if ready else json.dumps({"error": {"message": reason}}).encode()
        self.send_response(200 if ready else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def health_server(request: pytest.FixtureRequest) -> Iterator[HealthServer]:
    server = HealthServer(request.param)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("health_server", [2], indirect=True)
def test_wait_returns_when_the_server_is_ready(health_server: HealthServer) -> None:
    assert cli.main(["wait", "--url", health_server.url + "/", "--timeout", "60"]) == 0
    assert health_server.paths == ["/health"] * 3


@pytest.mark.parametrize("health_server", [10**6], indirect=True)
def test_wait_gives_up_and_says_why(health_server: HealthServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["wait", "--url", health_server.url, "--timeout", "0.3"]) == 1
    message = capsys.readouterr().err
    assert "not ready after 0.3 s" in message
    assert "loading weights" in message


@pytest.mark.parametrize("health_server", [4], indirect=True)
def test_wait_prints_each_new_reason_whole(health_server: HealthServer, capsys: pytest.CaptureFixture[str]) -> None:
    long = "the workers need 8 CPUs, " * 30
    health_server.reasons = ["no workers", "no workers", long, "connecting"]
    assert cli.main(["wait", "--url", health_server.url, "--timeout", "60"]) == 0
    *reasons, ready = capsys.readouterr().out.splitlines()
    assert reasons == [f"waiting: HTTP 503: {text}" for text in ("no workers", long, "connecting")]
    assert ready.endswith("is ready")


def test_a_server_without_the_application_is_told_apart() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reason = why_not_ready(f"http://127.0.0.1:{server.server_port}/no-such/health", 5.0)
        server.shutdown()
    assert reason is not None and reason.startswith("HTTP 404") and "`pdray status`" in reason


@pytest.mark.parametrize("url", ["http://", "http://host:port", "http://127.0.0.1:99999", "http://a b:1", "host:8000"])
def test_wait_tells_what_is_no_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["wait", "--url", url, "--timeout", "60"]) == 2
    assert repr(url) in capsys.readouterr().err


@pytest.mark.parametrize("health_server", [0], indirect=True)
def test_a_healthy_server_may_be_another_one(health_server: HealthServer) -> None:
    """While `pdray serve --replace` waits, the former application answers."""
    told: list[str] = []
    answers = iter(["still the former one", None])
    wait_until_ready(health_server.url, 60.0, on_reason=told.append, check=lambda: next(answers))
    assert told == ["still the former one"]


@pytest.mark.parametrize("health_server", [10**6], indirect=True)
def test_bench_does_not_show_its_key(
    health_server: HealthServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PDRAY_API_KEY", "sk-ours")
    assert cli.main(["bench", "serve", "--base-url", health_server.url, "--num-prompts", "1"]) == 1
    shown = capsys.readouterr()
    assert "503" in shown.err and "sk-ours" not in shown.err + shown.out


def test_wait_without_a_server_says_so(unused_tcp_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["wait", "--url", f"http://127.0.0.1:{unused_tcp_port}", "--timeout", "0.1"]) == 1
    assert "Connection refused" in capsys.readouterr().err


def test_wait_refuses_another_kind_of_url() -> None:
    assert cli.main(["wait", "--url", "file:///etc/hosts"]) == 2


def test_status_table() -> None:
    worker = {"worker_id": "decode-0", "role": "decode", "device": "cpu", "pid": 41, "running": 2, "waiting": 0}
    worker |= {"queued_tokens": 7, "free_blocks": 90, "num_blocks": 100, "leases": [{"state": "RUNNING"}] * 3}
    application = {
        "name": "pdray",
        "model": "tiny",
        "mode": "disaggregated",
        "workers": [
            worker,
            {"worker_id": "prefill-0", "role": "prefill", "device": "cpu", "pid": 40, "free_blocks": 5},
        ],
        "routers": [{"router_id": "router-a", "queue_depth": 4}],
    }
    lines = format_status([application]).splitlines()
    assert lines[0] == "pdray tiny disaggregated"
    header, decode, prefill = (line.split() for line in lines[1:4])
    titles = "worker role device running waiting queued tokens free blocks blocks leases pid"
    assert " ".join(header) == titles
    assert decode == ["decode-0", "decode", "cpu", "2", "0", "7", "90", "100", "3", "41"]
    assert prefill == ["prefill-0", "prefill", "cpu", "-", "-", "-", "5", "-", "-", "40"]
    assert lines[4] == "router router-a: queue depth 4"
    lease = {"request_id": "r1", "attempt": 2, "state": "quarantine", "router_id": "router-a", "num_blocks": 3}
    worker["leases"] = [lease | {"prefill_worker_id": "prefill-0", "expires_in_s": 4.25}]
    application["integrity"] = {"decode-0": [], "prefill-0": ["block 3 is lost"]}
    listed = format_status([application], leases=True).splitlines()[5:]
    assert listed[:2] == ["integrity decode-0: ok", "integrity prefill-0: block 3 is lost"]
    assert listed[-1].split() == ["r1", "2", "quarantine", "router-a", "prefill-0", "3", "decode-0", "4.2", "s"]
    assert format_status([]) == "no pdray application is running"


def test_status_says_which_channel_a_pair_has_and_why() -> None:
    worker = {"worker_id": "prefill-0", "channels": {"decode-0": "cuda_ipc", "decode-1": "object_store"}}
    worker["passed_over"] = {"decode-0": {}, "decode-1": {"cuda_ipc": "different machines", "nccl": "no NCCL"}}
    worker["sent"] = {"decode-0": {"num_puts": 3, "num_bytes": 4_500_000, "seconds": 0.2}}
    lines = format_status([{"name": "pdray", "workers": [worker]}]).splitlines()
    assert "channel prefill-0 to decode-0: cuda_ipc, 4.5 MB in 3 puts" in lines
    assert lines[-1] == (
        "channel prefill-0 to decode-1: object_store (not cuda_ipc: different machines; not nccl: no NCCL)"
    )


@pytest.mark.parametrize(
    ("decode_sms", "chunk", "unavailable", "line"),
    [
        (32, None, None, "decodes on 32 SMs, prompts on 100; 4 changes, 9 pieces"),
        (None, 512, None, "in one step of 512 tokens at most; 4 changes, 9 pieces"),
        (0, None, "old driver", "on two streams (no partitions: old driver); 4 changes, 9 pieces"),
    ],
)
def test_status_says_how_prompts_and_decodes_share_a_gpu(
    decode_sms: int | None, chunk: int | None, unavailable: str | None, line: str
) -> None:
    split = SplitState(decode_sms, chunk, 132, (16, 32), 4, 9, unavailable)
    workers = [{"worker_id": "decode-0", "split": split._asdict()}, {"worker_id": "decode-1", "split": None}]
    lines = format_status([{"name": "pdray", "workers": workers}]).splitlines()
    assert [shown for shown in lines if "split" in shown] == [f"split of decode-0: {line}"]


def test_advice_names_options_that_exist() -> None:
    """Whatever the command line and its helpers tell to set."""
    parser = cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    options = {
        option
        for command in (parser, *commands.choices.values())
        for action in command._actions
        for option in action.option_strings
    }
    package = Path(cli.__file__).parent
    for path in (*package.glob("*.py"), *(package / "serve").glob("*.py")):
        if path.name == "options.py":
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text()):
            assert option in options, f"{path.name} names {option}"
