"""The load generator against a small server that speaks OpenAI's completion stream."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from pdray.bench import serve as bench_serve
from pdray.bench.client import sse_data
from pdray.bench.sending import send_all
from pdray.bench.serving_metrics import RequestRecord
from pdray.bench.workload import BenchRequest
from pdray.errors import ConfigError, PdrayError

TIMINGS = {"queue": 0.001, "lease_wait": 0.0, "prefill_queue": 0.0, "prefill": 0.004, "ttft": 0.006}
TIMINGS_FIELD = {f"{part}_ms": 1000 * seconds for part, seconds in TIMINGS.items()} | {"ttft_unexplained_ms": 1.0}


class FakeServer:
    """Streams `max_tokens` chunks; refuses or breaks every request for which `fault` says so."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.faults: dict[int, str] = {}

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        fault = self.faults.get(len(self.bodies))
        self.bodies.append(body)
        if fault == "full":
            error = {"error": {"message": "the queue is full", "type": "rate_limit", "code": 429}}
            return web.json_response(error, status=429, headers={"Retry-After": "3"})
        if fault == "bad":
            return web.json_response({"error": {"message": "prompt too long"}}, status=400)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(request, body, fault)
        finally:
            self.in_flight -= 1

    async def _stream(self, request: web.Request, body: dict, fault: str | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": a comment\n\n")
        for index in range(body["max_tokens"]):
            await asyncio.sleep(0.005)
            if index == 1 and fault == "cut":
                return response
            if index == 1 and fault == "died":
                await response.write(b'data: {"error": {"message": "decode-0 died"}}\n\n')
                break
            chunk = {"choices": [{"index": 0, "text": f"t{index}", "finish_reason": None}], "usage": None}
            data = f"data: {json.dumps(chunk)}\n\n".encode()
            await response.write(data[:9])
            await response.write(data[9:])
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await response.write(
            f"data: {json.dumps({'choices': [], 'usage': usage, 'timings': TIMINGS_FIELD})}\n\n".encode()
        )
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeServer, str]]:
    server = FakeServer()
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield server, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_serve.add_arguments(parser)
    return parser.parse_args(["--disable-tqdm", *words])


async def test_counts_tokens_and_chunks(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    result, records = await bench_serve.run(
        options(
            "--base-url",
            url,
            "--num-prompts",
            "6",
            "--random-input-len",
            "12",
            "--random-output-len",
            "4",
            "--ignore-eos",
        )
    )
    assert result["model_id"] == "fake-model"
    assert (result["completed"], result["failed"], result["rejected"]) == (6, 0, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (72, 24)
    assert [len(record.itls) for record in records] == [3] * 6
    for record in records:
        assert record.e2el == pytest.approx(record.ttft + sum(record.itls))
    assert result["server_timings_mean_s"] == pytest.approx(TIMINGS)
    assert len(server.bodies) == 7  # one untimed trial first
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in server.bodies)


async def test_rejected_and_failed_requests_are_told_apart(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.faults = {1: "full", 2: "full", 3: "bad", 4: "cut", 5: "died"}
    words = ("--num-prompts", "7", "--random-input-len", "3", "--random-output-len", "3", "--max-concurrency", "1")
    result, records = await bench_serve.run(options("--base-url", url, *words))
    assert [record.outcome for record in records] == ["rejected"] * 2 + ["failed"] * 3 + ["ok"] * 2
    assert [record.retry_after_s for record in records[:3]] == [3.0, 3.0, None]
    assert result["errors"] == {
        "HTTP 429: the queue is full": 2,
        "HTTP 400: prompt too long": 1,
        "the stream broke off before [DONE]": 1,
        "decode-0 died": 1,
    }
    assert result["total_output_tokens"] == 6


async def test_max_concurrency_bounds_what_is_in_flight(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    words = ("--num-prompts", "9", "--random-input-len", "3", "--random-output-len", "3", "--max-concurrency", "3")
    await bench_serve.run(options("--base-url", url, *words))
    assert server.most_in_flight == 3
    await bench_serve.run(options("--base-url", url, *words[:-2]))
    assert server.most_in_flight == 9


async def test_first_failing_request_ends_the_run(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.faults = {0: "bad"}
    with pytest.raises(PdrayError, match="prompt too long"):
        await bench_serve.run(options("--base-url", url))
    assert len(server.bodies) == 1


async def test_no_server_is_a_clear_error(fake: tuple[FakeServer, str], unused_tcp_port: int) -> None:
    with pytest.raises(PdrayError, match="does not name a model"):
        await bench_serve.run(options("--base-url", f"http://127.0.0.1:{unused_tcp_port}"))


async def test_trace_is_replayed(fake: tuple[FakeServer, str], tmp_path: Path) -> None:
    server, url = fake
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": 40 * i, "input_length": 10 + i, "output_length": 50, "hash_ids": [0]} for i in range(3)]
    trace.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    result, records = await bench_serve.run(options("--base-url", url, "--trace", str(trace), "--max-output-len", "2"))
    assert [record.prompt_len for record in records] == [10, 11, 12]
    assert [record.output_len for record in records] == [2, 2, 2]
    assert result["workload"]["num_outputs_cut"] == 3
    assert result["duration"] >= 0.08
    prompts = [body["prompt"] for body in server.bodies[1:]]
    assert prompts[0] == prompts[1][:10] == prompts[2][:10]


async def test_requests_are_sent_in_order_of_arrival() -> None:
    sent: list[int] = []

    async def send(request: BenchRequest) -> RequestRecord:
        sent.append(request.output_len)
        return RequestRecord(1, "ok", output_len=request.output_len)

    requests = [BenchRequest(0.002 * i, [1], i) for i in range(5)]
    records = await send_all(requests, send)
    assert sent == [0, 1, 2, 3, 4]
    assert [record.output_len for record in records] == sent


async def test_what_is_sent_late_says_so() -> None:
    """A time is told from the arrival, also where a place was waited for: such a client measures another load."""

    async def send(request: BenchRequest) -> RequestRecord:
        await asyncio.sleep(0.05)
        return RequestRecord(1, "ok")

    first, second = await send_all([BenchRequest(0.0, [1], 1)] * 2, send, max_concurrency=1)
    assert first.lateness < second.lateness and second.lateness >= 0.05


async def test_several_processes_send_each_request_once_and_in_turn(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.faults = {3: "full"}
    words = ("--random-output-len", "3", "--request-rate", "200", "--num-client-processes", "3")
    result, records = await bench_serve.run(options("--base-url", url, "--num-prompts", "7", *words))
    workload = bench_serve.build_workload(options("--num-prompts", "7", *words))
    sent = sorted(body["prompt"] for body in server.bodies[1:])
    assert sent == sorted(request.prompt_token_ids for request in workload.requests)
    assert sorted(record.outcome for record in records) == ["ok"] * 6 + ["rejected"]
    assert [record.prompt_len for record in records] == [1024] * 7
    assert result["num_client_processes"] == 3 and result["duration"] >= 6 / 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-client-processes", "0"), "--num-client-processes 0 must be at least 1"),
        (("--num-client-processes", "2", "--max-concurrency", "4"), "--max-concurrency 4 counts .* of one process"),
    ],
)
async def test_client_processes_that_cannot_be(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await bench_serve.run(options(*words))


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
async def test_events_survive_any_cut(cut: int) -> None:
    stream = b": ping\n\ndata: one\r\n\r\nevent: x\ndata: two\n\ndata: three\ndata: four\n\n"

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(stream), cut):
            yield stream[start : start + cut]

    assert [event async for event in sse_data(pieces())] == ["one", "two", "three\nfour"]


def test_result_file_holds_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run(_: argparse.Namespace) -> tuple[dict, list[RequestRecord]]:
        record = RequestRecord(4, "ok", 200, output_len=2, ttft=0.1, itls=[0.2], e2el=0.3, timings=TIMINGS)
        return bench_serve.calculate_metrics([record], 1.0), [record]

    monkeypatch.setattr(bench_serve, "run", run)
    path = tmp_path / "result.json"
    assert bench_serve.main(options("--save-result", str(path), "--save-detailed")) == 0
    saved = json.loads(path.read_text())
    assert saved["median_itl_ms"] == pytest.approx(200)
    assert saved["requests"][0]["itls"] == [0.2]
    assert "lease_wait" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-prompts", "0"), "--num-prompts 0"),
        (("--max-concurrency", "0"), "--max-concurrency 0"),
        (("--min-token-id", "9", "--max-token-id", "9"), "--min-token-id 9"),
        (("--random-input-len", "0"), "input 0"),
        (("--random-range-ratio", "1"), "ratio 1.0"),
    ],
)
def test_options_that_cannot_work_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_serve.build_workload(options(*words))
