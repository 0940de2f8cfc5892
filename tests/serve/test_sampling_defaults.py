"""What a request leaves out of its sampling parameters comes from the model's generation config."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pdray.models.generation_config import NEUTRAL, SamplingDefaults
from pdray.sampling_params import SamplingParams

VALUES = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05}
ROUNDED = {name: getattr(SamplingParams(**VALUES), name) for name in VALUES}  # to what is computed with
DEFAULTS = SamplingDefaults(VALUES, 24, "test")
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}


async def params_of(http: httpx.AsyncClient, router: Any, path: str, **fields: Any) -> SamplingParams:
    response = await http.post(path, json=BODIES[path] | fields)
    assert response.status_code == 200, response.text
    params: SamplingParams = router.requests[-1].params
    return params


@pytest.mark.parametrize("path", BODIES)
async def test_defaults_fill_what_is_left_out_and_nothing_else(path: str, http: Any, router: Any) -> None:
    router.sampling_defaults = DEFAULTS
    params = await params_of(http, router, path)
    assert {name: getattr(params, name) for name in VALUES} == ROUNDED and params.max_tokens == 24
    null = await params_of(http, router, path, temperature=None, max_tokens=None)
    assert (null.temperature, null.max_tokens) == (ROUNDED["temperature"], 24)
    given = {"temperature": 0.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    params = await params_of(http, router, path, **given, max_tokens=7)
    assert {name: getattr(params, name) for name in given} == given and params.max_tokens == 7


@pytest.mark.parametrize("path", BODIES)
async def test_without_defaults(path: str, http: Any, router: Any) -> None:
    router.sampling_defaults = NEUTRAL
    params = await params_of(http, router, path)
    assert {name: getattr(params, name) for name in VALUES} == {
        name: getattr(SamplingParams(), name) for name in VALUES
    }
    left = router.max_model_len - len(router.requests[-1].output.prompt_token_ids)
    assert params.max_tokens == (16 if path == "/v1/completions" else left)


@pytest.mark.parametrize("path", BODIES)
async def test_a_default_length_gives_way_to_the_context(path: str, http: Any, router: Any) -> None:
    router.sampling_defaults = SamplingDefaults({}, 100_000, "test")
    params = await params_of(http, router, path)
    assert params.max_tokens == router.max_model_len - len(router.requests[-1].output.prompt_token_ids)


async def test_a_long_prompt_without_max_tokens_gets_what_is_left(http: Any, router: Any) -> None:
    router.sampling_defaults = NEUTRAL
    prompt = "x" * (router.max_model_len - 5)
    assert (await params_of(http, router, "/v1/completions", prompt=prompt)).max_tokens == 5
