"""The process of a rank other than 0: `python -m pdray.ranks.process PARENT PIPE INPUTS KV_ORDERS CHANNELS`.

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
from typing import NamedTuple, NoReturn

import torch

from pdray.background import start_thread
from pdray.config import Config
from pdray.engine.build import PoolPlace, make_pool
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
from pdray.ranks.channel_orders import ChannelFollower
from pdray.ranks.engine import end_process
from pdray.ranks.facts import RankFacts
from pdray.ranks.kv_orders import KVFollower, Staging
from pdray.ranks.member import process_name
from pdray.ranks.setup import RankSite, Setup, decode, join
from pdray.transfer.channel import Kind, Site
from pdray.transfer.registry import load_kind

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def main(parent: int, pipe: int, inputs: int, kv_orders: int, channels: int) -> None:
    """Run until rank 0 says so, or is gone. Does not return, nor destroy anything of the rank before the process ends:
    CUDA, Gloo and NCCL might wait for other ranks, and NCCL waits for the graphs that have its sums."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to handle
    log_to_stderr()
    connection = Connection(pipe)
    try:
        setup = decode(connection.recv_bytes())
        rank = make_rank(setup, inputs, Connection(kv_orders), Connection(channels))
        follow(rank, connection)
    except EOFError:
        pass  # rank 0 is gone
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):  # rank 0 is gone
            connection.send_bytes(describe_error(error).encode())
        end(1)  # while the error still has what it came from
    end(0)


def end(status: int) -> NoReturn:
    """End this process without another word."""
    sys.stderr.flush()
    os._exit(status)


def die_with(parent: int) -> None:
    """Be killed when the parent ends, whatever this process does then; and be found by its name until that is done."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_NAME, process_name(parent).encode())
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Rank(NamedTuple):
    """What follows rank 0.

    Attributes:
        note_step: to be called after each step.
    """

    lane: Lane
    note_step: Callable[[], None]


def make_rank(setup: Setup, inputs: int, kv_orders: Connection, channels: Connection) -> Rank:
    """What rank 0 makes, too, in the same order; in mode disaggregated it follows orders for its pool from now on."""
    config = setup.config
    device = select_device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    group = join(setup, device)
    config = config.for_device(device.type)
    kinds, spare_bytes = {}, 0
    if setup.site is not None:
        kinds, spare_bytes = make_kinds(setup.site, config, device), setup.site.spare_bytes
    model = load_model(config, device, group=group)
    pool = make_pool(config, model, device, PoolPlace(spare_bytes))
    max_model_len = usable_model_len(model.decoder.max_len, pool.num_blocks, config.block_size)
    limits = EngineLimits.of(config, model.config, pool, max_model_len)
    memory = SharedMemory(inputs, pinned=device.type == "cuda")
    facts = RankFacts(memory, setup.size)
    lane, _ = open_lane(config, model.decoder, pool, limits, LaneRanks(memory))
    if config.mode == "disaggregated":
        KVFollower(setup.rank, pool, Staging(memory, pool.layout, setup.size), kv_orders)
    for kind in kinds.values():
        kind.attach(pool)
    if kinds:
        ChannelFollower(kinds, channels)
    quiet_garbage_collection()
    start_thread("pulse", partial(facts.beat, setup.rank), print)
    return Rank(lane, facts.writer(setup.rank, device))


def make_kinds(site: RankSite, config: Config, device: torch.device) -> dict[str, Kind]:
    """Those that rank 0 has; see its assemble()."""
    peers = site.sends, site.num_peer_ranks
    mine = Site(config, site.worker_id, device, site.num_peers, end_process, site.address, *peers)
    return {name: load_kind(name)(mine) for name in site.kinds}


def follow(rank: Rank, connection: Connection) -> None:
    """Do this rank's part of every step. Returns when rank 0 says that there are no more."""
    while order := connection.recv_bytes():
        rank.lane.follow(decode_order(order))
        rank.note_step()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
