"""Every request field that pdray knows of and does not serve: what is done with it instead.

The fields that it serves are those of the bodies in pdray/serve/protocol.py. A name that is neither there nor here is
refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pdray.errors import InvalidRequestError
from pdray.router.conversation import is_empty, shown


class Ignored(NamedTuple):
    """Taken whatever its value.

    Attributes:
        why: the answer is the same without it.
    """

    why: str


class Refused(NamedTuple):
    """Refused, unless its value asks for nothing.

    Attributes:
        neutral: values that ask for nothing; null always does. None stands for false, "", [] and {}.
        instead: what to do instead.
    """

    neutral: tuple[Any, ...] | None = None
    instead: str = ""


OFF = Refused()
ON = Refused((True,))
USE_CHAT = "use /v1/chat/completions"
A_HINT = Ignored("a hint for caching or routing")
A_LABEL = Ignored("a label for the client's own use")
USE_STRUCTURED_OUTPUTS = Refused(instead="use structured_outputs")
USE_REQUEST_ID = Refused(instead="send the header X-Request-Id")

FIELDS: dict[str, Ignored | Refused] = {
    # OpenAI
    "audio": OFF,
    "best_of": Refused((1,)),
    "function_call": Refused(("none", "auto")),
    "functions": OFF,
    "max_completion_tokens": Refused(instead="use max_tokens"),
    "messages": Refused(instead=USE_CHAT),
    "metadata": A_LABEL,
    "modalities": Refused(([], ["text"])),
    "moderation": OFF,
    "parallel_tool_calls": Refused((True,), USE_CHAT),
    "prediction": Ignored("it makes an answer faster, not another one"),
    "prompt": Refused(instead="use /v1/completions"),
    "prompt_cache_key": A_HINT,
    "prompt_cache_options": A_HINT,
    "prompt_cache_retention": A_HINT,
    "reasoning_effort": Refused(instead=USE_CHAT),
    "safety_identifier": A_LABEL,
    "service_tier": Refused(("auto", "default")),
    "store": OFF,
    "suffix": OFF,
    "tool_choice": Refused(("none", "auto"), USE_CHAT),
    "tools": Refused(instead=USE_CHAT),
    "top_logprobs": Refused((0,), "use logprobs"),
    "user": A_LABEL,
    "verbosity": Refused(("medium",)),
    "web_search_options": OFF,
    # vLLM
    "add_generation_prompt": OFF,
    "chat_template": Refused(instead="the model's own template is used"),
    "chat_template_kwargs": OFF,
    "continue_final_message": OFF,
    "documents": OFF,
    "early_stopping": OFF,
    "ec_transfer_params": OFF,
    "guided_choice": USE_STRUCTURED_OUTPUTS,
    "guided_decoding_backend": OFF,
    "guided_grammar": USE_STRUCTURED_OUTPUTS,
    "guided_json": USE_STRUCTURED_OUTPUTS,
    "guided_regex": USE_STRUCTURED_OUTPUTS,
    "guided_whitespace_pattern": USE_STRUCTURED_OUTPUTS,
    "include_reasoning": Refused((True,), USE_CHAT),
    "kv_transfer_params": OFF,
    "length_penalty": Refused((1, 1.0)),
    "logits_processors": OFF,
    "logprob_token_ids": OFF,
    "media_io_kwargs": OFF,
    "mm_processor_kwargs": OFF,
    "prompt_embeds": OFF,
    "repetition_detection": OFF,
    "request_id": USE_REQUEST_ID,
    "return_mm_kwargs": ON,
    "return_prompt_text": OFF,
    "return_token_strs": Refused((False,), "use /tokenize"),
    "return_token_offsets": OFF,
    "return_tokens_as_token_ids": OFF,
    "routed_experts_prompt_start": Refused((0,)),
    "session_id": A_HINT,
    "spaces_between_special_tokens": ON,
    "stream_interval": Refused((1,)),
    "structural_tag": OFF,
    "truncation_side": Refused(("left",)),
    "use_beam_search": OFF,
    "vllm_xargs": OFF,
    "watermarking": OFF,
    # SGLang
    "bootstrap_host": OFF,
    "bootstrap_port": OFF,
    "bootstrap_room": OFF,
    "custom_labels": OFF,
    "custom_logit_processor": OFF,
    "custom_params": OFF,
    "data_parallel_rank": OFF,
    "disagg_prefill_dp_rank": OFF,
    "ebnf": USE_STRUCTURED_OUTPUTS,
    "extra_key": OFF,
    "images_config": OFF,
    "input_ids": Refused(instead="use /v1/completions with token ids as its prompt"),
    "json_schema": USE_STRUCTURED_OUTPUTS,
    "lora_path": OFF,
    "max_dynamic_patch": OFF,
    "min_dynamic_patch": OFF,
    "ngram_corpus_id": OFF,
    "no_stop_trim": Refused(instead="use include_stop_str_in_output"),
    "regex": USE_STRUCTURED_OUTPUTS,
    "return_cached_tokens_details": OFF,
    "return_hidden_states": OFF,
    "return_meta_info": OFF,
    "return_prompt_token_ids": Refused(instead="use return_token_ids"),
    "return_routed_experts": OFF,
    "rid": USE_REQUEST_ID,
    "routed_dp_rank": OFF,
    "routed_experts_start_len": Refused((0,)),
    "separate_reasoning": Refused((True, False)),
    "session_params": OFF,
    "stop_regex": OFF,
    "stream_reasoning": ON,
    "task": OFF,
    "use_audio_in_video": OFF,
    # llama.cpp, TGI
    "grammar": USE_STRUCTURED_OUTPUTS,
    "n_predict": Refused(instead="use max_tokens"),
    "max_new_tokens": Refused(instead="use max_tokens"),
    "repeat_penalty": Refused(instead="use repetition_penalty"),
}
IGNORED = {name: entry.why for name, entry in FIELDS.items() if isinstance(entry, Ignored)}


def known_fields(
    body: dict[str, Any], served: Collection[str], own: Mapping[str, Ignored | Refused] = MappingProxyType({})
) -> dict[str, Any]:
    """The fields of a body that its endpoint serves. What else it holds must ask for nothing.

    Args:
        own: what the endpoint does with some other fields, in place of FIELDS' entries.

    Raises:
        InvalidRequestError: naming a field that is not supported or not known.
    """
    kept = {}
    for name, value in body.items():
        if name in served:
            kept[name] = value
            continue
        match own.get(name, FIELDS.get(name)):
            case None:
                if value is not None:
                    raise InvalidRequestError(f"unknown field {name!r}{_guess(name, served)}", name)
            case Refused() as entry if not _asks_for_nothing(value, entry.neutral):
                instead = f"; {entry.instead}" if entry.instead else ""
                raise InvalidRequestError(f"{name} (here {shown(value)}) is not supported{instead}", name)
    return kept


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...] | None) -> bool:
    if neutral is None:
        return is_empty(value)
    return value is None or any(value == each and type(value) is type(each) for each in neutral)


def _guess(name: str, served: Collection[str]) -> str:
    close = difflib.get_close_matches(name[:64], served, 1, 0.8)
    return f"; did you mean {close[0]!r}?" if close else "; leave it out"
