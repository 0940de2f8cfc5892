"""Rank 0's side of a worker of several ranks: it starts the others, and tells them of every step."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from pdray.background import start_thread
from pdray.config import Config
from pdray.engine.ranks.orders import LaneRanks, StepOrder
from pdray.engine.ranks.orders import encode as encode_order
from pdray.engine.ranks.shared_memory import SharedMemory
from pdray.errors import RankDiedError
from pdray.ranks.facts import PULSE_S, RankFacts, RankState
from pdray.ranks.member import Member, check_visible, member_environment
from pdray.ranks.setup import Setup, encode, join, settings_of

if TYPE_CHECKING:
    import torch

    from pdray.engine.kv.pool import KVPool
    from pdray.kernels.collective.group import RankGroup
    from pdray.models.model_config import ModelConfig
    from pdray.ranks.pools import RankPools

HUNG_TIMEOUTS = 2.0  # a rank silent for so many worker_timeout_s is ended; its processor may be busy
DEATH_S = 1.0  # until a process that was killed is seen to be
KV_TIMEOUT_S = 60.0  # for a piece of blocks, where nothing is said of steps


class Leader:
    """Starts the other ranks and joins them. They load the model and make pools and lanes when this process does.

    A rank that ends takes the whole worker with it: what the others compute without it means nothing, and they may wait
    for it for ever, so that they are ended at once.

    Args:
        device: of this process; other ranks have GPUs of their own.
        on_end: called with the reason when a rank has ended, once, on a thread of its own; perhaps while this thread
            waits for that rank, and will for ever.

    Attributes:
        group: for load_model(). ranks: for build_engine().
    """

    def __init__(self, config: Config, device: torch.device, on_end: Callable[[RankDiedError], object]) -> None:
        size, on_gpu = config.tensor_parallel_size, device.type == "cuda"
        gpus = visible_gpus() if on_gpu else []
        if on_gpu:
            check_visible(gpus, size)
        self._on_end = on_end
        self._ended = threading.Lock()  # taken by the first rank that ends
        self._killed: list[RankDiedError] = []
        self._was_killed = threading.Event()  # one of them, and is in the list
        self._ending = threading.Event()  # the others end with it
        self._closing = threading.Event()
        self._inputs: int | None = os.memfd_create("pdray-inputs")
        self._members = [
            Member(rank, member_environment(gpus[rank:] + gpus[:rank]), self._inputs, self._member_ended)
            for rank in range(1, size)
        ]
        try:
            self.group = self._join(config, device)
        except BaseException:
            self.close()
            raise
        memory = SharedMemory(self._inputs, pinned=on_gpu)
        self._facts = RankFacts(memory, size)
        self.ranks = LaneRanks(memory, self._announce)
        self._timeout_s = config.step_timeout_s or KV_TIMEOUT_S
        self._hung_s = config.worker_timeout_s * HUNG_TIMEOUTS
        start_thread("rank-pulses", self._watch_pulses, self._unwatched)

    @property
    def pids(self) -> list[int]:
        """Processes of the other ranks."""
        return [member.pid for member in self._members]

    def states(self) -> list[RankState]:
        """Of the other ranks."""
        return [self._facts.of(member.rank, member.pid) for member in self._members]

    def open_pools(self, pool: KVPool, model: ModelConfig) -> RankPools:
        """All ranks' blocks, once this process has its lane; the others expect it in mode disaggregated. Once."""
        from pdray.ranks.kv_orders import Staging
        from pdray.ranks.pools import RankPools

        staging = Staging(self.ranks.memory, pool.layout, len(self._members) + 1)
        return RankPools(pool, model.num_kv_heads, self._members, staging, timeout_s=self._timeout_s)

    def close(self) -> None:
        """End the other ranks, and see them gone. Idempotent; no step may be in flight."""
        self._closing.set()
        for member in self._members:
            member.close()
        if self._inputs is not None:
            os.close(self._inputs)
            self._inputs = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _join(self, config: Config, device: torch.device) -> RankGroup:
        unique_id = None
        if device.type == "cuda":
            from pdray.kernels.collective.nccl import make_unique_id

            unique_id = make_unique_id()
        with tempfile.TemporaryDirectory(prefix="pdray-") as folder:
            setup = Setup(settings_of(config), 0, config.tensor_parallel_size, unique_id, f"{folder}/ranks")
            for member in self._members:
                member.send(encode(msgspec.structs.replace(setup, rank=member.rank)))
            return join(setup, device)

    def _announce(self, order: StepOrder) -> None:
        message = encode_order(order)
        for member in self._members:
            member.send(message)

    def cause_of(self, error: BaseException) -> BaseException:
        """The error that a rank was killed, if that is why this process's step, or another rank, has failed. May wait
        for a moment: connections between ranks are seen to end before a process is."""
        return self._killed[0] if self._was_killed.wait(DEATH_S) else error

    def _watch_pulses(self) -> None:
        """End a rank that is stopped, or hangs. Time in which this process itself stood still does not count."""
        awake = time.monotonic()
        while not self._closing.wait(PULSE_S):
            before, awake = awake, time.monotonic()
            if awake - before > 2 * PULSE_S:
                continue
            for member in self._members:
                if (silent_s := self._facts.silent_s(member.rank)) > self._hung_s:
                    member.kill(f"it was silent for {silent_s:.1f} s (worker_timeout_s)")

    def _unwatched(self, error: BaseException) -> None:
        self._member_ended(RankDiedError(f"ranks are not watched any more: {error!r}"))

    def _member_ended(self, error: RankDiedError) -> None:
        if self._ending.is_set():
            return  # one of the others
        if error.was_killed:
            self._killed.append(error)
            self._was_killed.set()
        cause = self.cause_of(error)
        if self._ended.acquire(blocking=False):
            assert isinstance(cause, RankDiedError)
            self._ending.set()
            for member in self._members:
                member.kill("another rank has ended")
            self._on_end(cause)


def check_model(config: Config, setting: str = "tensor_parallel_size") -> None:
    """Before any process is started.

    Args:
        setting: that the number of ranks comes from.

    Raises:
        ConfigError: the model cannot be divided by so many ranks.
    """
    from pdray.models import load_model_config
    from pdray.models.shards import check_divisible

    check_divisible(load_model_config(config), config.tensor_parallel_size, setting)


def visible_gpus() -> list[str]:
    """Those that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
