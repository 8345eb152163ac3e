"""Of a model of text and pictures the text model is loaded, measured, sliced and saved as a causal LM."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import relative_error
from tiny_runs import write_model, write_text
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import calculate_LR
import mean_cut_accuracy_experiments as sweep
from slicing import layer_redundancy, load_model, perplexity, rotate_and_slice, token_windows
from slicing.composites import text_model
from slicing.experiment.results import read_results
from slicing.families import InputError
from slicing.loading import load_config

VOCAB = 304
_TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "depth": 1,
    "out_hidden_size": 48,
    "image_size": 28,
    "patch_size": 14,
}
# model_type -> the text model's, and the settings of both parts
COMPOSITES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("qwen2", _MROPE, {"embed_dim": 16, "hidden_size": 48}),
    "qwen2_5_vl": ("qwen2", _MROPE, {}),
    "qwen3_vl": ("qwen3", _MROPE, {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": (
        "qwen3_moe",
        _MROPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        {"deepstack_visual_indexes": [0]},
    ),
    "glm4v": (
        "glm4",
        {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}},
        {},
    ),
    "mistral3": ("mistral", {"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 8}),
    "llama4": (
        "llama4_text",
        {"num_local_experts": 4, "intermediate_size_mlp": 40, "moe_layers": [0, 2]},
        {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 8}, {}),
    "internvl": ("qwen2", {"model_type": "qwen2"}, {"image_size": [28, 28], "patch_size": [14, 14]}),
    "llava": ("llama", {"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "fuyu": ("persimmon", {"model_type": "persimmon"}, {}),
    "emu3": ("llama", {}, {}),
}
_WHOLE: dict[str, dict[str, Any]] = {  # settings beside both parts
    "fuyu": {"patch_size": 2},
    "emu3": {
        "vq_config": {"base_channels": 32, "num_res_blocks": 1, "codebook_size": 8, "hidden_size": 32},
        "vocabulary_map": {"<image>": 300} | {f"<|visual token {index:06d}|>": 290 + index for index in range(8)},
    },
}
KNOWN = [name for name in COMPOSITES if name in CONFIG_MAPPING]
every_composite = pytest.mark.parametrize("model_type", KNOWN)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_model(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], tuple[Path, Any]]:
    """A model of a type, and the folder that it is saved in."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(model_type: str) -> tuple[Path, Any]:
        if model_type not in made:
            _, text, eyes = COMPOSITES[model_type]
            tied = model_type in ("gemma3", "qwen2_vl")
            whole = {"text_config": _TEXT | text, "tie_word_embeddings": tied, **_WHOLE.get(model_type, {})}
            if model_type not in _WHOLE:
                whole["vision_config"] = _EYES | eyes
            config = AutoConfig.for_model(model_type, **whole)
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(
                config, dtype=torch.float32, experts_implementation="eager"
            ).eval()
            for parameter in model.parameters():
                parameter.data.normal_(0.5 * (parameter.ndim == 1), 0.2)
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[model_type] = folder, model
        return made[model_type]

    return make


def ids(count: int = 6) -> torch.Tensor:
    return torch.randint(1, VOCAB, (count, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, model_type: str = "") -> torch.Tensor:
    whole = model.language_model if model_type == "llama4" else model  # Llama 4's wants pictures
    found: torch.Tensor = whole(input_ids=ids(2), use_cache=False).logits
    return found


@every_composite
def test_the_text_model_gives_the_logits_of_the_whole_and_is_sliced_and_saved_as_a_causal_lm(
    model_type, composite, caplog, tmp_path
):
    folder, whole = composite(model_type)
    with caplog.at_level(logging.WARNING, logger="slicing"):
        model, _ = load_model(str(folder), device="cpu")
    family = COMPOSITES[model_type][0]
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("slicing")]
    assert f"is a {model_type}: its text model is loaded alone, as a {family}; what sees or hears" in said
    assert "\n" not in said
    assert model.config.model_type == family == load_config(str(folder)).model_type
    assert model.config.tie_word_embeddings == whole.config.tie_word_embeddings
    assert torch.equal(logits(model), logits(whole, model_type))

    model.set_experts_implementation("eager")
    assert layer_redundancy(model, ids()).cosine.isfinite().all()
    sliced = rotate_and_slice(model, ids(), [24, 40, 32])
    assert 1 < perplexity(sliced, ids()) < 1e9
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager", trust_remote_code=True)
    assert loaded.config.dense_model_type == family
    assert relative_error(logits(loaded.eval()), logits(sliced)) < 1e-6


@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3", "llava"])
def test_both_scripts_take_a_composite_and_what_they_save_opens_as_its_text_model(
    model_type, composite, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, _ = composite(model_type)
    text = write_text(tmp_path / "text", train=600, validation=300, test=320)
    common = ["--dataset", text, "--quiet"]
    lengths = ["--samples", "6", "--max-seq-len", "16", "--stride", "16", "--device", "cpu"]
    assert calculate_LR.main([str(folder), *common, *lengths, "--output", str(tmp_path / "lr.json")]) == 0
    given = ["--model", str(folder), "--vector-cut", str(tmp_path / "lr.json"), "--mean", "0.3", "--step", "0.3"]
    lengths = ["--calibration-samples", "8", "--calibration-length", "16", "--perplexity-length", "16"]
    given += [*lengths, "--cuda-device", "cpu", "--save-model", "all", "--output-dir", str(tmp_path / "results")]
    assert sweep.main([*given, *common]) == 0
    (run,) = (tmp_path / "results").iterdir()
    points = read_results(run).points
    assert [point.kind for point in points] == ["dense", "sweep", "sweep"]
    saved = sorted((run / "models").iterdir())
    assert len(saved) == 2
    test = token_windows(text, AutoTokenizer.from_pretrained(folder), split="test", length=16)
    for place, point in zip(saved, reversed(points[1:]), strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        assert loaded.config.dense_model_type == COMPOSITES[model_type][0]
        assert perplexity(loaded, test, progress=False) == pytest.approx(point.perplexity, rel=1e-5)


def test_a_checkpoint_with_newer_names_is_read_too(composite, tmp_path):
    folder, whole = composite("llava")
    whole.save_pretrained(tmp_path, save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert any(name.startswith("model.language_model.") for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(load_model(str(tmp_path), device="cpu")[0]), logits(whole))


def test_a_composite_whose_text_has_other_names_is_refused_with_that_reason(composite, tmp_path):
    folder, whole = composite("llava")
    whole.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("language_model.", "words."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"the text model of .* \(llava\) can't be loaded by itself: \d+ of its tensors"
    ):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("model_type", ["llama", "phi4_multimodal", "mllama", "gemma3_text"])
def test_what_is_no_composite_of_a_causal_lm_is_left_as_it_is(model_type):
    assert text_model(AutoConfig.for_model(model_type)) is None


def test_a_text_model_that_can_not_be_sliced_is_measured_all_the_same(tokenizer, tmp_path):
    if "gemma4" not in CONFIG_MAPPING:
        pytest.skip("this release of Transformers does not have it")
    text = _TEXT | {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    eyes = {**_EYES, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        "gemma4", text_config=text | {"num_kv_shared_layers": 0}, vision_config=eyes, audio_config=None
    )
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), device="cpu")
    assert model.config.model_type == "gemma4_text"
    assert torch.equal(logits(model), logits(whole))
    assert perplexity(model, ids()) > 1
    assert layer_redundancy(model, ids()).cosine.isfinite().all()
    with pytest.raises(InputError, match="can't slice 'gemma4_text': its layers have a third branch"):
        rotate_and_slice(model, ids(), [24] * 3)
