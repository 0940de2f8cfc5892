"""The `pdray` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import pdray
from pdray.errors import ConfigError, PdrayError
from pdray.health import wait_until_ready
from pdray.interrupts import INTERRUPTED, interrupts_end_the_process
from pdray.options import add_config_arguments, add_sampling_arguments, config_from_args, sampling_from_args
from pdray.vllm_flags import add_vllm_flags, check_vllm_flags, normalized


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error, 2 for a wrong option, 130 for Ctrl-C."""
    with interrupts_end_the_process():
        args = build_parser().parse_args(normalized(sys.argv[1:] if argv is None else argv))
    try:
        return int(args.run(args))
    except ConfigError as error:
        print(f"pdray {args.command}: {error}", file=sys.stderr)
        return 2
    except PdrayError as error:
        print(f"pdray {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # as of `pdray status | head`; Python would complain again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Parser(argparse.ArgumentParser):
    """Takes no beginning of an option's name for the option, as argparse would."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options. Nothing heavy is imported until a command runs."""
    parser = _Parser(prog="pdray", description="Prefill/decode-disaggregated LLM serving on Ray.")
    parser.add_argument("--version", action="version", version=f"pdray {pdray.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over an OpenAI-compatible API, until Ctrl-C")
    serve.add_argument("model", nargs="?", metavar="MODEL", help="Hugging Face id, folder, .gguf file, or config.json")
    serve.add_argument("--model", dest="named_model", metavar="MODEL", help="the same, as an option")
    serve.add_argument("--host", default="127.0.0.1", help="address of the HTTP server (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port of the HTTP server (default: 8000)")
    serve.add_argument("--name", default="pdray", help="of the Serve application (default: pdray)")
    serve.add_argument(
        "--replace", action="store_true", help="replace pdray's application of that name, if there is one"
    )
    serve.add_argument("--num-routers", type=int, default=1, help="processes that answer HTTP requests (default: 1)")
    _add_address(serve, "Ray cluster to join; `local` starts one; default: a running one, else start one")
    add_config_arguments(serve)
    add_vllm_flags(serve)
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="complete prompts and print the answers")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--model", help="Hugging Face id, folder, .gguf file, or config.json")
    generate.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    generate.add_argument("--timings", action="store_true", help="print where each request's time went")
    _add_address(generate, "Ray cluster to join; default: a running one, else start one")
    add_sampling_arguments(generate)
    add_config_arguments(generate)
    generate.set_defaults(run=_generate)

    status = commands.add_parser("status", help="show applications, workers, queues, blocks and leases")
    _add_address(status, "Ray cluster to look at; default: the running one")
    status.add_argument("--json", action="store_true", help="everything, for programs")
    status.add_argument("--leases", action="store_true", help="list every lease of every decode worker")
    status.add_argument("--check", action="store_true", help="check the workers' block accounting; exit 1 if it is off")
    status.set_defaults(run=_status)

    stop = commands.add_parser("stop", help="delete pdray's applications and stop their workers; Ray keeps running")
    _add_address(stop, "Ray cluster to act on; default: the running one")
    stop.add_argument("--name", help="only this application")
    stop.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        help="seconds until giving up, beyond graceful_shutdown_timeout_s (default: 60)",
    )
    stop.set_defaults(run=_stop)

    wait = commands.add_parser("wait", help="return when a server is ready to answer")
    wait.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: http://127.0.0.1:8000)")
    wait.add_argument("--timeout", type=float, default=600.0, help="seconds until giving up (default: 600)")
    wait.set_defaults(run=_wait)

    _add_bench(commands.add_parser("bench", help="measure"))
    return parser


def _add_address(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--address", help=text)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from pdray.bench import handover, kernels, mux, offline, pipeline, serve, transfer
    from pdray.bench.shapes import command as shapes

    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, module, text in (
        ("serve", serve, "load a running OpenAI-compatible server"),
        ("offline", offline, "generation speed without a server"),
        ("kernels", kernels, "every operation of a step against what the device can do"),
        ("transfer", transfer, "how fast KV blocks get from one worker to another"),
        ("handover", handover, "what it costs an answer that its prompt ran on another device"),
        ("shapes", shapes, "the same load on several arrangements of workers"),
        ("mux", mux, "prompts and decodes beside each other on one GPU"),
        ("pipeline", pipeline, "decode steps in micro-batches, attention beside feed-forward"),
    ):
        kind_parser = kinds.add_parser(name, help=text)
        module.add_arguments(kind_parser)
        kind_parser.set_defaults(run=module.main)


def _serve(args: argparse.Namespace) -> int:
    check_vllm_flags(args)
    config = config_from_args(args)
    if args.num_routers < 1:
        raise ConfigError(f"--num-routers {args.num_routers} must be at least 1")
    with interrupts_end_the_process():
        from pdray.serve_command import serve
    return serve(
        config,
        name=args.name,
        host=args.host,
        port=args.port,
        address=args.address,
        replace=args.replace,
        num_routers=args.num_routers,
    )


def _status(args: argparse.Namespace) -> int:
    with interrupts_end_the_process():
        from pdray.cluster_commands import status
    return status(args.address, as_json=args.json, leases=args.leases, check=args.check)


def _stop(args: argparse.Namespace) -> int:
    with interrupts_end_the_process():
        from pdray.cluster_commands import stop
    return stop(args.address, name=args.name, timeout_s=args.timeout)


def _generate(args: argparse.Namespace) -> int:
    params = sampling_from_args(args, max_tokens=128)
    config = config_from_args(args).model_dump(exclude_unset=True)
    with interrupts_end_the_process():
        from pdray.llm import LLM
    with LLM(ray_address=args.address, **config) as llm:
        if args.chat:
            outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in args.prompts], params)
        else:
            outputs = llm.generate(args.prompts, params)
    for prompt, output in zip(args.prompts, outputs, strict=True):
        for completion in output.outputs:
            print(f"Prompt: {prompt!r}\nAnswer: {completion.text!r} ({completion.finish_reason})")
    if args.timings:
        from dataclasses import asdict

        from pdray.bench.timings import breakdown_table

        print(breakdown_table({f"prompt {index}": asdict(output.timings) for index, output in enumerate(outputs)}))
    return 0


def _wait(args: argparse.Namespace) -> int:
    wait_until_ready(args.url, args.timeout, on_reason=lambda reason: print(f"waiting: {reason}", flush=True))
    print(f"{args.url} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
