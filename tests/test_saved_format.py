"""What a saved sliced model looks like to tools that go by config.json, Auto classes and names of weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, HIDDEN, LAYERS, VOCAB, family_of, logits, random_model, relative_error, windows
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from slicing.loading import load_config
from slicing.modeling import SlicedForCausalLM, SlicedForSequenceClassification, SlicedModel
from slicing.parts import part
from slicing.rotation import rotate_and_slice

WIDTHS = [32, 24, 40]
TRUSTED: dict[str, Any] = {"trust_remote_code": True}
every_case = pytest.mark.parametrize("case", CASES)


def tied(case: str) -> bool:
    """Half of the cases are tied."""
    return list(CASES).index(case) % 2 == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and model by case, made once; code of the folders is copied to a cache of this module's own."""
    root = tmp_path_factory.mktemp("saved")
    made: dict[str, tuple[Path, SlicedForCausalLM]] = {}

    def of(case: str) -> tuple[Path, SlicedForCausalLM]:
        if case not in made:
            dense = random_model(case, tied=tied(case), dtype=torch.float32)
            model = rotate_and_slice(dense, windows(2), WIDTHS, rotations=1)
            model.save_pretrained(root / case)
            made[case] = root / case, model
        return made[case]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        yield of


@every_case
def test_the_config_is_the_dense_models_with_own_fields(case, saved):
    folder, model = saved(case)
    found = json.loads((folder / "config.json").read_text())
    dense = json.loads(random_model(case, tied=tied(case), dtype=torch.float32).config.to_json_string())
    own = {"model_type", "dense_model_type", "widths", "rotations", "gained_biases", "embedding_size"}
    own |= {"auto_map", "architectures"}
    assert {name: value for name, value in found.items() if name not in own} == {
        name: value for name, value in dense.items() if name not in own
    }
    assert (found["model_type"], found["dense_model_type"]) == ("sliced", dense["model_type"])
    assert found["architectures"] == ["SlicedForCausalLM"]
    assert found["embedding_size"] == model.get_input_embeddings().weight.shape[1]
    assert model.config.get_text_config() is model.config
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (HIDDEN, LAYERS)
    assert model.config.dense().to_dict() == random_model(case, tied=tied(case), dtype=torch.float32).config.to_dict()


@every_case
def test_weights_have_the_dense_models_names(case, saved):
    folder, model = saved(case)
    dense = random_model(case, tied=tied(case))
    shortcuts = {f"{name}.weight" for name in ("embedding_projection", "attn_shortcut", "mlp_shortcut")}
    gained = {f"{name.rpartition('.')[2]}.bias" for name in model.config.gained_biases}
    names = {name for name in load_file(folder / "model.safetensors") if not name.endswith((*shortcuts, *gained))}
    expected = set(dense.state_dict())
    if tied(case):
        expected -= {"lm_head.weight", "embed_out.weight"}
    norms = {name for name in names | expected if "norm" in name or ".ln_" in name}  # a LayerNorm's bias has gone
    assert names - norms == expected - norms
    assert model.base_model is part(model, family_of(case).layers.partition(".")[0])
    assert isinstance(model, type(dense))


@every_case
def test_auto_classes_open_the_folder(case, saved):
    folder, model = saved(case)
    ids = windows(2)
    wanted = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    for options in (TRUSTED, {}):
        load_config(str(folder))  # this project's own classes, for those who don't trust code
        body = AutoModel.from_pretrained(folder, **options, experts_implementation=model.config._experts_implementation)
        assert type(body).__name__ == SlicedModel.__name__
        assert torch.equal(body(input_ids=ids, use_cache=False).last_hidden_state, wanted)
        head = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options)
        assert type(head).__name__ == SlicedForSequenceClassification.__name__
        assert head(input_ids=ids[:1], labels=torch.tensor([1])).loss.isfinite()


def engine_attention(module, query, key, value, attention_mask, scaling, attention_instances=None, **kwargs):
    """What an engine puts in attention's place: its own kernels and cache, found by the layer's index."""
    attention_instances[module.layer_idx] += 1
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2), None


# an engine learns of a sliding window by arguments of its own
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("mistral", "qwen2", "gemma3_text")])
def test_an_engine_with_a_transformers_backend_runs_the_folder(case, saved):
    """The steps of vLLM's and SGLang's backends, with names renamed as they do."""
    folder, model = saved(case)
    if not model.is_backend_compatible():  # the dense family isn't either
        pytest.skip("the family's attention can't be exchanged")
    config = AutoConfig.from_pretrained(folder, **TRUSTED)
    assert config.get_text_config() == config  # else it is taken for a multimodal model
    AttentionInterface.register("engine", engine_attention)
    config._attn_implementation = "engine"
    with torch.device("meta"):
        body = AutoModel.from_config(config, dtype=torch.float32, **TRUSTED)
    assert body.is_backend_compatible()
    prefix = f"{body.base_model_prefix}."
    weights = load_file(folder / "model.safetensors")
    found = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    assert {name: weight.shape for name, weight in found.items()} == {
        name: weight.shape for name, weight in body.state_dict().items()
    }
    assert config.embedding_size == body.get_input_embeddings().embedding_dim  # its table is made anew by this

    body = AutoModel.from_config(config, dtype=torch.float32, experts_implementation="eager", **TRUSTED).eval()
    body.load_state_dict(found)
    ids, calls = windows(2), [0] * LAYERS
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden, *_ = body(
            input_ids=ids, position_ids=positions, use_cache=False, attention_instances=calls, return_dict=False
        )
        wanted = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert calls == [1] * LAYERS
    assert relative_error(hidden, wanted) < 1e-5


def first_format(folder: Path, old: Path) -> None:
    """Rewrite a folder to what the first versions saved: a nested config, all weights below `model`."""
    config = json.loads((folder / "config.json").read_text())
    own = {"widths", "rotations", "gained_biases", "tie_word_embeddings", "architectures", "dtype"}
    nested = {name: value for name, value in config.items() if name not in ("auto_map", "widths", "embedding_size")}
    nested["model_type"] = nested.pop("dense_model_type")
    outer = {name: value for name, value in config.items() if name in own}
    outer |= {"model_type": "sliced", "text_config": nested}
    old.mkdir()
    (old / "config.json").write_text(json.dumps(outer))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"model.{name}": weight for name, weight in weights.items()}, old / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize("case", ["llama", "mistral", "opt", "gpt2", "gpt_neox", "falcon", "phi", "mixtral"])
def test_folders_of_the_first_versions_load(case, saved, tmp_path):
    folder, model = saved(case)
    first_format(folder, tmp_path / "old")
    load_config(str(tmp_path / "old"))
    experts = {"experts_implementation": model.config._experts_implementation}
    for auto in (SlicedForCausalLM, AutoModelForCausalLM):
        found, info = auto.from_pretrained(tmp_path / "old", output_loading_info=True, **experts)
        assert not any(info.values())
        assert torch.equal(logits(found, windows(2)), logits(model, windows(2)))
    found.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_the_vocabulary_grows_in_one_config(saved, tmp_path):
    _, model = saved("llama")
    model = SlicedForCausalLM.from_pretrained(saved("llama")[0])
    model.resize_token_embeddings(VOCAB + 8)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == VOCAB + 8
    assert torch.equal(logits(SlicedForCausalLM.from_pretrained(tmp_path), windows(2)), logits(model, windows(2)))
