"""The model card says what a reader of the folder needs, and the hub can read its front matter."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from slicing.report.model_card import write_model_card

GIVEN: dict[str, Any] = {
    "model_name": "someone/model-7b",
    "revision": "0123abc",
    "slice_percentage": 0.3,
    "slice_base": 0.125,
    "widths": [4096, 2864, 2048],
    "rotations": 1,
    "calibration": "128 windows of 2048 tokens of wikitext2 (train)",
    "perplexity": {"data": "wikitext2 (test)", "dense": 5.4718, "sliced": 8.6432},
    "parameters": (7_000_000_000, 5_600_000_000),
    "command": "python3.11 mean_cut_accuracy_experiments.py --model someone/model-7b --mean 0.3",
}


def card(folder: Path, **changes: Any) -> str:
    path = write_model_card(folder, **(GIVEN | changes))
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "said",
    [
        "someone/model-7b (revision 0123abc)",
        "| mean cut over the layers (SP) | 30.00% |",
        "| part of the cut that every layer gets (SB) | 12.50% |",
        "| bases a layer | 1 |",
        "4096, 2864, 2048",
        GIVEN["calibration"],
        "| perplexity on wikitext2 (test) | dense 5.472, sliced 8.643 |",
        "dense 7,000,000,000, sliced 5,600,000,000",
        "| true cut of the parameters | 20.00% |",
        GIVEN["command"],
        "trust_remote_code=True",
        "GGUF converters",
        "vLLM has not been tried",
    ],
)
def test_the_card_says(tmp_path, said):
    assert said in card(tmp_path)


def test_what_is_not_known_is_said_to_be_unknown(tmp_path):
    text = card(
        tmp_path, revision=None, slice_base=None, perplexity={"data": "ptb (test)", "dense": None, "sliced": 1.0}
    )
    assert "revision" not in text
    assert "(SB) | none |" in text
    assert "dense not measured, sliced 1.000" in text


@pytest.mark.parametrize(
    ("model_name", "base_model"),
    [
        ("someone/model-7b", "someone/model-7b"),
        ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("{folder}/own: model", "own: model"),  # a colon would break unquoted YAML
    ],
)
def test_the_hub_reads_the_front_matter(tmp_path, model_name, base_model):
    (tmp_path / "own: model").mkdir()
    data = ModelCard(card(tmp_path, model_name=model_name.format(folder=tmp_path))).data
    assert data.base_model == base_model
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["sliced", "slicegpt"]


def test_a_pipe_does_not_break_the_table(tmp_path):
    text = card(tmp_path, calibration="a | b\nc")
    assert "| calibrated on | a \\| b c |" in text


def test_a_name_that_is_not_utf_8_is_no_obstacle(tmp_path):
    assert r"of caf\udce9.txt" in card(tmp_path, calibration="8 windows of caf\udce9.txt")
