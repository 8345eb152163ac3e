"""LR is what a computation by hand gives: mean cosine of a layer's input and output, for every family with layers."""

import gc
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import CASES, LAYERS, VOCAB, family_of, logits, random_model, windows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slicing.families import REFUSED, InputError
from slicing.likelihood import window_nll
from slicing.parts import part
from slicing.redundancy import decoder_layers, layer_redundancy
from slicing.rotation import rotate_and_slice

TOLERANCE = 1e-6  # cosines are fp32
# where the norm behind the last layer is; elsewhere it is model.norm
FINAL_NORM = {
    "opt": "model.decoder.final_layer_norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "phi": "model.final_layernorm",
    "falcon": "transformer.ln_f",
    "gptj": "transformer.ln_f",
}
_SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "pad_token_id": 0}
_LLAMA = _SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# families that tests/tiny_models.py has no case of, or an easier one
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo2": _LLAMA,
    "bloom": _SIZES | {"n_head": 4},
    "mpt": {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "vocab_size": VOCAB, "max_seq_len": 64},
    "openai-gpt": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB},  # lists
    "modernbert-decoder": _LLAMA | {"cls_token_id": 1, "sep_token_id": 2},  # its `decoder` is the head
    "llama4_text": _LLAMA | {"num_local_experts": 4, "intermediate_size_mlp": 64},
}
# families of several streams, and the axis that these have
STREAMS: dict[str, tuple[dict[str, Any], int]] = {
    "hy_v4": (_LLAMA, 2),
    "gemma3n_text": (
        _LLAMA
        | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
        | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * LAYERS, "intermediate_size": [64] * LAYERS},
        0,
    ),
}
# families whose layers are no chain of (B, S, D), and why
NO_CHAIN: dict[str, tuple[dict[str, Any], str]] = {
    "xlm": (
        {"emb_dim": 32, "n_layers": LAYERS, "n_heads": 4, "vocab_size": VOCAB, "n_words": VOCAB, "causal": True},
        r"its 3 layers \(MultiHeadAttention\) are no chain: layer 1 does not read what layer 0 writes",
    ),
    "dory": (_LLAMA, "do not run once each, one after the other"),
}


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Each measurement collects garbage first; what other tests hold on to need not be looked through again."""
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def model_of(case: str) -> PreTrainedModel:
    """A tiny model in fp32, of a case or of another family."""
    if case in CASES:
        return random_model(case, dtype=torch.float32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case, **OTHERS[case], initializer_range=0.2))
    return model.eval()


def states_by_hand(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The L + 1 states (N, S, D) of the stream, the last one before the final norm."""
    owner, _, name = FINAL_NORM.get(model.config.model_type, "model.norm").rpartition(".")
    norm = getattr(part(model, owner), name)
    setattr(part(model, owner), name, nn.Identity())
    with torch.no_grad():
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    setattr(part(model, owner), name, norm)
    return list(states)


def cosines_by_hand(states: list[torch.Tensor]) -> torch.Tensor:
    """The cosine of each token's state before and behind each layer (L, N, S), token by token, in fp64."""
    count, length = states[0].shape[:2]
    found = torch.empty(len(states) - 1, count, length, dtype=torch.float64)
    for layer in range(len(states) - 1):
        for row in range(count):
            for token in range(length):
                x, y = states[layer][row, token].double(), states[layer + 1][row, token].double()
                found[layer, row, token] = x.dot(y) / (x.dot(x) * y.dot(y)).sqrt()
    return found


# ---- the numbers


@pytest.mark.parametrize("case", CASES)
def test_lr_equals_the_computation_by_hand(case):
    model, ids = model_of(case), windows(3, 8)
    by_hand = cosines_by_hand(states_by_hand(model, ids))
    found = layer_redundancy(model, ids)
    assert found.cosine.dtype == found.stderr.dtype == found.normalised.dtype == torch.float64
    wanted = by_hand.mean((1, 2))
    assert torch.allclose(found.cosine, wanted, atol=TOLERANCE)
    of_windows = by_hand.mean(2)  # (L, N)
    deviation = ((of_windows - wanted[:, None]).square().sum(1) / 2).sqrt()
    assert torch.allclose(found.stderr, deviation / math.sqrt(3), atol=TOLERANCE)
    spread = wanted.max() - wanted.min()
    assert torch.allclose(found.normalised, (wanted - wanted.min()) / spread, atol=4 * TOLERANCE / spread)
    assert found.normalised.min() == 0
    assert found.normalised.max() == 1


def test_the_last_layer_is_measured_before_the_final_norm():
    model, ids = model_of("llama"), windows(3, 8)
    with torch.no_grad():
        last, normed = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-2:]
    after_norm = torch.nn.functional.cosine_similarity(last, normed, dim=-1).mean()
    assert abs(layer_redundancy(model, ids).cosine[-1] - after_norm) > 1e-3


@pytest.mark.parametrize("case", ["llama", "falcon-sequential", "gptj"])
def test_the_batch_size_does_not_matter(case):
    wanted = layer_redundancy(model_of(case), windows(5, 8))
    for batch_size in (1, 2, 8):
        found = layer_redundancy(model_of(case), windows(5, 8), batch_size=batch_size)
        assert torch.allclose(found.cosine, wanted.cosine, atol=TOLERANCE)
        assert torch.allclose(found.stderr, wanted.stderr, atol=TOLERANCE)


def test_the_stderr_of_a_single_window_is_nan():
    found = layer_redundancy(model_of("llama"), windows(1, 8))
    assert torch.isfinite(found.cosine).all()
    assert torch.isnan(found.stderr).all()


def test_an_fp64_model_is_measured():
    model, ids = random_model("llama"), windows(3, 8)
    wanted = cosines_by_hand(states_by_hand(model, ids)).mean((1, 2))
    assert torch.allclose(layer_redundancy(model, ids).cosine, wanted, atol=TOLERANCE)


def test_cosines_of_a_bf16_model_are_computed_in_fp32():
    model, ids = random_model("llama", dtype=torch.bfloat16), windows(3, 8)
    wanted = cosines_by_hand(states_by_hand(model, ids)).mean((1, 2))
    assert torch.allclose(layer_redundancy(model, ids).cosine, wanted, atol=TOLERANCE)


def test_a_layer_that_does_nothing_is_the_most_redundant():
    model = random_model("llama", dtype=torch.float32)
    layer = model.model.layers[1]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    found = layer_redundancy(model, windows(3, 8))
    assert found.cosine[1].item() == pytest.approx(1, abs=TOLERANCE)
    assert found.normalised[1] == 1


# ---- every family


@pytest.mark.parametrize("case", OTHERS)
def test_lr_runs_for_any_family_whether_it_can_be_sliced_or_not(case):
    model, ids = model_of(case), windows(3, 8)
    found = layer_redundancy(model, ids)
    with torch.no_grad():
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    wanted = cosines_by_hand(list(states[:LAYERS])).mean((1, 2))  # all but the last layer
    assert torch.allclose(found.cosine[:-1], wanted, atol=TOLERANCE)
    assert torch.isfinite(found.cosine).all()


@pytest.mark.parametrize("case", NO_CHAIN)
def test_lists_of_modules_that_are_no_chain_have_no_lr(case):
    settings, message = NO_CHAIN[case]
    if case not in CONFIG_MAPPING:
        pytest.skip("this release of Transformers does not have it")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case, **settings)).eval()
    with pytest.raises(InputError, match=f"has no layer redundancy: .*{message}"):
        layer_redundancy(model, windows(3, 8))


@pytest.mark.parametrize("case", STREAMS)
def test_of_several_streams_a_tokens_numbers_are_one_vector(case):
    if case not in CONFIG_MAPPING:
        pytest.skip("this release of Transformers does not have it")
    settings, axis = STREAMS[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case, **settings)).eval()
    states: list[torch.Tensor] = []

    def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        states.extend(args[:1] or [kwargs["hidden_states"]])
        states.append(output[0] if isinstance(output, tuple) else output)

    for layer in decoder_layers(model):
        layer.register_forward_hook(hook, with_kwargs=True)
    ids = windows(3, 8)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    vectors = [state.movedim(axis, 2).flatten(2) for state in states]
    wanted = [cosines_by_hand(vectors[index : index + 2]).mean() for index in range(0, 2 * LAYERS, 2)]
    assert states[0].ndim == 4
    assert torch.allclose(layer_redundancy(model, ids).cosine, torch.stack(wanted), atol=TOLERANCE)


def test_families_that_slicing_refuses_are_among_those_measured():
    assert REFUSED.keys() & OTHERS.keys()


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_the_decoder_layers_are_as_many_as_the_config_says(case):
    layers = decoder_layers(model_of(case))
    assert len(layers) == model_of(case).config.num_hidden_layers == LAYERS
    assert len({type(layer) for layer in layers}) == 1


# ---- the model is left as it was


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon", "mixtral", "gemma2"])
def test_measuring_leaves_the_model_as_it_was(case):
    model = model_of(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, wanted = model.config.to_dict(), logits(model, windows(2, 8))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    layer_redundancy(model, windows(2, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(logits(model, windows(2, 8)), wanted)


def test_a_sliced_model_has_no_lr():
    sliced = rotate_and_slice(random_model("llama"), windows(2, 8), [40, 32, 24])
    with pytest.raises(InputError, match="layer 0 reads 40 numbers and writes 32, so it has no cosine"):
        layer_redundancy(sliced, windows(2, 8))


def test_no_hook_is_left_when_the_forward_fails(monkeypatch):
    model = random_model("llama")
    layer_redundancy(model, windows(2, 8))
    monkeypatch.setattr(decoder_layers(model)[1].mlp, "forward", lambda states: states[..., :7])
    with pytest.raises(InputError, match="its body alone fails: The size of tensor"):
        layer_redundancy(model, windows(2, 8))
    assert not any(module._forward_hooks for module in decoder_layers(model))


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_lr_has_no_dropout_whatever_the_mode_of_the_model(case):
    model = random_model(case, dtype=torch.float32)
    wanted = layer_redundancy(model, windows(2, 8)).cosine
    model.train()
    assert torch.equal(layer_redundancy(model, windows(2, 8)).cosine, wanted)
    assert all(module.training for module in model.modules())


# ---- bad input


@pytest.mark.parametrize(("case", "index"), [("llama", 1), ("gpt2", 0), ("falcon", 2), ("mixtral", 1)])
def test_activations_that_are_not_finite_are_an_error_that_names_the_first_such_layer(case, index):
    model = random_model(case, dtype=torch.float32)
    next(part(model, family_of(case).layers)[index].parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(InputError, match=f"the activations of layer {index} are not finite: use --dtype"):
        layer_redundancy(model, windows(2, 8))


@pytest.mark.parametrize("measure", [layer_redundancy, window_nll, lambda *a: rotate_and_slice(*a, [40, 32, 24])])
@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_weights_that_are_not_finite_are_an_error_whatever_the_kernel_makes_of_them(measure, name):
    model = random_model("llama", dtype=torch.float32)  # AVX-512's attention swallows NaN in queries and keys
    model.get_submodule(f"model.layers.1.self_attn.{name}").weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=f"self_attn.{name}.weight are not"):
        measure(model, windows(2, 8))


def test_a_token_whose_state_is_zero_is_no_error():
    model = random_model("llama", dtype=torch.float32)
    model.model.embed_tokens.weight.data[0] = 0  # a padding token's row
    ids = windows(2, 8)
    ids[0, 0] = 0
    assert torch.isfinite(layer_redundancy(model, ids).cosine).all()


@pytest.mark.parametrize("ids", [torch.ones(4, dtype=torch.long), torch.ones(0, 8, dtype=torch.long)])
def test_windows_of_a_wrong_shape_are_an_error(ids):
    with pytest.raises(InputError, match=r"shape \(N, S\)"):
        layer_redundancy(model_of("llama"), ids)


def test_a_model_without_a_list_of_layers_is_an_error():
    model = random_model("llama")
    model.config.model_type = "unheard_of"
    model.config.num_hidden_layers = LAYERS + 1
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no layer redundancy: no list of 4 layers"):
        layer_redundancy(model, windows(2, 8))
