"""A model's generation_config.json: end-of-sequence ids, and defaults of sampling parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pdray.config import Config
from pdray.errors import ConfigError, InvalidRequestError, ModelLoadError
from pdray.models.resolve import GENERATION_FILE, ModelSource, SourceKind, read_json, resolve_model
from pdray.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Of generation_config.json, in the names of SamplingParams. do_sample and all others are not read, as by vLLM: whether
# to sample is said by the temperature.
SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
GGUF_SAMPLING_FIELDS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


class SamplingDefaults(NamedTuple):
    """Attributes:
    values: fields of SamplingParams for requests that leave them out; without max_tokens.
    max_tokens: for requests that leave it out, as far as the context length allows.
    source: what the log calls their origin.
    """

    values: Mapping[str, Any] = {}
    max_tokens: int | None = None
    source: str = "neutral"

    def params(self) -> SamplingParams:
        """Parameters for a caller that gives none at all."""
        return SamplingParams(**self._given)

    def __str__(self) -> str:
        return f"{self.source}: " + (", ".join(f"{name} {value:g}" for name, value in self._given.items()) or "none")

    @property
    def _given(self) -> dict[str, Any]:
        return dict(self.values) | ({} if self.max_tokens is None else {"max_tokens": self.max_tokens})


NEUTRAL = SamplingDefaults()


def generation_file(config: Config, source: ModelSource) -> Path | None:
    """The generation_config.json in force: the one that Config.generation_config names, or the model's if it has one.

    Raises:
        ConfigError: Config.generation_config names none.
    """
    if config.generation_config in ("auto", "vllm"):
        folder = source.path if source.kind is SourceKind.FOLDER else source.path.parent
        file = folder / GENERATION_FILE
        return file if file.is_file() else None
    path = Path(config.generation_config).expanduser()
    path = path / GENERATION_FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"generation_config is {config.generation_config!r}, but there is no file {path.absolute()}; give auto, "
            f"vllm, a folder with a {GENERATION_FILE}, or such a file"
        )
    return path


def load_sampling_defaults(config: Config, log: logging.Logger = logger) -> SamplingDefaults:
    """The sampling defaults of the model, or neutral ones with generation_config=vllm; says in the log which.

    Args:
        log: where a line is written; a warning if the defaults are not neutral, for they change answers.

    Raises:
        ModelLoadError: the model is not found, or a value of the file cannot be. ConfigError: see generation_file().
    """
    defaults = NEUTRAL if config.generation_config == "vllm" else _read(config)
    if defaults is NEUTRAL:
        log.info("Requests that leave out sampling parameters get neutral ones")
    else:
        hint = "generation_config=vllm makes them neutral"
        log.warning("Requests that leave out sampling parameters get those of %s; %s", defaults, hint)
    return defaults


def _read(config: Config) -> SamplingDefaults:
    source = resolve_model(config, weights=False)
    file = generation_file(config, source)
    if file is not None:
        return _checked(read_json(file), SAMPLING_FIELDS, file)
    if source.kind is SourceKind.GGUF:
        from pdray.models.gguf_file import GGUFFile

        gguf = GGUFFile(source.path)
        fields = {key: gguf.field(key) for key in gguf.keys if key.startswith("general.sampling.")}
        if others := sorted(set(fields) - set(GGUF_SAMPLING_FIELDS)):
            logger.warning("%s has sampling defaults that are not applied: %s", source.path, ", ".join(others))
        return _checked(fields, GGUF_SAMPLING_FIELDS, source.path)
    return NEUTRAL


def _checked(fields: Mapping[str, Any], names: Mapping[str, str], file: Path) -> SamplingDefaults:
    given = {names[key]: value for key, value in fields.items() if key in names and value is not None}
    for name, value in given.items():
        kinds = (int,) if name in ("top_k", "max_tokens") else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ModelLoadError(f"{name} is {value!r} in {file}; it must be a number; set generation_config=vllm")
    if given.get("max_tokens") == 0:  # which a request may ask for, to score its prompt
        raise ModelLoadError(f"max_tokens is 0 in {file}: answers would be empty; set generation_config=vllm")
    try:
        SamplingParams(**given)
    except InvalidRequestError as error:
        raise ModelLoadError(f"sampling defaults in {file}: {error}; set generation_config=vllm") from error
    if not given:
        return NEUTRAL
    max_tokens = given.pop("max_tokens", None)
    return SamplingDefaults(given, max_tokens, str(file))
