"""Every graph against the same step launched kernel by kernel, at the same padded shape: not a bit may differ."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from models import SHAPES, build, engine
from rows import Row

from pdray.engine.engine import Engine
from pdray.engine.request import EngineRequest
from pdray.engine.step.draws import Draws
from pdray.engine.step.inputs import StepInputs, StepShape
from pdray.engine.step.lane import Lane
from pdray.engine.step.layer_groups import OnGroup
from pdray.kernels.sampling.sample import SamplingMetadata, SamplingRow, sample
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams

NUM_REQUESTS = 40


class Comparison:
    """Runs each step that a graph would run twice: launched one by one first, from the same state.

    Attributes:
        shapes: how often each was compared. differing: those whose logits or tokens were not equal.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.shapes: Counter[StepShape] = Counter()
        self.differing: list[str] = []
        self.unwrapped = lane.launch
        lane.launch = self.launch  # type: ignore[method-assign]

    @torch.inference_mode()
    def launch(self, inputs: StepInputs, on_group: OnGroup | None) -> Draws:
        if self.lane.graphs is None or inputs.shape not in self.lane.graphs:
            return self.unwrapped(inputs, on_group)
        sampled = self.lane.sampled.clone()
        num_decodes = inputs.shape.num_seqs if inputs.shape.is_decode else 0
        captured = replace(inputs.attention, query_lens=[], kv_lens=[], num_decodes=num_decodes)  # as a graph knows it
        logits = self.lane.compute(inputs._replace(attention=captured)).clone()
        drawn = self.lane.sampled.clone()
        self.lane.sampled.copy_(sampled)
        draws = self.unwrapped(inputs, on_group)
        num = len(inputs.num_logprobs)
        graph = self.lane.graphs.logits
        name = str(tuple(inputs.shape))
        self.shapes[inputs.shape] += 1
        if not (torch.equal(graph[:num], logits[:num]) and torch.equal(self.lane.sampled[:num], drawn[:num])):
            self.differing.append(name)
        return draws


def requests() -> list[EngineRequest]:
    """Prompts of all lengths, answers that end one after the other."""
    generator = torch.Generator().manual_seed(2)
    return [
        EngineRequest(
            number,
            torch.randint(5, 1024, (1 + 17 * number % 301,), generator=generator).tolist(),
            SamplingParams(temperature=0.8, seed=number, max_tokens=3 + 2 * number, ignore_eos=True),
        )
        for number in range(NUM_REQUESTS)
    ]


def check_graphs() -> Iterator[Row]:
    """bfloat16, while requests come one after the other, so that prompts join a batch that decodes."""
    for name in ("Qwen3 16/8 d128", "Llama 9/3 d64"):
        with tempfile.TemporaryDirectory() as temporary:
            build(*SHAPES[name], Path(temporary))
            settings = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "num_kv_blocks": 1000}
            running = engine(Path(temporary), "bfloat16", **settings)
        comparison = Comparison(running.lane)
        waiting = requests()
        while waiting or running.has_work():
            for request in waiting[: 1 + len(waiting) % 3]:
                running.add(waiting.pop(waiting.index(request)))
            running.step()
        for length in (1000, 1500, 1900):  # long prompts, the first alone and the others beside what they decode
            tokens = torch.randint(5, 1024, (length,), generator=torch.Generator().manual_seed(length)).tolist()
            running.add(EngineRequest(1000 + length, tokens, SamplingParams(seed=1, max_tokens=20, ignore_eos=True)))
            for _ in range(5):
                running.step()
        while running.has_work():
            running.step()
        kinds = Counter("decode" if shape.is_decode else "with prompts" for shape in comparison.shapes)
        split = sum(shape.is_split for shape in comparison.shapes)
        shapes = f"{dict(kinds)} shapes, {split} of them split at fresh prompts"
        figure = f"{sum(comparison.shapes.values())} steps of {shapes}; differ: {comparison.differing[:3]}"
        ok = not comparison.differing and min(kinds["decode"], kinds["with prompts"]) >= 3
        yield Row(f"graphs, {name}", figure, "all equal", ok)
        running.lane.launch = comparison.unwrapped  # type: ignore[method-assign]
        yield check_settings(name, running)


SETTINGS = (
    {"temperature": 0.8},
    {"temperature": 0.0, "frequency_penalty": 0.4},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 5},
    {"temperature": 1.1, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.7, "presence_penalty": 0.8, "logprobs": 20, "min_tokens": 6, "stop_token_ids": tuple(range(300))},
    {"temperature": 0.8, "allowed_token_ids": tuple(range(40, 700, 3)), "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.0, "allowed_token_ids": tuple(range(100, 900))},
    {"temperature": 0.9, "logit_bias": {i: (i % 7) / 2 - 1 for i in range(3, 900)}, "top_k": 40},
    {"temperature": 0.0, "logit_bias": {5: 100.0, 6: 99.5}, "frequency_penalty": 1.5},
    {"temperature": 0.9, "prompt_logprobs": 3, "logprobs": 4},  # its prompts' steps are launched kernel by kernel
)


def check_settings(name: str, running: Engine) -> Row:
    """Draws of every kind in one batch, each against the reference on its logits and the tokens before it."""
    logits: dict[tuple[object, int], torch.Tensor] = {}

    def record(rows: torch.Tensor) -> None:
        draws = [draw for chunk in running._scheduler.plans_in_flight[-1].chunks for draw in chunk.draws]
        for draw, row in zip(draws, rows.cpu(), strict=True):
            logits[draw.sequence.request.key, draw.position] = row

    running.lane.on_logits = record
    tokens: dict[object, list[SampledToken]] = {}
    asked = [
        replace(
            request, params=SamplingParams(seed=7 + i, max_tokens=30, ignore_eos=True, **SETTINGS[i % len(SETTINGS)])
        )
        for i, request in enumerate(requests())
    ]
    for request in asked:
        running.add(request)
    while running.has_work():
        for update in running.step():
            tokens.setdefault(update.key, []).extend(update.tokens)
    running.lane.on_logits = None
    num, wrong = 0, []
    for request in asked:
        ids = [token.token_id for token in tokens[request.key]]
        for position, token in enumerate(tokens[request.key]):
            is_early = position < request.params.min_tokens
            banned = (*running._scheduler.limits.eos_token_ids, *request.params.stop_token_ids) if is_early else ()
            if (allowed := request.params.allowed_token_ids) is not None:
                banned = tuple(set(range(logits[request.key, position].shape[-1])) - set(allowed))
            seed = request.params.seed or 0
            row = SamplingRow(request.params, seed, position, request.prompt_token_ids, ids[:position], banned)
            expected = sample(logits[request.key, position][None], SamplingMetadata.build([row]))
            same = int(expected.token_ids[0]) == token.token_id
            if same and expected.logprobs is not None and token.logprobs is not None:
                top = expected.logprobs.top_token_ids[0].tolist()
                same = [i for i in top if i != token.token_id] == [i for i in token.logprobs if i != token.token_id]
                same &= abs(token.logprobs[token.token_id].logprob - float(expected.logprobs.sampled[0])) < 1e-4
            num += 1
            wrong += [] if same else [f"{request.key}:{position}"]
    return Row(
        f"draws of every kind, {name}", f"{num} draws; differ: {wrong[:4]}", "all equal", not wrong and num > 900
    )
