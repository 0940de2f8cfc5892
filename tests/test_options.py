"""Options of the command line against the fields that they set."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from pdray.config import Config
from pdray.errors import ConfigError, InvalidRequestError
from pdray.options import (
    NOT_SAMPLING_OPTIONS,
    add_config_arguments,
    add_sampling_arguments,
    config_from_args,
    option_name,
    sampling_from_args,
)
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
    **dict.fromkeys(("decode_attention_sm", "decode_ffn_sm", "decode_micro_batches"), {"decode_pipeline": "on"}),
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
        (["--prefill-num-gpus", "2"], "at most 1: for workers of several GPUs set tensor_parallel_size"),
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
