"""A result that the family's own config can describe is saved as a checkpoint of the family's: no code, no trust."""

import json
import shutil

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from test_families import known
from test_saved_format import first_format
from tiny_models import (
    ALL,
    CASES,
    HIDDEN,
    INNER,
    LAYERS,
    VOCAB,
    family_of,
    logits,
    output_norms,
    random_model,
    relative_error,
    windows,
)
from tiny_runs import VECTOR, Runs
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import mean_cut_accuracy_experiments as script
from slicing import perplexity, token_windows
from slicing.inner import inner_sizes
from slicing.loading import load_config
from slicing.modeling import SlicedConfig, SlicedForCausalLM, count_parameters, dense_config
from slicing.report.labels import dense_labels
from slicing.report.table import main as report
from slicing.rotation import rotate_and_slice

MANY = windows(60)


def with_inner(case: str, cut: int, **settings) -> SlicedForCausalLM:
    """A case's model whose every MLP, or every expert, has a cut-th of its inner width less."""
    model = random_model(case, dtype=torch.float32, **settings)
    sizes = inner_sizes(model, family_of(case))
    fewer = [size - size // cut for size in sizes]
    return rotate_and_slice(model, MANY, [HIDDEN] * LAYERS, inner_widths=fewer, refit=case != "llama")


@pytest.mark.parametrize("case", [case for case in CASES if not output_norms(case)])
def test_equal_inner_widths_are_saved_as_the_familys_own(case, tmp_path):
    sliced = with_inner(case, 4, tied=True)
    wanted = logits(sliced, windows())
    sliced.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == sliced.config.dense_model_type
    assert "auto_map" not in saved
    assert "widths" not in saved
    assert not list(tmp_path.glob("*.py"))
    plain, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not isinstance(plain, SlicedForCausalLM)
    assert count_parameters(plain) == count_parameters(sliced)
    torch.testing.assert_close(logits(plain, windows()), wanted, rtol=1e-4, atol=1e-4)
    assert load_config(str(tmp_path)).model_type == saved["model_type"]


# Of these the config has no number, or one that stands for another width too: they stay sliced models.
NOT_PLAIN = (
    *("afmoe", "aria_text", "bailing_hybrid", "bloom", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("dots1", "ernie4_5_moe", "exaone_moe", "falcon_mamba", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("granitemoehybrid", "hunyuan_v1_moe", "hy_v3", "kimi_linear", "llama4_text", "mamba", "mamba2", "moshi", "mpt"),
    *("recurrent_gemma", "sarvam_mla", "sarvam_moe", "solar_open", "xlstm"),
)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", filter(known, ALL))
def test_a_saved_model_of_any_family_gives_the_same_logits_plain_or_not(case, tied, tmp_path):
    """Weights are drawn, not sliced; all tokens are read, the padding token too."""
    dense = random_model(case, dtype=torch.float32, tied=tied)
    inner = None
    if case != "bitnet":  # a norm goes over its neurons: none is cut
        inner = [size - size // 4 for size in inner_sizes(dense, family_of(case))]
    widths = [HIDDEN] * dense.config.num_hidden_layers
    config = SlicedConfig.of(dense.config, widths=widths, inner_widths=inner)
    sliced = SlicedForCausalLM(config).eval()
    sliced.set_experts_implementation("eager")
    for parameter in sliced.parameters():
        parameter.data.normal_(float(parameter.ndim == 1), 0.3)
    sliced.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())["model_type"] != "sliced"
    assert plain or ALL[case][0] in (*NOT_PLAIN, "youtu")
    load = AutoModelForCausalLM if plain else SlicedForCausalLM
    again = load.from_pretrained(tmp_path, experts_implementation="eager")
    ids = torch.arange(VOCAB).reshape(2, -1)
    assert relative_error(logits(again, ids), logits(sliced, ids)) < 1e-6


def test_a_plain_checkpoint_whose_padding_row_loading_would_change_is_saved_with_code(tmp_path):
    """Youtu's code sets that row to 0: it is 0 in all that was loaded."""
    if "youtu" not in CONFIG_MAPPING:
        pytest.skip("this release of Transformers does not have it")
    model = random_model("youtu", dtype=torch.float32, tied=True)
    row = model.model.embed_tokens.weight[model.config.pad_token_id]
    for name, zero in (("sliced", False), ("youtu", True)):
        row.data.mul_(not zero)
        sliced = rotate_and_slice(model, MANY, [HIDDEN] * LAYERS, inner_widths=[32] * LAYERS)
        sliced.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == name
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=not zero)
        ids = torch.arange(VOCAB).reshape(2, -1)
        assert torch.equal(logits(again, ids), logits(sliced, ids))


@pytest.mark.parametrize(
    ("widths", "inner"), [([HIDDEN] * 3, [32, 32, INNER]), ([HIDDEN, 40, HIDDEN], [32] * 3)], ids=["inner", "stream"]
)
def test_what_the_familys_config_cannot_say_stays_sliced(widths, inner, tmp_path):
    model = random_model("llama", dtype=torch.float32)
    rotate_and_slice(model, MANY, widths, inner_widths=inner).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "sliced"
    assert (saved["widths"], saved["inner_widths"]) == (widths, inner)


def test_a_model_of_which_nothing_is_cut_is_saved_as_it_was(tmp_path):
    model = random_model("llama", dtype=torch.float32)
    rotate_and_slice(model, MANY, [HIDDEN] * LAYERS).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again, windows()), logits(model, windows()), rtol=1e-5, atol=1e-5)


def test_a_plain_checkpoint_that_is_cut_again_remembers_the_first_model(tmp_path):
    with_inner("llama", 4).save_pretrained(tmp_path / "once")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    rotate_and_slice(once, MANY, [HIDDEN] * LAYERS, inner_widths=[32] * LAYERS).save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert (twice.config.intermediate_size, dense_config(twice.config).intermediate_size) == (32, INNER)
    stream = rotate_and_slice(once, MANY, [32] * LAYERS)
    assert dense_config(stream.config).intermediate_size == INNER


# ---- through the second script


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("plain"))


INNER_SIZES = {"llama": 64, "gpt2": 192, "mixtral": 64}  # in front of a cut of 0.3


@pytest.mark.parametrize("case", INNER_SIZES)
def test_constant_inner_slicing_is_saved_plain_and_measured_again_as_what_it_is(case, tmp_path, capsys):
    """0.3 of 64 neurons is no multiple of 8: all layers get the nearest one."""
    runs = Runs(tmp_path / "runs", case=case)
    nearest = 8 * round(0.7 * INNER_SIZES[case] / 8)
    more = ("--inner-mean", "0.3", "--vector-cut", *VECTOR, "--save-model", "all", "--calibration-samples", "60")
    folder, results = runs.run("inner", *more, mean=0, step=0.3)
    _, constant, dynamic = results.points
    assert (constant.base, constant.inner_widths) == (0.3, [nearest] * LAYERS)
    (plain,) = (folder / "models").glob("SB_0.3000-*")
    (coded,) = (folder / "models").glob("SB_0.0000-*")
    assert len(set(dynamic.inner_widths)) > 1
    assert (coded / "modeling.py").exists()
    assert not list(plain.glob("*.py"))
    assert "plain checkpoint" in (plain / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert count_parameters(model) == constant.parameters
    test = token_windows(runs.text, AutoTokenizer.from_pretrained(plain), split="test", length=16)
    assert perplexity(model, test, progress=False) == pytest.approx(constant.perplexity, rel=1e-5)
    lm = HFLM(pretrained=str(plain), device="cpu")
    assert torch.equal(lm._model_call(test[:1]), logits(model, test[:1]))
    for saved in (plain, coded):
        for file in saved.iterdir():  # what is pushed tells nothing of this machine
            assert str(runs.folder).encode() not in file.read_bytes(), file.name
    for saved, point in ((plain, constant), (coded, dynamic)):
        assert_named(runs, saved, point, results, tmp_path, capsys)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("mamba", "no layer of the model has an MLP whose inner width could be cut"),
        ("bitnet", "layer 0 can't be cut: mlp.ffn_sub_norm.weight goes over its neurons too"),
        ("olmo2", "norm what their branches write"),
    ],
)
def test_inner_widths_that_can_not_be_cut_are_one_line_before_weights_are_read(case, why, tmp_path, capsys):
    runs = Runs(tmp_path, case=case)
    (runs.model / "model.safetensors").unlink()
    capsys.readouterr()
    assert script.main(runs.arguments("none", "--inner-mean", "0.3")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert why in line


def test_folders_of_either_format_are_measured_again_as_what_they_are(runs, tmp_path, capsys):
    folder, results = runs.run("stream", "--save-model", "best", step=0.3)
    (saved,) = (folder / "models").iterdir()
    best = min(results.points[1:], key=lambda point: point.perplexity)
    first_format(saved, tmp_path / "old")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path / "old" / name)
    for each in (saved, tmp_path / "old"):
        assert_named(runs, each, best, results, tmp_path, capsys)


def assert_named(runs, saved, point, results, tmp_path, capsys) -> None:
    """A saved model, measured by the second script and tabled by the report, is a sliced one with its true cut."""
    folder, again = runs.run(f"{results.seed}-{saved.name}", "--model", str(saved), mean=0)
    (alone,) = again.points
    assert again.model.parameters == results.model.parameters
    assert (alone.parameters, alone.cut) == (point.parameters, point.cut)
    assert alone.perplexity == pytest.approx(point.perplexity, rel=1e-5)
    assert point.cut > 0.01
    capsys.readouterr()
    for form in ("text", "markdown", "latex", "csv"):
        assert report([str(folder), "--format", form, "--output", str(tmp_path), "--wide"]) == 0
        (row,) = [line for line in capsys.readouterr().out.splitlines() if "sliced model" in line]
        cut = f"{point.cut:.1%}".replace("%", r"\%") if form == "latex" else f"{point.cut:.1%}"
        assert (str(point.cut) if form == "csv" else cut) in row
    assert "sliced model" in dense_labels([again])[0]
