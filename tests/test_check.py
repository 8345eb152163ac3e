"""A wrong row, or a layer that computes something else than its row says, is found before anything is sliced."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CASES, LAYERS, family_of, logits, random_model, windows
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP

from slicing import check
from slicing.check import TOLERANCE, check_config, check_layers, check_names
from slicing.families import FAMILIES, Family, InputError
from slicing.modeling import SlicedForCausalLM
from slicing.parts import part
from slicing.rotation import rotate_and_slice

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_passed(monkeypatch):
    monkeypatch.setattr(check, "_passed", set())


@pytest.mark.parametrize("rotations", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_right_rows_are_right_to_rounding(case, dtype, rotations, monkeypatch):
    monkeypatch.setattr(check, "TOLERANCE", 1e-5)
    assert check_layers(random_model(case, dtype=dtype), family_of(case), CPU, rotations) > 0


def broken(case: str, block: dict[str, object] | None = None, **fields: object) -> tuple[str, Family]:
    """A case, and its row with other names in its first layout or other fields."""
    first, *others = family_of(case).blocks
    return case, replace(family_of(case), blocks=(replace(first, **(block or {})), *others), **fields)


BROKEN = {
    "offset of the norms forgotten": broken("gemma", norm_offset=0.0),
    "offset where there is none": broken("llama", norm_offset=1.0),
    "eps of another size": broken("olmo", norm_eps=1e-3),
    "eps under another name": broken("qwen3", norm_eps="eps"),
    "reader of attention missing": broken("llama", {"attention_in": ("self_attn.q_proj", "self_attn.k_proj")}),
    "reader of the MLP missing": broken("mistral", {"mlp_in": ("mlp.gate_proj",)}),
    "router missing": broken("mixtral", {"mlp_in": ("mlp.experts.gate_up_proj",)}),
    "writer of attention wrong": broken("llama", {"attention_out": "self_attn.q_proj"}),
    "writer of the MLP wrong": broken("llama", {"mlp_out": ("mlp.up_proj",)}),
    "one writer of two missing": broken("qwen2_moe", {"mlp_out": ("mlp.experts.down_proj",)}),
    "norms swapped": broken("llama", {"attention_norm": "post_attention_layernorm", "mlp_norm": "input_layernorm"}),
    "one norm for both": broken("llama", {"mlp_norm": "input_layernorm"}),
    "one norm for both LayerNorms": broken("falcon-sequential", {"mlp_norm": "input_layernorm"}),
    "scale of the branches forgotten": broken("granite", {"scale": None}),
    "activation forgotten": broken("opt", {"mlp": ("fc1", "fc2")}),
    "modules of the MLP in another order": broken("opt", {"mlp": ("activation_fn", "fc1", "fc2")}),
    "no mixture of experts": broken("mixtral", {"experts": False}),
    "sequential where it is parallel": broken("gptj", {"parallel": False}),
    "parallel where it is sequential": broken("llama", {"parallel": True}),
    "output norm of attention forgotten": broken("gemma3_text", {"attention_output_norm": ""}),
    "output norm of the MLP forgotten": broken("olmo2", {"mlp_output_norm": ""}),
    "output norms swapped": broken(
        "olmo2",
        {"attention_output_norm": "post_feedforward_layernorm", "mlp_output_norm": "post_attention_layernorm"},
    ),
    "output norms taken for norms": broken(
        "olmo2",
        {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
        | {"attention_output_norm": "", "mlp_output_norm": ""},
    ),
    "output norm taken for the MLP's norm": broken(
        "gemma3_text",
        {"mlp_norm": "post_attention_layernorm", "attention_output_norm": "pre_feedforward_layernorm"},
    ),
    "norm forgotten": broken("llama", {"attention_norm": ""}),
    "RMSNorm taken for LayerNorm": broken("llama", layer_norm=True),
    "LayerNorm taken for RMSNorm": broken("opt", layer_norm=False),
    "LayerNorm without parameters taken for RMSNorm": broken("olmo", layer_norm=False),
}


@pytest.mark.parametrize("case_and_row", BROKEN.values(), ids=BROKEN)
def test_a_wrong_row_is_found(case_and_row):
    case, row = case_and_row
    with pytest.raises(InputError) as found:
        check_layers(random_model(case), row, CPU)
    message = str(found.value)
    assert message.startswith(f"can't slice this {CASES[case][0]!r} model: ")
    assert "layer 0 (" in message or "DecoderLayer has no " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("own", "release", "why"),
    [
        (LlamaDecoderLayer, "5.24.3", "$"),
        (LlamaDecoderLayer, "5.99.1", r"; the row is for Transformers 5\.24, this is 5\.99\.1$"),
        (
            type("OwnLayer", (LlamaDecoderLayer,), {}),
            "5.24.0",
            "; the layer is code of its own: .* without --trust-remote-code$",
        ),
    ],
    ids=["wrong row", "other release", "own code"],
)
def test_a_layer_without_what_its_row_names_is_refused_with_its_index_class_and_the_reason(
    own, release, why, monkeypatch
):
    case, row = broken("llama", {"mlp_norm": "gone"})
    monkeypatch.setattr(check.transformers, "__version__", release)
    model = random_model(case)
    for layer in model.model.layers:
        layer.__class__ = own
    with pytest.raises(InputError, match=f"model: layer 0: {own.__name__} has no gone, which the row in .* names{why}"):
        check_names(model, row)


def test_what_a_row_does_not_fit_is_refused_before_weights_are_read():
    case, row = broken("llama", {"attention_out": "gone"})
    config = AutoConfig.for_model(*CASES[case][:1], **CASES[case][1])
    with pytest.raises(InputError, match="layer 0: LlamaDecoderLayer has no gone"):
        check_config(config, row)
    check_config(config, family_of(case))
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    check_config(config, row)  # its code is not known yet


class Quarter(LlamaDecoderLayer):
    """Code that says `model_type: llama` and computes something else."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + 0.25 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)


class OwnForCausalLM(LlamaForCausalLM):
    """A class of a checkpoint's own."""


class OwnMLP(LlamaMLP):
    """The same numbers, but not the class that loading builds."""


def test_a_layer_that_computes_something_else_is_refused_with_its_index_class_and_error():
    model = random_model("llama")
    model.model.layers[1].__class__ = Quarter
    with pytest.raises(InputError, match=r"its layer 1 \(Quarter\) does not compute .* is off by [\d.]+ \(0\.001 is"):
        rotate_and_slice(model, windows(), [16] * LAYERS)


class Doubled(LlamaForCausalLM):
    """Layers of Llama's, below another head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("path", "own"), [("", OwnForCausalLM), ("model.layers.2.mlp", OwnMLP)], ids=["model", "module of a layer"]
)
def test_classes_that_loading_would_not_build_are_sliced_as_those_it_builds(path, own, tied, tmp_path):
    model = random_model("llama", dtype=torch.float32, tied=tied)
    wanted = logits(rotate_and_slice(model, windows(), [16] * LAYERS), windows())
    model.get_submodule(path).__class__ = own
    sliced = rotate_and_slice(model, windows(), [16] * LAYERS)
    assert type(model.get_submodule(path)) is own
    assert torch.equal(logits(sliced, windows()), wanted)
    sliced.save_pretrained(tmp_path)
    assert torch.equal(logits(SlicedForCausalLM.from_pretrained(tmp_path).eval(), windows()), wanted)


def test_classes_that_compute_something_else_than_those_that_loading_builds_are_refused():
    model = random_model("llama")
    model.__class__ = Doubled
    what = "its class is Doubled, Transformers' own LlamaForCausalLM gives other logits .relative error 0.5."
    with pytest.raises(InputError, match=what):
        rotate_and_slice(model, windows(), [16] * LAYERS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("home", ["cpu", "cuda"], ids=["offloaded", "on the GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["llama", "gpt2", "olmo", "mixtral", "gemma3_text"])
def test_the_check_is_the_same_on_a_gpu(case, dtype, home, monkeypatch):
    monkeypatch.setattr(check, "TOLERANCE", 1e-4)
    model, gpu = random_model(case, dtype=dtype).to(home), torch.device("cuda", 0)
    assert check_layers(model, family_of(case), gpu) > 0
    assert {parameter.device.type for parameter in model.parameters()} == {home}
    first, *others = family_of(case).blocks
    wrong = replace(first, attention_out=first.mlp_in[0])
    with pytest.raises(InputError, match="its layer 0 "):
        check_layers(model, replace(family_of(case), blocks=(wrong, *others)), gpu)


def test_layers_of_other_code_shapes_or_numbers_are_checked_apart_and_once_a_process(monkeypatch):
    checked: list[int] = []
    measured = check._layer_error
    monkeypatch.setattr(check, "_layer_error", lambda *args: checked.append(args[2]) or measured(*args))
    model = random_model("qwen3_moe")  # layer 1 has no experts
    family = FAMILIES["qwen3_moe"]
    check_layers(model, family, CPU)
    check_layers(model, family, CPU)
    assert checked == [0, 1]
    part(model, family.layers)[2].input_layernorm.variance_epsilon *= 2
    check_layers(model, family, CPU)
    assert checked == [0, 1, 2]
    monkeypatch.setattr(type(model.model.layers[0]), "forward", lambda self, x, **kwargs: x)
    with pytest.raises(InputError, match="its layer 0 "):
        check_layers(model, family, CPU)


def test_the_check_leaves_the_model_as_it_was_and_its_seconds_stand_in_the_sliced_model():
    model = random_model("mixtral", dtype=torch.float32).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sliced = rotate_and_slice(model, windows(2), [16] * LAYERS)
    assert 0 < sliced.check_seconds < 60
    assert all(module.training for module in model.modules())
    assert model.config._experts_implementation == "eager"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_not_finite_are_left_to_the_calibration():
    model = random_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    assert check_layers(model, FAMILIES["llama"], CPU) > 0
    assert TOLERANCE < 1e-2
