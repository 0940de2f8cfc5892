"""response_format and structured_outputs: what the router is asked for, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.errors import InvalidRequestError, QueueFullError
from pdray.router import grammars
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        ({"response_format": json_schema(SCHEMA)}, StructuredOutputsParams(json=SCHEMA)),
        ({"response_format": json_schema(SCHEMA, strict=True)}, StructuredOutputsParams(json=SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputsParams(json=SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, StructuredOutputsParams(json=json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutputsParams(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputsParams(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, StructuredOutputsParams(grammar='root ::= "a"')),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            StructuredOutputsParams(json_object=True, disable_any_whitespace=True),
        ),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
            StructuredOutputsParams(regex="a"),
        ),
    ],
)
@pytest.mark.parametrize("path", BODIES)
async def test_the_router_is_asked_for_it(
    http: httpx.AsyncClient, router: Any, path: str, fields: dict[str, Any], expected: StructuredOutputsParams | None
) -> None:
    answer = await http.post(path, json={**BODIES[path], **fields})
    assert answer.status_code == 200, answer.text
    assert router.requests[-1].params.structured_outputs == expected


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}}, None, "takes no"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, None, "schema"),
        ({"response_format": json_schema({"uniqueItems": True})}, "response_format", "'uniqueItems'"),
        ({"response_format": json_schema({"type": "object", "properties": {"a": {"not": {}}}})}, None, "'not'"),
        ({"structured_outputs": {"json": {"if": {}}}}, "structured_outputs", "'if'"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs", '"b"'),
        ({"structured_outputs": {"structural_tag": "x"}}, None, "structural_tag"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "regex and choice"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None, "leave one out"),
        ({"guided_json": SCHEMA}, "guided_json", "use structured_outputs"),
    ],
)
@pytest.mark.parametrize("path", BODIES)
async def test_what_cannot_be_enforced_is_named_in_a_400(
    http: httpx.AsyncClient, router: Any, path: str, fields: dict[str, Any], param: str | None, message: str
) -> None:
    answer = await http.post(path, json={**BODIES[path], **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"], answer.text
    assert param is None or error["param"] == param
    assert not router.requests


async def test_without_a_tokenizer_it_is_refused(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer = None
    answer = await http.post("/v1/completions", json={"prompt": [1, 2], "structured_outputs": {"regex": "a"}})
    assert answer.status_code == 400 and "skip_tokenizer_init" in answer.json()["error"]["message"]


async def test_openai_parses_its_own_models(client: openai.AsyncOpenAI, router: Any) -> None:
    """A union that pydantic tells apart by a tag comes as oneOf."""

    class City(BaseModel):
        name: str
        inhabitants: int | None

    router.reply = '{"name": "Paris", "inhabitants": null}'
    answer = await client.chat.completions.parse(
        model="smol", messages=[{"role": "user", "content": "x"}], response_format=City, max_tokens=60
    )
    assert answer.choices[0].message.parsed == City(name="Paris", inhabitants=None)
    assert router.requests[-1].params.structured_outputs.kind == "json"


@pytest.fixture
def slow_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiles nothing before it is let go."""
    go_on = threading.Event()

    def load() -> TokenPieces:
        assert go_on.wait(60)
        return TokenPieces([bytes([i]) for i in range(256)], frozenset())

    compiler = GrammarCompiler(load)
    monkeypatch.setattr(grammars, "compiler_of", lambda tokenizer: compiler)
    monkeypatch.setattr(grammars, "COMPILE_TIMEOUT_S", 0.05)
    yield go_on
    go_on.set()


async def test_what_compiles_for_too_long_holds_nobody_up(slow_compiler: threading.Event) -> None:
    """The first is refused; who waits behind it is to come again; and who comes when it is done is served."""

    def check(regex: str) -> Any:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex))
        return grammars.check_grammar(params, object())  # type: ignore[arg-type]

    bomb = asyncio.ensure_future(check("a{1000}"))
    await asyncio.sleep(0.01)
    with pytest.raises(QueueFullError):
        await check("b")
    with pytest.raises(InvalidRequestError, match="takes longer"):
        await bomb
    slow_compiler.set()
    await asyncio.to_thread(grammars.compiler_of(None).compile(StructuredOutputsParams(regex="b")).result, 60)  # type: ignore[arg-type]
    await check("b")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"json": ""}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"multipleOf": -1}}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"multipleOf": 0}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
async def test_what_contradicts_itself_is_refused(http: httpx.AsyncClient, fields: Any, param: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]} | fields
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
