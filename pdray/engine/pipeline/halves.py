"""Where the two halves of a pipelined step run: the attention of every layer, and the feed-forward of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from pdray.kernels.green_context import Partition, SmSplit, plain_streams, split_sms
from pdray.kernels.processors import device_processors, limit_processors
from pdray.partition_settings import SM_GROUP

Split = Callable[[torch.device, int], SmSplit]


class Half(NamedTuple):
    """A stream on which one micro-batch's turn follows another's.

    Attributes:
        stream: None: the thread's current one; on CPU there is no other.
        num_sms: that kernels are launched for; None: all of the device's.
    """

    stream: torch.cuda.Stream | None = None
    num_sms: int | None = None

    @contextmanager
    def turn(self, before: torch.cuda.Event | None) -> Iterator[torch.cuda.Event | None]:
        """What is launched within runs here, after ``before``. The value is recorded behind it."""
        if self.stream is None:
            with limit_processors(self.num_sms):
                yield None
            return
        assert before is not None, "a turn on a stream of its own comes after a fork"
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream), limit_processors(self.num_sms):
            self.stream.wait_event(before)
            yield done
            done.record(self.stream)


class Halves(NamedTuple):
    """Both halves. Without streams their turns run one after the other, in the same order."""

    attention: Half = Half()
    ffn: Half = Half()

    def fork(self) -> torch.cuda.Event | None:
        """What the first turns come after: all that the current stream has to do."""
        return None if self.attention.stream is None else torch.cuda.current_stream().record_event()

    def join(self, turns: Iterable[torch.cuda.Event | None]) -> None:
        """The current stream goes on after these."""
        for done in turns:
            if done is not None:
                torch.cuda.current_stream().wait_event(done)

    def rejoin(self) -> None:
        """Join after a turn that failed, whatever was launched of it: a capture cannot end while work is forked."""
        if self.attention.stream is None:
            return
        is_captured = torch.cuda.is_current_stream_capturing()
        for half in self:
            assert half.stream is not None
            with torch.cuda.stream(half.stream):
                is_forked = torch.cuda.is_current_stream_capturing() == is_captured
            if is_forked:
                torch.cuda.current_stream().wait_stream(half.stream)

    @property
    def name(self) -> str:
        """As tables and logs call them."""
        if self.attention.stream is None:
            return "in turn"
        if self.attention.num_sms is None:
            return "two streams"
        return f"{self.attention.num_sms} + {self.ffn.num_sms} SMs"


class SplitHalves(NamedTuple):
    """Halves, and what holds their streams until it is closed."""

    halves: Halves
    split: SmSplit


def split_halves(device: torch.device, attention_sms: int, split: Split = split_sms) -> SplitHalves:
    """The attention on so many SMs, the feed-forward on the rest.

    Devices hand out SMs in groups of SM_GROUP and leave a remainder: either half may be the one that has it.

    Raises:
        UnavailableError: the device cannot be split so; the text says why.
    """
    if device.type == "cuda" and attention_sms % SM_GROUP:
        sides = split(device, device_processors(device) - attention_sms)
        attention, ffn = sides.rest, sides.first
    else:
        sides = split(device, attention_sms)
        attention, ffn = sides.first, sides.rest
    return SplitHalves(Halves(_half(attention), _half(ffn)), sides)


def stream_halves(device: torch.device) -> SplitHalves:
    """Both on streams of their own that share every SM; on CPU in turn."""
    sides = plain_streams(device, "no partitions were asked for")
    return SplitHalves(Halves(Half(sides.first.stream), Half(sides.rest.stream)), sides)


def _half(side: Partition) -> Half:
    return Half(side.stream, side.num_sms)
