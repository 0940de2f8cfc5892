"""Both lanes' places on each split of the device: streams on its SMs, and graphs that were captured there."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import torch

from pdray.engine.step.graphs import FEW_SEQUENCES
from pdray.engine.step.inputs import StepShape
from pdray.engine.step.lane import Lane, Place
from pdray.kernels.green_context import SmSplit
from pdray.kernels.processors import limit_processors

logger = logging.getLogger(__name__)

LADDER = (16, 32, 48, 64)  # SMs of the decodes' lane
DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# A piece of a prompt is as long as a few decode steps: long enough for full matrix products, and short enough that a
# change of the split does not wait. Pieces are replayed, for launching kernels one by one holds Python's lock.
PIECE_TOKENS = 2048
PIECE_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph on each partition: fewer than those on the whole device."""
    return sorted({size for size in DECODE_SIZES if size < max_num_seqs} | {max_num_seqs})


def piece_shapes(most_tokens: int, max_num_seqs: int) -> list[StepShape]:
    """Pieces of prompts that get a graph on each partition."""
    few = min(FEW_SEQUENCES, max_num_seqs)
    return [StepShape(n, few, few, False) for n in (*(n for n in PIECE_SIZES if n < most_tokens), most_tokens)]


class Partitions:
    """Engine's thread only, but for ``ready``.

    Args:
        capture: make graphs, one at a time in capture_next(); else every split is ready at once.

    Attributes:
        ready: SMs of the decodes' lane of splits that can be used.
        unavailable: why these are no partitions; None: they are.
    """

    def __init__(self, main: Lane, prompts: Lane, splits: list[SmSplit], *, capture: bool) -> None:
        self._whole = main.place
        self._lanes = (main, prompts)
        self._splits = splits
        self.unavailable = splits[0].unavailable
        self.ready: list[int] = []
        self._places: dict[int, tuple[Place, Place]] = {}
        self._captures = self._capture_all() if capture else iter(())
        for split in splits:
            streams = split.first.stream, split.rest.stream
            if capture:
                sizes = decode_sizes(main.limits.max_num_seqs)
                pieces = piece_shapes(prompts.limits.max_num_batched_tokens, prompts.limits.max_num_seqs)
                graphs = main.more_graphs(sizes, []), prompts.more_graphs([pieces[0].num_seqs], pieces)
                self._places[_key(split)] = (Place(streams[0], graphs[0]), Place(streams[1], graphs[1]))
            else:
                self._places[_key(split)] = (Place(streams[0]), Place(streams[1]))
                self.ready.append(_key(split))

    @property
    def whole(self) -> Place:
        """The main lane's place on every SM."""
        return self._whole

    def places(self, decode_sms: int) -> tuple[Place, Place]:
        """The main lane's and the prompts' lane's."""
        return self._places[decode_sms]

    def capture_next(self) -> bool:
        """Capture one more graph, while no step is in flight. False once all are made, or memory has run out."""
        try:
            return next(self._captures, None) is not None
        except RuntimeError as error:
            if "out of memory" not in str(error):  # which CUDA's own errors are called too, not only the allocator's
                raise
            logger.warning("no graphs for more partitions than %s: %s", self.ready or "none", error)
        self._captures = iter(())
        self._places = {key: places for key, places in self._places.items() if key in self.ready}
        torch.cuda.empty_cache()  # what is left is for steps
        return False

    def _capture_all(self) -> Iterator[StepShape]:
        """Both lanes' graphs of one split after the other; the middle ones, which are used most, first."""
        middle = (len(self._splits) - 1) / 2
        for split in sorted(self._splits, key=lambda split: abs(self._splits.index(split) - middle)):
            places, sms = self._places[_key(split)], (split.first.num_sms, split.rest.num_sms)
            for lane, place, num_sms in zip(self._lanes, places, sms, strict=True):
                captures = lane.capture_one_by_one(place)
                while True:
                    with limit_processors(num_sms):
                        shape = next(captures, None)
                    if shape is None:
                        break
                    yield shape
                torch.cuda.empty_cache()  # blocks are a stream's own: those that no graph holds would lie idle
            self.ready = sorted([*self.ready, _key(split)])

    def close(self) -> None:
        """Give up graphs, the lanes' inputs and streams, in this order: neither lane can be used any more. Idempotent.

        Pinned memory remembers the streams that it was copied on, and must go before them.
        """
        self._captures = iter(())
        self._places.clear()
        self.ready = []
        for lane in self._lanes:
            lane.close()
        gc.collect()
        for split in self._splits:
            split.close()


def _key(split: SmSplit) -> int:
    return 0 if split.unavailable is not None else split.first.num_sms
