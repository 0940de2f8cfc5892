"""Bodies of requests to the API, and the shape of its refusals, for tests."""

from __future__ import annotations

from typing import Any

import httpx

USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> dict[str, Any]:
    """Of /v1/completions; the fields come last, so that they can replace the prompt."""
    return {"model": "smol", "prompt": "x", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    """Of /v1/chat/completions; likewise."""
    return {"model": "smol", "messages": [USER], **fields}


def check_shape(response: httpx.Response, status: int) -> dict[str, Any]:
    """Assert OpenAI's shape of an error, and return what it says."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and (error["param"] is None or isinstance(error["param"], str))
    return error
