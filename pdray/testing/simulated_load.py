"""A colocated engine under Poisson load in simulated time: the token budget decides, a model of costs says how long.

`python -m pdray.testing.simulated_load` prints the table by which the default was chosen.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pdray.engine.schedule.step_costs import StepWork
from pdray.engine.schedule.token_budget import STEP_SIZES, AdaptiveBudget, FixedBudget

MAX_TOKENS = 8192


class Costs(NamedTuple):
    """Milliseconds of a step: by default Qwen3-8B's on an H100, measured.

    Attributes:
        weights: to read all weights. seqs: what sixteen sequences and more add to it.
        token, knee: each token of a step beyond so many, which the reading of the weights hides.
        prompts: of every step with prompts.
        kv: to read a thousand tokens of context. prefix: of a thousand pairs of a prompt's token and its context.
        least_prefix: at least, of a thousand tokens of context before a prompt's, in steps of at most 128 tokens.
        context: of a thousand tokens of context before a prompt's, in each step with prompts.
    """

    weights: float = 5.3
    seqs: float = 1.3
    token: float = 0.0235
    knee: int = 180
    prompts: float = 0.9
    kv: float = 0.052
    prefix: float = 0.0015
    least_prefix: float = 0.0
    context: float = 0.0

    def step(self, work: StepWork, kv_tokens: int) -> float:
        """Of a step whose decoding sequences have so much context together."""
        reading = self.weights + self.seqs * min(1.0, work.num_decodes / 16) + self.kv * kv_tokens / 1000
        if not work.num_prompt_tokens:
            return reading
        size = work.num_prompt_tokens + work.num_decodes
        padded = next((each for each in STEP_SIZES if each >= size), -(-size // 512) * 512)
        attending = (self.prefix * work.num_prompt_tokens + self.context) * work.context / 1000
        if padded <= STEP_SIZES[0]:
            attending = max(attending, self.least_prefix * work.context / 1000)
        return reading + self.prompts + self.token * max(0, padded - self.knee) + attending


H100_8B = Costs()


class Figures(NamedTuple):
    """Milliseconds; of requests that came when the batch was full. gap: the longest of each stream."""

    ttft_p50: float
    ttft_p90: float
    tpot_p50: float
    tpot_p90: float
    gap_p50: float
    gap_max: float


@dataclass(slots=True)
class Simulated:
    """One request. left: tokens of prompt to compute."""

    arrival: float
    left: int
    times: list[float] = field(default_factory=list)


def simulate(
    budget: AdaptiveBudget | FixedBudget,
    rate: float,
    *,
    num_requests: int = 250,
    input_len: int = 2048,
    output_len: int = 256,
    costs: Costs = H100_8B,
) -> Figures:
    """Serve so many requests that arrive at ``rate`` a second."""
    rng = random.Random(0)
    now = 0.0
    coming: deque[Simulated] = deque()
    for _ in range(num_requests):
        now += rng.expovariate(rate) * 1000
        coming.append(Simulated(now, input_len))
    requests, queue, batch, now = list(coming), deque[Simulated](), list[Simulated](), 0.0
    while coming or queue or batch:
        if not queue and not batch:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            queue.append(coming.popleft())
        context = input_len - queue[0].left if queue else 0
        tokens = MAX_TOKENS
        if batch and queue:
            tokens = budget.tokens(len(batch), sum(each.left for each in queue), context)
        work, done = compute(queue, tokens - len(batch), input_len)
        work = work._replace(num_decodes=len(batch))
        taken = costs.step(work, sum(input_len + len(each.times) for each in batch))
        now += taken
        if isinstance(budget, AdaptiveBudget):
            budget.costs.note(work, taken / 1000)
        for each in (*batch, *done):
            each.times.append(now)
        batch = [each for each in (*batch, *done) if len(each.times) < output_len]
    return figures(requests[num_requests // 5 :])


def compute(queue: deque[Simulated], num_tokens: int, input_len: int) -> tuple[StepWork, list[Simulated]]:
    """Prompts in order, as far as the tokens go; also those that are complete."""
    done, pairs, total = [], 0, 0
    while queue and num_tokens > total:
        first = queue[0]
        chunk = min(first.left, num_tokens - total)
        pairs += chunk * (input_len - first.left)
        first.left -= chunk
        total += chunk
        if not first.left:
            done.append(queue.popleft())
    return StepWork(0, total, pairs / total if total else 0.0), done


def figures(requests: list[Simulated]) -> Figures:
    ttft = np.percentile([each.times[0] - each.arrival for each in requests], (50, 90))
    tpot = np.percentile([(each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in requests], (50, 90))
    gaps = np.percentile([max(np.diff(each.times)) for each in requests], (50, 100))
    return Figures(*(round(float(each), 2) for each in (*ttft, *tpot, *gaps)))


def budgets() -> dict[str, AdaptiveBudget | FixedBudget]:
    """What is compared. Steps of 2,048 tokens, decodes first, are vLLM's way."""
    return {
        "8,192": FixedBudget(8192),
        "2,048": FixedBudget(2048),
        "adaptive": AdaptiveBudget(MAX_TOKENS, STEP_SIZES),
        "target 12 ms": AdaptiveBudget(MAX_TOKENS, STEP_SIZES, target_s=0.012),
    }


def main() -> None:
    print("| requests/s | budget | TTFT p50 / p90 ms | TPOT p50 / p90 ms | longest gap p50 / max ms |")
    print("|---|---|---|---|---|")
    for rate in (4, 7, 9, 11):
        for name, budget in budgets().items():
            row = simulate(budget, rate, num_requests=500)
            pairs = zip(row[::2], row[1::2], strict=True)
            print(f"| {rate} | {name} | {' | '.join(f'{a:.1f} / {b:.1f}' for a, b in pairs)} |")


if __name__ == "__main__":
    main()
