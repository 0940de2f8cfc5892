"""The token budget of an engine's steps, from its configuration and model."""

from __future__ import annotations

from pdray.config import Config
from pdray.engine.schedule.token_budget import SMALL_STEP_SIZES, STEP_SIZES, AdaptiveBudget, FixedBudget, TokenBudget
from pdray.models.model_config import ModelConfig

ATTENTION_EFFICIENCY = 0.5  # of the device's arithmetic, against what products reach


def make_budget(
    config: Config, model: ModelConfig, *, padded: bool, adaptive: type[AdaptiveBudget] = AdaptiveBudget
) -> TokenBudget:
    """Args:
    padded: steps are padded to the sizes of CUDA graphs. adaptive: what is made where the configuration fixes nothing.
    """
    target_ms = config.target_tpot_ms
    if target_ms == 0:
        return FixedBudget(config.max_num_batched_tokens)
    return adaptive(
        config.max_num_batched_tokens,
        STEP_SIZES if padded else SMALL_STEP_SIZES + STEP_SIZES,
        target_s=None if target_ms is None else target_ms / 1000,
        half_context=half_context(model),
    )


def half_context(model: ModelConfig) -> float:
    """Tokens of context whose attention takes as long as all products of a token's layers.

    A weight takes two operations, a token of context four for each element of a query.
    """
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights = 2 * model.hidden_size * (query + key) + 3 * model.hidden_size * model.intermediate_size
    return ATTENTION_EFFICIENCY * weights / (2 * query)
