"""The choice of an engine's device, and checks that this installation fits it."""

from __future__ import annotations

from importlib import metadata

import torch

from pdray.config import Config
from pdray.errors import ConfigError
from pdray.kernels.cpu_rows import steady_rows


def select_device(config: Config) -> torch.device:
    """The device that the configuration names; for "auto", CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and torch cannot use it, or cupy is built for another CUDA than torch.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        steady_rows()
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise ConfigError(
            f"device is {config.device}, but torch {torch.__version__} is built without CUDA; install a CUDA build "
            "of torch and pdray[cuda12] or pdray[cuda13], or set device to cpu"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {config.device}, but torch {torch.__version__} sees no GPU; see nvidia-smi")
    check_cupy(torch.version.cuda)
    return torch.device("cuda")


def check_cupy(torch_cuda: str) -> None:
    """Raises:
    ConfigError: the cupy that is installed is for another major version of CUDA than torch ("12.8", "13.0").
    """
    major = torch_cuda.partition(".")[0]
    installed = {name for name in ("cupy-cuda12x", "cupy-cuda13x") if _is_installed(name)}
    if installed and f"cupy-cuda{major}x" not in installed:
        raise ConfigError(
            f"torch is built for CUDA {torch_cuda}, but {', '.join(sorted(installed))} is installed; "
            f"install pdray[cuda{major}], or a torch that is built for the same CUDA"
        )


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
