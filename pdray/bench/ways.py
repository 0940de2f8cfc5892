"""Ways to generate that `pdray bench offline` compares: the engine in this process, transformers, and pdray.LLM."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pdray.bench.mixed import Play
from pdray.bench.players import play_engine, play_router
from pdray.bench.rows import Requests
from pdray.config import Config
from pdray.engine.step.times import Spread, StepSpread
from pdray.garbage_collection import quiet_garbage_collection
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pdray.engine.engine import Engine


class Generation(NamedTuple):
    """One timed batch.

    Attributes:
        seconds: start until the last token. first_token_s: start until every prompt has its first token.
        token_ids: the answers, to compare the rows with each other.
        steps: of the engine; of several workers the one with the slowest steps.
    """

    seconds: float
    first_token_s: float
    token_ids: list[list[int]]
    steps: StepSpread | None = None


Generate = Callable[[list[list[int]], list[SamplingParams]], Generation]


@dataclass(frozen=True, slots=True)
class Way:
    """A way that can also be sent requests over time. play: see pdray.bench.mixed.Play."""

    generate: Generate
    play: Play

    def __call__(self, prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
        return self.generate(prompts, params)


@contextlib.contextmanager
def make_engine(config: Config) -> Iterator[Way]:
    """The engine, stepped by this thread: no Ray, no HTTP. The garbage collector is as quiet as in a worker.

    Without a tokenizer its grammars are over a made-up vocabulary.
    """
    import torch

    from pdray.bench.vocabulary import make_vocabulary
    from pdray.engine.device import select_device
    from pdray.engine.grammar.compiler import GrammarCompiler
    from pdray.engine.step.mask_filling import num_fill_threads
    from pdray.ranks.engine import open_engine

    device = select_device(config)
    with open_engine(config, device) as engine:
        if config.skip_tokenizer_init:
            vocabulary = make_vocabulary(engine.model.config.vocab_size)
            engine.grammars = GrammarCompiler(lambda: vocabulary, num_fill_threads(device))
        thresholds = gc.get_threshold()
        quiet_garbage_collection()
        yield _way_of(engine)
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        if device.type == "cuda":
            torch.cuda.synchronize()
            del engine
            gc.collect()
            torch.cuda.empty_cache()


def _way_of(engine: Engine) -> Way:
    from pdray.engine.request import EngineRequest

    def generate(prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
        answers: list[list[int]] = [[] for _ in prompts]
        num_finished, first_token_s = 0, None
        started = time.perf_counter()
        for key, prompt in enumerate(prompts):
            engine.add(EngineRequest(key=key, prompt_token_ids=prompt, params=params[key]))
        while num_finished < len(prompts):
            for update in engine.step():
                assert isinstance(update.key, int)
                answers[update.key] += [token.token_id for token in update.tokens]
                num_finished += update.finished
            if first_token_s is None and all(answers):
                first_token_s = time.perf_counter() - started
        seconds = time.perf_counter() - started
        for key in range(len(prompts)):
            engine.release(key)
        assert first_token_s is not None
        return Generation(seconds, first_token_s, answers, engine.step_times())

    def play(requests: Requests, arrivals: list[float]) -> list[list[float]]:
        return play_engine(engine, requests, arrivals)

    return Way(generate, play)


@contextlib.contextmanager
def make_transformers(config: Config) -> Iterator[Generate]:
    """transformers.generate with its dynamic cache, on the same weights and dtype."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    from pdray.bench.transformers_model import transformers_model
    from pdray.engine.device import select_device
    from pdray.models import load_model

    model = transformers_model(load_model(config, select_device(config)))

    class FirstToken(BaseStreamer):
        """Notes when the second put comes: the first is the prompt, the second the first token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
        streamer = FirstToken()
        inputs = torch.tensor(prompts, device=model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=params[0].max_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
            )
        seconds = time.perf_counter() - started
        return Generation(seconds, streamer.times[1] - started, output[:, inputs.shape[1] :].tolist())

    yield generate


@contextlib.contextmanager
def make_llm(config: Config) -> Iterator[Way]:
    """pdray.LLM in the configured mode, on a Ray cluster that it joins or starts."""
    from pdray.llm import LLM

    with LLM(**config.model_dump(exclude_unset=True)) as llm:

        def generate(prompts: list[list[int]], params: list[SamplingParams]) -> Generation:
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            first_token_s = max(output.timings.ttft or 0.0 for output in outputs)
            answers = [output.outputs[0].token_ids for output in outputs]
            return Generation(seconds, first_token_s, answers, slowest_steps(llm.status()))

        def play(requests: Requests, arrivals: list[float]) -> list[list[float]]:
            assert llm._router is not None
            return llm._run(play_router(llm._router, requests, arrivals))

        yield Way(generate, play)


def slowest_steps(status: dict[str, Any]) -> StepSpread | None:
    """Step times of the worker with the slowest steps in LLM.status()."""
    steps = [worker["step_ms"] for worker in status["workers"] if worker.get("step_ms")]
    spreads = [StepSpread(Spread(**entry["step"]), Spread(**entry["host"])) for entry in steps]
    return max(spreads, key=lambda spread: spread.step.p50, default=None)
