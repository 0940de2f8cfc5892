"""The figures of one shape at one rate of requests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from pdray.bench.serving_metrics import RequestRecord, calculate_metrics, distribution, meets
from pdray.bench.shapes.server import Usage
from pdray.errors import ConfigError, PdrayError


class Limit(NamedTuple):
    """A request is good within these, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def __str__(self) -> str:
        ttft = f"{self.ttft_ms / 1000:g} s" if self.ttft_ms >= 1000 else f"{self.ttft_ms:g} ms"
        return f"{ttft}, {self.tpot_ms:g} ms"


def parse_limit(text: str) -> Limit:
    """ "1000:15": a TTFT of at most 1 s, and 15 ms for each further token.

    Raises:
        ConfigError: another form, or a limit that is not above 0.
    """
    try:
        limit = Limit(*(float(part) for part in text.split(":")))
    except (ValueError, TypeError):
        raise ConfigError(f"limit {text!r} must read TTFT:TPOT in milliseconds, as 1000:15") from None
    if not (limit.ttft_ms > 0 and limit.tpot_ms > 0):
        raise ConfigError(f"limit {text!r}: both times must be above 0")
    return limit


@dataclass(frozen=True, slots=True)
class Point:
    """Attributes:
    rate: requests per second that were offered.
    counts: sent requests by outcome: ok, rejected, failed.
    errors: how often each was met.
    percentiles_ms: of ttft, tpot and longest_gap (of each answer), by percentile.
    within: share of all sent requests that were answered within a limit, by str(limit).
    link_bytes: KV that each pair of workers has moved.
    router_us, proxy_us: CPU time per output token.
    p99_lateness_ms: of the clients; where it is not small, they offered less than the rate.
    """

    shape: str
    num_workers: int
    rate: float
    counts: dict[str, int]
    errors: dict[str, int]
    duration_s: float
    output_tokens_per_s: float
    percentiles_ms: dict[str, dict[str, float | None]]
    within: dict[str, float]
    link_bytes: dict[str, int]
    router_us: float | None
    proxy_us: float | None
    p99_lateness_ms: float

    def kv_gb_per_s(self) -> float:
        """Over all links, mean of the whole duration."""
        return sum(self.link_bytes.values()) / self.duration_s / 1e9

    def link_gb_per_s(self) -> list[float]:
        """Of each link, the slowest first."""
        return sorted(num_bytes / self.duration_s / 1e9 for num_bytes in self.link_bytes.values())

    def goodput(self, limit: str) -> float:
        """Requests per second that were offered and answered within the limit."""
        return self.rate * self.within[limit]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


def make_point(
    shape: str,
    num_workers: int,
    rate: float,
    records: list[RequestRecord],
    duration_s: float,
    before: Usage,
    after: Usage,
    limits: list[Limit],
) -> Point:
    """Figures of requests that were sent between two looks at the server's usage.

    Raises:
        PdrayError: a worker was replaced meanwhile, so that the two looks cannot be compared.
    """
    link_bytes = {name: sent - before.link_bytes.get(name, 0) for name, sent in after.link_bytes.items()}
    if replaced := [name for name, sent in link_bytes.items() if sent < 0]:
        raise PdrayError(f"{shape} at {rate:g} requests/s: workers were replaced under load ({', '.join(replaced)})")
    figures = calculate_metrics(records, duration_s)
    num_tokens = figures["total_output_tokens"]
    gaps = distribution(
        "longest_gap", [max(record.itls) for record in records if record.outcome == "ok" and record.itls]
    )
    percentiles = {
        name: {f"p{p}": source[f"p{p}_{name}_ms"] for p in (50, 90, 99)}
        for name, source in (("ttft", figures), ("tpot", figures), ("longest_gap", gaps))
    }

    def share(limit: Limit) -> float:
        seconds = {"ttft": limit.ttft_ms / 1000, "tpot": limit.tpot_ms / 1000}
        return sum(record.outcome == "ok" and meets(record, seconds) for record in records) / len(records)

    def us_per_token(seconds: float) -> float | None:
        return 1e6 * seconds / num_tokens if num_tokens else None

    return Point(
        shape=shape,
        num_workers=num_workers,
        rate=rate,
        counts={"ok": figures["completed"], "rejected": figures["rejected"], "failed": figures["failed"]},
        errors=figures["errors"],
        duration_s=duration_s,
        output_tokens_per_s=figures["output_throughput"],
        percentiles_ms=percentiles,
        within={str(limit): share(limit) for limit in limits},
        link_bytes=link_bytes,
        router_us=us_per_token(after.router_cpu_s - before.router_cpu_s),
        proxy_us=us_per_token(after.proxy_cpu_s - before.proxy_cpu_s),
        p99_lateness_ms=figures["p99_lateness_ms"],
    )
