"""The command line: messages, exit status, and what each command passes on."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pdray import cli
from pdray.bench.client import authorization
from pdray.errors import ConfigError, PdrayError
from pdray.options import config_from_args
from pdray.outputs import CompletionOutput, RequestOutput, RequestTimings
from pdray.sampling_params import SamplingParams


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


@pytest.mark.parametrize("kind", ["mux", "pipeline", "kernels"])
def test_what_measures_one_rank_refuses_several(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("tensor-parallel-size", "decode-tensor-parallel-size"):
        assert cli.main(["bench", kind, f"--{option}", "3", "--device", "cpu"]) == 2
        setting = option.replace("-", "_")
        assert f"{setting} is 3, but bench {kind} measures one rank" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--api-key", "two words"], ["--api-key", "key", "--max-num-batched-tokens", "1"]])
def test_errors_do_not_show_the_api_key(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *words]) == 2
    shown = capsys.readouterr().err
    assert words[1] not in shown.replace("api_key", "")


def test_a_model_is_named_as_a_word_or_an_option_and_no_option_is_abbreviated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = cli.build_parser()
    for words in (["m"], ["--model", "m"], ["m", "--model=m"]):
        assert config_from_args(parser.parse_args(["serve", *words])).model == "m"
    with pytest.raises(ConfigError, match="two models are named, a and --model b"):
        config_from_args(parser.parse_args(["serve", "a", "--model", "b"]))
    assert cli.main(["serve", "a", "--model", "b"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["serve", "--served-model", "m"])
    assert "--served-model" in capsys.readouterr().err


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
        if path.name in ("options.py", "quick_ray.py"):  # whose options are none of the command line's, or a raylet's
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text()):
            assert option in options, f"{path.name} names {option}"
