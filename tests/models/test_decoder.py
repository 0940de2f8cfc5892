"""The decoder's logits equal transformers' for every family and position embedding, however a sequence is cut."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 6}),
    "llama-mqa-tied": ("LlamaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 12}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 20, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "qwen3-biases-tied": ("Qwen3ForCausalLM", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    **{
        f"{family}-{kind}": (architecture, {"rope_parameters": {"rope_theta": 5000.0, **rope}, "head_dim": 16})
        for kind, rope in ROPE.items()
        for family, architecture in (("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM"))
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_one_go_in_chunks_and_in_decode_steps(
    name: str, hf_model: Any, decoder_of: Any, paged: Any, tokens: Any, reference_logits: Any
) -> None:
    architecture, overrides = MODELS[name]
    model = hf_model(architecture, **overrides)
    decoder = decoder_of(model)
    prompt = tokens(75)
    expected = reference_logits(model, prompt)

    torch.testing.assert_close(paged(decoder).run(prompt), expected, atol=1e-4, rtol=1e-4)
    cut = paged(decoder)
    pieces = [cut.run(prompt[:29]), cut.run(prompt[29:70]), *(cut.run([token]) for token in prompt[70:])]
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3"])
def test_rows_do_not_depend_on_how_the_sequence_is_cut(
    name: str, hf_model: Any, decoder_of: Any, paged: Any, tokens: Any
) -> None:
    architecture, overrides = MODELS[name]
    decoder = decoder_of(hf_model(architecture, **overrides))
    prompt = tokens(50)
    whole = paged(decoder).run(prompt)
    cut = paged(decoder)
    pieces = torch.cat([cut.run(prompt[:17]), cut.run(prompt[17:46]), *(cut.run([token]) for token in prompt[46:])])
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("rows", [[49], [7, 49, 7], []])
def test_rows_that_are_asked_for_alone(
    rows: list[int], hf_model: Any, decoder_of: Any, paged: Any, tokens: Any
) -> None:
    decoder = decoder_of(hf_model("Qwen3ForCausalLM"))
    prompt = tokens(50)
    whole, part = paged(decoder), paged(decoder)
    logits = whole.run(prompt)
    assert torch.equal(part.run(prompt, rows=rows), logits[rows])
    assert torch.equal(part.kv, whole.kv)


def test_dynamic_rope_equals_transformers_when_decoding_past_the_trained_length(
    hf_model: Any, decoder_of: Any, paged: Any, tokens: Any
) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = hf_model("LlamaForCausalLM", max_position_embeddings=32, rope_parameters=scaling)
    sequence = paged(decoder_of(model))
    assert sequence.decoder.max_len == 64
    prompt = tokens(60)
    with torch.inference_mode():
        ours = [sequence.run(prompt[:30])]
        output = model(torch.tensor([prompt[:30]]), use_cache=True)
        theirs = [output.logits[0]]
        for token in prompt[30:]:
            ours.append(sequence.run([token]))
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            theirs.append(output.logits[0])
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), atol=1e-4, rtol=1e-4)


def test_on_layer_is_called_once_a_layer_when_its_kv_is_stored(
    hf_model: Any, decoder_of: Any, paged: Any, tokens: Any
) -> None:
    sequence = paged(decoder_of(hf_model("LlamaForCausalLM", num_hidden_layers=3)))
    stored: list[list[bool]] = []
    stale = sequence.kv.clone()

    def on_layer(layer: int) -> None:
        assert layer == len(stored)
        stored.append([not torch.equal(sequence.kv[i], stale[i]) for i in range(3)])

    sequence.run(tokens(5), on_layer)
    assert stored == [[True, False, False], [True, True, False], [True, True, True]]


class Operations(TorchDispatchMode):
    """What was computed, and on which shapes: that is what a kernel is chosen by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [getattr(each, "shape", None) for each in args]
        self.seen.add((str(function), str(shapes)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("rows", [None, [6]])
def test_a_rehearsal_computes_whatever_a_step_computes(
    num_layers: int, rows: list[int] | None, hf_model: Any, decoder_of: Any, paged: Any, tokens: Any
) -> None:
    """What it leaves out would be loaded while a graph is captured."""
    decoder = decoder_of(hf_model("Qwen3ForCausalLM", head_dim=8, num_hidden_layers=num_layers))
    whole, rehearsed, layers = Operations(), Operations(), []
    with whole:
        paged(decoder).run(tokens(7), rows=rows)
    decoder.forward = functools.partial(decoder.forward, is_rehearsal=True)
    with rehearsed:
        paged(decoder).run(tokens(7), layers.append, rows)
    assert whole.seen == rehearsed.seen and len(whole.seen) > 10
    assert layers == sorted({0, num_layers - 1})


def test_packing_keeps_every_parameter(hf_model: Any, decoder_of: Any) -> None:
    model = hf_model("Qwen2ForCausalLM", tie_word_embeddings=True)
    parameters = decoder_of(model).parameters()
    expected = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, tensor in parameters.items():
        assert torch.equal(tensor, expected[name]), name


def test_bfloat16_stays_close_to_float32(hf_model: Any, decoder_of: Any, paged: Any, tokens: Any) -> None:
    from pdray.models.decoder import Decoder

    full = decoder_of(hf_model("Qwen3ForCausalLM", head_dim=16))
    half = Decoder(full.config, full.max_len, torch.bfloat16, torch.device("cpu"))
    source = full.parameters()
    for name, parameter in half.parameters().items():
        parameter.copy_(source[name])
    half.pack_weights()
    prompt = tokens(20)
    expected, logits = paged(full).run(prompt), paged(half).run(prompt)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
