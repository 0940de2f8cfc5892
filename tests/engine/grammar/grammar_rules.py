"""Requests with grammars, and the vocabulary that they are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

VOCAB_SIZE = 199
SPECIAL = frozenset({0, 1, 2, 3})
EOS = (2, 3)
WORDS = ['{"', '":', '","', "true", "null", "12", "  ", "\n", "name", "age", "}]", "é", "ab", "\\u"]
# Ids 4 to 98 are printable ASCII, the next are pieces of several characters; those left are in no text.
PIECES = [b""] * 4 + [bytes([code]) for code in range(32, 127)] + [word.encode() for word in WORDS]
PIECES += [b""] * (VOCAB_SIZE - len(PIECES))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
LONG = StructuredOutputsParams(regex="[a-z]{300}")
RULES = {
    "schema": SamplingParams(
        temperature=1.0, seed=5, max_tokens=150, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    ),
    "greedy": SamplingParams(temperature=0, max_tokens=150, structured_outputs=StructuredOutputsParams(json=SCHEMA)),
    "compact": SamplingParams(
        temperature=1.5,
        seed=6,
        max_tokens=150,
        structured_outputs=StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    ),
    "any": SamplingParams(
        temperature=1.0, seed=7, max_tokens=40, structured_outputs=StructuredOutputsParams(json_object=True)
    ),
    "three": SamplingParams(
        n=3, temperature=1.0, seed=8, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[a-c]{5,25}d?")
    ),
    "choice": SamplingParams(
        temperature=1.0, seed=9, max_tokens=30, structured_outputs=StructuredOutputsParams(choice=("abé", 'a"b', "12"))
    ),
    "penalties": SamplingParams(
        temperature=0.8,
        seed=10,
        max_tokens=30,
        frequency_penalty=0.9,
        structured_outputs=StructuredOutputsParams(regex="[a-z]{20}"),
    ),
    "filters": SamplingParams(
        temperature=1.2,
        seed=11,
        max_tokens=30,
        top_k=3,
        top_p=0.9,
        structured_outputs=StructuredOutputsParams(grammar='start: "x" digit+\ndigit: /[0-9]/'),
    ),
    "logprobs": SamplingParams(
        temperature=1.0, seed=12, max_tokens=20, logprobs=3, structured_outputs=StructuredOutputsParams(regex="[0-9]+")
    ),
    "free": SamplingParams(temperature=1.0, seed=13, max_tokens=30, ignore_eos=True),
    "long": SamplingParams(temperature=1.0, seed=1, max_tokens=110, structured_outputs=LONG),
    "longer": SamplingParams(temperature=1.0, seed=2, max_tokens=120, structured_outputs=LONG),
}


def requests() -> list[EngineRequest]:
    return [
        EngineRequest(name, [5 + (7 * i + j) % 150 for j in range(3 + 9 * i)], params, tuple(range(params.n)))
        for i, (name, params) in enumerate(RULES.items())
    ]


def answers(engine: Any) -> dict[Any, Any]:
    return {key: dict(indices) for key, indices in engine.tokens.items()}


def text_of(ids: list[int]) -> str:
    return b"".join(PIECES[i] for i in ids if i not in SPECIAL).decode()


def wanted(kind: str, value: Any, **params: Any) -> SamplingParams:
    defaults = {"temperature": 1.0, "seed": 3, "max_tokens": 30}
    return SamplingParams(**{**defaults, **params}, structured_outputs=StructuredOutputsParams(**{kind: value}))


def run(make: Callable[..., Any], params: SamplingParams, **settings: Any) -> Any:
    """An engine that has completed one request with these parameters."""
    engine = make(**settings)
    assert params.structured_outputs is not None
    engine.grammars.check(params.structured_outputs).result(PATIENCE_S)
    engine.run(EngineRequest("r", list(range(10, 30)), params))
    engine.assert_empty()
    return engine
