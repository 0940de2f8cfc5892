"""One decoder for the Llama, Qwen2 and Qwen3 families: configuration, weights, tokenizer.

Names are imported when they are first used, so that a router that needs only the tokenizer does not load the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdray.models.load import LoadedModel, load_model, load_model_config
    from pdray.models.model_config import ModelConfig
    from pdray.models.tokenizer import load_tokenizer

__all__ = ["LoadedModel", "ModelConfig", "load_model", "load_model_config", "load_tokenizer"]

_MODULES = {
    "LoadedModel": "pdray.models.load",
    "ModelConfig": "pdray.models.model_config",
    "load_model": "pdray.models.load",
    "load_model_config": "pdray.models.load",
    "load_tokenizer": "pdray.models.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import an exported name on its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
