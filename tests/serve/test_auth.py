"""With an API key, /v1 answers only those who send it; and the key shows nowhere."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from pydantic import SecretStr, ValidationError

from pdray.config import Config
from pdray.serve import app as serve_app

KEY = "sk-our-own-key"
GOOD = {"Authorization": f"Bearer {KEY}"}
BODY = {"prompt": "x", "max_tokens": 3}
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/smol"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture
def config() -> Config:
    return Config(served_model_name="smol", max_request_bytes=20_000, api_key=SecretStr(KEY))


@pytest.mark.parametrize("method,path", ROUTES)
@pytest.mark.parametrize(
    "given",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        f"Bearer {KEY}x".encode(),
        f"Bearer {KEY[:-1]}".encode(),
        f"Basic {KEY}".encode(),
        KEY.encode(),
        "Bearer schlüssel".encode(),
        b"Bearer \xff\xfe",
        b"\xff",
    ],
)
async def test_no_or_another_key(http: httpx.AsyncClient, method: str, path: str, given: bytes | None) -> None:
    headers: Any = [] if given is None else [(b"authorization", given)]
    response = await http.request(method, path, headers=headers, content=b"no JSON")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert KEY not in response.text


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_refused_before_the_body_is_read(app: FastAPI, path: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/v1/{path}", "raw_path": b"", "query_string": b""}
    await app({**scope, "headers": []}, receive, send)
    assert sent[0]["status"] == 401


async def test_the_key_lets_in(http: httpx.AsyncClient, url: str) -> None:
    assert (await http.post("/v1/completions", json=BODY, headers=GOOD)).status_code == 200
    assert (await http.post("/v1/completions", json=BODY, headers={"authorization": f"bearer {KEY}"})).is_success
    assert (await http.get("/v1/models", headers=GOOD)).json()["data"][0]["id"] == "smol"
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        assert (await client.completions.create(model="smol", **BODY)).choices[0].text == "The"  # type: ignore[call-overload]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="not this server's"):
            await client.models.list()


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/openapi.json"])
async def test_what_stays_open(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 200


def test_the_key_survives_what_carries_a_configuration(config: Config) -> None:
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.model_copy()):
        assert copied == config and copied.api_key.get_secret_value() == KEY
        assert copied.fingerprint() == config.fingerprint()


def test_the_fingerprint_tells_keys_apart(config: Config) -> None:
    fields = config.model_dump(exclude_unset=True)
    others = [Config(**fields), Config(**fields, api_key=SecretStr("other"))]
    assert len({each.fingerprint() for each in (config, *others)}) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"api_key": "two words"},
        {"api_key": "schlüssel"},
        {"api_key": ""},
        {"api_key": KEY, "max_num_seqs": 0},
        {"api_key": KEY, "max_num_seqs": 64, "max_num_batched_tokens": 1},
        {"api_key": KEY, "unknown": 1},
        {"api_key": []},
        {"api_key": [KEY, "two words"]},
        {"api_key": {"key": KEY}},
    ],
)
def test_errors_do_not_show_the_key(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Config(**fields)
    assert not any(secret in f"{caught.value!s} {caught.value!r}" for secret in (KEY, "two words", "schlüssel"))


async def test_the_key_shows_nowhere(
    http: httpx.AsyncClient, config: Config, caplog: pytest.LogCaptureFixture, router: Any
) -> None:
    router.refusals[0] = KeyError("unexpected")
    with caplog.at_level(logging.DEBUG):
        await http.post("/v1/completions", json=BODY, headers=GOOD)
        logging.getLogger().error("%s %r", config, config)
    shown = [repr(config), str(config), config.model_dump_json(), json.dumps(config.model_dump()), config.fingerprint()]
    assert not any(KEY in text for text in (*shown, caplog.text))


@pytest.mark.parametrize(
    "variable,field,expected",
    [(None, None, None), ("env", None, "env"), ("env", "own", "own"), (None, "own", "own"), ("", None, None)],
)
def test_the_environments_key_is_the_default(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, field: str | None, expected: str | None
) -> None:
    monkeypatch.delenv(serve_app.API_KEY_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(serve_app.API_KEY_VARIABLE, variable)
    fields = {"max_num_seqs": 3} if field is None else {"max_num_seqs": 3, "api_key": field}
    deployment: Any = serve_app.build(Config.model_validate(fields))._bound_deployment
    [deployed] = deployment.init_args
    assert deployed.max_num_seqs == 3
    assert (deployed.api_key.get_secret_value() if deployed.api_key else None) == expected
