"""The token budget that a configuration asks for."""

from __future__ import annotations

import pytest

from pdray.config import OFFLINE_TARGET_TPOT_MS, Config
from pdray.engine.budget import half_context, make_budget
from pdray.engine.schedule.token_budget import SMALL_STEP_SIZES, STEP_SIZES, AdaptiveBudget, FixedBudget
from pdray.models.model_config import ModelConfig

MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 211,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("target_ms", [None, 20.0])
def test_by_default_and_with_a_target_it_adapts(target_ms: float | None, padded: bool) -> None:
    config = Config(max_num_batched_tokens=700, target_tpot_ms=target_ms)
    budget = make_budget(config, MODEL, padded=padded)
    assert isinstance(budget, AdaptiveBudget) and budget.max_tokens == 700
    assert budget.target_s == (None if target_ms is None else pytest.approx(0.02))
    sizes = (() if padded else SMALL_STEP_SIZES) + STEP_SIZES
    assert [budget.tokens(1, 10**6, 0), budget.tokens(1, 10**6, 0)] == [1, next(s for s in sizes if s >= 17)]


def test_without_a_limit_every_step_takes_all_that_fits() -> None:
    budget = make_budget(Config(target_tpot_ms=OFFLINE_TARGET_TPOT_MS), MODEL, padded=True)
    assert isinstance(budget, FixedBudget) and budget.tokens(9, 10**6, 0) == 2048


def test_context_that_costs_as_much_as_all_products() -> None:
    layer = 48 * 6 * 8 * 2 + 48 * 2 * 8 * 2 + 3 * 48 * 96
    assert half_context(MODEL) == pytest.approx(0.5 * (2 * layer) / (4 * 6 * 8))
