"""Sums by copies between two ranks: threads stand for the streams of each, and the host's memory for the device's."""

from __future__ import annotations

import ctypes
import gc
import json
import random
import re
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pdray.config import Config
from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.collective.copied_sums import NUM_PENDING, NUM_PLACES, NUM_WORDS, CopiedSums
from pdray.kernels.collective.group import PendingSum, RankGroup
from pdray.kernels.elementwise.rms_norm import rms_norm
from pdray.models import load_model
from pdray.models.decoder import Decoder
from pdray.testing.patience import PATIENCE_S
from pdray.testing.rank_threads import run_ranks

CPU = torch.device("cpu")
NUM_SUMS, MAX_NUMBERS = 60, 500


class Stream:
    """Runs what is launched on it in order, on a thread of its own, some of it late.

    Attributes:
        made: all of one test, to be ended before its memory is freed: what is not waited for may come later.
        is_over: nothing that was launched begins any more, or goes on waiting.
    """

    made: ClassVar[list[Stream]] = []

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.is_over = threading.Event()
        self.made.append(self)
        self._executor = ThreadPoolExecutor(1)
        self._rng = random.Random(id(self))
        self.cuda_stream = self

    def launch(self, run: partial[None]) -> Future[None]:
        def late() -> None:
            if self._rng.random() < 0.2:
                time.sleep(0.001)
            if not self.is_over.is_set():
                run()

        return self._executor.submit(late)

    def record_event(self) -> Future[None]:
        return self.launch(partial(int))

    def wait_event(self, event: Future[None]) -> None:
        self.launch(partial(event.result, PATIENCE_S))

    def synchronize(self) -> None:
        self.record_event().result(PATIENCE_S)

    @classmethod
    def end_all(cls) -> None:
        for stream in cls.made:
            stream.is_over.set()
        for stream in cls.made:
            stream._executor.shutdown(cancel_futures=True)
        cls.made.clear()

    def wait_stream(self, stream: Current) -> None:
        pass  # whose work is done when the host has launched it


class Current:
    """The stream that ranks compute on, which the host runs itself."""

    cuda_stream: Current

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.cuda_stream = self

    def launch(self, run: partial[None]) -> None:
        run()

    def wait_event(self, event: Future[None]) -> None:
        event.result(PATIENCE_S)


class Driver:
    """cuda.bindings.driver, over addresses of the host."""

    @staticmethod
    def cuMemcpyAsync(target: int, source: int, num_bytes: int, stream: Stream) -> tuple[int]:  # noqa: N802
        stream.launch(partial(ctypes.memmove, target, source, num_bytes))
        return (0,)

    @staticmethod
    def cuStreamWriteValue32(stream: Stream, address: int, value: int, flags: int) -> tuple[int]:  # noqa: N802
        assert flags == 0
        stream.launch(partial(setattr, ctypes.c_int32.from_address(address), "value", value))
        return (0,)

    @staticmethod
    def cuStreamWaitValue32(stream: Stream, address: int, value: int, flags: int) -> tuple[int]:  # noqa: N802
        assert flags == 0, "at least"
        word = ctypes.c_int32.from_address(address)

        def wait() -> None:
            deadline = time.monotonic() + PATIENCE_S
            while not stream.is_over.is_set() and ctypes.c_int32(word.value - value).value < 0:  # cyclic
                assert time.monotonic() < deadline, "the other rank does not come"
                time.sleep(0)

        stream.launch(partial(wait))
        return (0,)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CopiedSums]]:
    current = Current()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    places = [torch.zeros(NUM_PLACES, MAX_NUMBERS * 4, dtype=torch.uint8) for _ in range(2)]
    words = [torch.zeros(NUM_WORDS, dtype=torch.int32) for _ in range(2)]
    yield [
        CopiedSums(
            Driver, places[rank], words[rank].data_ptr(), places[1 - rank].data_ptr(), words[1 - rank].data_ptr()
        )
        for rank in range(2)
    ]
    Stream.end_all()


@pytest.fixture
def decoder_config(tmp_path: Path) -> Config:
    sizes = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 9, "head_dim": 8}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6, "eos_token_id": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sizes | heads | kind))
    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu"}
    return Config(model=str(path), dtype="float32", mode="colocated", **options)


@torch.inference_mode()
def forward(decoder: Decoder, num_tokens: int) -> Tensor:
    """One prompt's, over a pool of its own."""
    positions, blocks = torch.arange(num_tokens), torch.arange(num_tokens, dtype=torch.int32)
    kv = torch.zeros(decoder.config.num_layers, num_tokens, 2, 1, decoder.shard.kv_heads.size, decoder.config.head_dim)
    meta = AttentionMetadata(
        slot_mapping=positions,
        block_tables=blocks[None],
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        query_lens=[num_tokens],
        kv_lens=[num_tokens],
        fresh_from=0,
    )
    return decoder.forward(positions, positions, kv, meta)


def test_sums_are_the_same_on_both_ranks(pair: list[CopiedSums]) -> None:
    """Of many sizes, two pending at a time as for the halves of a step; one rank is now and then far behind."""
    rng = random.Random(1)
    sizes = [rng.randint(1, MAX_NUMBERS) for _ in range(NUM_SUMS)]
    parts = [[torch.randn(size) for size in sizes] for _ in range(2)]
    expected = [one + other for one, other in zip(*parts, strict=True)]

    def run(rank: int) -> list[torch.Tensor]:
        assert pair[rank].obstacle() == ""
        late = random.Random(rank)
        pending, totals = list[PendingSum](), list[torch.Tensor]()
        for part in parts[rank]:
            pending.append(pair[rank].begin(part.clone()))
            if late.random() < 0.2:
                pending[0].arrive()
            if late.random() < 0.3:  # before anybody waits, and after
                first = len(totals)
                weight = torch.ones(sizes[first])
                assert torch.equal(pending[0].normed(weight, 1e-6), rms_norm(expected[first], weight, 1e-6))
                assert torch.equal(pending[0].normed(weight, 1e-6), rms_norm(expected[first], weight, 1e-6))
            if late.random() < 0.2:
                time.sleep(0.003)
            if len(pending) == NUM_PENDING:
                totals.append(pending.pop(0).wait())
        return totals + [each.wait() for each in pending]

    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(run, range(2)))
    for totals in found:
        assert len(totals) == NUM_SUMS and all(map(torch.equal, totals, expected))


def test_counts_go_round(pair: list[CopiedSums]) -> None:
    """A word has 32 bits, of which the driver compares what a subtraction leaves."""
    for sums in pair:
        sums._num_begun = sums._num_added = 2**31 - 2
        words = (ctypes.c_int32 * NUM_WORDS).from_address(sums._words)
        words[0] = 2**31 - 2
    for _ in range(NUM_PLACES):
        begun = [sums.begin(torch.full((3,), float(rank + 1))) for rank, sums in enumerate(pair)]
        assert [each.wait().tolist() for each in begun] == [[3.0] * 3] * 2


def test_parts_end_with_their_sums(pair: list[CopiedSums]) -> None:
    """Without the garbage collector, which a rank lets run so rarely that a step's parts would fill the GPU."""
    gc.disable()
    try:
        for way in (lambda each: each.wait(), lambda each: each.normed(torch.ones(8), 1e-6)):
            begun = [sums.begin(torch.ones(8)) for sums in pair]
            parts = [weakref.ref(each._own) for each in begun]  # type: ignore[attr-defined]
            for each in begun:
                way(each)
            del begun, each
            assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()


def test_a_step_in_halves_holds_a_few_parts(pair: list[CopiedSums], decoder_config: Config) -> None:
    """However many layers it has, and with what whole rows compute to the last bit."""

    def run(group: RankGroup) -> tuple[list[Tensor], int]:
        decoder, most, parts = load_model(decoder_config, CPU, group=group).decoder, 0, list[weakref.ref[Tensor]]()

        def begin(x: Tensor) -> PendingSum:
            nonlocal most
            parts.append(weakref.ref(x))
            most = max(most, sum(part() is not None for part in parts))
            return pair[group.rank].begin(x)

        group.begin_sum = begin  # type: ignore[method-assign]
        outs = []
        for group.halves_bytes in (1 << 40, 1):
            outs.append(forward(decoder, num_tokens=12))
        assert len(parts) == 4 * (decoder.config.num_layers - 1)
        return outs, most

    gc.disable()
    try:
        results = run_ranks(2, run)
    finally:
        gc.enable()
    for (whole, halved), most in results:
        assert torch.equal(whole, halved) and most <= 2 * NUM_PENDING


def test_sums_are_added_in_order_and_few_are_pending(pair: list[CopiedSums]) -> None:
    """Or a part would be copied over one that was not added."""
    ones, others = ([sums.begin(torch.ones(4)) for _ in range(NUM_PENDING)] for sums in pair)
    with pytest.raises(AssertionError, match="pending"):
        pair[0].begin(torch.ones(4))
    with pytest.raises(AssertionError, match="added before"):
        ones[1].wait()
    assert [each.wait().tolist() for each in others] == [[2.0] * 4] * NUM_PENDING


def test_what_fits_no_place_is_left_to_others(pair: list[CopiedSums], monkeypatch: pytest.MonkeyPatch) -> None:
    is_capturing = threading.Event()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing.is_set)
    assert pair[0].takes(torch.zeros(MAX_NUMBERS)) and pair[0].takes(torch.zeros(2 * MAX_NUMBERS).bfloat16())
    assert not pair[0].takes(torch.zeros(MAX_NUMBERS + 1)) and not pair[0].takes(torch.zeros(0))
    is_capturing.set()
    assert not pair[0].takes(torch.zeros(1))


@pytest.mark.parametrize("refused", ["cuStreamWaitValue32", "cuStreamWriteValue32", "cuMemcpyAsync"])
def test_what_the_driver_does_not_take_is_told(
    refused: str, pair: list[CopiedSums], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, refused, staticmethod(lambda *_: (801,)))
    assert re.fullmatch("a stream cannot .* another rank's memory: 801", pair[0].obstacle())
