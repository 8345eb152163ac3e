"""A result that the family's own config can describe is saved as a checkpoint of the family's: no code, no trust."""

import json

import pytest
import torch
from tiny_models import CASES, HIDDEN, INNER, LAYERS, family_of, logits, output_norms, random_model, windows
from transformers import AutoModelForCausalLM

from slicing.inner import inner_sizes
from slicing.loading import load_config
from slicing.modeling import SlicedForCausalLM, count_parameters
from slicing.rotation import rotate_and_slice

MANY = windows(60)


def with_inner(case: str, cut: int, **settings) -> SlicedForCausalLM:
    """A case's model whose every MLP, or every expert, has a cut-th of its inner width less."""
    model = random_model(case, dtype=torch.float32, **settings)
    sizes = inner_sizes(model, family_of(case))
    fewer = [size - size // cut for size in sizes]
    return rotate_and_slice(model, MANY, [HIDDEN] * LAYERS, inner_widths=fewer, refit=case != "llama")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if not output_norms(case)])
def test_equal_inner_widths_are_saved_as_the_familys_own(case, tied, tmp_path):
    sliced = with_inner(case, 4, tied=tied)
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
