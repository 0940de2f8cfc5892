"""Every request field of vLLM, SGLang and OpenAI is served, refused by name, or ignored for a written reason."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAIChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAICompletion

from pdray.serve.fields import FIELDS, IGNORED, Ignored, Refused
from pdray.serve.protocol import ChatBody, CompletionBody

# Names in the request classes of their OpenAI-compatible servers.
VLLM = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template
chat_template_kwargs continue_final_message documents early_stopping echo ec_transfer_params frequency_penalty
guided_choice guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos
include_reasoning include_stop_str_in_output kv_transfer_params length_penalty logit_bias logits_processors
logprob_token_ids logprobs max_completion_tokens max_tokens media_io_kwargs messages min_p min_tokens
mm_processor_kwargs model n parallel_tool_calls presence_penalty priority prompt prompt_embeds prompt_logprobs
reasoning_effort repetition_detection repetition_penalty request_id response_format return_mm_kwargs
return_prompt_text return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed
session_id skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval
stream_options structural_tag structured_outputs suffix temperature thinking_token_budget tool_choice tools top_k
top_logprobs top_p truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
"""
SGLANG = """
best_of bootstrap_host bootstrap_port bootstrap_room cache_salt chat_template_kwargs continue_final_message
custom_labels custom_logit_processor custom_params data_parallel_rank disagg_prefill_dp_rank ebnf echo extra_key
frequency_penalty ignore_eos images_config input_ids json_schema logit_bias logprobs lora_path max_completion_tokens
max_dynamic_patch max_tokens messages min_dynamic_patch min_p min_tokens model n ngram_corpus_id no_stop_trim
parallel_tool_calls presence_penalty priority prompt reasoning_effort regex repetition_penalty response_format
return_cached_tokens_details return_hidden_states return_meta_info return_prompt_token_ids return_routed_experts
return_token_ids rid routed_dp_rank routed_experts_start_len seed separate_reasoning session_id session_params
skip_special_tokens stop stop_regex stop_token_ids stream stream_options stream_reasoning suffix task temperature
tool_choice tools top_k top_logprobs top_p use_audio_in_video user
"""
OPENAI = {*OpenAIChat.__annotations__, *OpenAICompletion.__annotations__, "stream"}

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}
SERVED = {"/v1/completions": CompletionBody.model_fields, "/v1/chat/completions": ChatBody.model_fields}


@pytest.mark.parametrize("names", [{*VLLM.split()}, {*SGLANG.split()}, OPENAI], ids=["vllm", "sglang", "openai"])
@pytest.mark.parametrize("path", BODIES)
def test_no_field_is_forgotten(path: str, names: set[str]) -> None:
    assert not names - {*SERVED[path]} - {*FIELDS}


def test_no_field_is_listed_in_vain() -> None:
    """What both endpoints serve needs no entry."""
    assert not FIELDS.keys() & CompletionBody.model_fields.keys() & ChatBody.model_fields.keys()
    assert all(entry.why for entry in FIELDS.values() if isinstance(entry, Ignored))


@pytest.mark.parametrize("path", BODIES)
async def test_every_other_field(http: httpx.AsyncClient, router: Any, path: str) -> None:
    """As null, as what asks for nothing, and as what asks for something."""
    for name, entry in FIELDS.items():
        if name in SERVED[path]:
            continue
        neutral = [None]
        if isinstance(entry, Refused):
            neutral += [False, "", [], {}] if entry.neutral is None else entry.neutral
        for value in neutral:
            answer = await http.post(path, json=BODIES[path] | {name: value})
            assert answer.status_code == 200, answer.text
        num_submitted = router.num_submitted
        for value in ("required", {"type": "x"}, 7):
            answer = await http.post(path, json=BODIES[path] | {name: value})
            if isinstance(entry, Ignored):
                assert answer.status_code == 200, answer.text
            else:
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, name) and name in error["message"]
                assert router.num_submitted == num_submitted


@pytest.mark.parametrize("value", [0, 3, False, "", "x", [], {}])
async def test_unknown_fields_are_refused_by_name(http: httpx.AsyncClient, value: Any) -> None:
    for path, body in BODIES.items():
        error = (await http.post(path, json=body | {"typical_p": value})).json()["error"]
        assert error["param"] == "typical_p" and "'typical_p'" in error["message"]
        assert (await http.post(path, json=body | {"typical_p": None})).status_code == 200


@pytest.mark.parametrize("written,meant", [("max_token", "max_tokens"), ("temprature", "temperature")])
async def test_a_slip_of_the_pen(http: httpx.AsyncClient, written: str, meant: str) -> None:
    error = (await http.post("/v1/completions", json={"prompt": "x", written: 1})).json()["error"]
    assert f"did you mean '{meant}'?" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"stream_options": {"include_usage": True, "include_obfuscation": True}},
        {"stream_options": {"surprise": 1}},
        {"response_format": {"type": "text", "schema": {}}},
    ],
)
async def test_fields_within_fields(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    [(outer, inner)] = fields.items()
    for path, body in BODIES.items():
        answer = await http.post(path, json=body | {"stream": True} | fields)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == outer and [*inner][-1] in error["message"]


async def test_the_schema_tells_what_is_ignored(http: httpx.AsyncClient) -> None:
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
    for kind in ("CompletionBody", "ChatBody"):
        assert schemas[kind]["additionalProperties"] is False
        assert IGNORED.keys() <= schemas[kind]["properties"].keys()
        assert ("tools" in schemas[kind]["properties"]) is (kind == "ChatBody")
