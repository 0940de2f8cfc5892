"""Commands that ask a server whether it is ready, and what they tell while it is not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdray import cli
from pdray.health import wait_until_ready, why_not_ready


class HealthServer(ThreadingHTTPServer):
    """Says 503 to the first `num_refusals` questions and 200 afterwards; with the reasons of a list."""

    def __init__(self, num_refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), HealthHandler)
        self.num_refusals = num_refusals
        self.reasons = ["loading weights"]
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HealthHandler(BaseHTTPRequestHandler):
    server: HealthServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        ready = len(self.server.paths) > self.server.num_refusals
        reason = self.server.reasons[min(len(self.server.paths), len(self.server.reasons)) - 1]
        body = b"" if ready else json.dumps({"error": {"message": reason}}).encode()
        self.send_response(200 if ready else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def health_server(request: pytest.FixtureRequest) -> Iterator[HealthServer]:
    server = HealthServer(request.param)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("health_server", [2], indirect=True)
def test_wait_returns_when_the_server_is_ready(health_server: HealthServer) -> None:
    assert cli.main(["wait", "--url", health_server.url + "/", "--timeout", "60"]) == 0
    assert health_server.paths == ["/health"] * 3


@pytest.mark.parametrize("health_server", [10**6], indirect=True)
def test_wait_gives_up_and_says_why(health_server: HealthServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["wait", "--url", health_server.url, "--timeout", "0.3"]) == 1
    message = capsys.readouterr().err
    assert "not ready after 0.3 s" in message
    assert "loading weights" in message


@pytest.mark.parametrize("health_server", [4], indirect=True)
def test_wait_prints_each_new_reason_whole(health_server: HealthServer, capsys: pytest.CaptureFixture[str]) -> None:
    long = "the workers need 8 CPUs, " * 30
    health_server.reasons = ["no workers", "no workers", long, "connecting"]
    assert cli.main(["wait", "--url", health_server.url, "--timeout", "60"]) == 0
    *reasons, ready = capsys.readouterr().out.splitlines()
    assert reasons == [f"waiting: HTTP 503: {text}" for text in ("no workers", long, "connecting")]
    assert ready.endswith("is ready")


def test_a_server_without_the_application_is_told_apart() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reason = why_not_ready(f"http://127.0.0.1:{server.server_port}/no-such/health", 5.0)
        server.shutdown()
    assert reason is not None and reason.startswith("HTTP 404") and "`pdray status`" in reason


@pytest.mark.parametrize("url", ["http://", "http://host:port", "http://127.0.0.1:99999", "http://a b:1", "host:8000"])
def test_wait_tells_what_is_no_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["wait", "--url", url, "--timeout", "60"]) == 2
    assert repr(url) in capsys.readouterr().err


@pytest.mark.parametrize("health_server", [0], indirect=True)
def test_a_healthy_server_may_be_another_one(health_server: HealthServer) -> None:
    """While `pdray serve --replace` waits, the former application answers."""
    told: list[str] = []
    answers = iter(["still the former one", None])
    wait_until_ready(health_server.url, 60.0, on_reason=told.append, check=lambda: next(answers))
    assert told == ["still the former one"]


@pytest.mark.parametrize("health_server", [10**6], indirect=True)
def test_bench_does_not_show_its_key(
    health_server: HealthServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PDRAY_API_KEY", "sk-ours")
    assert cli.main(["bench", "serve", "--base-url", health_server.url, "--num-prompts", "1"]) == 1
    shown = capsys.readouterr()
    assert "503" in shown.err and "sk-ours" not in shown.err + shown.out


def test_wait_without_a_server_says_so(unused_tcp_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["wait", "--url", f"http://127.0.0.1:{unused_tcp_port}", "--timeout", "0.1"]) == 1
    assert "Connection refused" in capsys.readouterr().err


def test_wait_refuses_another_kind_of_url() -> None:
    assert cli.main(["wait", "--url", "file:///etc/hosts"]) == 2
