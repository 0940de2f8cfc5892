"""What sampling parameters may be, whichever door they come through: the numbers that the kernels compute with."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from pdray.errors import InvalidRequestError
from pdray.sampling_params import SamplingParams, wrap_seed
from pdray.structured_outputs import StructuredOutputsParams

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs")
REFUSED: list[tuple[str, Any]] = [
    *[(name, value) for name in FLOATS for value in (math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, "1", True)],
    *[(name, None) for name in FLOATS],
    *[(name, value) for name in INTEGERS for value in (2**64, -(2**64), 10**5000, 1.5, math.nan, math.inf, "1", True)],
    *[(name, None) for name in ("n", "top_k", "min_tokens")],
    *[(name, 2**31) for name in INTEGERS if name != "seed"],
    ("top_p", 0.0),
    ("top_p", 1e-50),
    ("top_p", 1e-40),  # it may count as 0 on a GPU
    ("top_p", 1.0000002),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-50),
    ("repetition_penalty", 1e-39),  # its reciprocal is infinite
    ("repetition_penalty", 100.00001),
    ("temperature", -1e-30),
    ("temperature", 100.00001),
    ("min_p", -1e-30),
    ("presence_penalty", 2.0000003),
    ("frequency_penalty", -2.0000003),
    ("top_k", -2),
    ("n", 0),
    ("n", 65),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("logprobs", 21),
    ("logprobs", -1),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [5, 2**31]),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [True]),
    ("stop", [""]),
    ("stop", [5]),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: repr(value)[:24] if value != 10**5000 else "big")
def test_what_leaves_its_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} is ") as raised:
        SamplingParams(**{name: value})
    assert raised.value.param == name and "it must be" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.7),
        ("temperature", 1e-50),
        ("temperature", 100),
        ("top_p", 0.9),
        ("top_p", 2.0**-126),
        ("top_p", 0.99999999),
        ("top_p", 1 + 1e-9),
        ("min_p", 1e-60),
        ("min_p", 1e-40),
        ("presence_penalty", -1.1),
        ("frequency_penalty", 1.1),
        ("repetition_penalty", 1.3),
        ("repetition_penalty", 2.0**-126),
        ("repetition_penalty", np.float32(1.3)),
    ],
)
def test_a_float_is_the_float32_that_is_computed_with(name: str, value: Any) -> None:
    held = getattr(SamplingParams(**{name: value}), name)
    assert type(held) is float and held == float(np.float32(value))


def test_a_float_that_rounds_to_off_is_off() -> None:
    assert SamplingParams(top_p=0.99999999).top_p == 1.0 and SamplingParams(min_p=1e-60).min_p == 0.0
    assert SamplingParams(temperature=1e-50).greedy


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("top_k", 2**31 - 1, 2**31 - 1),
        ("top_k", -1, -1),
        ("top_k", 4.0, 4),
        ("top_k", np.int64(7), 7),
        ("n", 2.0, 2),
        ("seed", -1, None),
        ("seed", -2, -2),
        ("seed", -(2**63), -(2**63)),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("seed", None, None),
        ("max_tokens", 2**31 - 1, 2**31 - 1),
        ("max_tokens", None, None),
        ("logprobs", None, None),
        ("stop_token_ids", [np.int32(3), 2**31 - 1], (3, 2**31 - 1)),
    ],
)
def test_integers_that_fit(name: str, value: Any, held: Any) -> None:
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == held and type(getattr(params, name)) is type(held)


def test_the_wire_brings_the_same_parameters() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=-5, stop=["a"], stop_token_ids=[3], repetition_penalty=1.1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    params = SamplingParams(
        logit_bias={5: 0.1, 7: -100},
        allowed_token_ids=[5, 7],
        bad_words=["a"],
        bad_words_token_ids=((5, 6),),
        cache_salt="s",
        structured_outputs=StructuredOutputsParams(json={"type": "object"}, whitespace_pattern=" ?"),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    with pytest.raises(msgspec.ValidationError, match="top_k is"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_k": 2**40}), type=SamplingParams)


def test_seeds_wrap_to_64_bits() -> None:
    assert [wrap_seed(seed) for seed in (-1, 5, 2**63 - 1, 2**63, 2**64 + 3)] == [-1, 5, 2**63 - 1, -(2**63), 3]
