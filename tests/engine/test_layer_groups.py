"""Which layers of a step are told of together, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdray.engine.step.inputs import StepShape
from pdray.engine.step.lane import Lane
from pdray.engine.step.layer_groups import TAPER, WORTH_BYTES, layer_groups

MIB = 2**20


@pytest.mark.parametrize("num_layers", [1, 2, 3, 28, 36, 80])
@pytest.mark.parametrize("layer_bytes", [0, 1, MIB // 8, MIB, 3 * MIB, 16 * MIB, 100 * MIB])
@pytest.mark.parametrize("largest", [1, 2, 8, 16, 100])
@pytest.mark.parametrize("worth_bytes", [0, WORTH_BYTES])
def test_groups_are_all_layers_in_order(num_layers: int, layer_bytes: int, largest: int, worth_bytes: int) -> None:
    groups = layer_groups(num_layers, layer_bytes, largest, worth_bytes)
    assert [layer for group in groups for layer in group] == list(range(num_layers))
    assert all(len(group) > 0 for group in groups)
    *others, last = groups
    if others:  # the last is worth a message, and no smaller one would be
        assert len(last) * layer_bytes >= worth_bytes
        assert len(last) == 1 or (len(last) - 1) * layer_bytes < worth_bytes
        assert max(map(len, others)) <= max(largest, len(last))
    else:
        assert num_layers == 1 or num_layers * layer_bytes <= 2 * worth_bytes


@pytest.mark.parametrize("num_layers", [2, 3, 6, 12, 28, 36, 80])
@pytest.mark.parametrize("layer_bytes", [1, MIB // 2, MIB, 3 * MIB, 8 * MIB, 16 * MIB, 100 * MIB])
@pytest.mark.parametrize("largest", [1, 2, 8, 16, 100])
@pytest.mark.parametrize("worth_bytes", [0, WORTH_BYTES])
def test_a_group_is_sent_while_the_next_is_computed(
    num_layers: int, layer_bytes: int, largest: int, worth_bytes: int
) -> None:
    """So that next to nothing but the last one is left when the last layer is computed."""
    sizes = [len(group) for group in layer_groups(num_layers, layer_bytes, largest, worth_bytes)]
    worth = -(-worth_bytes // layer_bytes)
    for size, following in zip(sizes, sizes[1:], strict=False):
        assert size < TAPER * following + max(1, worth)  # but for a rest that is not worth a group of its own
    assert all(2 * size >= worth for size in sizes) or len(sizes) == 1
    assert len(sizes) <= 2 + -(-num_layers // max(largest, worth)) + 2  # few all the same


@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        (128, [36]),
        (256, [10, 10, 16]),
        (1024, [16, 16, 4]),
        (2048, [13, 13, 8, 2]),
        (4096, [16, 15, 4, 1]),
        (8192, [16, 15, 4, 1]),
    ],
)
def test_groups_of_an_8b_model(num_tokens: int, sizes: list[int]) -> None:
    """36 layers of 4 KiB a token: one put for a short prompt, four at most."""
    assert [len(group) for group in layer_groups(36, 4096 * num_tokens, 16)] == sizes


class Graphs:
    """Stands for captured graphs: replay computes what a graph would, and an event is a name."""

    def __init__(self, lane: Lane, shape: StepShape) -> None:
        self.lane, self.shape = lane, shape
        self.inputs: Any = None
        self.logits = torch.zeros(8, lane.decoder.config.vocab_size)

    def __contains__(self, shape: StepShape) -> bool:
        return shape == self.shape

    def replay(self, shape: StepShape) -> torch.Tensor:
        return self.lane.compute(self.inputs)

    def stored(self, shape: StepShape) -> list[tuple[range, str]]:
        return [(range(0, 2), "first"), (range(2, 3), "second")]


def test_groups_of_a_graph_come_with_its_events(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with an event of this launch, made from the graph's own, which its next replay records again."""
    from pdray.engine.request import EngineRequest
    from pdray.sampling_params import SamplingParams

    engine = llama.engine(max_num_batched_tokens=32)
    told: list[Any] = []
    engine.on_layer_group = told.append
    lane, launch = engine.lane, engine.lane.launch

    def launch_as_graph(inputs: Any, on_group: Any) -> Any:
        lane.graphs = Graphs(lane, inputs.shape)
        lane.graphs.inputs = inputs
        try:
            return launch(inputs, on_group)
        finally:
            lane.graphs = None

    monkeypatch.setattr(lane, "launch", launch_as_graph)
    monkeypatch.setattr(lane, "_event_after", lambda stored: f"after {stored}")
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.add(EngineRequest("r", list(range(4, 24)), params, prefill_only=True))
    while engine.has_work():
        engine.step()
    assert [(ready.layers, ready.ready) for ready in told] == [
        (range(0, 2), "after first"),
        (range(2, 3), "after second"),
    ]
    engine.release("r")
