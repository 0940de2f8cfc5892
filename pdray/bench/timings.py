"""The per-request timing breakdown as a table: the parts of TTFT and of the first gap, and the remainders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TTFT_PARTS = ("queue", "lease_wait", "prefill_queue", "prefill")
FIRST_GAP_PARTS = ("transfer_wait", "first_decode_step")
ROWS = (*TTFT_PARTS, "unexplained", "ttft", *FIRST_GAP_PARTS, "unexplained", "first_gap", "e2e")


def timings_of_response(field: Mapping[str, object]) -> dict[str, float]:
    """Seconds by part from the `timings` field of a response: milliseconds under names that end in _ms.

    Remainders are left out: with_remainders computes them.
    """
    parts = (*TTFT_PARTS, "ttft", *FIRST_GAP_PARTS, "first_gap", "e2e")
    milliseconds = {part: field.get(f"{part}_ms") for part in parts}
    return {part: value / 1000 for part, value in milliseconds.items() if isinstance(value, float | int)}


def with_remainders(timings: Mapping[str, float | None]) -> list[float | None]:
    """Seconds for each of ROWS. A remainder is its sum less its parts; None where the sum is not known."""
    rows: list[float | None] = []
    for total, parts in (("ttft", TTFT_PARTS), ("first_gap", FIRST_GAP_PARTS)):
        seconds = timings.get(total)
        explained = sum(timings.get(part) or 0.0 for part in parts)
        rows += [*(timings.get(part) for part in parts), None if seconds is None else seconds - explained, seconds]
    return [*rows, timings.get("e2e")]


def mean_timings(all_timings: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each part over the requests that report it."""
    names = dict.fromkeys(name for timings in all_timings for name in timings)
    means: dict[str, float] = {}
    for name in names:
        seconds = [value for timings in all_timings if (value := timings.get(name)) is not None]
        if seconds:
            means[name] = sum(seconds) / len(seconds)
    return means


def breakdown_table(columns: Mapping[str, Mapping[str, float | None]]) -> str:
    """One column of milliseconds per request, named by its key; sums are marked with `=`."""
    titles = list(columns)
    width = max(9, *(len(title) + 1 for title in titles))
    values = [with_remainders(timings) for timings in columns.values()]
    lines = [f"{'milliseconds':<20}" + "".join(f"{title:>{width}}" for title in titles)]
    for index, row in enumerate(ROWS):
        label = f"= {row}" if row in ("ttft", "first_gap", "e2e") else f"  {row}"
        cells = "".join(f"{_milliseconds(column[index]):>{width}}" for column in values)
        lines.append(f"{label:<20}{cells}")
    return "\n".join(lines)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"
