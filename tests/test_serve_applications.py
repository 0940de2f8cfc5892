"""What pdray takes from Serve's own state: where it listens, and what a deployment's message says."""

from __future__ import annotations

import pytest

from pdray import serve_applications
from pdray.errors import PdrayError
from pdray.serve_applications import ServeApplication, ServeState, brief, require_http


def application(name: str) -> ServeApplication:
    return ServeApplication(name, "RUNNING", "", "/", True, "")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (ServeState("127.0.0.1", 8100, True, {"a": application("a")}), r"8100 .*not on 127.0.0.1:8000.*--port 8100"),
        (ServeState("10.0.0.1", 8000, True, {}), "--port 8000 --host 10.0.0.1"),
        (ServeState("127.0.0.1", 8000, False, {}), "without HTTP"),
    ],
)
def test_serve_that_listens_elsewhere_is_told_at_once(
    state: ServeState, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_applications, "serve_state", lambda: state)
    with pytest.raises(PdrayError, match=message):
        require_http("127.0.0.1", 8000)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_serve_that_listens_there_is_used(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_applications, "serve_state", lambda: ServeState(host, 8000, True, {}))
    require_http("127.0.0.1", 8000)


TRACEBACK = """Deploying app 'pdray' failed with exception:
Traceback (most recent call last):
  File "/ray/serve/application_state.py", line 1, in build
    app = call(args)
  File "/pydantic/main.py", line 9, in parse
    raise validation_error
pydantic_core._pydantic_core.ValidationError: 1 validation error for Config
num_decode_wrokers
  Extra inputs are not permitted [type=extra_forbidden]
    For further information visit https://errors.pydantic.dev/2.14/v/extra_forbidden
"""


def test_a_message_is_its_exception_without_the_frames() -> None:
    assert brief(TRACEBACK) == (
        "Deploying app 'pdray' failed with exception: pydantic_core._pydantic_core.ValidationError: 1 validation error "
        "for Config num_decode_wrokers Extra inputs are not permitted [type=extra_forbidden]"
    )
    assert brief(" one\n two ") == "one two"
    assert brief("") == ""
