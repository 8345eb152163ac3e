"""The table of families names what the models have, and says no, with the reason, to what can't be sliced."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    ALL,
    CASES,
    HIDDEN,
    LAYERS,
    OTHERS,
    family_of,
    layer_norm,
    live_in,
    logits,
    random_model,
    relative_error,
    subspace,
    tolerance,
    windows,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.aria import modeling_aria
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slicing import check, families, layouts
from slicing.families import FAMILIES, REFUSED, InputError, find_family
from slicing.modeling import SlicedForCausalLM
from slicing.parts import find_block, matrix, part
from slicing.rotation import rotate_and_slice

every_case = pytest.mark.parametrize("case", CASES)

# ---- what a row names is there


def known(case):
    """Whether this release of Transformers has the case's model type, as the row means it."""
    if case == "aria_text" and hasattr(modeling_aria, "AriaGroupedExpertsGemm"):
        return False  # an older one's experts lie in modules of their own, and the row is refused
    return ALL[case][0] in CONFIG_MAPPING


def test_every_attention_and_every_mlp_of_every_family_is_that_of_a_tiny_model():
    found: dict[str, set[Any]] = {}
    wanted: dict[str, set[Any]] = {}
    for case in filter(known, ALL):
        name = ALL[case][0]
        family = FAMILIES[name]
        wanted[name] = {part for block in family.blocks for part in (block.attention_in, block.mlp_in)}
        for layer in part(random_model(case), family.layers):
            block = find_block(layer, family)
            found.setdefault(name, set()).update((block.attention_in, block.mlp_in))
    assert found == wanted
    assert {name for name, _ in ALL.values()} == FAMILIES.keys()


@pytest.mark.parametrize("case", OTHERS)
def test_every_layer_of_a_family_computes_what_its_row_says_and_slices_without_loss(case, monkeypatch):
    if not known(case):
        pytest.skip("this release of Transformers does not have it")
    monkeypatch.setattr(check, "TOLERANCE", 1e-5)
    monkeypatch.setattr(check, "_passed", set())
    dtype = torch.float32 if case == "xglm" else torch.float64  # its attention has no fp64
    model = random_model(case, dtype=dtype)
    live_in(model, subspace(20, centred=layer_norm(case)))
    wanted = logits(model, windows(2))
    sliced = rotate_and_slice(model, windows(), [20, 32, 20, 32][: model.config.num_hidden_layers])
    assert relative_error(logits(sliced, windows(2)), wanted) < tolerance(case, dtype)


@pytest.mark.parametrize("case", ["lfm2", "mamba"])  # what Transformers tells by the names of classes
def test_words_and_caches_of_their_own_are_kept_in_generation_and_reload(case, tmp_path):
    model = rotate_and_slice(random_model(case, dtype=torch.float32), windows(2), [32, 40, 32])
    model.save_pretrained(tmp_path)
    loaded = SlicedForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, windows(2)), logits(model, windows(2)))
    wanted, found = (
        loaded.generate(windows(2, 8), max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cached)
        for cached in (False, True)
    )
    assert torch.equal(found, wanted)


@every_case
def test_every_name_of_a_row_is_there(case):
    model, family = random_model(case), family_of(case)
    layers = part(model, family.layers)
    assert isinstance(layers, torch.nn.ModuleList)
    assert len(layers) == LAYERS
    for path in family.tables:
        assert isinstance(part(model, path), torch.nn.Embedding), path
    for layer in layers:
        block = find_block(layer, family)
        for path in (*block.attention_in, block.attention_out, *block.mlp_in, *block.mlp_out):
            owner, name = matrix(layer, path)
            assert isinstance(getattr(owner, name), torch.nn.Parameter), path
        for path in block.norms() | block.output_norms():
            norm = part(layer, path)
            assert "Norm" in type(norm).__name__
            assert not isinstance(family.norm_eps, str) or hasattr(norm, family.norm_eps), path
        for name in (*block.dropout, block.scale, block.parallel):
            assert not isinstance(name, str) or part(layer, name) is not None, name


@every_case
def test_every_matrix_on_the_stream_is_in_the_row(case):
    model, family = random_model(case), family_of(case)
    layer = part(model, family.layers)[0]
    block = find_block(layer, family)
    paths = (*block.attention_in, block.attention_out, *block.mlp_in, *block.mlp_out)
    owners = [matrix(layer, path) for path in paths]
    named = {id(getattr(owner, name)) for owner, name in owners}
    wide = {name: p for name, p in layer.named_parameters() if p.ndim > 1 and HIDDEN in p.shape}
    assert [name for name, parameter in wide.items() if id(parameter) not in named] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention", "self_attn.gone"),
        ("attention_norm", "gone_layernorm"),
        ("attention_in", ("self_attn.q_proj", "self_attn.gone")),
        ("attention_out", "gone.o_proj"),
        ("mlp", ("gone",)),
        ("mlp_norm", "mlp.gone"),
        ("mlp_in", ("mlp.gate_proj.gone",)),
        ("mlp_out", ("mlp.gone",)),
    ],
)
def test_a_row_that_names_a_missing_module_is_found(field, value, monkeypatch):
    block = replace(FAMILIES["llama"].blocks[0], **{field: value})
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], blocks=(block,)))
    missing = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(InputError, match=f"layer 0: LlamaDecoderLayer has no {missing}, which the row in families"):
        rotate_and_slice(random_model("llama"), windows(), [16] * LAYERS)


@pytest.mark.parametrize(("field", "value"), [("layers", "model.gone"), ("tables", ("model.gone",))])
def test_a_row_with_wrong_layers_or_tables_is_found(field, value, monkeypatch):
    model = random_model("llama")
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], **{field: value}))
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no model.gone: the row in families.py doesn't fit"):
        rotate_and_slice(model, windows(), [16] * LAYERS)


@pytest.mark.skipif(transformers.__version__ < "5.24", reason="an older release lacks some")
def test_every_family_is_one_that_transformers_knows():
    assert [name for name in (*FAMILIES, *REFUSED) if name not in CONFIG_MAPPING] == []


@pytest.mark.parametrize("module", [families, layouts])
def test_the_table_imports_nothing_but_the_standard_library(module):
    imported: set[str] = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or ".")
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert imported <= {"collections.abc", "dataclasses", "typing", "layouts"}


@pytest.mark.skipif(transformers.__version__ < "5.24", reason="an older release lacks some")
def test_the_page_of_families_says_which_types_slice_and_why_others_do_not():
    page = (Path(families.__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    sliced, refused = (set(re.findall(r"^\| `([\w.-]+)` \|", half, re.M)) for half in page.split("\nRefused:\n"))
    assert sliced | refused == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sliced >= FAMILIES.keys()
    assert refused >= REFUSED.keys()
    assert "wrong" not in page


# ---- options of a family that change its parts


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("llama", {"attention_bias": False, "mlp_bias": False}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("gpt2", {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}),
        ("starcoder2", {"use_bias": False}),
        ("stablelm", {"qk_layernorm": True}),
        ("olmo", {"clip_qkv": 0.5}),
        ("gpt_neox", {"attention_bias": False}),
        ("phi", {"qk_layernorm": True}),
        ("falcon", {"bias": True}),
        ("cohere", {"use_qk_norm": True, "attention_bias": True}),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
    ids=str,
)
def test_options_of_a_family_keep_slicing_lossless(case, settings):
    model = random_model(case, **settings)
    live_in(model, subspace(20, centred=layer_norm(case)))
    wanted = logits(model, windows())
    sliced = rotate_and_slice(model, windows(), [20, 32, 20])
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case)


# dropout of everything that a branch adds to the stream, none elsewhere
ALL_DROPPED: dict[str, dict[str, float]] = {
    "phi3": {"resid_pdrop": 1.0},
    "opt": {"dropout": 1.0},
    "gpt2": {"resid_pdrop": 1.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "starcoder2": {"residual_dropout": 1.0},
    "stablelm": {"hidden_dropout": 1.0},
    "stablelm-parallel": {"hidden_dropout": 1.0},
    "gpt_neox": {"hidden_dropout": 1.0},
    "gpt_neox-sequential": {"hidden_dropout": 1.0},
    "phi": {"resid_pdrop": 1.0},
    "falcon": {"hidden_dropout": 1.0},
    "falcon-sequential": {"hidden_dropout": 1.0, "attention_dropout": 1.0},
    "falcon-two-norms": {"hidden_dropout": 1.0},
    "gptj": {"resid_pdrop": 1.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("case", ALL_DROPPED)
def test_dropout_in_training_drops_what_the_family_drops(case):
    model = random_model(case, **ALL_DROPPED[case])
    sliced = rotate_and_slice(model, windows(2), [HIDDEN] * LAYERS)
    wanted = logits(model, windows(2))
    assert relative_error(logits(sliced, windows(2)), wanted) < tolerance(case)
    dropped = logits(model.train(), windows(2))
    assert relative_error(dropped, wanted) > 0.1
    assert relative_error(logits(sliced.train(), windows(2)), dropped) < tolerance(case)


# ---- what can't be sliced


def test_an_unknown_family_is_an_error_in_one_line():
    with pytest.raises(InputError, match=f"can't slice 'new': it is none of the {len(FAMILIES)} model types"):
        find_family(SimpleNamespace(model_type="new"))


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_can_not_be_sliced_are_refused_with_the_reason(model_type):
    with pytest.raises(InputError, match=re.escape(f"can't slice {model_type!r}: {REFUSED[model_type]}")):
        find_family(SimpleNamespace(model_type=model_type))


def test_composites_that_load_as_their_text_model_have_its_row():
    for model_type in filter(CONFIG_MAPPING.__contains__, families._TEXT_ALONE):
        config = AutoConfig.for_model(model_type)
        assert find_family(config) is FAMILIES[config.get_text_config(decoder=True).model_type]


def test_a_refused_model_is_refused_before_any_work():
    config = AutoConfig.for_model("openai-gpt", n_embd=32, n_layer=2, n_head=2, vocab_size=96)
    with pytest.raises(InputError, match="can't slice 'openai-gpt'"):
        rotate_and_slice(AutoModelForCausalLM.from_config(config), windows(), [16, 16])


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "normalises after the residual addition"),
        ("opt", {"hidden_size": 64, "word_embed_proj_dim": 32}, "projects embeddings of 32 to 64"),
        ("opt", {"_remove_final_layer_norm": True}, "no final norm"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_models_of_a_known_family_that_can_not_be_sliced_are_refused_with_the_reason(model_type, settings, reason):
    with pytest.raises(InputError, match=f"can't slice this '{model_type}' model: .*{reason}"):
        find_family(AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(model_type):
    with pytest.raises(InputError, match=f"can't slice '{model_type}': it is an encoder-decoder"):
        find_family(AutoConfig.for_model(model_type))


@every_case
def test_supported_configs_are_not_refused(case):
    model_type, settings = CASES[case]
    config: Any = AutoConfig.for_model(model_type, **settings)
    assert find_family(config) is FAMILIES[model_type]
