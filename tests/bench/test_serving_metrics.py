"""The formulas, on timelines worked out by hand."""

from __future__ import annotations

import pytest

from pdray.bench.serving_metrics import RequestRecord, calculate_metrics, format_metrics, parse_goodput
from pdray.bench.timings import ROWS, breakdown_table, mean_timings, timings_of_response, with_remainders
from pdray.errors import ConfigError


def answered(prompt_len: int, output_len: int, ttft: float, itls: list[float]) -> RequestRecord:
    return RequestRecord(prompt_len, "ok", 200, output_len=output_len, ttft=ttft, itls=itls, e2el=ttft + sum(itls))


# Sent at 0: tokens at 1.0, 1.5, 2.5 s. Sent at 0: one token at 3.0 s. Sent at 0: tokens at 0.5, 0.7 s.
RECORDS = [answered(10, 3, 1.0, [0.5, 1.0]), answered(20, 1, 3.0, []), answered(5, 2, 0.5, [0.2])]


def test_figures_of_three_requests() -> None:
    result = calculate_metrics(RECORDS, duration_s=4.0)
    assert result["completed"] == 3
    assert result["total_input_tokens"] == 35
    assert result["total_output_tokens"] == 6
    assert result["request_throughput"] == pytest.approx(0.75)
    assert result["output_throughput"] == pytest.approx(1.5)
    assert result["total_token_throughput"] == pytest.approx(41 / 4)
    assert result["mean_ttft_ms"] == pytest.approx(1500)
    assert result["median_ttft_ms"] == pytest.approx(1000)
    assert result["p99_ttft_ms"] == pytest.approx(1000 + 0.98 * 2000)
    # (2.5 - 1.0) / 2 and (0.7 - 0.5) / 1; the single-token answer has no TPOT
    assert result["mean_tpot_ms"] == pytest.approx((750 + 200) / 2)
    assert result["mean_itl_ms"] == pytest.approx((500 + 1000 + 200) / 3)
    assert result["median_itl_ms"] == pytest.approx(500)
    assert result["mean_e2el_ms"] == pytest.approx((2500 + 3000 + 700) / 3)
    assert result["request_goodput"] is None


def test_several_tokens_in_one_chunk_leave_tpot_exact() -> None:
    """Five tokens in two chunks: one gap, but the time per token divides by four."""
    result = calculate_metrics([answered(1, 5, 1.0, [2.0])], duration_s=3.0)
    assert result["mean_itl_ms"] == pytest.approx(2000)
    assert result["mean_tpot_ms"] == pytest.approx(500)


@pytest.mark.parametrize(
    ("limits", "per_second"),
    [
        (["ttft:1000"], 2 / 4),
        (["tpot:200"], 2 / 4),  # 750 fails; the single-token answer counts as 0
        (["ttft:1000", "tpot:700"], 1 / 4),
        (["e2el:100"], 0.0),
        (["e2el:3000"], 3 / 4),
    ],
)
def test_goodput_needs_every_limit(limits: list[str], per_second: float) -> None:
    result = calculate_metrics(RECORDS, 4.0, parse_goodput(limits))
    assert result["request_goodput"] == pytest.approx(per_second)


@pytest.mark.parametrize("limit", ["ttft", "ttft:fast", "itl:20", "tpot:-1", ":5"])
def test_bad_goodput_limit_is_named(limit: str) -> None:
    with pytest.raises(ConfigError, match="goodput limit"):
        parse_goodput([limit])


def test_rejections_and_failures_are_apart_and_not_measured() -> None:
    refused = [RequestRecord(7, "rejected", 429, error="HTTP 429: full") for _ in range(2)]
    broken = RequestRecord(7, "failed", None, error="ClientError: gone", ttft=9.0, itls=[9.0])
    result = calculate_metrics([*RECORDS, *refused, broken], 4.0)
    assert (result["completed"], result["rejected"], result["failed"]) == (3, 2, 1)
    assert result["errors"] == {"HTTP 429: full": 2, "ClientError: gone": 1}
    expected = calculate_metrics(RECORDS, 4.0)
    counts = ("rejected", "failed", "errors")
    assert {k: v for k, v in result.items() if k not in counts} == {
        k: v for k, v in expected.items() if k not in counts
    }


def test_nothing_completed_is_no_number() -> None:
    result = calculate_metrics([RequestRecord(7, "failed", 500, error="HTTP 500: no")], 1.0)
    assert result["mean_ttft_ms"] is None
    assert result["output_throughput"] == 0
    assert "1 x HTTP 500: no" in format_metrics(result)


def test_printed_table_names_the_figures() -> None:
    text = format_metrics(calculate_metrics(RECORDS, 4.0, {"ttft": 1.0}))
    assert any(line.startswith("Request goodput (req/s):") and line.endswith("0.50") for line in text.splitlines())
    assert any(line.startswith("Mean TTFT (ms):") and line.endswith("1500.00") for line in text.splitlines())


TIMINGS = {"queue": 0.001, "lease_wait": 0.002, "prefill_queue": 0.003, "prefill": 0.01, "ttft": 0.02}


def test_remainder_is_what_the_parts_leave() -> None:
    rows = with_remainders(TIMINGS | {"transfer_wait": None, "first_decode_step": 0.005, "first_gap": 0.006})
    assert rows[ROWS.index("unexplained")] == pytest.approx(0.004)
    assert rows[ROWS.index("first_gap") - 1] == pytest.approx(0.001)
    assert rows[-1] is None


def test_breakdown_has_a_column_per_request_and_marks_the_unknown() -> None:
    lines = breakdown_table({"first": TIMINGS, "second": TIMINGS | {"prefill": 0.0123}}).splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert lines[0].split() == ["milliseconds", "first", "second"]
    assert lines[4].split() == ["prefill", "10.0", "12.3"]
    assert lines[-1].split() == ["=", "e2e", "-", "-"]


def test_mean_is_over_the_requests_that_report_a_part() -> None:
    means = mean_timings([{"ttft": 1.0, "transfer_wait": None}, {"ttft": 3.0, "transfer_wait": 0.5}])
    assert means == {"ttft": 2.0, "transfer_wait": 0.5}


def test_timings_of_a_response_are_read_in_seconds() -> None:
    field = {"ttft_ms": 20.0, "transfer_wait_ms": None, "ttft_unexplained_ms": 3.0, "prefill_ms": 5, "other": "x"}
    assert timings_of_response(field) == {"ttft": 0.02, "prefill": 0.005}
