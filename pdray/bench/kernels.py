"""`pdray bench kernels`: every operation of a step at a model's shapes, and its share of what the device can do.

An operation's floor is the time that its least bytes, or its arithmetic, take: on a GPU at the rates that the floors
of `bench offline` assume (BYTES_PER_S, FLOPS_PER_S of an H100), on a CPU at those measured at the start. On a GPU the
calls are one CUDA graph, so that the time is the device's; its own rates are printed, to judge the shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pdray.bench.rows import BYTES_PER_S, FLOPS_PER_S
from pdray.errors import ConfigError
from pdray.gpu_settings import require_one_rank
from pdray.options import add_config_arguments, config_from_args

if TYPE_CHECKING:
    import torch

    from pdray.bench.kernel_cases import Call, Case

KERNELS = (
    "qkv",
    "o",
    "gate_up",
    "down",
    "lm_head",
    "norm",
    "rotary",
    "activation",
    "embedding",
    "attention",
    "draw",
    "pack",
)
GPU_WORKING_SET = 400e6  # bytes; an H100's L2 holds 50 MB
CPU_WORKING_SET = 64e6
NUM_REPLAYS = 5


class Rates(NamedTuple):
    """A device's measured rates: reading memory, and large matrix products."""

    bytes_per_s: float
    flops_per_s: float


class KernelRow(NamedTuple):
    """Attributes:
    us: of one call. limit: "bytes" or "operations". share: of the floor's speed.
    """

    kernel: str
    shape: str
    us: float
    limit: str
    floor_us: float
    share: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench kernels`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for `pdray serve`; no weights are read")
    parser.add_argument(
        "--kernels", nargs="+", default=["all"], metavar="NAME", help=f"all (default), or some of: {', '.join(KERNELS)}"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[1, 16, 64, 256],
        help="rows of decode steps (default: 1 16 64 256)",
    )
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the rows as JSON")
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Measure what was asked for, print a table, save it."""
    unknown = sorted(set(args.kernels) - {*KERNELS, "all"})
    if unknown:
        raise ConfigError(f"--kernels: no kernel is called {', '.join(unknown)}; there are: all, {', '.join(KERNELS)}")
    if min(args.batch_size) < 1:
        raise ConfigError(f"--batch-size: {min(args.batch_size)} is no number of rows; it must be at least 1")
    rows, measured = run(args)
    if args.save_result:
        from pdray.bench.offline import machine

        result = {"rates": measured._asdict(), "rows": [row._asdict() for row in rows]} | machine()
        args.save_result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run(args: argparse.Namespace) -> tuple[list[KernelRow], Rates]:
    """Rows in the order of KERNELS, and the device's own rates."""
    import torch

    from pdray.bench.kernel_cases import KernelCases
    from pdray.engine.device import select_device
    from pdray.models import load_model_config

    config = config_from_args(args)
    require_one_rank(config, "bench kernels")
    model, device = load_model_config(config), select_device(config)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if not on_gpu:
        torch.set_num_threads(config.num_threads)
    with torch.inference_mode():
        measured = measure_rates(device, dtype)
        limits = Rates(BYTES_PER_S, FLOPS_PER_S) if on_gpu else measured
        print(
            f"this device reads {measured.bytes_per_s / 1e9:,.0f} GB/s and computes {measured.flops_per_s / 1e12:,.2f} "
            f"TFLOP/s; floors take {limits.bytes_per_s / 1e9:,.0f} GB/s and {limits.flops_per_s / 1e12:,.2f} TFLOP/s"
        )
        print("| kernel | shape | us | limit | floor us | share of it |\n|---|---|---|---|---|---|")
        cases = KernelCases(model, dtype, device, args.batch_size, GPU_WORKING_SET if on_gpu else CPU_WORKING_SET)
        rows = []
        for name, make in cases.kinds().items():
            if name in args.kernels or "all" in args.kernels:
                for case in make():
                    rows.append(measure(name, case, limits, device))
                    print(format_row(rows[-1]), flush=True)
    return rows, measured


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of copying a large tensor (which reads as much as it writes) and of a large product of random numbers."""
    import torch

    on_gpu = device.type == "cuda"
    source = torch.ones(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_per_call([lambda: target.copy_(source)], device)
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Rates(2 * source.numel() / copy_s, 2 * size**3 / seconds_per_call([lambda: a @ b], device))


def measure(name: str, case: Case, limits: Rates, device: torch.device) -> KernelRow:
    """One case against its floor."""
    seconds = seconds_per_call(case.calls, device)
    by_bytes, by_operations = case.num_bytes / limits.bytes_per_s, case.operations / limits.flops_per_s
    floor, limit = max((by_bytes, "bytes"), (by_operations, "operations"))
    return KernelRow(name, case.shape, seconds * 1e6, limit, floor * 1e6, floor / seconds)


def seconds_per_call(calls: Sequence[Call], device: torch.device) -> float:
    """Median over a few runs of all calls, one after the other."""
    return _cuda_seconds(calls) if device.type == "cuda" else _cpu_seconds(calls)


def _cpu_seconds(calls: Sequence[Call]) -> float:
    taken = []
    for _ in range(NUM_REPLAYS):
        started = time.perf_counter()
        for call in calls:
            call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) / len(calls)


def _cuda_seconds(calls: Sequence[Call]) -> float:
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    taken = []
    for _ in range(NUM_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken) / len(calls)


def format_row(row: KernelRow) -> str:
    return f"| {row.kernel} | {row.shape} | {row.us:,.1f} | {row.limit} | {row.floor_us:,.1f} | {row.share:.0%} |"
