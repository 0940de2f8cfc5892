"""The process of a rank other than 0: `python -m pdray.ranks.process PARENT PIPE INPUTS KV_ORDERS`.

It loads its shard, makes its pool and its lane, and then does its part of every step that rank 0 tells it of.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from pdray.background import start_thread
from pdray.engine.build import make_pool
from pdray.engine.device import select_device
from pdray.engine.kv.sizing import usable_model_len
from pdray.engine.pipeline.pipeline import open_lane
from pdray.engine.ranks.orders import LaneRanks
from pdray.engine.ranks.orders import decode as decode_order
from pdray.engine.ranks.shared_memory import SharedMemory
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.step.lane import Lane
from pdray.errors import describe_error
from pdray.garbage_collection import quiet_garbage_collection
from pdray.logs import log_to_stderr
from pdray.models.load import load_model
from pdray.ranks.facts import RankFacts
from pdray.ranks.kv_orders import KVFollower, Staging
from pdray.ranks.setup import Setup, decode, join

PR_SET_PDEATHSIG = 1


def main(parent: int, pipe: int, inputs: int, kv_orders: int) -> None:
    """Run until rank 0 says so, or is gone. Does not return: CUDA and Gloo might wait for other ranks."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to handle
    log_to_stderr()
    connection = Connection(pipe)
    status = 0
    try:
        follow(make_rank(decode(connection.recv_bytes()), inputs, Connection(kv_orders)), connection)
    except EOFError:
        pass  # rank 0 is gone
    except BaseException as error:
        status = 1
        traceback.print_exc()
        with contextlib.suppress(OSError):  # rank 0 is gone
            connection.send_bytes(describe_error(error).encode())
    sys.stderr.flush()
    os._exit(status)


def die_with(parent: int) -> None:
    """Be killed when the parent ends, whatever this process does then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Rank(NamedTuple):
    """What follows rank 0.

    Attributes:
        note_step: to be called after each step.
    """

    lane: Lane
    note_step: Callable[[], None]


def make_rank(setup: Setup, inputs: int, kv_orders: Connection) -> Rank:
    """What rank 0 makes, too, in the same order; in mode disaggregated it follows KV orders from now on."""
    config = setup.config
    device = select_device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    group = join(setup, device)
    config = config.for_device(device.type)
    model = load_model(config, device, group=group)
    pool = make_pool(config, model, device)
    max_model_len = usable_model_len(model.decoder.max_len, pool.num_blocks, config.block_size)
    limits = EngineLimits.of(config, model.config, pool, max_model_len)
    memory = SharedMemory(inputs, pinned=device.type == "cuda")
    facts = RankFacts(memory, setup.size)
    lane, _ = open_lane(config, model.decoder, pool, limits, LaneRanks(memory))
    if config.mode == "disaggregated":
        KVFollower(setup.rank, pool, Staging(memory, pool.layout, setup.size), kv_orders)
    quiet_garbage_collection()
    start_thread("pulse", partial(facts.beat, setup.rank), print)
    return Rank(lane, facts.writer(setup.rank, device))


def follow(rank: Rank, connection: Connection) -> None:
    """Do this rank's part of every step. Returns when rank 0 says that there are no more."""
    while order := connection.recv_bytes():
        rank.lane.follow(decode_order(order))
        rank.note_step()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
