"""Command line options made from Config's and SamplingParams' fields, one to one, so that they cannot differ."""

from __future__ import annotations

import argparse
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import msgspec
from pydantic import ValidationError

from pdray.config import Config
from pdray.errors import ConfigError
from pdray.sampling_params import SamplingParams

# Fields whose plain names mean something else on a command line: the HTTP host, and the sampling seed.
RENAMED = {"host": "worker-host", "seed": "weights-seed"}
SIZES = ("max_model_len", "kv_cache_memory_bytes", "max_num_batched_tokens", "num_kv_blocks")
SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)")
NOT_SAMPLING_OPTIONS = ("stop_token_ids", "skip_special_tokens", "include_stop_str_in_output")
METAVARS = {"integer": "N", "number": "X", "string": "TEXT"}
PARSERS: dict[str, Callable[[str], Any]] = {"integer": int, "number": float, "string": str}


def option_name(field: str) -> str:
    """The option that sets a field of Config: num_kv_blocks → --num-kv-blocks."""
    return "--" + RENAMED.get(field, field.replace("_", "-"))


def add_config_arguments(parser: argparse.ArgumentParser, *, skip: tuple[str, ...] = ("model",)) -> None:
    """An option for every field of Config that is not in `skip`; a flag that is not given sets nothing."""
    group = parser.add_argument_group("configuration", "fields of pdray.Config")
    for field, schema in Config.model_json_schema()["properties"].items():
        if field in skip:
            continue
        default = schema.get("default") or None if schema.get("type") == "object" else schema.get("default")
        text = schema.get("description", field.replace("_", " "))
        text += (
            ""
            if default in (None, "")
            else f" (default: {str(default).lower() if default is True or default is False else default})"
        )
        add: dict[str, Any] = {"dest": f"config_{field}", "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        kinds = [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]
        kind = kinds[0]
        items = next((s["items"]["type"] for s in kinds if s["type"] == "array"), None)
        if items == "string":
            group.add_argument(option_name(field), nargs="*", type=_text_or_list, metavar="TEXT", action=Several, **add)
        elif kind["type"] == "object":
            group.add_argument(option_name(field), nargs="+", type=_pair, metavar="NAME=VALUE", **add)
        elif kind["type"] == "boolean":
            group.add_argument(option_name(field), action=argparse.BooleanOptionalAction, **add)
        elif "enum" in kind:
            choices = [str(choice) for choice in kind["enum"]]
            group.add_argument(option_name(field), choices=choices, type=str, **add)
        else:
            parse = parse_size if field in SIZES else PARSERS[kind["type"]]
            group.add_argument(option_name(field), type=parse, metavar=METAVARS[kind["type"]], **add)


def parse_size(text: str) -> int | None:
    """A number that may be written as vLLM takes it: 32k is 32,000 and 32K 32,768; auto is the default.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if text in ("auto", "-1"):
        return None
    if (found := SIZE.fullmatch(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 32768, 32k (32,000), 32K (32,768) or auto")
    unit = found[2]
    factor = 1 if not unit else (1000 if unit.islower() else 1024) ** ("kmgt".index(unit.lower()) + 1)
    if not (size := Decimal(found[1]) * factor) == int(size):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(size)


class Several(argparse.Action):
    """One or more values, or one JSON list of them as vLLM takes it: a list, but for a single one."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if len(values) == 1 and isinstance(values[0], list):
            setattr(namespace, self.dest, values[0])
        else:
            setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _text_or_list(text: str) -> str | list[Any]:
    if not text.startswith("["):
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON list: {error}") from None
    return list(value)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config that the command line set; an enum of numbers is text here, and pydantic reads it.

    Raises:
        ConfigError: two models are named.
    """
    values = {name.removeprefix("config_"): value for name, value in vars(args).items() if name.startswith("config_")}
    models = {name for name in (getattr(args, "model", None), getattr(args, "named_model", None)) if name}
    if len(models) > 1:
        raise ConfigError(f"two models are named, {args.model} and --model {args.named_model}; give one of them")
    if models:
        values["model"] = models.pop()
    for name in ("worker_env", "worker_resources"):
        if name in values:
            values[name] = dict(values[name])
    for name in SIZES:
        if values.get(name, 0) is None and name == "max_num_batched_tokens":
            del values[name]  # auto
    if isinstance(values.get("allowed_origins"), str):
        values["allowed_origins"] = [values["allowed_origins"]]
    if "block_size" in values:
        values["block_size"] = int(values["block_size"])
    return values


def options_of(values: Mapping[str, Any]) -> list[str]:
    """The options that set these fields of Config: what config_values() makes of them is the same again."""
    options = []
    for field, value in values.items():
        name = option_name(field)
        if isinstance(value, bool):
            options.append(name if value else f"--no-{name.removeprefix('--')}")
        elif isinstance(value, Mapping):
            options += [name, *(f"{key}={each}" for key, each in value.items())]
        elif isinstance(value, list):
            options.append(f"{name}={json.dumps(value)}")
        elif value is None:
            options.append(f"{name}=auto")
        else:
            options.append(f"{name}={value}")
    return options


def config_from_args(args: argparse.Namespace) -> Config:
    """The configuration that the options describe.

    Raises:
        ConfigError: a value out of range; the text names the option.
    """
    return config_from_values(config_values(args))


def config_from_values(values: Mapping[str, Any]) -> Config:
    """The configuration with these fields.

    Raises:
        ConfigError: a value out of range; the text names the option.
    """
    try:
        return Config(**values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            option = option_name(str(problem["loc"][0])) + ": " if problem["loc"] else ""
            given = f" (given: {problem['input']!r})" if problem["loc"] else ""
            lines.append(f"{option}{problem['msg'].removeprefix('Value error, ')}{given}")
        raise ConfigError("; ".join(lines)) from None


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of SamplingParams that makes sense for text."""
    group = parser.add_argument_group("sampling", "fields of pdray.SamplingParams")
    hints = typing.get_type_hints(SamplingParams)
    for field in msgspec.structs.fields(SamplingParams):
        if field.name in NOT_SAMPLING_OPTIONS:
            continue
        name, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        add: dict[str, Any] = {"dest": f"sampling_{field.name}", "default": argparse.SUPPRESS}
        shown = f"(default: {field.default})"
        if hint is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=shown, **add)
        elif field.name == "stop":
            group.add_argument(name, nargs="+", metavar="TEXT", help="strings that end the answer", **add)
        else:
            members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            number = next(member for member in members if member is not type(None))
            group.add_argument(name, type=number, metavar="N" if number is int else "X", help=shown, **add)


def sampling_from_args(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """Sampling parameters from the options, over `defaults`.

    Raises:
        InvalidRequestError: a value out of range.
    """
    given = {
        name.removeprefix("sampling_"): value for name, value in vars(args).items() if name.startswith("sampling_")
    }
    return SamplingParams(**(defaults | given))
