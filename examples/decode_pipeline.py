"""Decode steps in micro-batches: attention of one on some SMs of a GPU beside feed-forward of another on the others.

One engine, without Ray, answers the same prompts with plain steps and then with `decode_pipeline: on`. Where there is
no GPU, or it cannot be split, one line says why, and the steps are plain. Takes the options of `pdray serve`.
"""

from __future__ import annotations

import argparse
import logging

from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.device import select_device
from pdray.engine.request import EngineRequest
from pdray.models import LoadedModel, load_model, load_tokenizer
from pdray.options import add_config_arguments, config_from_args
from pdray.sampling_params import SamplingParams

PROMPTS = ["The capital of France is", "Water boils at a temperature of", "The three primary colors are"]
SMALL = {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**28}


def main() -> None:
    """Print how steps are computed, the answers, and whether both ways agree."""
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for `pdray serve`")
    add_config_arguments(parser)
    parser.set_defaults(config_decode_pipeline="on")
    given = config_from_args(parser.parse_args())
    config = Config(**{**SMALL, **given.model_dump(exclude_unset=True)})
    model, tokenizer = load_model(config, select_device(config)), load_tokenizer(config)
    prompts = [list(range(5, 9 + i)) for i in range(3)]
    if tokenizer is not None:
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    plain = generate(config.model_copy(update={"decode_pipeline": "off"}), model, prompts)
    pipelined = generate(config, model, prompts)
    for prompt, answer in zip(prompts, pipelined, strict=True):
        print(*(ids if tokenizer is None else repr(tokenizer.decode(ids)) for ids in (prompt, answer)), sep=" -> ")
    print("the same tokens as plain steps:", pipelined == plain)


def generate(config: Config, model: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Answers, greedy, of an engine with this configuration."""
    engine = build_engine(config, model, model.decoder.device)
    while engine.prepare_more():  # with "auto": measure
        pass
    for number, prompt in enumerate(prompts):
        engine.add(EngineRequest(number, prompt, SamplingParams(temperature=0, max_tokens=24)))
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for update in engine.step():
            assert isinstance(update.key, int)
            answers[update.key] += [token.token_id for token in update.tokens]
    if engine.pipeline is not None:
        state = engine.pipeline.state()
        print(f"{state.num_steps} of {engine.stats().num_steps} steps pipelined: {', '.join(state.ways) or 'none'}")
        engine.pipeline.close()
    return answers


if __name__ == "__main__":
    main()
