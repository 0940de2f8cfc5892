"""vLLM's flags on `pdray serve`: renamed where pdray has the same, taken where they ask for what is so anyway, and else
refused with pdray's word for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from pdray.errors import ConfigError


class Same(NamedTuple):
    """What pdray does anyway, and so one of these values may be asked for; without values, whatever it says.

    Attributes:
        values: as on the command line, in lower case. A switch has "true".
        instead: what to do where another is wanted.
    """

    values: tuple[str, ...] = ()
    instead: str = ""
    is_switch: bool = False


class Renamed(NamedTuple):
    """Another name of one of pdray's options."""

    option: str


def _one(instead: str) -> Same:
    return Same(("1",), instead)


def _never(instead: str) -> Same:
    return Same(("false",), instead, is_switch=True)


ANY_SWITCH = Same(is_switch=True)
NO_LORA = _never("adapters are not supported; merge them into the model's weights")
NO_TLS = Same(("none",), "pdray speaks plain HTTP; end TLS in a proxy before it")
WORKERS = "set --num-prefill-workers and --num-decode-workers"

REFUSED = "vllm_refused"
NEGATION = "no-"

FLAGS: dict[str, Same | Renamed] = {
    # names
    "num-gpu-blocks-override": Renamed("num-kv-blocks"),
    "max-num-reqs": Renamed("max-num-seqs"),
    "disable-cuda-graph": Renamed("enforce-eager"),
    "model-name": Renamed("served-model-name"),
    "mem-fraction-static": Renamed("gpu-memory-utilization"),
    "context-length": Renamed("max-model-len"),
    # parallelism
    "tp-size": Renamed("tensor-parallel-size"),
    "pipeline-parallel-size": _one("pipeline parallelism is not supported; set --tensor-parallel-size"),
    "data-parallel-size": _one(f"for replicas of the model {WORKERS}"),
    "data-parallel-size-local": _one(f"for replicas of the model {WORKERS}"),
    "decode-context-parallel-size": _one("contexts are not divided; set --tensor-parallel-size"),
    "enable-expert-parallel": _never("mixtures of experts are not supported"),
    "distributed-executor-backend": Same(("ray", "mp", "uni"), "workers are Ray actors"),
    "api-server-count": _one("routers are replicas of the Serve deployment"),
    "nnodes": _one(f"join a Ray cluster with --address, and {WORKERS}"),
    # model
    "trust-remote-code": _never("no code of a model's repository is run"),
    "tokenizer-mode": Same(("auto", "hf"), "set --tokenizer to a folder with a tokenizer.json"),
    "revision": Same(("none", "main"), "download the revision, and give its folder as MODEL"),
    "tokenizer-revision": Same(("none", "main"), "download the revision, and give its folder as --tokenizer"),
    "code-revision": Same(("none", "main"), "no code of a model's repository is run"),
    "download-dir": Same(("none",), "set HF_HOME in --worker-env, and here"),
    "quantization": Same(("none",), "only GGUF files are quantised"),
    "kv-cache-dtype": Same(("auto",), "the KV cache has the model's dtype"),
    "hf-overrides": Same(("none", "{}"), "edit the model's config.json"),
    "rope-scaling": Same(("none", "{}"), "edit the model's config.json"),
    "runner": Same(("auto", "generate"), "only generation is supported"),
    "task": Same(("auto", "generate"), "only generation is supported"),
    "convert": Same(("auto", "none"), "only generation is supported"),
    "chat-template": Same(("none",), "the model's own template is used; edit its tokenizer_config.json"),
    "chat-template-content-format": Same(("auto",), "what the template shows decides"),
    "limit-mm-per-prompt": Same(("none", "{}"), "only text is supported"),
    "enable-lora": NO_LORA,
    "lora-modules": Same(("none",), NO_LORA.instead),
    "speculative-config": Same(("none",), "speculative decoding is not supported"),
    # engine
    "swap-space": Same(("0", "4"), "KV is not swapped; a preempted sequence is computed again"),
    "cpu-offload-gb": Same(("0",), "weights stay on their device"),
    "enable-chunked-prefill": Same(
        ("true",), "prompts are always computed in chunks; see --max-num-batched-tokens", True
    ),
    "scheduling-policy": Same(("fcfs", "priority"), "requests go by priority, then first come"),
    "max-logprobs": Same(("20",), "a request may ask for 20"),
    "logprobs-mode": Same(("raw_logprobs",), "log-probabilities are those of the raw logits"),
    "disable-sliding-window": ANY_SWITCH,
    "compilation-config": Same(("none", "0", "{}"), "see --enforce-eager"),
    "attention-backend": Same(("none", "auto"), "kernels are pdray's own"),
    "structured-outputs-config": Same(("none", "{}"), "there is one backend"),
    "guided-decoding-backend": Same(("auto",), "there is one backend"),
    "kv-transfer-config": Same(
        ("none",), "disaggregation is on by itself: see --mode, --channel and the workers' counts"
    ),
    "kv-events-config": Same(("none",), "routers learn what workers have cached by themselves"),
    # API
    "enable-auto-tool-choice": Same(
        ("true",), "tools are taken by themselves; --tool-call-parser none refuses them", True
    ),
    "exclude-tools-when-tool-choice-none": Same(("true",), "they always are", True),
    "disable-log-requests": Same(("true",), "see --log-prompts", True),
    "enable-log-requests": _never("see --log-prompts"),
    "disable-log-stats": ANY_SWITCH,
    "disable-uvicorn-access-log": ANY_SWITCH,
    "disable-frontend-multiprocessing": ANY_SWITCH,
    "disable-fastapi-docs": ANY_SWITCH,
    "enable-server-load-tracking": Same(("true",), "/load always answers", True),
    "enable-prompt-tokens-details": Same(("true",), "usage always has them", True),
    "enable-force-include-usage": _never("send stream_options.include_usage in requests"),
    "enable-request-id-headers": ANY_SWITCH,
    "return-tokens-as-token-ids": _never("send return_token_ids in requests"),
    "uvicorn-log-level": Same(("debug", "info", "warning", "error", "critical", "trace"), "it must be one of these"),
    "allow-credentials": _never("keys travel in the Authorization header"),
    "allowed-methods": Same(("*", '["*"]'), "all that there are are allowed"),
    "allowed-headers": Same(("*", '["*"]'), "all are allowed"),
    "response-role": Same(("assistant",), "answers are the assistant's"),
    "root-path": Same(("none", ""), "the proxy in front must strip it"),
    "middleware": Same(("none",), "put a proxy in front"),
    "ssl-keyfile": NO_TLS,
    "ssl-certfile": NO_TLS,
    "ssl-ca-certs": NO_TLS,
    "uds": Same(("none",), "set --host and --port"),
    "seed": Same(("0", "none"), "requests name their seeds; that of dummy weights is --weights-seed"),
}
SHORT = {
    "tp-size": "-tp",
    "pipeline-parallel-size": "-pp",
    "data-parallel-size": "-dp",
    "quantization": "-q",
}


class _Checked(argparse.Action):
    """Takes a flag, and notes where it asks for something else than what is so anyway."""

    def __init__(self, *args: Any, same: Same, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._same = same

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        same, name = self._same, option_string or ""
        given = str(values)
        if same.is_switch:
            given = "false" if name[2:].startswith(NEGATION) else "true"
        if same.values and given.lower() not in same.values:
            shown = name if same.is_switch else f"{name} {given}"
            refused = getattr(namespace, REFUSED, [])
            setattr(namespace, REFUSED, [*refused, f"{shown} is not supported: {same.instead}"])


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """All of them, without help texts of their own: they would hide pdray's."""
    for name, flag in FLAGS.items():
        names = [f"--{name}", *([SHORT[name]] if name in SHORT else [])]
        if isinstance(flag, Renamed):
            for each in names:
                alias(parser, each, f"--{flag.option}")
            continue
        if flag.is_switch:
            names.append(f"--{NEGATION}{name}")
        parser.add_argument(
            *names,
            action=_Checked,
            same=flag,
            nargs=0 if flag.is_switch else None,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def check_vllm_flags(args: argparse.Namespace) -> None:
    """Raises:
    ConfigError: some ask for what pdray does not do.
    """
    if refused := getattr(args, REFUSED, []):
        raise ConfigError("; ".join(refused))
    for field in ("served_model_name", "api_key", "allowed_origins"):
        values = getattr(args, f"config_{field}", None)
        if isinstance(values, list) and len(values) > 1 and args.model is None:
            raise ConfigError(
                f"--{field.replace('_', '-')} takes several values, and may have taken MODEL: give MODEL first"
            )


def alias(parser: argparse.ArgumentParser, name: str, option: str) -> None:
    """Another name of an option that is there."""
    action = parser._option_string_actions[option]
    parser._option_string_actions[name] = action


def normalized(words: Sequence[str]) -> list[str]:
    """Options' names may be written with underscores, as for vLLM."""
    result = []
    for word in words:
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return result
