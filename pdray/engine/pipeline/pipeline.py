"""The attention/feed-forward pipeline of an engine's decode steps: what it is made of, and where it is used."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from pdray import __version__
from pdray.config import Config
from pdray.engine.kv.pool import KVPool
from pdray.engine.pipeline.halves import Split, SplitHalves, split_halves, stream_halves
from pdray.engine.pipeline.lane import PipelinedLane, Way
from pdray.engine.pipeline.table import Table, TableFile
from pdray.engine.pipeline.tuner import grid_of, tune
from pdray.engine.ranks.orders import LaneRanks
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.step.graphs import StepGraphs, decode_sizes
from pdray.kernels.green_context import UnavailableError, split_sms
from pdray.kernels.processors import device_processors
from pdray.models.decoder import Decoder

logger = logging.getLogger(__name__)

LADDER = (64, -48, -32)  # SMs of the attention that "auto" tries; below 0: all but so many
DEFAULT_FFN_SMS = 48  # of "on"


class PipelineState(NamedTuple):
    """For `pdray status`.

    Attributes:
        mode: decode_pipeline. ways: that are in use, by name: batch sizes that have them.
        num_measured, num_won: sizes and contexts, and those where a way beats plain steps; with "on" 0.
        is_preparing: something is still to be measured or captured.
        num_steps: that were pipelined.
        unavailable: why every step is plain; None: not because the device cannot.
    """

    mode: str
    ways: dict[str, list[int]]
    num_measured: int
    num_won: int
    is_preparing: bool
    num_steps: int
    unavailable: str | None


class DecodePipeline:
    """Engine's thread only, but for state().

    Args:
        opened: ways of using the device; empty where it cannot.
        unavailable: why it is empty.
    """

    def __init__(
        self, config: Config, lane: PipelinedLane, opened: list[SplitHalves], unavailable: str | None = None
    ) -> None:
        self._mode = config.decode_pipeline
        self._number = config.decode_micro_batches
        self._lane = lane
        self._opened = opened
        self._unavailable = unavailable
        self._ways: dict[str, Way] = {}
        self._table = Table()
        self._sizes = [size for size in decode_sizes(lane.limits.max_num_seqs) if size > 1]  # that have plain graphs
        self._work: Iterator[None] = iter(())
        self._is_preparing = bool(opened)
        if opened and self._mode == "on":
            self._work = self._capture({0: self._sizes})
            while self.prepare_more():
                pass
        elif opened:
            assert lane.graphs is not None, "without graphs steps take as long as the host needs to launch them"
            self._work = self._tune(lane.graphs)  # now: a lane that is moved to a partition has others

    def choose(self, num_seqs: int, mean_len: float) -> Way | None:
        """See PipelinedLane.choose."""
        if self._mode == "on":
            return next(iter(self._ways.values()))
        return self._ways.get(self._table.winner(num_seqs, mean_len) or "")

    def prepare_more(self) -> bool:
        """Measure or capture one thing more, while no step is in flight; returns whether more is left."""
        reason = ""
        try:
            next(self._work)
        except StopIteration:
            self._is_preparing = False
        except RuntimeError as error:
            if "out of memory" not in str(error):  # which CUDA's own errors are called too, not only the allocator's
                raise
            reason = f"out of memory for its graphs; lower gpu_memory_utilization ({error})"
        if reason:  # the error is gone by now, and with it what held the graphs
            self._give_up(reason)
        return self._is_preparing

    def _give_up(self, reason: str) -> None:
        logger.warning("no decode pipeline, decode steps are plain: %s", reason)
        self._unavailable, self._is_preparing, self._work = reason, False, iter(())
        self._lane.choose = None
        self._ways = {}
        torch.cuda.empty_cache()

    def _capture(self, sizes: dict[int, list[int]]) -> Iterator[None]:
        """Make graphs, and use them. Args: sizes: of batches, by the place in what is opened."""
        ways = {}
        for place, its_sizes in sizes.items():
            way = self._lane.make_way(self._opened[place].halves, self._number, its_sizes)
            for _ in self._lane.capture_way(way):
                yield
            ways[way.name] = way
        self._ways = ways
        self._lane.choose = self.choose if ways else None

    def _tune(self, plain: StepGraphs) -> Iterator[None]:
        """Measure, unless an earlier start has; then make the winners' graphs."""
        lane, grid = self._lane, grid_of(self._lane.limits)
        sizes = sorted({cell.num_seqs for cell in grid})
        ways = [lane.make_way(each.halves, self._number, sizes) for each in self._opened]
        names = [way.name for way in ways]
        file = TableFile(table_key(lane) | {"grid": grid, "ways": names})
        table = file.load()
        if table is not None and not table.is_of(grid, names):
            logger.warning("the decode pipeline is measured again: what was found before is not of these steps")
            table = None
        if table is None:
            table = Table()
            yield from tune(lane, plain, ways, grid, table)
            file.save(table)
        del ways
        torch.cuda.empty_cache()  # the losers' graphs are gone, and their memory may be another process's
        self._table = table
        won = table.won_sizes(self._sizes)
        logger.info("the decode pipeline is faster than plain steps in %d of %d cells", table.num_won, len(table.cells))
        yield from self._capture({names.index(name): its_sizes for name, its_sizes in won.items()})

    def state(self) -> PipelineState:
        """Any thread."""
        ways = {name: list(way.sizes) for name, way in self._ways.items()}
        measured = len(self._table.cells), self._table.num_won
        steps = self._lane.num_pipelined
        return PipelineState(self._mode, ways, *measured, self._is_preparing, steps, self._unavailable)

    def close(self) -> None:
        """Wait for the device, give up graphs, then the partitions' streams: steps are plain again. Idempotent."""
        if self._opened:
            torch.cuda.synchronize(self._lane.pool.device)
        self._lane.choose = None
        self._work, self._is_preparing = iter(()), False
        self._ways = {}
        for each in self._opened:
            each.split.close()
        self._opened = []


def open_lane(
    config: Config, decoder: Decoder, pool: KVPool, limits: EngineLimits, ranks: LaneRanks | None = None
) -> tuple[PipelinedLane, DecodePipeline | None]:
    """An engine's lane, with graphs on CUDA, and what open_pipeline() makes of it; see Lane for ``ranks``."""
    capture = pool.device.type == "cuda" and not config.enforce_eager
    group = config.transfer_layer_group
    lane = PipelinedLane(decoder, pool, limits, largest_group=group, capture=capture, ranks=ranks)
    return lane, open_pipeline(config, lane)


def open_pipeline(config: Config, lane: PipelinedLane, split: Split = split_sms) -> DecodePipeline | None:
    """What the configuration asks for; None where decode_pipeline is off.

    Where the device cannot, every step is plain, and one line of the log says why.
    """
    if config.decode_pipeline == "off":
        return None
    try:
        return DecodePipeline(config, lane, _open(config, lane.pool.device, split))
    except UnavailableError as error:
        logger.warning("no decode pipeline, decode steps are plain: %s", error)
        return DecodePipeline(config, lane, [], str(error))


def _open(config: Config, device: torch.device, split: Split) -> list[SplitHalves]:
    """Raises: UnavailableError."""
    if device.type != "cuda":
        raise UnavailableError(f"{device} has no SMs to split; only CUDA devices have")
    total = device_processors(device)
    wanted = _attention_sms(config, total)
    with ExitStack() as made:
        opened = []
        ladder = sorted({size % total for size in LADDER if abs(size) < total})
        for attention_sms in ladder if wanted is None else [wanted]:
            opened.append(split_halves(device, attention_sms, split))
            made.callback(opened[-1].split.close)
        if config.decode_pipeline == "auto":
            opened.append(stream_halves(device))
        made.pop_all()
    return opened


def _attention_sms(config: Config, total: int) -> int | None:
    """None: any. Raises: UnavailableError."""
    attention, ffn = config.decode_attention_sm, config.decode_ffn_sm
    if attention and ffn and attention + ffn != total:
        raise UnavailableError(
            f"decode_attention_sm ({attention}) and decode_ffn_sm ({ffn}) are {attention + ffn} SMs, and the device "
            f"has {total}; give one of them, or two that add up"
        )
    if attention is None and ffn is None and config.decode_pipeline == "auto":
        return None
    wanted = attention or total - (ffn or DEFAULT_FFN_SMS)
    if not 0 < wanted < total:
        raise UnavailableError(
            f"{attention or ffn or DEFAULT_FFN_SMS} of the device's {total} SMs for one half leave none for the other; "
            f"set {'decode_attention_sm' if attention else 'decode_ffn_sm'} to fewer"
        )
    return wanted


def table_key(lane: PipelinedLane) -> dict[str, Any]:
    """What durations of steps depend on, but for what is measured."""
    properties = torch.cuda.get_device_properties(lane.pool.device)
    return {
        "device": [properties.name, properties.multi_processor_count],
        "versions": [__version__, torch.__version__, importlib.metadata.version("triton")],
        "model": dataclasses.asdict(lane.decoder.config),
        "dtype": str(lane.decoder.dtype),
        "block_size": lane.limits.block_size,
        "max_model_len": lane.limits.max_model_len,
    }
