"""Load a model as the configuration says: its shape, its weights, and a digest of both."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from pdray.config import Config
from pdray.errors import ConfigError, ModelLoadError
from pdray.kernels.collective.group import RankGroup
from pdray.models.arena import Arena
from pdray.models.decoder import Decoder, num_weight_bytes
from pdray.models.dummy import fill_dummy
from pdray.models.end_of_sequence import tokenizer_end_ids
from pdray.models.fingerprint import fingerprint
from pdray.models.generation_config import generation_file
from pdray.models.gguf_config import read_model_config
from pdray.models.gguf_file import GGUFFile
from pdray.models.gguf_loader import load_gguf
from pdray.models.model_config import ModelConfig
from pdray.models.resolve import ModelSource, SourceKind, read_config_files, read_json, resolve_model
from pdray.models.safetensors_loader import has_head_of_its_own, load_safetensors

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel(NamedTuple):
    """Attributes:
    fingerprint: 16 hex digits; equal only for equal configuration, dtype and (sampled) weights.
    """

    config: ModelConfig
    decoder: Decoder
    dtype: torch.dtype
    fingerprint: str


def load_model_config(config: Config) -> ModelConfig:
    """The model's shape, without reading weights.

    Raises:
        ModelLoadError: the model is not found, or of a kind that pdray does not know.
    """
    source = resolve_model(config, weights=False)
    return _model_config(source, _gguf(source), config)


class WeightMemory(NamedTuple):
    """Memory for a model's weights, where they are to lie in one piece.

    Attributes:
        take: gives [n] uint8 on the model's device.
        is_filled: the same model's weights are there already.
    """

    take: Callable[[int], torch.Tensor]
    is_filled: bool = False


def load_model(
    config: Config, device: torch.device, memory: WeightMemory | None = None, group: RankGroup | None = None
) -> LoadedModel:
    """Build the decoder on ``device`` and fill it.

    Args:
        memory: default: torch's own.
        group: ranks that share the model: this process loads its own shard and nothing else.

    Raises:
        ModelLoadError: the model is not found, unknown, or its tensors do not fit its configuration.
        ConfigError: max_model_len is beyond the model's limit, or the model cannot be divided by so many ranks.
    """
    source = resolve_model(config, weights=True)
    gguf = _gguf(source)
    model_config = _model_config(source, gguf, config)
    if config.load_format != "dummy" and model_config.tie_word_embeddings and source.kind is SourceKind.FOLDER:
        untied = has_head_of_its_own(source.path)
        if untied:
            logger.warning("%s ties its embeddings by its config.json, but holds an lm_head of its own", source.path)
        model_config = dataclasses.replace(model_config, tie_word_embeddings=not untied)
    dtype = choose_dtype(config, model_config, device)
    arena = None if memory is None else Arena(memory.take(num_weight_bytes(model_config, dtype)))
    decoder = Decoder(model_config, choose_max_len(config, model_config), dtype, device, arena, group)
    if memory is None or not memory.is_filled:
        _fill(decoder, source, gguf, config)
    digest = fingerprint(decoder)
    decoder.pack_weights()
    return LoadedModel(model_config, decoder, dtype, digest)


def choose_dtype(config: Config, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    """Config.dtype; auto is float32 on CPU and the checkpoint's own elsewhere."""
    name: str = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model_config.torch_dtype
    if name not in DTYPES:
        raise ModelLoadError(f"the checkpoint's dtype is {name!r}; set dtype to one of {', '.join(DTYPES)}")
    return DTYPES[name]


def choose_max_len(config: Config, model_config: ModelConfig) -> int:
    """Config.max_model_len, or the model's limit."""
    limit = model_config.max_model_len
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but {config.model!r} has positions for {limit} tokens; lower it"
        )
    return config.max_model_len or limit


def _gguf(source: ModelSource) -> GGUFFile | None:
    """The file, opened once: parsing its vocabulary takes most of a second."""
    return GGUFFile(source.path) if source.kind is SourceKind.GGUF else None


def _fill(decoder: Decoder, source: ModelSource, gguf: GGUFFile | None, config: Config) -> None:
    """Give every parameter its value. No view of them outlives this, so that packing frees what it replaces."""
    parameters, cuts = decoder.parameters(), decoder.cuts()
    if config.load_format == "dummy":
        fill_dummy(parameters, config.seed, decoder.config.initializer_range, cuts)
    elif gguf is not None:
        load_gguf(gguf, parameters, cuts)
    else:
        load_safetensors(source.path, parameters, cuts)


def _model_config(source: ModelSource, gguf: GGUFFile | None, config: Config) -> ModelConfig:
    """Sequences end at what the model's own files name, and at what the tokenizer does."""
    if gguf is not None:
        model_config = read_model_config(gguf)
    else:
        hf_config, _ = read_config_files(source)
        file = generation_file(config, source)
        model_config = ModelConfig.from_hf(hf_config, None if file is None else read_json(file))
    end_ids = (*model_config.eos_token_ids, *tokenizer_end_ids(config, source))
    return dataclasses.replace(model_config, eos_token_ids=tuple(dict.fromkeys(end_ids)))
