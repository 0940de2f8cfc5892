"""An engine whose steps take a set time and compute nothing: all of an engine but its model.

Scheduler, block pool, bookkeeping and the thread that steps are the real ones, so that a load test on few CPU cores
measures admission and back-pressure and not the cores.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from pdray.config import Config
from pdray.engine.build import make_pool
from pdray.engine.engine import Engine
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.step.draws import Draws
from pdray.engine.step.inputs import StepInputs
from pdray.engine.step.lane import Lane
from pdray.engine.step.layer_groups import OnGroup
from pdray.models.decoder import Decoder
from pdray.models.load import LoadedModel
from pdray.models.model_config import ModelConfig

CPU = torch.device("cpu")
VOCAB_SIZE = 32_000
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a step takes: step_s, and prompt_token_s more for each prompt token in it."""

    step_s: float = 0.010
    prompt_token_s: float = 0.000_010

    def seconds(self, query_lens: list[int]) -> float:
        """Of a step, by the tokens that it computes of each sequence; one alone is not of a prompt."""
        return self.step_s + self.prompt_token_s * sum(length for length in query_lens if length > 1)

    def capacity(self, num_seqs: int, num_prompt_tokens: int, num_tokens: int) -> float:
        """Requests a second, if so many sequences always run and nothing else takes time."""
        return num_seqs / (num_tokens * self.step_s + num_seqs * num_prompt_tokens * self.prompt_token_s)


class PacedLane(Lane):
    """Sleeps in place of the model. Keeps the calls that a model makes."""

    def __init__(self, lane: Lane, limits: EngineLimits, pace: Pace) -> None:
        super().__init__(lane.decoder, lane.pool, limits)
        self.pace = pace

    def launch(self, inputs: StepInputs, on_group: OnGroup | None) -> Draws:
        """Tokens as next_token() says; their log-probabilities are never there."""
        ends_at = time.perf_counter() + self.pace.seconds(inputs.attention.query_lens)
        rows = inputs.logit_rows.numpy()
        token_ids = next_token(inputs.input_ids.numpy()[rows], inputs.positions.numpy()[rows])
        if on_group is not None:
            for layers in self.groups(inputs.shape):
                on_group(layers, None)
        time.sleep(max(0.0, ends_at - time.perf_counter()))
        return Draws(torch.from_numpy(token_ids), inputs.num_logprobs, None, launched_at=time.perf_counter())


def next_token(token_id: np.ndarray, position: np.ndarray) -> np.ndarray:
    """What comes after a token at a position, whatever else is in the batch."""
    return (31 * token_id + 17 * position + 7) % VOCAB_SIZE


class PacedEngine(Engine):
    """An Engine with a PacedLane.

    Args:
        config: its model is not read; num_kv_blocks must be set.
    """

    def __init__(self, config: Config, pace: Pace) -> None:
        shape = ModelConfig.from_hf(SHAPE)
        max_len = config.max_model_len or shape.max_model_len
        decoder = Decoder(shape, max_len, torch.float32, CPU)  # uninitialised, and never run
        model = LoadedModel(shape, decoder, torch.float32, "paced")
        super().__init__(config, model, make_pool(config, model, CPU))
        self.lane = PacedLane(self.lane, self._scheduler.limits, pace)
