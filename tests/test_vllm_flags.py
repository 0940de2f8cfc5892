"""What people type for vLLM: taken where it means something here, else refused with pdray's word."""

from __future__ import annotations

from typing import Any

import pytest

from pdray import cli
from pdray.config import Config
from pdray.errors import ConfigError
from pdray.options import config_from_args
from pdray.vllm_flags import FLAGS, Renamed, Same, check_vllm_flags, normalized


def parse(*words: str) -> Config:
    args = cli.build_parser().parse_args(normalized(["serve", *words]))
    check_vllm_flags(args)
    return config_from_args(args)


TWO = {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    "words,expected",
    [
        (["m", "--max-model-len", "32k"], {"max_model_len": 32_000}),
        (["m", "--max-model-len", "32K"], {"max_model_len": 32_768}),
        (["m", "--max-model-len", "25.6k"], {"max_model_len": 25_600}),
        (["m", "--max-model-len", "auto"], {"max_model_len": None}),
        (["m", "--max_model_len=-1"], {"max_model_len": None}),
        (["m", "--kv-cache-memory-bytes", "2G"], {"kv_cache_memory_bytes": 2 * 2**30}),
        (["m", "--num-gpu-blocks-override", "1000"], {"num_kv_blocks": 1000}),
        (["m", "--max-num-batched-tokens", "8k"], {"max_num_batched_tokens": 8000}),
        (["m", "--served-model-name", "a", "b"], {"served_model_name": ["a", "b"]}),
        (["m", "--served_model_name", "a"], {"served_model_name": "a"}),
        (["--served-model-name", "a"], {"served_model_name": "a"}),
        (["m", "--allowed-origins", '["https://a", "https://b"]'], {"allowed_origins": ["https://a", "https://b"]}),
        (["m", "--allowed-origins", "https://a"], {"allowed_origins": ["https://a"]}),
        (["m", "--allowed-origins", "[]"], {"allowed_origins": []}),
        (["m", "--reasoning-parser", "qwen3"], {"reasoning_parser": "qwen3"}),
        (["m", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"], {"tool_call_parser": "hermes"}),
        (["-tp", "1", "m", "--no-trust-remote-code"], {"tensor_parallel_size": 1}),
        (["--tp-size", "2", "m", "--mode", "colocated"], {"tensor_parallel_size": 2, "mode": "colocated"}),
        (["-tp", "2", "m", "--prefill-tensor-parallel-size", "4"], {"prefill_tensor_parallel_size": 4} | TWO),
        (["--tensor-parallel-size", "1", "m", "--uvicorn-log-level", "info", "--disable-log-requests"], {}),
        (["m", "--enable-chunked-prefill", "--quantization", "None", "--distributed-executor-backend", "ray"], {}),
    ],
)
def test_what_is_taken(words: list[str], expected: dict[str, Any]) -> None:
    assert parse(*words) == Config(**({"model": "m"} if "m" in words else {}) | expected)


@pytest.mark.parametrize(
    "words,named",
    [
        (
            ["--tensor-parallel-size", "2", "--channel", "nccl"],
            "channel is nccl, but nccl joins workers of one rank each.* set channel to auto",
        ),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2 is not supported: .*--tensor-parallel-size"),
        (["--trust-remote-code"], "--trust-remote-code is not supported"),
        (["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill .*--max-num-batched-tokens"),
        (["--quantization", "awq"], "--quantization awq .*GGUF"),
        (["--kv-transfer-config", '{"kv_role": "kv_both"}'], "see --mode"),
        (["--seed", "7"], "--weights-seed"),
        (["--enable-lora", "--lora-modules", "a=b"], "--enable-lora .*; --lora-modules a=b "),
        (["--served-model-name", "a", "m"], "give MODEL first"),
        (["--max-model-len", "0"], "--max-model-len"),
    ],
)
def test_what_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(*words)


@pytest.mark.parametrize("text", ["32q", "k", "-5", "1.0001k", "many"])
def test_bad_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--max-model-len={text}")
    assert "--max-model-len" in capsys.readouterr().err


def test_a_refused_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--pipeline-parallel-size", "2"]) == 2
    assert capsys.readouterr().err.startswith("pdray serve: --pipeline-parallel-size 2 is not supported: ")


def test_the_table_says_what_to_do() -> None:
    parser = cli.build_parser()
    for name, flag in FLAGS.items():
        if isinstance(flag, Renamed):
            parser.parse_args(["serve", f"--{name}"] if name == "disable-cuda-graph" else ["serve", f"--{name}", "1"])
        else:
            assert isinstance(flag, Same) and (flag.instead or not flag.values)
