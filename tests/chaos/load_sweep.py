"""Loads below, at and beyond capacity: what comes out must not fall when more comes in."""

from __future__ import annotations

from pathlib import Path

from paced_load import Load

from pdray.bench.plot import Series, line_plot

HEAD = (
    "| load / capacity | offered /s | completed /s | 429 /s | TTFT p99 ms | ITL p99 ms | client CPU | server CPU |\n"
    "|---:|---:|---:|---:|---:|---:|---:|---:|"
)


async def sweep(load: Load, capacity: float, multiples: list[float], step_s: float, svg: Path | None) -> None:
    """Print a line for each multiple of capacity, and plot them.

    Args:
        step_s: at each multiple; must be well above paced_load.WARM_UP_S.
    """
    print(HEAD, flush=True)
    offered, goodput = [], []
    for multiple in multiples:
        phase = await load.poisson(multiple * capacity, step_s)
        await load.at_rest()
        print(
            f"| {multiple:g} | {phase.offered_per_s:.1f} | {phase.completed_per_s:.1f} | {phase.refused_per_s:.1f} "
            f"| {phase.ttft_ms(99):.0f} | {phase.itl_ms(99):.1f} | {phase.client_cpu} | {phase.server_cpu} |",
            flush=True,
        )
        offered.append((multiple, phase.offered_per_s))
        goodput.append((multiple, phase.completed_per_s))
    if svg is not None:
        series = [Series("offered", "#888888", offered), Series("goodput (completed)", "#1f6feb", goodput)]
        title = f"Goodput beyond saturation (capacity {capacity:.1f} requests/s)"
        svg.write_text(line_plot(title, "offered load / capacity", "requests/s", series))
