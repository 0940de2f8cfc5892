"""Waiting for a server: its /health, asked until it is 200, and each reason that it gives meanwhile."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

from pdray.errors import ConfigError, PdrayError

POLL_INTERVAL_S = 0.5
REQUEST_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 64 * 1024


def wait_until_ready(
    url: str,
    timeout_s: float,
    *,
    setting: str = "--timeout",
    on_reason: Callable[[str], None] = lambda reason: None,
    check: Callable[[], str | None] = lambda: None,
) -> None:
    """Poll `url`/health until it answers 200.

    Args:
        setting: what the caller's user raises to wait for longer.
        on_reason: told why it is not ready, whenever the reason is another one.
        check: called before each poll; raises if waiting is of no use, and returns a reason to wait though /health
            answers 200, if there is one.

    Raises:
        PdrayError: not within timeout_s; the text holds the last answer.
        ConfigError: url is not an http address.
    """
    health = health_url(url)
    deadline = time.monotonic() + timeout_s
    last = ""
    while True:
        more = check()
        reason = why_not_ready(health, min(REQUEST_TIMEOUT_S, max(0.1, deadline - time.monotonic()))) or more
        if reason is None:
            return
        if reason != last:
            on_reason(reason)
            last = reason
        if deadline - time.monotonic() < POLL_INTERVAL_S:
            raise PdrayError(f"{health} was not ready after {timeout_s:g} s (raise {setting}?); last answer: {last}")
        time.sleep(POLL_INTERVAL_S)


def health_url(url: str) -> str:
    """Raises:
    ConfigError: url is not an http address.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url is {url!r}; it must begin with http:// or https://")
    try:
        parts = urllib.parse.urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(character.isspace() for character in url):
        raise ConfigError(f"url is {url!r}; it must be http://host:port, as http://127.0.0.1:8000")
    return url.rstrip("/") + "/health"


def why_not_ready(health: str, timeout_s: float) -> str | None:
    """Ask once. None: it is ready."""
    try:
        with urllib.request.urlopen(health, timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        said = _message(error)
        if error.code == 404:
            said += " (a server is there, but no pdray application answers at this address; see `pdray status`)"
        return f"HTTP {error.code}: {said}"
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def _message(error: urllib.error.HTTPError) -> str:
    """The whole of what the server says: the message of an error in OpenAI's shape, or the body."""
    try:
        body = error.read(MAX_ANSWER_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as broken:
        return f"{error.reason} (the answer broke off: {broken})"
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body or str(error.reason)
