"""What clients and proxies do to a request: slashes, HEAD, compression, a byte-order mark."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from pdray.serve.inflate import MAX_MEMBERS

LIMIT = 20_000  # max_request_bytes of the fixture
BODY = {"model": "smol", "prompt": "Hello", "max_tokens": 3}
RAW = json.dumps(BODY).encode()


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    "path",
    ["/v1/models/", "//v1/models", "/v1//models//", "/v1/models/smol", "/v1/models/smol/", "//health", "/health/"],
)
async def test_slashes(http: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "HEAD"):
        assert (await http.request(method, f"http://pdray{path}")).status_code == 200


@pytest.mark.parametrize("path", ["//v1/completions", "/v1/completions/", "/v1//completions//"])
async def test_slashes_of_a_post(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.post(f"http://pdray{path}", json=BODY)).json()["usage"]["completion_tokens"] == 3


async def test_a_base_url_that_ends_in_a_slash(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}//v1/", api_key="none", max_retries=0) as client:
        assert [model.id for model in (await client.models.list()).data] == ["smol"]
        assert (await client.completions.create(model="smol", prompt="x")).choices[0].text


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/v1/models", "/v1/models/smol", "/openapi.json"])
async def test_head_is_get_without_the_body(http: httpx.AsyncClient, url: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=url) as behind_a_server:
        for client in (http, behind_a_server):
            head, got = await client.head(path), await client.get(path)
            assert (head.status_code, head.content) == (200, b"") and got.content
            for name in ("content-type", "content-length"):
                assert head.headers[name] == got.headers[name]


async def test_head_of_what_is_not_there(http: httpx.AsyncClient, router: Any) -> None:
    assert (await http.head("/v1/nothing")).status_code == 404
    refused = await http.head("/v1/completions")
    assert refused.status_code == 405 and "POST" in refused.headers["allow"]
    router.ready = False
    assert (await http.head("/health")).status_code == 503


ENCODED = [
    ("gzip", gzip.compress(RAW, mtime=0)),
    ("x-gzip", gzip.compress(RAW, mtime=0)),
    ("GZIP", gzip.compress(RAW, mtime=0)),
    ("identity, gzip", gzip.compress(RAW, mtime=0)),
    ("gzip", gzip.compress(RAW[:9], mtime=0) + gzip.compress(RAW[9:], mtime=0)),
    ("gzip", gzip.compress(b"\xef\xbb\xbf" + RAW, mtime=0)),
    ("deflate", zlib.compress(RAW)),
    ("deflate", raw_deflate(RAW)),
    ("identity", RAW),
    ("", RAW),
]


@pytest.mark.parametrize("coding,content", ENCODED)
@pytest.mark.parametrize("piece", [1, 7, 10_000])
async def test_compressed_bodies(http: httpx.AsyncClient, router: Any, coding: str, content: bytes, piece: int) -> None:
    async def pieces() -> Any:
        for start in range(0, len(content), piece):
            yield content[start : start + piece]

    answer = await http.post("/v1/completions", content=pieces(), headers={"Content-Encoding": coding})
    assert answer.status_code == 200, answer.text
    assert router.requests[0].output.prompt == "Hello"


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, br", "gzip, gzip", "snappy"])
async def test_other_codings_are_refused_by_name(http: httpx.AsyncClient, router: Any, coding: str) -> None:
    answer = await http.post("/v1/completions", content=RAW, headers={"Content-Encoding": coding})
    assert answer.status_code == 415 and repr(coding) in answer.json()["error"]["message"]
    assert answer.headers["accept-encoding"] == "gzip, deflate" and not router.num_submitted


@pytest.mark.parametrize(
    "coding,content,named",
    [
        ("gzip", RAW, "gzip"),
        ("gzip", b"", "cut short"),
        ("gzip", b"\x1f", "cut short"),
        ("gzip", gzip.compress(RAW, mtime=0)[:-1], "cut short"),
        ("gzip", gzip.compress(RAW, mtime=0) + b"more", "gzip"),
        ("gzip", zlib.compress(RAW), "gzip"),
        ("gzip", gzip.compress(b"", mtime=0) * (MAX_MEMBERS + 1), f"more than {MAX_MEMBERS} members"),
        ("deflate", zlib.compress(RAW)[:-1], "cut short"),
        ("deflate", zlib.compress(RAW) + zlib.compress(RAW), "behind its end"),
        ("deflate", b"\xff" * 9, "deflate"),
        ("gzip", gzip.compress(b"nonsense", mtime=0), "no valid JSON"),
    ],
)
async def test_broken_compression(
    http: httpx.AsyncClient, router: Any, coding: str, content: bytes, named: str
) -> None:
    answer = await http.post("/v1/completions", content=content, headers={"Content-Encoding": coding})
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]
    assert not router.num_submitted


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_the_limit_is_of_what_comes_out(http: httpx.AsyncClient, coding: str) -> None:
    compress = gzip.compress if coding == "gzip" else zlib.compress
    for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
        body = json.dumps({"prompt": "x", "user": ""}).encode()
        body = body.replace(b'""', b'"%s"' % (b"y" * (size - len(body))))
        assert len(body) == size
        answer = await http.post("/v1/completions", content=compress(body), headers={"Content-Encoding": coding})
        assert answer.status_code == status, answer.text


async def test_a_bomb_is_refused_before_it_is_read(app: FastAPI) -> None:
    """A gigabyte of spaces in a megabyte: its first piece inflates to more than the limit, and no more is asked for."""
    stream = zlib.compressobj(wbits=31)
    bomb = b"".join(stream.compress(b" " * 2**20) for _ in range(64))
    num_read, sent = 0, []

    async def receive() -> Any:
        nonlocal num_read
        start, num_read = num_read * 1000, num_read + 1
        return {"type": "http.request", "body": bomb[start : start + 1000], "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b""}
    await app({**scope, "headers": [(b"content-encoding", b"gzip")]}, receive, send)
    assert sent[0]["status"] == 413 and num_read == 1


async def test_a_byte_order_mark(http: httpx.AsyncClient) -> None:
    for raw, status in ((b"\xef\xbb\xbf" + RAW, 200), (b"\xef\xbb\xbf" * 2 + RAW, 400), (b"\xef\xbb" + RAW, 400)):
        assert (await http.post("/v1/completions", content=raw)).status_code == status
