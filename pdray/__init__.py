"""Prefill/decode-disaggregated LLM serving as plain Ray actors.

    import pdray
    outputs = pdray.generate(["The capital of France is"], pdray.SamplingParams(temperature=0))
    print(outputs[0].outputs[0].text)

Names are imported when they are first used, so that `import pdray` loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pdray.config import Config
    from pdray.errors import (
        ConfigError,
        HandshakeError,
        InvalidRequestError,
        ModelLoadError,
        NoWorkerError,
        OutOfMemoryError,
        PdrayError,
        QueueFullError,
        RequestFailedError,
        TransferError,
        WorkerDiedError,
    )
    from pdray.llm import LLM, generate
    from pdray.outputs import CompletionOutput, Logprob, RequestOutput, RequestTimings
    from pdray.sampling_params import SamplingParams
    from pdray.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Config",
    "ConfigError",
    "HandshakeError",
    "InvalidRequestError",
    "Logprob",
    "ModelLoadError",
    "NoWorkerError",
    "OutOfMemoryError",
    "PdrayError",
    "QueueFullError",
    "RequestFailedError",
    "RequestOutput",
    "RequestTimings",
    "SamplingParams",
    "StructuredOutputsParams",
    "TransferError",
    "WorkerDiedError",
    "__version__",
    "generate",
]

_MODULES = {
    "LLM": "pdray.llm",
    "generate": "pdray.llm",
    "Config": "pdray.config",
    "SamplingParams": "pdray.sampling_params",
    "StructuredOutputsParams": "pdray.structured_outputs",
    "CompletionOutput": "pdray.outputs",
    "Logprob": "pdray.outputs",
    "RequestOutput": "pdray.outputs",
    "RequestTimings": "pdray.outputs",
}


def __getattr__(name: str) -> Any:
    """Import an exported name on its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "pdray.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
