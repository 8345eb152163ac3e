"""A model that sees the future is told by what it computes; one that does not is measured, whatever its config says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CASES, VOCAB, random_model, windows
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slicing import rotate_and_slice
from slicing.bases import dense_bases
from slicing.causality import check_causal, trial_tokens
from slicing.families import InputError
from slicing.likelihood import window_nll
from slicing.redundancy import layer_redundancy

MEASURES: dict[str, Callable[..., Any]] = {
    "perplexity": lambda model, ids: window_nll(model, ids, progress=False),
    "redundancy": layer_redundancy,
    "slicing": lambda model, ids: rotate_and_slice(model, ids, [40, 32, 24]),
    "bases": dense_bases,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def bert(model_type: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **_BERT, initializer_range=0.2, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_is_measured_on_a_model_that_sees_the_future(measure):
    model = random_model("llama", dtype=torch.float32, is_causal=False)
    with pytest.raises(InputError, match="LlamaForCausalLM is not causal: later tokens move the logits"):
        MEASURES[measure](model, windows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["mistral", "qwen2", "gemma", "gemma both ways", "phi3", "mixtral"])
def test_any_familys_model_is_refused_where_its_config_takes_the_mask_away(case, dtype):
    setting = {"use_bidirectional_attention": True} if case.endswith("both ways") else {"is_causal": False}
    with pytest.raises(InputError, match="is not causal"):
        check_causal(random_model(case.split()[0], dtype=dtype, **setting))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_an_encoder_is_refused_and_measured_as_a_decoder(model_type, dtype):
    with pytest.raises(InputError, match="is not causal"):
        window_nll(bert(model_type, dtype), windows(), progress=False)
    assert window_nll(bert(model_type, dtype, is_decoder=True), windows(), progress=False).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_causal_models_pass_in_any_dtype_and_layout(case, dtype):
    check_causal(random_model(case, dtype=dtype))


def test_what_the_config_says_of_a_causal_model_does_not_matter():
    check_causal(random_model("llama", dtype=torch.float32, is_causal=True))
    check_causal(random_model("llama", dtype=torch.float32, is_decoder=False))


def test_rounding_of_experts_that_are_grouped_otherwise_is_no_future(monkeypatch):
    model = random_model("mixtral", dtype=torch.bfloat16)
    forward, noise = model.forward, torch.Generator().manual_seed(0)

    def rounded(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits += 0.01 * output.logits.abs().max() * torch.randn(output.logits.shape, generator=noise)
        return output

    monkeypatch.setattr(model, "forward", rounded)
    check_causal(model)


def test_a_model_is_tried_again_only_where_its_config_changed(monkeypatch):
    model = random_model("llama", dtype=torch.float32)
    check_causal(model)
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **arguments: calls.append(1) or forward(**arguments))
    check_causal(model)
    assert not calls
    model.config.is_causal = False
    with pytest.raises(InputError, match="is not causal"):
        check_causal(model)


def test_trial_tokens_have_no_meaning_of_their_own():
    model = random_model("llama", pad_token_id=3, eos_token_id=list(range(20, 60)))
    drawn = {index for seed in range(8) for index in trial_tokens(model, seed)[0].tolist()}
    assert drawn
    assert not drawn & {0, 3, *range(20, 60)}


def test_a_model_that_can_not_be_run_on_text_alone_is_one_line(monkeypatch):
    model = random_model("llama", dtype=torch.float32)

    def fail(**arguments: Any) -> None:
        raise KeyError("pixel_values")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(InputError, match="LlamaForCausalLM can't be run on text alone: KeyError: 'pixel_values'"):
        window_nll(model, windows(), progress=False)
