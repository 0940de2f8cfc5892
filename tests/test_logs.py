"""What an application's processes log, and what they leave out."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from pdray.logs import leave_out_polls


@pytest.mark.parametrize(
    ("message", "access", "kept"),
    [
        ("GET /health 200 1.0ms", True, False),
        ("GET /health 503 1.0ms", True, False),
        ("HEAD /llm/ping 200 1.0ms", True, False),
        ("GET /metrics/ 404 1.0ms", True, False),
        ("GET /v1/models 200 1.0ms", True, True),
        ("POST /v1/completions 200 1.0ms", True, True),
        ("GET /healthy 404 1.0ms", True, True),
        ("GET /health 200 1.0ms", False, True),
    ],
)
def test_polls_are_left_out_of_the_access_log(
    message: str, access: bool, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("ray.serve")
    before = list(logger.filters)
    leave_out_polls()
    try:
        logger.addHandler(caplog.handler)
        logger.warning(message, extra={"serve_access_log": True} if access else {})
    finally:
        logger.removeHandler(caplog.handler)
        logger.filters[:] = before
    assert (message in caplog.messages) == kept


def test_messages_have_a_time_and_a_name_once() -> None:
    code = (
        "import logging\nfrom pdray.logs import log_to_stderr\nlog_to_stderr()\nlog_to_stderr()\n"
        "logging.getLogger('pdray.serve.api').info('prompt')\nlogging.getLogger('other').info('not ours')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert line.endswith("INFO pdray.serve.api: prompt") and line[:2] == "20"
