"""An engine with whatever ranks its configuration asks for, in a process that does nothing else."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pdray.config import Config
from pdray.errors import ConfigError, RankDiedError
from pdray.gpu_settings import ROLES, num_ranks

if TYPE_CHECKING:
    import torch

    from pdray.engine.engine import Engine


@contextlib.contextmanager
def open_engine(config: Config, device: torch.device) -> Iterator[Engine]:
    """Over a model of its own, with tensor_parallel_size ranks; ends the others. If one of them ends by itself, so does
    this process.

    Raises:
        ConfigError: prefill and decode workers are to have other numbers of them.
    """
    from pdray.engine.build import build_engine
    from pdray.models import load_model
    from pdray.ranks.leader import Leader, check_model

    sizes = {num_ranks(config, role) for role in ROLES}
    if sizes != {config.tensor_parallel_size}:
        raise ConfigError("one engine runs alone, and is no prefill or decode worker: set tensor_parallel_size alone")
    if config.tensor_parallel_size == 1:
        yield build_engine(config, load_model(config, device), device)
        return
    check_model(config)
    with Leader(config, device, end_process) as leader:
        yield build_engine(config, load_model(config, device, group=leader.group), device, ranks=leader.ranks)


def end_process(error: RankDiedError) -> None:
    """End this process, whose engine's thread may wait for that rank, for ever."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)
