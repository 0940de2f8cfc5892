"""Tokens, names, keys, origins, load and metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from pdray.config import Config
from pdray.metric_table import TABLE
from pdray.router.router import DecodePool
from pdray.serve.api import create_app

ASK = [{"role": "user", "content": "hi"}]
Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def serve(router: Any) -> Serve:
    """A client of the API with these settings."""

    @asynccontextmanager
    async def serving(metrics: Any = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(Config(**({"served_model_name": "smol"} | settings)), lambda: router, metrics=metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pdray") as http:
            yield http

    return serving


async def test_tokenize(http: httpx.AsyncClient, router: Any) -> None:
    answer = (await http.post("/tokenize", json={"prompt": "hi!", "return_token_strs": True})).json()
    assert answer == {"count": 3, "max_model_len": 200, "tokens": [*b"hi!"], "token_strs": ["h", "i", "!"]}
    answer = (await http.post("/tokenize", json={"messages": ASK})).json()
    assert bytes(answer["tokens"]) == b"user: hi\nassistant: " and answer["token_strs"] is None
    body = {"messages": ASK, "add_generation_prompt": False, "temperature": 0, "max_tokens": 5}
    assert bytes((await http.post("/tokenize", json=body)).json()["tokens"]) == b"user: hi\n"
    assert (await http.post("/tokenize", json={"prompt": "x" * 500})).json()["count"] == 500  # longer than the context
    assert (await http.post("/tokenize", json={"prompt": ""})).json()["count"] == 0
    assert not router.num_submitted


async def test_tokenizer_info(http: httpx.AsyncClient, router: Any) -> None:
    """What lm_eval needs to prepare prompts without the model's files."""
    info = (await http.get("/tokenizer_info")).json()
    assert info["eos_token"] == "<eos>" and info["bos_token"] is None
    assert info["chat_template"] == router.tokenizer.chat_template and "Tokenizer" in info["tokenizer_class"]
    router.tokenizer = None
    assert (await http.get("/tokenizer_info")).status_code == 400


async def test_detokenize(http: httpx.AsyncClient) -> None:
    assert (await http.post("/detokenize", json={"tokens": [*b"hi!"]})).json() == {"prompt": "hi!"}
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    "path,body,named",
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": 5}, "prompt"),
        ("tokenize", {"prompt": "x", "mood": 1}, "mood"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"messages": ASK, "prompt": "x"}, "prompt"),
        ("detokenize", {"tokens": [129]}, "129"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": "x"}, "tokens"),
        ("detokenize", {}, "tokens"),
    ],
)
async def test_bad_token_requests(http: httpx.AsyncClient, path: str, body: Any, named: str) -> None:
    answer = await http.post(f"/{path}", json=body)
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]


async def test_tokens_without_a_tokenizer(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer = None
    for path, body in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [1]})):
        answer = await http.post(f"/{path}", json=body)
        assert answer.status_code == 400 and "tokenizer" in answer.json()["error"]["message"]


async def test_several_names(serve: Serve) -> None:
    """Each is served, and answers bear the first."""
    async with serve(served_model_name=["smol", "small"]) as http:
        assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["smol", "small"]
        for name in ("smol", "small"):
            assert (await http.get(f"/v1/models/{name}")).json()["id"] == name
            answer = await http.post("/v1/chat/completions", json={"model": name, "messages": ASK})
            assert answer.json()["model"] == "smol"
        answer = await http.post("/tokenize", json={"model": "big", "prompt": "x"})
        assert answer.status_code == 404 and "'smol' and 'small'" in answer.json()["error"]["message"]


async def test_several_keys(serve: Serve) -> None:
    async with serve(api_key=[SecretStr("one"), SecretStr("two")]) as http:
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert (await http.get("/v1/models", headers=headers)).status_code == status
            assert (await http.post("/tokenize", json={"prompt": "x"}, headers=headers)).status_code == status
        assert (await http.get("/load")).status_code == (await http.get("/ping")).status_code == 200


def test_keys_and_names_in_the_configuration() -> None:
    assert Config(api_key="a").fingerprint() != Config(api_key=["a", "b"]).fingerprint() != Config().fingerprint()
    assert Config(api_key=["a", "b"]).api_keys == ["a", "b"] and "'a'" not in repr(Config(api_key=["a", "b"]))
    assert Config(served_model_name=["x", "y"]).model_name == "x" and Config(model="m").model_names == ["m"]
    for bad in ({"served_model_name": []}, {"served_model_name": ""}, {"served_model_name": ["x", ""]}):
        with pytest.raises(ValueError, match="served_model_name"):
            Config(**bad)


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


async def test_pages_of_any_origin(serve: Serve, router: Any) -> None:
    """What a browser asks first, answers, and errors of every kind: without a header a page sees none of them."""
    page = {"Origin": "https://page.example"}
    async with serve(api_key="key", max_request_bytes=100) as http:
        allowed = await http.options("/v1/chat/completions", headers=page | PREFLIGHT)
        assert allowed.status_code == 200 and "authorization" in allowed.headers["access-control-allow-headers"]
        key = {"Authorization": "Bearer key"}
        for answer, status in (
            (await http.get("/v1/models", headers=page | key), 200),
            (await http.get("/v1/models", headers=page), 401),
            (await http.get("/nothing", headers=page), 404),
            (await http.post("/v1/completions", headers=page | key, json={"prompt": "x" * 200}), 413),
            (await http.post("/v1/completions", headers=page | key, json={}), 400),
        ):
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
            assert "Retry-After" in answer.headers["access-control-expose-headers"]
        router.refusals[0] = KeyError("unexpected")
        answer = await http.post("/v1/completions", headers=page | key, json={"prompt": "x"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, "*")


async def test_pages_of_some_origins(serve: Serve) -> None:
    async with serve(allowed_origins=["https://a.example"]) as http:
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            answer = await http.get("/v1/models", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
    async with serve(allowed_origins=[]) as http:
        answer = await http.options("/v1/models", headers={"Origin": "https://a.example"} | PREFLIGHT)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


async def test_load(http: httpx.AsyncClient, router: Any) -> None:
    router.stats = lambda: {"running": 2, "queue_depth": 3}
    assert (await http.get("/load")).json() == {"server_load": 5}
    head = await http.head("/load")
    assert head.status_code == 200 and not head.content


async def test_metrics(serve: Serve, router: Any, metrics: Any) -> None:
    """Both names of every row, read by Prometheus' own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    router.stats = lambda: {"running": 2, "queue_depth": 0}
    router.pools = [DecodePool(100, 25, 16), DecodePool(100, 75, 16)]
    metrics.exposition.samples["ttft"].observe(0.3)
    metrics.exposition.samples["ttft"].observe(0.25)
    metrics.exposition.samples["requests"].add(1, "stop")
    async with serve(metrics) as http:
        answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for row in TABLE.values():
        for name in filter(None, (row.pdray, row.vllm)):
            assert families[name].type == row.kind and families[name].samples
    labels = {"model_name": 'a "model"', "engine": "0"}
    [running] = families["vllm:num_requests_running"].samples
    assert (running.labels, running.value) == (labels, 2)
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0.5
    buckets = {s.labels.get("le"): s.value for s in families["vllm:time_to_first_token_seconds"].samples}
    assert (buckets["0.1"], buckets["0.25"], buckets["0.5"], buckets["+Inf"]) == (0, 1, 2, 2)
    reasons = {s.labels["finished_reason"]: s.value for s in families["vllm:request_success"].samples}
    assert reasons == {"stop": 1, "length": 0, "abort": 0}
    [config] = families["vllm:cache_config_info"].samples
    assert config.labels == labels | {"block_size": "16", "num_gpu_blocks": "200"}
    async with serve(metrics, vllm_metrics=False) as http:
        assert "vllm" not in (await http.get("/metrics")).text


async def test_there_are_no_metrics_before_a_router(metrics: Any) -> None:
    transport = httpx.ASGITransport(create_app(Config(), lambda: None, metrics=metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://pdray") as http:
        assert (await http.get("/metrics")).status_code == 503
        assert (await http.get("/load")).json() == {"server_load": 0}


async def test_litellm_knows_a_context_overflow(http: httpx.AsyncClient) -> None:
    """By this text it raises ContextWindowExceededError."""
    for path, body in (("completions", {"prompt": "x" * 300}), ("responses", {"input": "x" * 300})):
        error = (await http.post(f"/v1/{path}", json=body)).json()["error"]
        assert error["message"].startswith("This model's maximum context length is")
        assert error["code"] == "context_length_exceeded"
