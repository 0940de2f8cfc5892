"""The controller while it knows no costs, or is to know none."""

from __future__ import annotations

import pytest

from pdray.engine.mux.controller import Controller
from pdray.engine.mux.costs import MIXED, Arrangement, SplitCosts
from pdray.engine.mux.load import Load, Wait
from pdray.engine.mux.pace import PacedBudget, Targets
from pdray.engine.schedule.token_budget import STEP_SIZES, FixedBudget

NUM_DECODES = 32
ENDLESS = Load(NUM_DECODES, [Wait(4096, 0.0, 4096)] * 2, 0)


def test_before_anything_was_measured_it_leaves_all_as_it_is() -> None:
    budget = PacedBudget(1000, STEP_SIZES)
    controller = Controller(SplitCosts(budget.costs, 132), budget, Targets(0.01, 1.0), may_mix=True)
    controller.splits = [32]
    assert [controller.choose(i / 10, ENDLESS) for i in range(50)] == [MIXED] * 50
    assert budget.tokens(NUM_DECODES, 10**6, 0) == NUM_DECODES, "a plain step, so that its duration is known"
    assert budget.tokens(NUM_DECODES, 10**6, 0) == 128


@pytest.mark.parametrize(("may_mix", "chosen"), [(True, MIXED), (False, Arrangement(16))])
def test_where_throughput_alone_counts_nothing_is_weighed(may_mix: bool, chosen: Arrangement) -> None:
    budget = PacedBudget(1000, STEP_SIZES)
    controller = Controller(SplitCosts(budget.costs, 132), FixedBudget(1000), Targets(), may_mix=may_mix)
    controller.splits = [16, 32]
    assert [controller.choose(i / 10, ENDLESS) for i in range(5)] == [chosen] * 5
