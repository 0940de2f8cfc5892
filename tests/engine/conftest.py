"""Engines around tiny random models, transformers on the same weights, and a prefill engine feeding a decode engine."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from pdray.config import Config
from pdray.engine.build import make_pool
from pdray.engine.engine import Engine
from pdray.engine.mux.engine import MuxEngine
from pdray.engine.request import EngineRequest, LayerGroupReady, RequestUpdate, Reservation
from pdray.engine.schedule.plan import LaneName
from pdray.kernels.kv.blocks import gather_blocks, scatter_blocks
from pdray.models import LoadedModel, load_model
from pdray.outputs import SampledToken

_spec = importlib.util.spec_from_file_location("fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None and _spec.loader is not None
sys.modules["fake_engine"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["fake_engine"])

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


class TinyModel(NamedTuple):
    """The same random weights in transformers and in pdray."""

    hf: Any
    folder: Path
    loaded: LoadedModel

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[len(token_ids), vocab_size]: what transformers says comes after each token."""
        logits: torch.Tensor = self.hf(torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """A naive loop: the whole sequence again for every token."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def engine(self, **settings: Any) -> RecordingEngine:
        config = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 200, "transfer_layer_group": 2}
        settings = {"model": str(self.folder), "skip_tokenizer_init": True, **config, **settings}
        return RecordingEngine(Config(**settings), self.loaded)

    def mux(self, **settings: Any) -> RecordingMux:
        """Two lanes whenever prompts and decodes both wait; on CPU they take turns."""
        config = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 200}
        colocated = {"mode": "colocated", "sm_partition": "on"}
        settings = {"model": str(self.folder), "skip_tokenizer_init": True, **config, **colocated, **settings}
        return RecordingMux(Config(**settings), self.loaded)


class RecordingEngine(Engine):
    """An engine that keeps all tokens that it announced, and the logits that they were drawn from."""

    def __init__(self, config: Config, model: LoadedModel, device: torch.device = CPU, **others: Any) -> None:
        super().__init__(config, model, make_pool(config, model, device), **others)
        self.tokens: dict[Hashable, dict[int, list[SampledToken]]] = defaultdict(lambda: defaultdict(list))
        self.logits: dict[tuple[Hashable, int, int], torch.Tensor] = {}  # key, index, position
        self.updates: dict[Hashable, list[RequestUpdate]] = defaultdict(list)
        self.lane.on_logits = self._record_logits

    def _record_logits(self, logits: torch.Tensor) -> None:
        draws = [draw for chunk in self._scheduler.plans_in_flight[-1].chunks for draw in chunk.draws]
        for (sampler, _, position), row in zip(draws, logits, strict=True):
            self.logits[sampler.request.key, sampler.index, position] = row.clone()

    def step(self) -> list[RequestUpdate]:
        updates = super().step()
        for update in updates:
            self.updates[update.key].append(update)
            for token in update.tokens:
                self.tokens[update.key][token.index].append(token)
        assert self.check_integrity() == []
        return updates

    def run(self, *requests: EngineRequest) -> RecordingEngine:
        """Add, and step until nothing is left to do."""
        for request in requests:
            self.add(request)
        while self.has_work() or self._scheduler.compiling:
            self.step()
        return self

    def ids(self, key: Hashable, index: int = 0) -> list[int]:
        return [token.token_id for token in self.tokens[key][index]]

    def assert_empty(self) -> None:
        """Nothing is held but cached prefixes."""
        stats = self.stats()
        assert stats.free_blocks == self.num_blocks - 1 and stats.free_places == self.config.max_num_seqs
        assert (stats.running, stats.waiting, stats.reserved, stats.queued_tokens) == (0, 0, 0, 0)
        assert self.check_integrity() == []


class RecordingMux(RecordingEngine, MuxEngine):
    """The same of a MuxEngine, whose pieces stay in flight for as many looks at them as ``hold`` says.

    Attributes:
        launches: (lane, keys of its prompts, keys of its decodes, number of pieces in flight) of each step.
    """

    def __init__(self, config: Config, model: LoadedModel, device: torch.device = CPU) -> None:
        super().__init__(config, model, device)
        self.prompt_lane.on_logits = self._record_logits
        self.launches: list[Launch] = []
        self.hold: Callable[[], int] = lambda: 0

    def _launch(self, plan: Any, lane: Any) -> Any:
        decodes = [chunk.sequence.request.key for chunk in plan.chunks[: plan.num_decodes]]
        prompts = [chunk.sequence.request.key for chunk in plan.chunks[plan.num_decodes :]]
        self.launches.append(Launch(plan.lane, prompts, decodes, len(self._pieces)))
        return super()._launch(plan, lane)

    def _settle(self, plan: Any, lane: Any, launched: Any) -> Any:
        flight, news = super()._settle(plan, lane, launched)
        if lane is self.prompt_lane and flight is not None:
            flight = flight._replace(draws=Held(flight.draws, self.hold()))
        return flight, news


class Launch(NamedTuple):
    """See RecordingMux."""

    lane: LaneName
    prompts: list[Hashable]
    decodes: list[Hashable]
    num_pieces: int


class Held:
    """Draws that count as there only after so many looks, unless they are waited for."""

    def __init__(self, draws: Any, looks: int) -> None:
        self.draws = draws
        self.looks = looks
        self.scores, self.launched_at = draws.scores, draws.launched_at

    def is_done(self) -> bool:
        self.looks -= 1
        return self.looks < 0 and bool(self.draws.is_done())

    def read(self) -> Any:
        return self.draws.read()


class Disaggregated:
    """A prefill engine that copies each layer group into a decode engine's reserved blocks as it becomes final."""

    def __init__(self, prefill: RecordingEngine, decode: RecordingEngine) -> None:
        self.prefill, self.decode = prefill, decode
        self.reservations: dict[Hashable, Reservation] = {}
        self.received: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)  # (layer, block position), in order
        prefill.on_layer_group = self._copy

    def _copy(self, ready: LayerGroupReady) -> None:
        reservation = self.reservations[ready.key]
        positions = range(ready.first_block, ready.first_block + len(ready.block_ids))
        self.received[ready.key] += [(layer, position) for layer in ready.layers for position in positions]
        num_skipped = reservation.num_cached_tokens // self.decode.block_size
        pairs = [
            (s, reservation.block_ids[p]) for s, p in zip(ready.block_ids, positions, strict=True) if p >= num_skipped
        ]
        if pairs:
            sources, destinations = (list(ids) for ids in zip(*pairs, strict=True))
            blocks = gather_blocks(self.prefill.pool.tensor, ready.layers, sources)
            scatter_blocks(self.decode.pool.tensor, ready.layers, destinations, blocks)

    def run(self, *requests: EngineRequest) -> RecordingEngine:
        """Every request through both engines; the decode engine's records then hold the first tokens too."""
        for request in requests:
            reservation = self.decode.reserve(request)
            assert reservation is not None
            self.reservations[request.key] = reservation
            fields = {name: getattr(request, name) for name in EngineRequest.__dataclass_fields__}
            self.prefill.add(EngineRequest(**{**fields, "prefill_only": True}))
        started = set()
        engines = self.prefill, self.decode
        while any(engine.has_work() or engine._scheduler.compiling for engine in engines):
            for update in self.prefill.step():
                if update.finished:
                    for token in update.tokens:
                        self.decode.tokens[update.key][token.index].append(token)
                    self.decode.start_decode(update.key, update.tokens)
                    self.prefill.release(update.key)
                    started.add(update.key)
            self.decode.step()
        assert started == {request.key for request in requests}
        return self.decode


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Tiny models by architecture; each is made once."""
    made: dict[str, TinyModel] = {}

    def make(architecture: str) -> TinyModel:
        if architecture not in made:
            config = getattr(transformers, f"{architecture}Config")(**TINY)
            hf = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in hf.named_parameters():
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
            folder = tmp_path_factory.mktemp(architecture)
            hf.save_pretrained(folder)
            loaded = load_model(Config(model=str(folder), skip_tokenizer_init=True, dtype="float32"), CPU)
            made[architecture] = TinyModel(hf, folder, loaded)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[[str], TinyModel]) -> TinyModel:
    return tiny_model("Llama")


@pytest.fixture
def disaggregated() -> type[Disaggregated]:
    return Disaggregated
