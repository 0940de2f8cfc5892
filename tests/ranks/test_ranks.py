"""A worker of several processes draws what one process does, and ends as a whole when one of them does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.engine import Engine
from pdray.engine.request import EngineRequest
from pdray.errors import ConfigError, RankDiedError, StepFailedError
from pdray.models import load_model
from pdray.ranks.leader import Leader, check_model
from pdray.sampling_params import SamplingParams
from pdray.testing.every_draw import EVERY_DRAW, requests_of
from pdray.testing.patience import PATIENCE_S
from pdray.testing.tiny_model import TINY_CONFIG

CPU = torch.device("cpu")


def make_config(folder: Path, size: int, **settings: Any) -> Config:
    """Of a tiny model with random weights."""
    file = folder / "config.json"
    file.write_text(json.dumps(TINY_CONFIG | {"vocab_size": 199, "initializer_range": 0.2}))
    return Config(
        model=str(file),
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cpu",
        mode="colocated",
        tensor_parallel_size=size,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_kv_blocks=200,
        **settings,
    )


class Ranks:
    """An engine over several processes.

    Attributes:
        ends: why ranks have ended.
    """

    def __init__(self, config: Config) -> None:
        self.ends: list[RankDiedError] = []
        self.ended = threading.Event()
        self.leader = Leader(config, CPU, self._on_end)
        model = load_model(config, CPU, group=self.leader.group)
        self.engine = build_engine(config, model, CPU, ranks=self.leader.ranks)

    def _on_end(self, error: RankDiedError) -> None:
        self.ends.append(error)
        self.ended.set()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(make_config(tmp_path, 2, worker_timeout_s=0.5))
    yield ranks
    ranks.leader.close()
    assert not any(psutil.pid_exists(pid) for pid in ranks.leader.pids)


class Answers(NamedTuple):
    """By key (and index): tokens, log-probabilities of the drawn ones, and of the prompt's."""

    tokens: dict[Any, list[int]]
    logprobs: dict[Any, list[float]]
    scores: dict[Any, list[float]]


def run(engine: Engine, requests: list[EngineRequest]) -> Answers:
    answers = Answers(defaultdict(list), defaultdict(list), {})
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for update in engine.step():
            assert update.failure is None
            for token in update.tokens:
                answers.tokens[update.key, token.index].append(token.token_id)
                if token.logprobs is not None:
                    answers.logprobs[update.key, token.index] += [each.logprob for each in token.logprobs.values()]
            if update.prompt_scores is not None:
                rows = update.prompt_scores.unpack()
                answers.scores[update.key] = [each.logprob for row in rows for each in row.values()]
    for request in requests:
        engine.release(request.key)
    assert engine.check_integrity() == []
    return answers


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.tokens == expected.tokens
    for mine, its in ((found.logprobs, expected.logprobs), (found.scores, expected.scores)):
        assert mine.keys() == its.keys() and mine
        for key, values in mine.items():
            assert values == pytest.approx(its[key], abs=1e-4)


DRAWS = EVERY_DRAW | {
    "allowed": SamplingParams(temperature=1.0, seed=11, max_tokens=20, allowed_token_ids=list(range(60, 90))),
    "bias": SamplingParams(temperature=1.0, seed=12, max_tokens=20, ignore_eos=True, logit_bias={7: 4.0, 150: 3.0}),
    "scores": SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=2, logprobs=1),
}


def expected_answers(config: Config, requests: list[EngineRequest]) -> Answers:
    alone = config.model_copy(update={"tensor_parallel_size": 1})
    return run(build_engine(alone, load_model(alone, CPU), CPU), requests)


def test_two_ranks_draw_what_one_does(pair: Ranks) -> None:
    """Whatever is drawn, in chunks, after preemption, with prefixes that are cached, and steps planned ahead."""
    requests = requests_of(DRAWS)
    expected = expected_answers(pair.engine.config, requests)
    assert_same(run(pair.engine, requests), expected)
    pair.engine.overlap = True
    again = run(pair.engine, requests)
    assert again.tokens == expected.tokens
    assert pair.engine.stats().prefix_cache_hits > 0
    assert not pair.ends


def test_four_ranks_of_which_pairs_have_the_same_keys(tmp_path: Path) -> None:
    config = make_config(tmp_path, 4)
    requests = requests_of({name: DRAWS[name] for name in ("three", "scores")})
    ranks = Ranks(config)
    try:
        assert_same(run(ranks.engine, requests), expected_answers(config, requests))
    finally:
        ranks.leader.close()


@pytest.mark.parametrize(
    ("signal_number", "why"), [(signal.SIGKILL, "signal 9"), (signal.SIGSTOP, r"it was silent for \d+\.\d s .*")]
)
def test_a_rank_that_dies_or_hangs_ends_the_step_and_is_told_of(pair: Ranks, signal_number: int, why: str) -> None:
    run(pair.engine, requests_of({"one": DRAWS["one"]}))
    os.kill(pair.leader.pids[0], signal_number)
    assert pair.ended.wait(PATIENCE_S)
    assert re.fullmatch(rf"rank 1 \(process \d+\) has ended: {why}", str(pair.ends[0]))
    pair.engine.add(requests_of({"greedy": DRAWS["greedy"]})[0])
    with pytest.raises(StepFailedError) as failure:
        run(pair.engine, [])
    assert list(failure.value.keys) == ["greedy"]
    assert pair.leader.cause_of(failure.value) is pair.ends[0] and pair.ends[0].was_killed
    assert len(pair.ends) == 1


def test_what_keeps_a_rank_from_starting_is_told(tmp_path: Path) -> None:
    """The leader waits for it, for ever on a GPU: what has become of it is told on another thread."""
    config = make_config(tmp_path, 2).model_copy(update={"model": str(tmp_path / "gone.json")})
    ends: list[RankDiedError] = []
    with Leader(config, CPU, ends.append) as leader:
        leader._members[0]._thread.join(PATIENCE_S)
        assert re.search("rank 1 .* has ended: ModelLoadError: .*gone.json", str(ends[0])) and not ends[0].was_killed


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Also where it is killed, and where they are stopped."""
    settings = make_config(tmp_path, 2).model_dump_json(exclude_unset=True)
    (tmp_path / "settings.json").write_text(settings)
    code = (
        "import sys, time, torch; from pathlib import Path;"
        "from pdray.config import Config; from pdray.ranks.leader import Leader;"
        "config = Config.model_validate_json(Path(sys.argv[1]).read_text());"
        "leader = Leader(config, torch.device('cpu'), print);"
        "print(*leader.pids, flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "settings.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rank = psutil.Process(int(process.stdout.readline()))
        rank.suspend()
        process.kill()
        process.wait()
        rank.wait(PATIENCE_S)


def test_a_model_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, 3)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3, by which the model's num_attention_heads"):
        check_model(config)
