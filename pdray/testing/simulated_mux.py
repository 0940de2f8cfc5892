"""An engine of two lanes under Poisson load in simulated time: its controller decides, a model of costs says how long.

`python -m pdray.testing.simulated_mux FILE FILE` draws requests in time by rate. A table: simulated_goodput.py.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from pathlib import Path
from typing import NamedTuple

from pdray.bench.mux_served import COLORS
from pdray.bench.plot import Series, line_plot
from pdray.engine.mux.controller import Controller
from pdray.engine.mux.costs import Arrangement, SplitCosts
from pdray.engine.mux.late import LateLast
from pdray.engine.mux.load import Lengths, Load, Stream, Wait
from pdray.engine.mux.pace import Lateness, PacedBudget, Targets
from pdray.engine.schedule.step_costs import StepWork
from pdray.engine.schedule.token_budget import STEP_SIZES
from pdray.testing.simulated_load import H100_8B, MAX_TOKENS, Costs, Simulated, compute

HALF_CONTEXT = 16_000.0
TTFT_MS = 1000.0
# What fits today's steps on an H100: plain ones of `pdray bench pipeline`, and mixed ones of 14 requests/s of 2,048.
FITTED = Costs(weights=6.35, seqs=0.25, token=0.0225, knee=188, prompts=1.0, kv=0.049, prefix=0.003)
# The same with what steps of 8k showed: 43 us for each token in steps of 128, 23 in 256, 18 on 32 of the SMs.
FITTED_8K = FITTED._replace(least_prefix=1.07)
SPLITS_8K = {32: (1.8, 33_000.0)}
# A later run's steps of `pdray bench mux`, 2k and 8k in: the attention of a prompt's tokens is read once a step, too.
MEASURED = FITTED._replace(prefix=0.00183, context=0.25)
MEASURED_8K = FITTED._replace(prefix=0.0018, context=0.5, kv=0.052)
SPLITS_MEASURED_8K = {32: (2.2, 25_000.0)}  # as SPLITS, beside streams with 8k of context
PICTURES = ((15.0, (4, 6, 7, 8, 9, 10, 12)), (8.0, (1, 2, 2.5, 3, 3.5, 4, 5)))
SPLITS = {32: (1.58, 24_000.0), 48: (1.41, 17_000.0)}  # slowdown of decodes, and tokens of prompts a second, measured


class Served(NamedTuple):
    """Milliseconds, of one request."""

    ttft: float
    tpot: float


class Gpu:
    """Computes requests as it is told, on a clock of its own."""

    def __init__(
        self,
        costs: Costs,
        rate: float,
        num_requests: int,
        input_len: int,
        output_len: int,
        max_tokens: int | None,
        seed: int,
    ) -> None:
        rng = random.Random(seed)
        self.costs, self.input_len, self.output_len = costs, input_len, output_len
        self.max_tokens, self.lengths = max_tokens or output_len, Lengths()
        self.now = 0.0
        at = 0.0
        self.coming: deque[Simulated] = deque()
        for _ in range(num_requests):
            at += rng.expovariate(rate) * 1000
            self.coming.append(Simulated(at, input_len))
        self.all = list(self.coming)
        self.queue: deque[Simulated] = deque()
        self.batch: list[Simulated] = []

    def arrive(self) -> bool:
        """Queue what has come. False once all is done."""
        if not self.queue and not self.batch and self.coming:
            self.now = max(self.now, self.coming[0].arrival)
        while self.coming and self.coming[0].arrival <= self.now:
            self.queue.append(self.coming.popleft())
        return bool(self.queue or self.batch)

    def load(self) -> Load | None:
        if not self.queue or not self.batch:
            return None
        waits = [self.wait(each) for each in self.queue]
        streams = [
            Stream((self.now - each.times[0]) / 1000, len(each.times) - 1, self._num_left(each)) for each in self.batch
        ]
        num_begun = sum(each.left < self.input_len for each in self.queue)
        return Load(len(self.batch), waits, self.input_len - self.queue[0].left, streams, num_begun)

    def _num_left(self, each: Simulated) -> int:
        return self.lengths.left(len(each.times) - 1, self.max_tokens - len(each.times))

    def wait(self, each: Simulated) -> Wait:
        return Wait(each.left, (self.now - each.arrival) / 1000, self.input_len)

    def sort(self, order: LateLast[Simulated], lateness: Lateness) -> bool:
        """Sort prompts that have not begun. Returns what LateLast does."""
        begun = [each for each in self.queue if each.left < self.input_len]
        waiting = [each for each in self.queue if each.left == self.input_len]
        has_turn = order.sort(
            waiting, lambda each: lateness.is_late(self.wait(each)), lambda each: lateness.is_overdue(self.wait(each))
        )
        self.queue = deque(begun + waiting)
        return has_turn

    def step(self, num_tokens: int) -> tuple[StepWork, float]:
        """One of so many tokens on every SM; returns what it computed, and how long it took."""
        work, done = compute(self.queue, num_tokens - len(self.batch), self.input_len)
        work = work._replace(num_decodes=len(self.batch))
        taken = self.costs.step(work, self._kv_tokens())
        self._end(taken, done)
        return work, taken

    def step_beside(self, slowdown: float, rate: float) -> float:
        """One that decodes on a partition, beside prompts on the other; returns how long it took."""
        taken = slowdown * self.costs.step(StepWork(len(self.batch), 0), self._kv_tokens())
        _, done = compute(self.queue, round(rate * taken / 1000), self.input_len)
        self._end(taken, done)
        return taken

    def _kv_tokens(self) -> int:
        return sum(self.input_len + len(each.times) for each in self.batch)

    def _end(self, taken: float, done: list[Simulated]) -> None:
        self.now += taken
        for each in (*self.batch, *done):
            each.times.append(self.now)
        batch = [*self.batch, *done]
        self.batch = [each for each in batch if len(each.times) < self.output_len]
        for _ in range(len(batch) - len(self.batch)):
            self.lengths.note(self.output_len - 1)

    def served(self) -> list[Served]:
        """All requests but those that came while the batch was filling."""
        counted = self.all[len(self.all) // 8 :]
        return [Served(e.times[0] - e.arrival, (e.times[-1] - e.times[0]) / (len(e.times) - 1)) for e in counted]


def serve(
    how: Targets | Arrangement,
    rate: float,
    *,
    num_requests: int = 200,
    input_len: int = 2048,
    output_len: int = 256,
    max_tokens: int | None = None,
    splits: dict[int, tuple[float, float]] = SPLITS,
    costs: Costs = H100_8B,
    seed: int = 0,
) -> list[Served]:
    """Requests that arrive at ``rate`` a second.

    Args:
        how: a fixed arrangement, or what the controller is to hold.
        max_tokens: of each request, whose answer has ``output_len``; default: as many.
    """
    gpu = Gpu(costs, rate, num_requests, input_len, output_len, max_tokens, seed)
    budget = PacedBudget(MAX_TOKENS, STEP_SIZES, half_context=HALF_CONTEXT)
    split_costs = SplitCosts(budget.costs, 132)
    targets = how if isinstance(how, Targets) else Targets()
    controller = Controller(split_costs, budget, targets, may_mix=True)
    controller.splits = list(splits)
    controller.fixed = how if isinstance(how, Arrangement) else None
    order = LateLast[Simulated](lambda each: each.arrival)
    while gpu.arrive():
        has_turn = controller.is_paced and gpu.sort(order, controller.lateness())
        load, num_streams = gpu.load(), len(gpu.batch)
        chosen = controller.choose(gpu.now / 1000, load, may_wait=not has_turn)
        if load is not None and chosen is not None and chosen.decode_sms is not None:
            slowdown, prompt_rate = splits[chosen.decode_sms]
            prompt_rate = 1 / (1 / prompt_rate + costs.prefix * load.context / 1e6)
            taken = gpu.step_beside(slowdown, prompt_rate) / 1000
            split_costs.note_step(chosen.decode_sms, num_streams, taken, gpu.now / 1000)
            split_costs.note_rate(chosen.decode_sms, load.context, prompt_rate, gpu.now / 1000)
        else:
            tokens = chosen.chunk if chosen is not None else None
            if tokens is None:
                queued, context = (load.num_queued, load.context) if load is not None else (0, 0)
                tokens = budget.tokens(num_streams, queued, context) if gpu.queue else MAX_TOKENS
            work, taken = gpu.step(max(tokens, num_streams))
            taken /= 1000
            budget.costs.note(work, taken)
    return gpu.served()


def in_time(served: list[Served], tpot_ms: float, ttft_ms: float = TTFT_MS) -> float:
    """Share of the requests."""
    return sum(each.ttft <= ttft_ms and each.tpot <= tpot_ms for each in served) / len(served)


def plot(tpot_ms: float, rates: tuple[float, ...]) -> str:
    """Goodput over rate of 2,048 tokens in, as an SVG, with the costs that fit what was measured of it."""
    ways: dict[str, Targets | Arrangement] = {"controller": Targets(tpot_ms / 1000, TTFT_MS / 1000)}
    ways |= {f"mixed, {n}": Arrangement(chunk=n) for n in (128, 256, 512, 2048)} | {"32 + 100 SMs": Arrangement(32)}
    series = []
    for color, (name, how) in zip(COLORS, ways.items(), strict=False):
        shares = [in_time(serve(how, rate, costs=FITTED, splits=SPLITS), tpot_ms) for rate in rates]
        series.append(Series(name, color, [(r, r * share) for r, share in zip(rates, shares, strict=True)]))
    title = f"Simulated: 2,048 tokens in, 256 out, TTFT 1 s, TPOT {tpot_ms:g} ms"
    return line_plot(title, "offered requests/s", "in time requests/s", series)


def main() -> None:
    """Pictures for 15 ms and for 8 ms, in files of these names."""
    for path, row in zip(sys.argv[1:], PICTURES, strict=True):
        Path(path).write_text(plot(*row))


if __name__ == "__main__":
    main()
