"""What was measured, as a table, a picture and a page in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pdray.bench.plot import Series, line_plot
from pdray.bench.shapes.point import Point
from pdray.errors import ConfigError

COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7ea4", "#57606a")
ENOUGH = 0.9  # share of requests within the limit up to which a shape keeps up


def table_head(limits: Sequence[str]) -> str:
    """The first two lines of the table."""
    titles = ["shape", "requests/s", "ok / refused / failed", "TTFT p50 / p90 / p99 ms", "TPOT p50 / p90 / p99 ms"]
    titles += ["longest gap p50 / p99 ms", *(f"within {limit}" for limit in limits)]
    titles += ["output tok/s", "KV GB/s, all (least to most of a link)", "CPU us/token, router + proxy", "late p99 ms"]
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


def table_row(point: Point) -> str:
    """A point's line."""
    links = point.link_gb_per_s()
    kv = f"{point.kv_gb_per_s():.3g} ({links[0]:.3g} to {links[-1]:.3g})" if links else "-"
    cells = [
        point.shape,
        f"{point.rate:g}",
        " / ".join(str(point.counts[outcome]) for outcome in ("ok", "rejected", "failed")),
        _percentiles(point, "ttft", ".0f", "p50", "p90", "p99"),
        _percentiles(point, "tpot", ".2f", "p50", "p90", "p99"),
        _percentiles(point, "longest_gap", ".0f", "p50", "p99"),
        *(f"{share:.0%}" for share in point.within.values()),
        f"{point.output_tokens_per_s:,.0f}",
        kv,
        f"{_number(point.router_us, '.1f')} + {_number(point.proxy_us, '.1f')}",
        f"{point.p99_lateness_ms:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _percentiles(point: Point, name: str, form: str, *percentiles: str) -> str:
    return " / ".join(_number(point.percentiles_ms[name][p], form) for p in percentiles)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def highest_rate(points: Sequence[Point], limit: str) -> float | None:
    """Requests per second up to which ENOUGH of a shape's requests are within the limit, between rates linearly.

    None if the lowest rate is too much already. Where even the highest is not, that one: the answer is a lower bound.
    """
    ordered = sorted(points, key=lambda point: point.rate)
    if ordered[0].within[limit] < ENOUGH:
        return None
    for below, above in pairwise(ordered):
        good, bad = below.within[limit], above.within[limit]
        if bad < ENOUGH:
            return below.rate + (above.rate - below.rate) * (good - ENOUGH) / (good - bad)
    return ordered[-1].rate


def by_shape(points: Sequence[Point]) -> dict[str, list[Point]]:
    """In the order in which they came."""
    shapes: dict[str, list[Point]] = {}
    for point in points:
        shapes.setdefault(point.shape, []).append(point)
    return shapes


def capacity_table(points: Sequence[Point], limits: Sequence[str]) -> str:
    """For each shape, how many requests per second it serves within each limit, in all and for each worker."""
    lines = [f"| shape | {' | '.join(f'{limit}: requests/s (for each worker)' for limit in limits)} |"]
    lines.append(f"|{'---|' * (1 + len(limits))}")
    for shape, own in by_shape(points).items():
        cells = []
        for limit in limits:
            rate = highest_rate(own, limit)
            if rate is None:
                cells.append(f"below {min(point.rate for point in own):g}")
                continue
            bound = "at least " if rate == max(point.rate for point in own) else ""
            cells.append(f"{bound}{rate:.1f} ({rate / own[0].num_workers:.1f})")
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def best_table(points: Sequence[Point], limits: Sequence[str]) -> str:
    """For each rate, the shapes that answer most requests within each limit, of those that were asked at it."""
    lines = [f"| requests/s | {' | '.join(f'most within {limit}' for limit in limits)} |"]
    lines.append(f"|{'---|' * (1 + len(limits))}")
    for rate in sorted({point.rate for point in points}):
        asked = [point for point in points if point.rate == rate]
        cells = []
        for limit in limits:
            most = max(point.within[limit] for point in asked)
            names = ", ".join(point.shape for point in asked if point.within[limit] == most)
            cells.append(f"{names} ({most:.0%})")
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goodput_plot(points: Sequence[Point], limit: str) -> str:
    """SVG: requests per second within the limit, over requests per second offered; a line for each shape."""
    rates = sorted({point.rate for point in points})
    series = [Series("offered", "#bbbbbb", [(rate, rate) for rate in rates])]
    for number, (shape, own) in enumerate(by_shape(points).items()):
        places = [(point.rate, point.goodput(limit)) for point in sorted(own, key=lambda point: point.rate)]
        series.append(Series(shape, COLORS[number % len(COLORS)], places))
    return line_plot(f"Requests within {limit}", "offered requests/s", "requests/s within the limits", series)


def write_page(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """A page of result files, and beside it a picture for each limit.

    Raises:
        ConfigError: the results were measured under different loads or limits, and cannot stand in one table.
    """
    first = results[0]
    for other in results[1:]:
        if differing := [key for key in ("load", "limits", "device") if other[key] != first[key]]:
            raise ConfigError(f"results differ in {', '.join(differing)}, and cannot be compared; make a page of each")
    points = [Point.from_dict(point) for result in results for point in result["points"]]
    if not points:
        raise ConfigError("the results hold no figures: every load was left out")
    limits = first["limits"]
    pictures = []
    for number, limit in enumerate(limits):
        picture = path.with_name(f"{path.stem}-{number}.svg")
        picture.write_text(goodput_plot(points, limit))
        pictures.append(f"![requests within {limit}]({picture.name})")
    commands = "\n".join(result["command"] for result in results)
    parts = [
        "# Which shape for which load",
        f"{first['device']}, {', '.join(sorted({result['date'][:10] for result in results}))}. {describe_load(first)}. "
        'xPyD: x prefill and y decode workers; xC: x workers that do both. "Within" is the share of all requests sent '
        "whose first token came, and whose further tokens followed on average, in these times.",
        f"```\n{commands}\n```",
        "\n\n".join(pictures),
        f"## Capacity\nRequests per second of which at least {ENOUGH:.0%} are within the limits.",
        capacity_table(points, limits),
        "## The best shape at each rate",
        best_table(points, limits),
        "## All figures",
        "\n".join([table_head(limits), *map(table_row, points)]),
    ]
    left_out = [each for result in results for each in result["left_out"]]
    parts += [f"Not run: {'; '.join(left_out)}."] if left_out else []
    path.write_text("\n\n".join(parts) + "\n")


def describe_load(result: dict[str, Any]) -> str:
    """In words."""
    load = result["load"]
    return (
        f"{load['input_len']} tokens in, {load['output_len']} out, Poisson arrivals for {load['seconds']:g} s at each "
        f"rate from {load['num_client_processes']} client processes, {load['proxy']}"
    )
