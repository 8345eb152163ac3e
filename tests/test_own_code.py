"""Checkpoints whose config.json borrows a family's name, or takes its mask away: what the scripts say of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import Runs
from transformers import AutoModelForCausalLM

import calculate_LR
import mean_cut_accuracy_experiments as sweep
from slicing import count_parameters, load_model, rotate_and_slice

# modules of a checkpoint's own: a layer that adds a quarter of what Llama's does, and one with another name in it
SAME = """
class OwnLayer(LlamaDecoderLayer):
    pass
"""
QUARTER = """
class OwnLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + 0.25 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)
"""
RENAMED = """
class OwnLayer(LlamaDecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.feed_forward = self.mlp
        del self.mlp

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.feed_forward(self.post_attention_layernorm(hidden_states))
"""
MODEL = """
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
{layer}

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            self.model.layers[index] = OwnLayer(config, index)
        self.post_init()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("own"))


@pytest.fixture
def changed(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes copies of the model with other values in config.json, and code of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def copy(layer: str | None = None, **values: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(runs.model, folder)
        if layer is not None:
            (folder / "modeling_own.py").write_text(MODEL.format(layer=layer))
            values["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
            if layer == RENAMED:
                rename(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return copy


def rename(folder: Path) -> None:
    """Give the weights the names that the renamed module has."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {name.replace(".mlp.", ".feed_forward."): weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    """Of stderr, which has bars too."""
    return capfd.readouterr().err.rstrip().splitlines()[-1]


@pytest.mark.parametrize("layer", [QUARTER, RENAMED], ids=["quarter", "renamed"])
def test_layers_of_a_checkpoints_own_are_refused_before_a_point_is_measured(runs, changed, layer, tmp_path, capfd):
    given = ["--model", str(changed(layer)), "--trust-remote-code", "--output-dir", str(tmp_path / "results")]
    assert sweep.main(runs.arguments("unused", *given)) == 2
    assert "OwnLayer" in last_line(capfd)
    assert not list((tmp_path / "results").rglob("*.json"))
    assert sweep.main(runs.arguments("unused", *given, mean=0)) == 0
    assert calculate_LR.main([str(tmp_path / "model"), "--trust-remote-code", *LR, "--dataset", runs.text]) == 0


def test_a_checkpoints_own_layers_that_compute_what_llamas_do_are_sliced_and_saved_as_llamas(runs, changed, tmp_path):
    model, _ = load_model(str(changed(SAME)), device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    ids = torch.arange(1, 97).reshape(6, 16)
    sliced = rotate_and_slice(model, ids, [16] * model.config.num_hidden_layers)
    sliced.save_pretrained(tmp_path / "sliced")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, sliced(input_ids=ids).logits)
    stock, _ = load_model(str(runs.model), device="cpu")
    assert count_parameters(loaded) == count_parameters(
        rotate_and_slice(stock, ids, [16] * stock.config.num_hidden_layers)
    )


def test_code_that_is_there_and_not_run_is_told(runs, changed, tmp_path, capfd, caplog):
    assert calculate_LR.main([str(changed(QUARTER)), *LR, "--dataset", runs.text]) == 0
    assert "has code of its own (modeling_own.OwnForCausalLM), which is not run" in caplog.text


LR = ["--samples", "6", "--max-seq-len", "16", "--stride", "16", "--device", "cpu"]


@pytest.mark.parametrize("mean", [0.3, 0])
def test_a_model_that_sees_the_future_is_refused(runs, changed, mean, tmp_path, capfd):
    given = ["--model", str(changed(is_causal=False)), "--output-dir", str(tmp_path / "results")]
    assert sweep.main(runs.arguments("unused", *given, mean=mean)) == 2
    assert last_line(capfd).startswith("error: LlamaForCausalLM is not causal")
    assert not list((tmp_path / "results").rglob("*.json"))
    assert calculate_LR.main([str(tmp_path / "model"), *LR, "--dataset", runs.text]) == 2
    assert last_line(capfd).startswith("error: LlamaForCausalLM is not causal")
