"""Decode steps in micro-batches: where their halves really ran, and that they say what plain ones say."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from graphs import requests as many_requests
from models import BFLOAT16_FACTOR, GPU, NUM_OUTPUTS, SHAPES, build, ours, reference
from models import requests as model_requests
from partitions import NUM_REQUESTS, mark, marked, mux, plain, requests, serve
from rows import Row

from pdray.engine.pipeline.halves import Half, Halves
from pdray.engine.pipeline.lane import PipelinedLane, Way
from pdray.engine.step.inputs import StepInputs
from pdray.engine.step.layer_groups import OnGroup
from pdray.kernels.green_context import UnavailableError, split_sms

SHAPE = "Qwen3 16/8 d128"
ATTENTION_SMS = (64, 100)


def check_pipeline() -> Iterator[Row]:
    """SMs of both halves, equality in every mode, races, the tuner and its cache, fall-backs."""
    total = torch.cuda.get_device_properties(GPU).multi_processor_count
    try:
        split_sms(GPU, 16).close()
    except UnavailableError as error:
        yield Row("decode pipeline", str(error), "available", None)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    mark(torch.zeros(256, dtype=torch.int32, device=GPU))  # compiled, and loaded
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["PDRAY_CACHE"] = str(folder / "cache")
        model = build(*SHAPES[SHAPE], folder)
        expected = serve(plain(folder, "float32"), requests())
        for attention_sms in ATTENTION_SMS:
            yield sms_row(folder, attention_sms, total)
        for number in (2, 3, 5):
            yield same_row(
                f"{number} micro-batches", pipelined(folder, "float32", decode_micro_batches=number), expected
            )
        running = mux(folder, "float32", decode_sms=32, decode_pipeline="on")
        yield same_row("beside two lanes", running, expected)
        yield race_row(folder)
        yield bfloat16_row(folder, model)
        yield from tuner_rows(folder, expected)
        yield bad_counts_row(folder, expected)


def pipelined(folder: Path, dtype: str, **settings: Any) -> Any:
    return plain(folder, dtype, **{"decode_pipeline": "on"} | settings)


@contextmanager
def marks_in_turns(sizes: tuple[int, int]) -> Iterator[dict[int, torch.Tensor]]:
    """Every turn that is launched or captured within also marks its SMs, by the size of its partition."""
    seen = {size: torch.zeros(256, dtype=torch.int32, device=GPU) for size in sizes}
    turn = Half.turn

    @contextmanager
    def marking(self: Half, before: torch.cuda.Event | None) -> Iterator[torch.cuda.Event | None]:
        with turn(self, before) as done:
            yield done
            if self.num_sms in seen:
                mark(seen[self.num_sms], programs=1024, turns=200)

    Half.turn = marking  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Half.turn = turn  # type: ignore[method-assign]


def sms_row(folder: Path, attention_sms: int, total: int) -> Row:
    sizes = attention_sms, total - attention_sms
    with marks_in_turns(sizes) as seen:
        running = pipelined(folder, "float32", decode_attention_sm=attention_sms)
        torch.cuda.synchronize()
        for flags in seen.values():
            flags.zero_()  # of warm-up
        serve(running, requests())
        torch.cuda.synchronize()
        sides = [marked(seen[size]) for size in sizes]
    running.pipeline.close()
    shared = len(sides[0] & sides[1])
    ok = tuple(map(len, sides)) == sizes and not shared
    return Row(
        f"SMs of a pipeline of {attention_sms} + {sizes[1]}", f"{[*map(len, sides)]}, {shared} shared", "apart", ok
    )


def same_row(name: str, running: Any, expected: Any) -> Row:
    """float32, while requests come and go, so that batches have every size."""
    serve(running, requests())
    same = sum(running.ids(r.key) == expected.ids(r.key) for r in requests())
    steps = running.stats().num_pipelined_steps
    running.pipeline.close()
    figure = f"{same} of {NUM_REQUESTS} the same; {steps} pipelined steps"
    return Row(f"pipeline, {name}, float32", figure, "all, some", same == NUM_REQUESTS and steps > 50)


class InTurn:
    """Runs each pipelined step twice: first its turns one after another on one stream, from the same state.

    Attributes:
        steps: by batch size, padding included. logits, draws: of how many steps they differ.
    """

    def __init__(self, lane: PipelinedLane) -> None:
        self.lane, self.steps, self.logits, self.draws = lane, Counter[int](), 0, 0
        self.unwrapped = lane._run
        lane._run = self.run  # type: ignore[method-assign]

    @torch.inference_mode()
    def run(self, inputs: StepInputs, on_group: OnGroup | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        way = self.lane._way_of(inputs)
        if way is None:
            return self.unwrapped(inputs, on_group)
        halves = Halves(*(Half(None, half.num_sms) for half in way.halves))
        num, sampled = len(inputs.num_logprobs), self.lane.sampled.clone()
        captured = replace(inputs.attention, query_lens=[], kv_lens=[])  # as a graph knows it
        in_turn = self.lane.compute_in(Way(halves, way.num_micro_batches), inputs._replace(attention=captured))
        in_turn, drawn = in_turn[:num].clone(), self.lane.sampled[:num].clone()
        self.lane.sampled.copy_(sampled)
        logits, scores = self.unwrapped(inputs, on_group)
        self.steps[inputs.shape.num_seqs] += 1
        self.logits += not torch.equal(logits[:num], in_turn)
        self.draws += not torch.equal(self.lane.sampled[:num], drawn)
        return logits, scores


def race_row(folder: Path) -> Row:
    """bfloat16: both halves at once give not a bit else than one after the other, at the same shapes and grids.

    Without penalties, whose counts a second draw would raise again.
    """
    running = pipelined(folder, "bfloat16", max_num_seqs=40)
    compared = InTurn(running.lane)
    running.run(*many_requests())
    steps = f"{sum(compared.steps.values())} steps of {sorted(compared.steps)} sequences"
    ok = not compared.logits and not compared.draws and len(compared.steps) >= 5
    del running.lane._run
    running.pipeline.close()
    figure = f"{steps}; {compared.logits} logits, {compared.draws} draws differ"
    return Row("pipeline against its turns one by one, bfloat16", figure, "none", ok)


def bfloat16_row(folder: Path, model: Any) -> Row:
    """Teacher-forced logits against transformers in float32, as plain steps' in tests/gpu/models.py."""
    running = serve(pipelined(folder, "bfloat16", max_num_batched_tokens=128), model_requests(), 6)
    right = [reference(model, running, request) for request in model_requests()]
    theirs = [reference(model.to(torch.bfloat16), running, request) for request in model_requests()]
    error = sum((ours(running, r) - e).norm().item() for r, e in zip(model_requests(), right, strict=True))
    allowed = BFLOAT16_FACTOR * sum((t - e).norm().item() for t, e in zip(theirs, right, strict=True))
    running.pipeline.close()
    figure = f"error {error:.2f} of {len(right)} x {NUM_OUTPUTS} rows, {running.stats().num_pipelined_steps} steps"
    return Row("pipeline, bfloat16", figure, f"<= {allowed:.2f}", error <= allowed)


def tuner_rows(folder: Path, expected: Any) -> Iterator[Row]:
    """auto measures once, keeps what it found, and answers as before whatever it chose."""
    cells = []
    for name in ("measured", "kept"):
        running = pipelined(folder, "float32", decode_pipeline="auto")
        began, units, longest = time.perf_counter(), 0, 0.0
        while True:
            unit_began = time.perf_counter()
            more = running.prepare_more()
            longest = max(longest, time.perf_counter() - unit_began)
            if not more:
                break
            units += 1
        took, state = time.perf_counter() - began, running.pipeline.state()
        cells.append((state.num_measured, state.num_won, state.ways))
        serve(running, requests())
        same = sum(running.ids(r.key) == expected.ids(r.key) for r in requests())
        running.pipeline.close()
        figure = (
            f"{state.num_won} of {state.num_measured} cells won, {units} units in {took:.1f} s, longest {longest:.2f}"
        )
        ok = state.num_measured > 5 and same == NUM_REQUESTS and cells[0] == cells[-1]
        ok &= units > state.num_measured if name == "measured" else units < state.num_measured
        yield Row(f"tuner, {name}", f"{figure}; {same} of {NUM_REQUESTS} the same", "same", ok)


def bad_counts_row(folder: Path, expected: Any) -> Row:
    logging.getLogger("pdray.engine.pipeline.pipeline").setLevel(logging.ERROR)
    running = serve(pipelined(folder, "float32", decode_attention_sm=64, decode_ffn_sm=64), requests())
    reason, steps = running.pipeline.state().unavailable or "", running.stats().num_pipelined_steps
    same = all(running.ids(r.key) == expected.ids(r.key) for r in requests())
    return Row("64 + 64 SMs", reason, "refused, plain steps", "128 SMs" in reason and same and steps == 0)
