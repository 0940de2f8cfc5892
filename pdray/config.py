"""The one configuration of pdray: validated, frozen, with vLLM's names where the meaning is the same.

It is what `serve deploy` reads as the application's args, what `pdray.LLM(**kwargs)` takes and what
the command line's options set.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from pdray.errors import ConfigError
from pdray.gpu_settings import check_colocated, check_device_ids, check_ranks
from pdray.partition_settings import DEFAULT_MICRO_BATCHES, Switch, check_partition, check_pipeline
from pdray.setting_types import (
    Channel,
    Names,
    NonNegative,
    Positive,
    ReasoningParser,
    Seconds,
    SmCount,
    ToolCallParser,
    is_number,
)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

VISIBLE_ASCII = re.compile(r"[!-~]+")  # what every client can send in a header
GPU_MAX_NUM_SEQS = 256
GPU_MAX_NUM_BATCHED_TOKENS = 8192
GPU_STEP_TIMEOUT_S = 60.0
OFFLINE_TARGET_TPOT_MS = 0.0  # where nobody reads along, and what counts is when the last token comes


class Config(BaseModel):
    """All settings of a deployment. Fields are documented where they are declared."""

    # An error's text would show all that was given, and so the key.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # model
    model: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="Hugging Face id, folder, .gguf file, or config.json for dummy weights; a relative path starts"
        " where the driver or command runs, and in a Serve YAML where Ray's workers run: give an absolute one there",
    )
    tokenizer: str | None = Field(None, description="Hugging Face id or folder; default: the model's own")
    served_model_name: str | Names | None = Field(
        None, description="name in the API, or several, of which answers bear the first; default: the model as given"
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, the model's on CUDA"
    )
    seed: int = Field(0, ge=0, description="seed of dummy weights")
    generation_config: str = Field(
        "auto",
        min_length=1,
        description="auto: the model's generation_config.json gives what a request leaves out of its sampling "
        "parameters; vllm: neutral values do; or another such file or its folder",
    )
    skip_tokenizer_init: bool = Field(False, description="serve token ids only; for models that have no tokenizer")

    # engine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: Positive | None = Field(None, description="tokens, prompt and output; default: the model's limit")
    block_size: Literal[16, 32] = 16
    num_kv_blocks: Positive | None = Field(None, description="overrides the measured pool size")
    kv_cache_memory_bytes: Positive | None = Field(
        None, description="size of each worker's KV pool on each of its GPUs; default: measured"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a whole GPU that all its workers may use"
    )
    cpu_memory_utilization: float = Field(
        0.1, gt=0, le=1, description="share of free host memory for each CPU worker's KV pool"
    )
    max_num_seqs: Positive = Field(64, description="sequences in one decode batch; on a GPU by default 256")
    max_num_batched_tokens: Positive = Field(
        2048,
        description="most tokens of a step; on a GPU by default 8192. Beside streams it is fewer: see target_tpot_ms",
    )
    target_tpot_ms: float | None = Field(
        None,
        ge=0,
        description="what a step beside streams may take when it computes prompts too, unless those wait for over a "
        "second; default: 1.5 times what it takes without them, up to 4.5 times while much is queued, and in pdray.LLM "
        "0: whatever max_num_batched_tokens take, for throughput",
    )
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = Field(
        None, description="plan a step while the one before it runs; default: on CUDA"
    )
    sm_partition: Switch = Field(
        "off",
        description="colocated on a GPU: prompts and decodes beside each other, each on some of its SMs; on: whenever"
        " both wait; auto: when that computes more prompts within target_tpot_ms than one step of both",
    )
    decode_sms: Positive | None = Field(None, description="SMs for decodes then; default: found, of 16, 32, 48 and 64")
    target_ttft_ms: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="with sm_partition: prompts beside streams go as slowly as this allows, late ones last;"
        " default: full speed",
    )
    decode_pipeline: Switch = Field(
        "off",
        description="on a GPU: steps in micro-batches, one's attention beside another's feed-forward; auto: if faster",
    )
    decode_attention_sm: SmCount | None = Field(None, description="SMs for the attention then; default: the others")
    decode_ffn_sm: SmCount | None = Field(None, description="SMs for the feed-forward then; default: the others, or 48")
    decode_micro_batches: Annotated[int, Field(ge=2)] = DEFAULT_MICRO_BATCHES
    enforce_eager: bool = Field(False, description="launch every kernel by itself, without CUDA graphs")
    num_threads: Positive = Field(1, description="torch threads of each CPU worker")

    # cluster
    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    num_prefill_workers: Positive = 1
    num_decode_workers: Positive = 1
    tensor_parallel_size: Positive = Field(
        1, description="processes that share each worker's model, on a GPU of one host each"
    )
    prefill_tensor_parallel_size: Positive | None = Field(None, description="the same of prefill workers alone")
    decode_tensor_parallel_size: Positive | None = Field(None, description="the same of decode workers alone")
    disable_custom_all_reduce: bool = Field(
        False, description="leave every sum of a model's ranks to NCCL, also the small ones that one kernel makes"
    )
    prefill_num_gpus: float = Field(1.0, gt=0, description="GPUs, or a share of one, for each prefill worker (CUDA)")
    decode_num_gpus: float = Field(1.0, gt=0, description="GPUs, or a share of one, for each decode worker (CUDA)")
    prefill_device_id: NonNegative | list[NonNegative] | None = Field(
        None, description="GPU of the prefill workers, or one for each, on a single host; default: as Ray chooses"
    )
    decode_device_id: NonNegative | list[NonNegative] | None = Field(
        None, description="GPU of the decode workers, or one for each, on a single host; default: as Ray chooses"
    )
    worker_num_cpus: float = Field(0.25, ge=0, description="Ray CPUs that each worker reserves")
    worker_resources: dict[str, float] = Field(
        {}, description='other Ray resources that each worker reserves, as {"memory": 2e9, "fast_disk": 1}'
    )
    channel: Channel = Field(
        "auto",
        description="how KV blocks travel; auto: for each pair of workers the first of shared (on the GPU of the only"
        " decode worker: one pool, one copy of the weights), cuda_ipc (one GPU, or two of one machine that can write to"
        " each other), nccl (two GPUs) and object_store that can join them",
    )
    transfer_layer_group: Positive = Field(
        16,
        description="layers pushed together, at most, while the next ones compute; on a GPU few where they hold much"
        " KV, and all together for a short prompt",
    )
    transfer_staging_bytes: Positive | None = Field(
        None,
        description="GPU memory for blocks on their way, for each nccl channel of a prefill worker and for each decode"
        " worker; default: a 64th of the GPU's memory for all of a worker's together, each 128 to 512 MiB, because NCCL"
        " reaches the link's rate only with large pieces, of which four must fit",
    )
    worker_env: dict[str, str] = Field(
        {}, description="environment of the workers' processes, e.g. NCCL's; {worker_id} stands for each one's name"
    )
    host: str = Field(
        "",
        description="address workers listen on; default: the node's own, where only this machine may connect while the "
        "cluster is one node",
    )

    # admission
    max_queue_size: NonNegative = Field(256, description="requests that may wait at one router; more get 429")
    max_queue_wait_s: Seconds = Field(60.0, description="a request that waits longer gets 429")
    request_timeout_s: Seconds | None = Field(None, description="a request that takes longer is ended with 504")
    max_replays: NonNegative = Field(8, description="times that a request may lose its worker before it fails")
    decode_headroom_tokens: NonNegative = Field(
        64, description="output tokens whose blocks a lease holds from the start"
    )
    lease_timeout_s: Seconds = Field(10.0, description="a lease not renewed for so long ends")
    worker_timeout_s: Seconds = Field(2.0, description="a worker silent for so long counts as dead to its peers")
    step_timeout_s: Seconds | None = Field(
        None, description="a worker whose engine takes longer for one step is replaced; default: 60 on a GPU, else none"
    )
    probe_interval_s: Seconds | None = Field(
        30.0, description="time between requests by which a router that is idle tries its workers; none: never"
    )
    probe_timeout_s: Seconds = Field(10.0, description="workers that take longer for one of them are seen to")
    restart_backoff_s: Seconds = Field(
        1.0, description="wait before a dead worker is replaced; doubles with each failure in a row"
    )
    start_timeout_s: Seconds = Field(600.0, description="workers not ready after so long are an error")
    graceful_shutdown_timeout_s: Seconds = Field(
        20.0, description="requests of a server that stops, or changes its configuration, may go on for so long"
    )
    local_prefill_max_tokens: NonNegative = Field(
        0, description="prompts with at most so many uncached tokens are prefilled by the decode worker"
    )

    # API
    api_key: SecretStr | Annotated[list[SecretStr], Field(min_length=1)] | None = Field(
        None,
        exclude=True,  # neither a dump nor a result file holds it
        description="key, or any of several, that /v1 asks for as Authorization: Bearer; a server's default: "
        "$PDRAY_API_KEY, else none",
    )
    allowed_origins: list[str] = Field(
        ["*"], description="web pages of these origins may call the API (CORS); * is any, an empty list is none"
    )
    vllm_metrics: bool = Field(True, description="/metrics of the API has vLLM's names, too")
    tool_call_parser: ToolCallParser = Field(
        "auto", description="how the model writes tool calls; auto: as its chat template asks for; none: take no tools"
    )
    reasoning_parser: ReasoningParser = Field(
        "auto",
        description="how the model writes thoughts; auto: between think tags, if its chat template has them; "
        "none: leave them in the text",
    )
    max_request_bytes: Positive = Field(4 * 1024 * 1024, description="larger HTTP bodies get 413")
    log_prompts: bool = False

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:
        """A number is not true or false, which pydantic takes for 1 and 0."""
        if isinstance(value, bool) and is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"it is {str(value).lower()}, and must be a number")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"({self.max_num_seqs}): one decode step would not fit; raise it or lower max_num_seqs"
            )
        if (
            self.load_format == "dummy"
            and self.tokenizer is None
            and not self.skip_tokenizer_init
            and self.model.endswith(".json")
        ):
            raise ValueError(
                "load_format=dummy with a bare config.json has no tokenizer: set tokenizer, or skip_tokenizer_init=true"
            )
        check_colocated(self)
        check_ranks(self)
        for name in ("prefill_num_gpus", "decode_num_gpus"):
            share = getattr(self, name)
            if share > 1:
                raise ValueError(
                    f"{name} is {share}; it must be at most 1: for workers of several GPUs set tensor_parallel_size"
                )
        for name, amount in self.worker_resources.items():
            if name in ("CPU", "GPU", "object_store_memory") or not amount > 0:
                raise ValueError(
                    f"worker_resources gives {amount:g} for {name}; it takes amounts above 0 of resources other than "
                    "CPU (worker_num_cpus) and GPU (prefill_num_gpus, decode_num_gpus)"
                )
        check_partition(self)
        check_pipeline(self)
        check_device_ids(self)
        from pdray.control.guests import shared_obstacle  # which needs this module

        if (obstacle := shared_obstacle(self)) is not None:
            raise ValueError(obstacle)
        if not all(VISIBLE_ASCII.fullmatch(key) for key in self.api_keys):
            raise ValueError("api_key must be one or more visible ASCII characters, without spaces")
        if not all(self.model_names):
            raise ValueError("served_model_name must not be empty")
        return self

    @property
    def prefill_device_ids(self) -> list[int] | None:
        """One for each prefill worker; None: as Ray chooses."""
        return _for_each(self.prefill_device_id, self.num_prefill_workers)

    @property
    def decode_device_ids(self) -> list[int] | None:
        """One for each decode worker; None: as Ray chooses."""
        return _for_each(self.decode_device_id, self.num_decode_workers)

    @property
    def model_names(self) -> list[str]:
        """The model's names in the API."""
        names = self.served_model_name
        if names is None:
            return [self.model]
        return [names] if isinstance(names, str) else names

    @property
    def model_name(self) -> str:
        """The first of them, which answers bear."""
        return self.model_names[0]

    @property
    def api_keys(self) -> list[str]:
        """All that the API takes; none: it asks for none."""
        keys = self.api_key
        given = [] if keys is None else keys if isinstance(keys, list) else [keys]
        return [key.get_secret_value() for key in given]

    def with_absolute_paths(self) -> Config:
        """A copy in which `model` and `tokenizer` are absolute, because workers have other working directories.

        The model's name in the API stays as it was given. What is no path here is left: a Hugging Face id, or a path
        on the cluster's nodes.

        Raises:
            ConfigError: a relative path that leads nowhere.
        """
        changes: dict[str, Any] = {}
        for name in ("model", "tokenizer"):
            given: str | None = getattr(self, name)
            if given is None or Path(given).is_absolute():
                continue
            path = Path(given).expanduser()
            if path.exists():
                changes[name] = str(path.absolute())
            elif given.startswith((".", "~")) or path.suffix in (".gguf", ".json"):
                raise ConfigError(
                    f"{name} is {given!r}, and there is no {path.absolute()}; a path on other machines must be absolute"
                )
        if "model" in changes:
            changes.setdefault("served_model_name", self.served_model_name or self.model)
        return self.model_copy(update=changes) if changes else self

    def for_device(self, device_type: str) -> Config:
        """A copy with the defaults of that kind of device, where defaults depend on it and nothing was given."""
        if device_type != "cuda":
            return self
        given = self.model_fields_set
        num_seqs, num_tokens = self.max_num_seqs, self.max_num_batched_tokens
        if "max_num_batched_tokens" not in given:
            num_tokens = max(GPU_MAX_NUM_BATCHED_TOKENS, num_seqs if "max_num_seqs" in given else 0)
        if "max_num_seqs" not in given:
            num_seqs = min(GPU_MAX_NUM_SEQS, num_tokens)
        step_timeout_s = GPU_STEP_TIMEOUT_S if self.step_timeout_s is None else self.step_timeout_s
        changes = {"max_num_seqs": num_seqs, "max_num_batched_tokens": num_tokens, "step_timeout_s": step_timeout_s}
        return self.model_copy(update=changes)

    def fingerprint(self) -> str:
        """16 hex digits that two processes share only if they hold the same configuration, its API key included."""
        digest = hashlib.sha256(self.model_dump_json().encode())
        digest.update("".join(f"\n{key}" for key in self.api_keys).encode())
        return digest.hexdigest()[:16]


def _for_each(device_id: int | list[int] | None, count: int) -> list[int] | None:
    return [device_id] * count if isinstance(device_id, int) else device_id
