"""Partitions of the SMs: where kernels really ran, and that two lanes on them say what one lane says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from models import BFLOAT16_FACTOR, GPU, NUM_OUTPUTS, SHAPES, build, engine_conftest, ours, reference
from models import requests as model_requests
from rows import Row

from pdray.config import Config
from pdray.engine.mux.costs import Arrangement
from pdray.engine.request import EngineRequest
from pdray.engine.step.lane import Lane
from pdray.kernels.green_context import UnavailableError, open_splits, split_sms
from pdray.models import load_model
from pdray.sampling_params import SamplingParams

SHAPE = "Qwen3 16/8 d128"
SIZES = (16, 64)
NUM_REQUESTS = 24


@triton.jit
def mark_kernel(seen_ptr, turns):
    """Each program notes its SM, and stays there for a while."""
    row = tl.arange(0, 32)
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r,r", [row], dtype=tl.int32, is_pure=False, pack=1)
    x = row.to(tl.float32)
    for _ in range(turns):
        x = x * 1.0001 + 0.5
    tl.store(seen_ptr + sm, tl.where(x >= 0, 1, 0))


def mark(seen: torch.Tensor, programs: int = 8192, turns: int = 2000) -> None:
    """Set seen[i] for every SM i that the current stream's kernels run on."""
    mark_kernel[(programs,)](seen, turns, num_warps=1)


def marked(seen: torch.Tensor) -> set[int]:
    return set(seen.nonzero().flatten().tolist())


def check_partitions() -> Iterator[Row]:
    """Streams, graphs, lanes of an engine; equality; fall-backs."""
    total = torch.cuda.get_device_properties(GPU).multi_processor_count
    try:
        split_sms(GPU, 16).close()
    except UnavailableError as error:
        yield Row("partitions", str(error), "available", None)
        return
    mark(torch.zeros(256, dtype=torch.int32, device=GPU))  # compiled, and loaded
    for num_sms in SIZES:
        yield streams_row(num_sms, total)
    yield bad_size_row(total)
    with tempfile.TemporaryDirectory() as temporary:
        model = build(*SHAPES[SHAPE], Path(temporary))
        for num_sms in SIZES:
            yield from engine_rows(Path(temporary), num_sms)
        yield bfloat16_row(Path(temporary), model)


def streams_row(num_sms: int, total: int) -> Row:
    """Both streams at once, launched and from a graph that is replayed on another stream."""
    with split_sms(GPU, num_sms) as split:
        seen = [torch.zeros(256, dtype=torch.int32, device=GPU) for _ in range(4)]
        streams = split.first.stream, split.rest.stream
        torch.cuda.synchronize()
        graphs = []
        for stream, flags in zip(streams, seen[2:], strict=True):
            with torch.cuda.stream(stream):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin()
                mark(flags)
                graph.capture_end()
                graphs.append(graph)
        for stream, flags in zip(streams, seen[:2], strict=True):
            with torch.cuda.stream(stream):
                mark(flags)
        torch.cuda.synchronize()
        for graph in graphs:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.replay()
        torch.cuda.synchronize()
        found = [marked(flags) for flags in seen]
        del graphs, graph
    sizes = [len(sms) for sms in found]
    ok = sizes == [num_sms, total - num_sms] * 2 and not found[0] & found[1] and not found[2] & found[3]
    shared = len(found[0] & found[1]) + len(found[2] & found[3])
    return Row(f"streams of {num_sms} SMs and the rest", f"SMs {sizes}, {shared} shared", "apart", ok)


def bad_size_row(total: int) -> Row:
    """A size that the device does not hand out: one line, plain streams."""
    splits = open_splits(GPU, [13])
    reason = splits[0].unavailable or ""
    ok = len(splits) == 1 and splits[0].first.num_sms == total and "13" in reason
    return Row("13 SMs", reason, "refused, plain streams", ok)


def mux(folder: Path, dtype: str, **settings: Any) -> Any:
    base = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "num_kv_blocks": 1200}
    base |= {"mode": "colocated", "sm_partition": "on"}
    config = Config(model=str(folder), dtype=dtype, device="cuda", skip_tokenizer_init=True, **base | settings)
    engine = engine_conftest.RecordingMux(config, load_model(config, GPU), GPU)
    while engine.prepare_more():
        pass
    return engine


def plain(folder: Path, dtype: str, **settings: Any) -> Any:
    base = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "num_kv_blocks": 1200, "mode": "colocated"}
    config = Config(model=str(folder), dtype=dtype, device="cuda", skip_tokenizer_init=True, **base | settings)
    return engine_conftest.RecordingEngine(config, load_model(config, GPU), GPU)


def requests() -> list[EngineRequest]:
    """Prompts of all lengths, some penalised, so that lanes hand histories over."""
    generator = torch.Generator().manual_seed(5)
    return [
        EngineRequest(
            number,
            torch.randint(5, 1024, (1 + 71 * number % 900,), generator=generator).tolist(),
            SamplingParams(
                temperature=0.7 * (number % 2),
                seed=number,
                max_tokens=60 + number,
                ignore_eos=True,
                repetition_penalty=1.1 if number % 3 == 0 else 1.0,
            ),
        )
        for number in range(NUM_REQUESTS)
    ]


def serve(engine: Any, wanted: list[EngineRequest], every: int = 4) -> Any:
    waiting, steps = list(wanted), 0
    while waiting or engine.has_work():
        if waiting and steps % every == 0:
            engine.add(waiting.pop(0))
        engine.step()
        steps += 1
    return engine


@contextmanager
def marks_in_steps() -> Iterator[dict[int, torch.Tensor]]:
    """Every step that is launched or captured within also marks its SMs; by the stream that it was made on."""
    seen: dict[int, torch.Tensor] = {}
    compute = Lane.compute

    def marking(self: Lane, *arguments: Any, **named: Any) -> torch.Tensor:
        logits = compute(self, *arguments, **named)
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in seen:
            assert not torch.cuda.is_current_stream_capturing()
            seen[stream] = torch.zeros(256, dtype=torch.int32, device=GPU)
        mark(seen[stream], programs=2048, turns=200)
        return logits

    Lane.compute = marking  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Lane.compute = compute  # type: ignore[method-assign]


def engine_rows(folder: Path, num_sms: int) -> Iterator[Row]:
    """float32: two lanes on partitions give the tokens of one on the whole device, and keep to their SMs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = serve(plain(folder, "float32"), requests())
    with marks_in_steps() as seen:
        running = mux(folder, "float32", decode_sms=num_sms)
        torch.cuda.synchronize()
        for flags in seen.values():
            flags.zero_()
        serve(running, requests())
        torch.cuda.synchronize()
        sides = [
            marked(seen[place.stream.cuda_stream])
            for place in running._partitions.places(num_sms)
            if place.stream is not None
        ]
    same = sum(running.ids(r.key) == expected.ids(r.key) for r in requests())
    beside = sum(launch.lane.name == "MAIN" and launch.num_pieces > 0 for launch in running.launches)
    yield Row(
        f"two lanes, {num_sms} SMs for decodes, float32",
        f"{same} of {NUM_REQUESTS} the same; {beside} steps beside {running.split_state().num_pieces} pieces",
        "all, some",
        same == NUM_REQUESTS and beside > 20,
    )
    total = torch.cuda.get_device_properties(GPU).multi_processor_count
    sizes = [len(side) for side in sides]
    ok = len(sides) == 2 and not sides[0] & sides[1] and 0 < sizes[0] <= num_sms and 0 < sizes[1] <= total - num_sms
    yield Row(
        f"SMs of its two lanes, {num_sms} for decodes", f"{sizes}, {len(sides[0] & sides[1])} shared", "apart", ok
    )
    running.controller.fixed = Arrangement(decode_sms=num_sms)
    running.close()
    running.assert_empty()


def bfloat16_row(folder: Path, model: Any) -> Row:
    """Teacher-forced logits against transformers in float32, as one lane's in tests/gpu/models.py."""
    running = serve(mux(folder, "bfloat16", decode_sms=SIZES[-1], max_num_batched_tokens=128), model_requests(), 6)
    right = [reference(model, running, request) for request in model_requests()]
    theirs = [reference(model.to(torch.bfloat16), running, request) for request in model_requests()]
    error = sum((ours(running, r) - e).norm().item() for r, e in zip(model_requests(), right, strict=True))
    allowed = BFLOAT16_FACTOR * sum((t - e).norm().item() for t, e in zip(theirs, right, strict=True))
    running.close()
    figure = f"error {error:.2f} of {len(right)} x {NUM_OUTPUTS} rows"
    return Row("two lanes, bfloat16", figure, f"<= {allowed:.2f}", error <= allowed)
