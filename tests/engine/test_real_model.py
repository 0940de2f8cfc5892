"""The default model's greedy answers to real prompts are transformers', which loads the same GGUF by itself."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from pdray.cache import cache_folder
from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.request import EngineRequest
from pdray.models import load_model, load_tokenizer
from pdray.models.resolve import resolve_model
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

pytestmark = pytest.mark.model
NUM_TOKENS = 20
QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of copper.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Summarize in one sentence: The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
]
TEXTS = [
    "Once upon a time, in a village by the river,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "In 1969, Apollo 11",
    "Dear Sir or Madam,\n\nI am writing to",
    "The",
    "Water boils at 100 degrees Celsius at sea level. At higher altitudes, the boiling point",
    "1, 2, 3, 5, 8, 13,",
    "SELECT name, count(*) FROM",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the slings and arrows of",
]


@pytest.fixture(scope="session")
def transformers_model() -> Any:
    """Loaded from the GGUF by transformers itself (slow), then kept in the cache folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    gguf = resolve_model(Config(), weights=True).path
    folder = cache_folder() / "test-models" / f"{gguf.stem}-{gguf.stat().st_size}-float32"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        model.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_greedy_answers_equal_transformers(transformers_model: Any) -> None:
    config = Config(max_model_len=1024)
    tokenizer = load_tokenizer(config)
    assert tokenizer is not None
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        for conversation in conversations
    ] + [tokenizer(text)["input_ids"] for text in TEXTS]

    cpu = torch.device("cpu")
    engine = build_engine(config, load_model(config, cpu), cpu)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for key, prompt in enumerate(prompts):
        engine.add(EngineRequest(key, prompt, params))
    outputs: dict[Any, list[int]] = {key: [] for key in range(len(prompts))}
    while engine.has_work():
        for update in engine.step():
            outputs[update.key] += [token.token_id for token in update.tokens]
    assert engine.check_integrity() == []

    # What a model says greedily is what it holds for the likeliest after each of its own tokens: one pass shows it.
    said = [prompt + outputs[key] for key, prompt in enumerate(prompts)]
    longest = max(map(len, said))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in said])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in said])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = transformers_model(
            padded, attention_mask=mask, position_ids=positions, logits_to_keep=NUM_TOKENS + 1
        ).logits
    expected = logits[:, :-1].argmax(-1).tolist()
    differing = [key for key in outputs if outputs[key] != expected[key]]
    assert differing == [], [(tokenizer.decode(outputs[key]), tokenizer.decode(expected[key])) for key in differing]


CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "population": {"type": "integer", "minimum": 1000, "maximum": 40_000_000},
        "continent": {"enum": ["Europe", "Asia", "Africa", "America"]},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "population", "continent", "sights"],
    "additionalProperties": False,
}


def test_answers_are_json_of_the_schema() -> None:
    """Greedy and at random, several at once, steps planned ahead: each is valid, and says what it was asked for."""
    config = Config(max_model_len=1024, num_kv_blocks=200, async_scheduling=True)
    tokenizer, cpu = load_tokenizer(config), torch.device("cpu")
    assert tokenizer is not None
    messages = [{"role": "user", "content": "Describe the city of Paris in JSON: name, population, continent, sights."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    engine = build_engine(config, load_model(config, cpu), cpu)
    wanted = StructuredOutputsParams(json=CITY)
    for seed in range(4):
        params = SamplingParams(temperature=seed / 4, seed=seed, max_tokens=250, structured_outputs=wanted)
        engine.add(EngineRequest(seed, prompt, params))
    ids: dict[Any, list[int]] = {seed: [] for seed in range(4)}
    deadline = time.monotonic() + PATIENCE_S
    while engine.live_keys():
        assert time.monotonic() < deadline
        for update in engine.step():
            assert update.failure is None
            ids[update.key] += [token.token_id for token in update.tokens]
    for seed in range(4):
        city = json.loads(tokenizer.decode(ids[seed], skip_special_tokens=True))
        jsonschema.validate(city, CITY)
        assert seed or city["name"] == "Paris"
