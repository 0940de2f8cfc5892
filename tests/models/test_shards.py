"""Ranks that share a model compute together what one alone does, and each loads its own part of the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdray.config import Config
from pdray.errors import ConfigError
from pdray.kernels.collective.group import RankGroup
from pdray.models import load_model
from pdray.models.decoder import Decoder
from pdray.models.load import LoadedModel
from pdray.models.shards import Span, kv_heads_of, vocabulary_of
from pdray.testing.rank_threads import run_ranks

CPU = torch.device("cpu")
FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-one-kv-head-tied": ("LlamaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
}


def shard_of(group: RankGroup, whole: Decoder) -> Decoder:
    """A rank's part of a decoder that is not packed."""
    shard = Decoder(whole.config, whole.max_len, whole.dtype, whole.device, group=group)
    weights, cuts = whole.parameters(), shard.cuts()
    for name, parameter in shard.parameters().items():
        parameter.copy_(weights[name][cuts[name].indices] if name in cuts else weights[name])
    shard.pack_weights()
    return shard


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_compute_what_one_alone_does(
    name: str, size: int, hf_model: Any, decoder_of: Any, paged: Any, tokens: Any, reference_logits: Any
) -> None:
    architecture, overrides = MODELS[name]
    model = hf_model(architecture, **FOUR | overrides)
    whole, prompt = decoder_of(model), tokens(45)

    def run(group: RankGroup) -> tuple[torch.Tensor, torch.Tensor]:
        sequence = paged(shard_of(group, whole))
        first = sequence.run(prompt[:30], rows=[29, 3])
        return first, torch.cat([sequence.run([token]) for token in prompt[30:]])

    (first, rest), *others = run_ranks(size, run)
    expected = reference_logits(model, prompt)
    torch.testing.assert_close(first, expected[[29, 3]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rest, expected[30:], atol=1e-4, rtol=1e-4)
    assert all(logits.shape == (0, 211) for each in others for logits in each)


def test_a_step_that_draws_nothing(hf_model: Any, decoder_of: Any, paged: Any, tokens: Any) -> None:
    whole = decoder_of(hf_model("LlamaForCausalLM", **FOUR))
    logits = run_ranks(2, lambda group: paged(shard_of(group, whole)).run(tokens(20), rows=[]))
    assert [each.shape for each in logits] == [(0, 211)] * 2


def test_tokens_that_the_step_before_has_drawn(hf_model: Any, decoder_of: Any) -> None:
    whole = decoder_of(hf_model("LlamaForCausalLM", **FOUR))
    ids, sampled = torch.tensor([-1, 7, -3, 208]), torch.tensor([120, 5, 3])
    expected = whole.embed_tokens(ids, sampled)
    for vectors in run_ranks(4, lambda group: shard_of(group, whole).embed_tokens(ids, sampled)):
        assert torch.equal(vectors, expected)


def save_safetensors(model: Any, folder: Path) -> Config:
    model.save_pretrained(folder)
    return Config(model=str(folder))


def save_dummy(model: Any, folder: Path) -> Config:
    model.config.save_pretrained(folder)
    return Config(model=str(folder / "config.json"), load_format="dummy", skip_tokenizer_init=True)


@pytest.mark.parametrize("save", [save_safetensors, save_dummy])
@pytest.mark.parametrize("name", MODELS)
def test_each_rank_loads_its_part(
    name: str, save: Callable[[Any, Path], Config], tmp_path: Path, hf_model: Any
) -> None:
    architecture, overrides = MODELS[name]
    config = save(hf_model(architecture, **FOUR | overrides), tmp_path)
    check_parts(config, 4)


def check_parts(config: Config, size: int) -> None:
    """What the ranks hold is what one alone holds, and no rank holds all of a large matrix."""
    whole = load_model(config, CPU).decoder.parameters()
    decoders = [loaded.decoder for loaded in run_ranks(size, lambda group: load_model(config, CPU, group=group))]
    for decoder in decoders:
        cuts = decoder.cuts()
        for name, parameter in decoder.parameters().items():
            expected = whole[name][cuts[name].indices] if name in cuts else whole[name]
            assert torch.equal(parameter, expected), name
        matrices = {name for name, tensor in whole.items() if tensor.ndim == 2}
        assert {name for name in matrices if not name.endswith(("k_proj.weight", "v_proj.weight"))} <= cuts.keys()
    assert decoders[0].parameters().keys() == whole.keys()


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ({}, 3, r"tensor_parallel_size is 3, by which .*num_attention_heads \(8\) .*set it to 1 or 2 or 4 or 8$"),
        ({"intermediate_size": 90}, 4, r"intermediate_size \(90\) cannot be divided; set it to 1 or 2$"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            2,
            r"num_key_value_heads \(3\).* set it to 1 or 3 or 6$",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(
    overrides: dict[str, int], size: int, message: str, tmp_path: Path, hf_model: Any
) -> None:
    config = save_dummy(hf_model("LlamaForCausalLM", **FOUR | overrides), tmp_path)
    with pytest.raises(ConfigError, match=message):
        run_ranks(size, lambda group: load_model(config, CPU, group=group))


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 64))
def test_ranks_have_the_keys_that_their_queries_look_at(num_kv_heads: int, group: int, num_ranks: int) -> None:
    num_heads = num_kv_heads * group
    if num_heads % num_ranks or (num_kv_heads % num_ranks and num_ranks % num_kv_heads):
        return
    for rank in range(num_ranks):
        queries, keys = Span.share(num_heads, rank, num_ranks), kv_heads_of(num_kv_heads, rank, num_ranks)
        assert {head // group for head in range(*queries[:2])} == set(range(*keys[:2]))
        assert keys.size * group % queries.size == 0 if num_ranks > num_kv_heads else keys.size * group == queries.size


@given(st.integers(1, 500), st.integers(1, 300))
def test_every_token_is_some_ranks(vocab_size: int, rows: int) -> None:
    spans = [vocabulary_of(vocab_size, rows, rank) for rank in range(-(-vocab_size // rows) + 2)]
    assert [token for span in spans for token in range(span.start, span.stop)] == list(range(vocab_size))
    assert all(span.size <= rows for span in spans)


@pytest.mark.parametrize("name", ["llama-one-kv-head-tied", "qwen3"])
def test_a_fingerprint_is_of_all_ranks_weights(name: str, tmp_path: Path, hf_model: Any) -> None:
    architecture, overrides = MODELS[name]
    config = save_dummy(hf_model(architecture, **FOUR | overrides), tmp_path)
    whole = load_model(config, CPU).fingerprint
    for size in (2, 4):
        ranks = run_ranks(size, lambda group: load_model(config, CPU, group=group))
        assert [each.fingerprint for each in ranks] == [whole] * size
    other = config.model_copy(update={"seed": 1})
    for odd in range(4):  # has another model's weights, and so have fewer than all parameters

        def load(group: RankGroup, odd: int = odd) -> LoadedModel:
            return load_model(other if group.rank == odd else config, CPU, group=group)

        loaded = run_ranks(4, load)
        assert {each.fingerprint for each in loaded} != {whole}


def test_on_layer_speaks_for_every_rank(hf_model: Any, decoder_of: Any, paged: Any, tokens: Any) -> None:
    """Also in the last layer of a step that draws nothing, whose output nobody needs."""
    whole, told = decoder_of(hf_model("LlamaForCausalLM", **FOUR)), threading.Event()
    sequences: dict[int, Any] = {}
    seen: list[torch.Tensor] = []

    def run(group: RankGroup) -> None:
        sequence = sequences[group.rank] = paged(shard_of(group, whole))
        last = sequence.decoder.layers[-1]
        if group.rank == 1:
            attend = last.attend

            def late(*args: Any) -> torch.Tensor:
                told.wait(0.5)
                return attend(*args)  # type: ignore[no-any-return]

            last.attend = late

        def on_layer(layer: int) -> None:
            if group.rank == 0 and layer == len(sequence.decoder.layers) - 1:
                told.set()
                seen.append(sequences[1].kv[layer].clone())

        sequence.run(tokens(20), on_layer, rows=[])

    run_ranks(2, run)
    assert torch.equal(seen[0], sequences[1].kv[-1])
