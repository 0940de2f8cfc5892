"""Far more load than a paced server can bear: who is let in is served as before, who is not is told at once.

The server is a process of its own whose engine only keeps a pace; everything else in it is real. Exits 1 if something
did not hold. The figures mean something only while the machine has a core to spare for both processes: the lines on
stderr say how long these waited for one.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from load_sweep import sweep
from paced_engine import Pace
from paced_load import NUM_PROMPT_TOKENS, NUM_TOKENS, Load, Phase
from paced_process import paced_process
from rows import Row
from streams import Clients, new_session

PACE = Pace(step_s=0.020)  # a step is long beside what the machine adds to it
MAX_NUM_SEQS = 16
MAX_QUEUE_SIZE = 32
MAX_QUEUE_WAIT_S = 10.0
NUM_CLIENTS_MORE = 8  # than places, so that the queue is never empty while capacity is measured
NORMAL = 0.8  # of capacity
MIN_CAPACITY_S = 6.0

MIN_PACE = 0.85  # with less the machine is the bottleneck, and the other figures say nothing
MAX_ITL_RATIO = 1.5
MAX_REFUSAL_MS = 100.0
MIN_GOODPUT = 0.9
MAX_RSS_GROWTH = 0.10

OPTIONS = {
    "step_ms": 1e3 * PACE.step_s,
    "prompt_token_ms": 1e3 * PACE.prompt_token_s,
    "max_num_seqs": MAX_NUM_SEQS,
    "max_queue_size": MAX_QUEUE_SIZE,
    "max_queue_wait_s": MAX_QUEUE_WAIT_S,
}


class Measured(NamedTuple):
    """A server before, at and after its limit.

    Attributes:
        capacity: requests a second that a closed loop sustains.
        rss_mib: after the normal phase, and after the overload.
        problems: what was in use or wrong at the end.
    """

    capacity: float
    factor: float
    normal: Phase
    over: Phase
    rss_mib: tuple[float, float]
    problems: list[str]


def run_overload(duration_s: float = 60.0, factor: float = 4.0) -> list[Row]:
    """Half of the duration at NORMAL load, all of it at ``factor`` times capacity. Starts and ends its own server."""
    return rows_of(asyncio.run(measure(duration_s, factor)))


async def measure(duration_s: float, factor: float) -> Measured:
    """See run_overload()."""
    with paced_process(**OPTIONS) as server:
        async with new_session() as session:
            load = Load(server, Clients(server.url, session))
            capacity = await measure_capacity(load, max(MIN_CAPACITY_S, duration_s / 4))
            normal = await load.poisson(NORMAL * capacity, duration_s / 2)
            await load.at_rest()
            rss_before = server.rss_mib()
            over = await load.poisson(factor * capacity, duration_s)
            state = await load.at_rest()
            rss_after = server.rss_mib()
    problems = [*state["problems"], *(f"lease {lease}" for lease in state["leases"])]
    problems += [f"{state['router'][name]} {name}" for name in ("queue_depth", "running") if state["router"][name]]
    if state["blocks_in_use"]:
        problems.append(f"{state['blocks_in_use']} blocks in use")
    return Measured(capacity, factor, normal, over, (rss_before, rss_after), problems)


async def measure_capacity(load: Load, duration_s: float) -> float:
    """Requests a second that a closed loop sustains with every place taken. Leaves the server at rest."""
    phase = await load.closed_loop(MAX_NUM_SEQS + NUM_CLIENTS_MORE, duration_s)
    await load.at_rest()
    print(describe("closed loop", phase), file=sys.stderr, flush=True)
    return phase.completed_per_s


def rows_of(measured: Measured) -> list[Row]:
    """One for each thing that must hold."""
    for name, phase in ((f"{NORMAL:g}x", measured.normal), (f"{measured.factor:g}x", measured.over)):
        print(describe(name, phase), file=sys.stderr, flush=True)
    name = f"{measured.factor:g}x overload"
    return [
        _pace_row(measured.capacity),
        _latency_row(name, measured),
        _refusal_row(name, measured.over),
        _retry_after_row(name, measured.over),
        _goodput_row(name, measured),
        _answers_row(name, measured),
        _rss_row(name, measured),
        Row(
            f"{name}: at rest",
            "; ".join(measured.problems) or "nothing",
            "no lease, no block in use, no integrity problem",
            not measured.problems,
        ),
    ]


def _pace_row(capacity: float) -> Row:
    possible = PACE.capacity(MAX_NUM_SEQS, NUM_PROMPT_TOKENS, NUM_TOKENS)
    figure = f"{capacity:.1f} of {possible:.1f} requests/s ({capacity / possible:.0%})"
    limit = f">= {MIN_PACE:.0%} of what the engine's pace allows; else the machine is too busy to tell"
    return Row("overload: capacity", figure, limit, capacity >= MIN_PACE * possible)


def _latency_row(name: str, measured: Measured) -> Row:
    before, after = measured.normal.itl_ms(99), measured.over.itl_ms(99)
    figure = f"p99 {after:.1f} ms, at {NORMAL:g}x {before:.1f} ms ({after / before:.2f}x)"
    return Row(f"{name}: inter-token latency", figure, f"<= {MAX_ITL_RATIO:g}x", after <= MAX_ITL_RATIO * before)


def _refusal_row(name: str, over: Phase) -> Row:
    others = Counter(e.answer.status or e.answer.error for e in over.sent if e.answer.status not in (200, 429))
    p99 = over.refusal_ms(99)
    figure = f"{len(over.refused)} of {len(over.sent)} refused; p99 {p99:.1f} ms" + "".join(
        f"; {number} got {what}" for what, number in others.items()
    )
    ok = bool(over.refused) and p99 <= MAX_REFUSAL_MS and not others
    return Row(f"{name}: refusals", figure, f"each with 429; p99 <= {MAX_REFUSAL_MS:g} ms", ok)


def _retry_after_row(name: str, over: Phase) -> Row:
    seconds = Counter(each.answer.retry_after_s for each in over.refused)
    ok = all(s is not None and s.is_integer() and 1 <= s <= MAX_QUEUE_WAIT_S for s in seconds)
    figure = ", ".join(f"{number} of {'none' if s is None else f'{s:g} s'}" for s, number in seconds.most_common())
    return Row(f"{name}: Retry-After", figure, f"whole seconds in [1, {MAX_QUEUE_WAIT_S:g}]", ok and bool(seconds))


def _goodput_row(name: str, measured: Measured) -> Row:
    goodput, capacity = measured.over.completed_per_s, measured.capacity
    figure = f"{goodput:.1f} requests/s of {capacity:.1f} ({goodput / capacity:.0%})"
    return Row(f"{name}: goodput", figure, f">= {MIN_GOODPUT:.0%} of capacity", goodput >= MIN_GOODPUT * capacity)


def _answers_row(name: str, measured: Measured) -> Row:
    admitted = [each.answer for each in (*measured.normal.admitted, *measured.over.admitted)]
    ends = Counter((answer.outcome, answer.num_tokens) for answer in admitted)
    figure = ", ".join(f"{number} {outcome} with {tokens} tokens" for (outcome, tokens), number in ends.items())
    ok = ends.keys() == {("finished", NUM_TOKENS)}
    return Row(f"{name}: admitted requests", figure, f"{NUM_TOKENS} tokens each", ok)


def _rss_row(name: str, measured: Measured) -> Row:
    before, after = measured.rss_mib
    growth = after / before - 1
    figure = f"{before:.0f} → {after:.0f} MiB ({growth:+.1%})"
    return Row(f"{name}: server's RSS", figure, f"< +{MAX_RSS_GROWTH:.0%}", growth < MAX_RSS_GROWTH)


def describe(name: str, phase: Phase) -> str:
    """A line about a load, and whether the machine had room for it."""
    return (
        f"{name}: {phase.offered_per_s:.1f} requests/s offered, {phase.completed_per_s:.1f} completed, "
        f"{phase.refused_per_s:.1f} refused; TTFT p99 {phase.ttft_ms(99):.0f} ms, ITL p50 {phase.itl_ms(50):.1f} "
        f"p99 {phase.itl_ms(99):.1f} ms; share of a core: client {phase.client_cpu}, server {phase.server_cpu}"
    )


async def run_sweep(multiples: list[float], step_s: float, svg: Path | None) -> None:
    """Prints a table of loads, in multiples of capacity."""
    with paced_process(**OPTIONS) as server:
        async with new_session() as session:
            load = Load(server, Clients(server.url, session))
            capacity = await measure_capacity(load, step_s)
            await sweep(load, capacity, multiples, step_s, svg)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of overload")
    parser.add_argument("--factor", type=float, default=4.0, help="overload in multiples of capacity")
    parser.add_argument("--sweep", metavar="X,Y,...", help="instead: so many seconds at each multiple of capacity")
    parser.add_argument("--sweep-step", type=float, default=8.0, help="seconds at each multiple")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="plot of the sweep")
    args = parser.parse_args()
    if args.sweep:
        multiples = [float(each) for each in args.sweep.split(",")]
        asyncio.run(run_sweep(multiples, args.sweep_step, args.svg))
        return 0
    rows = run_overload(args.duration, args.factor)
    print("| test | figure | must hold | ok |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.figure} | {row.limit} | {'yes' if row.ok else '**no**'} |")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
