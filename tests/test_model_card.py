"""The model card says what a reader of the folder needs, the hub can read its front matter, and nothing in the folder
tells of the machine that made it."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from slicing.experiment.results import Text
from slicing.report.model_card import write_model_card
from slicing.report.origin import Origin, origin_of, public_command
from slicing.task_scores import TaskScore

GIVEN: dict[str, Any] = {
    "origin": Origin("model-7b", "someone/model-7b", "0123abc", {"license": "apache-2.0"}),
    "slice_percentage": 0.3,
    "slice_base": 0.125,
    "widths": [4096, 2864, 2048],
    "rotations": 1,
    "calibration": "128 windows of 2048 tokens of wikitext2 (train)",
    "text": Text("wikitext2", "test", windows=100, length=2048, tokens=204_800),
    "perplexity": (5.4718, 8.6432),
    "tasks": {
        "piqa": TaskScore("acc_norm", 0.7123, 0.0105, None, 1838, {}),
        "gsm8k": TaskScore("exact_match", 0.25, None, None, 4, {}),
        "odd": TaskScore(None, None, None, "it fails", 4, {}),
    },
    "parameters": (7_000_000_000, 5_600_000_000),
    "command": "python mean_cut_accuracy_experiments.py --model someone/model-7b --mean 0.3",
}


def card(folder: Path, **changes: Any) -> str:
    path = write_model_card(folder, **(GIVEN | changes))
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "said",
    [
        "# model-7b, sliced by 30 %",
        "someone/model-7b (revision 0123abc)",
        "| mean cut over the layers (SP) | 30.00% |",
        "| part of the cut that every layer gets (SB) | 12.50% |",
        "| bases a layer | 1 |",
        "4096, 2864, 2048",
        GIVEN["calibration"],
        "| perplexity on wikitext2 (test), windows of 2048 | dense 5.472, sliced 8.643 |",
        "dense 7,000,000,000, sliced 5,600,000,000",
        "| true cut of the parameters | 20.00% |",
        "| piqa | acc_norm | 0.7123 ± 0.0105 |",
        "| gsm8k | exact_match | 0.2500 |",
        GIVEN["command"],
        "trust_remote_code=True",
        "GGUF converters",
        "The terms of someone/model-7b (apache-2.0) hold for this model too.",
        "keep = ['.*embedding_projection', '.*attn_shortcut', '.*mlp_shortcut', '.*magnitude', 'lm_head']",
    ],
)
def test_the_card_says(tmp_path, said):
    assert said in card(tmp_path)


def test_a_plain_checkpoint_needs_no_trust(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    said = card(tmp_path)
    assert "plain checkpoint of its family" in said
    assert "trust_remote_code" not in said
    assert "Four bits" not in said
    (tmp_path / "config.json").write_text('{"model_type": "sliced"}')
    assert "trust_remote_code=True" in card(tmp_path)


def test_what_is_not_known_is_said_to_be_unknown(tmp_path):
    text = card(tmp_path, origin=Origin("own"), slice_base=None, perplexity=(None, 1.0), tasks={})
    assert "revision" not in text
    assert "license" not in text
    assert "(SB) | none |" in text
    assert "dense not measured, sliced 1.000" in text
    assert "does not say them" in text


def test_the_hub_reads_the_front_matter(tmp_path):
    data = ModelCard(card(tmp_path)).data
    assert data.base_model == "someone/model-7b"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.license == "apache-2.0"
    assert data.tags == ["sliced", "slicegpt"]
    assert data.model_name == "model-7b, sliced by 30 %"
    found = {(result.dataset_type, result.metric_type, result.metric_value) for result in data.eval_results}
    assert found == {
        ("Salesforce/wikitext", "perplexity", 8.6432),
        ("piqa", "accuracy", 0.7123),
        ("gsm8k", "exact_match", 0.25),
    }


def test_a_colon_and_a_pipe_break_nothing(tmp_path):
    text = card(tmp_path, calibration="a | b\nc", origin=Origin("own: model", licence={"license": "other: mine"}))
    assert "| calibrated on | a \\| b c |" in text
    data = ModelCard(text).data
    assert data.license == "other: mine"
    assert data.get("base_model") is None  # the hub takes no name of a folder


# ---- where a model came from


LICENSED = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nbase_model: a/b\n---\n# A model\n"


def test_a_snapshot_of_the_hubs_cache_has_the_models_name_commit_and_licence(tmp_path):
    snapshot = tmp_path / "hub" / "models--some-one--model--7b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(LICENSED)
    licence = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    assert origin_of(f"{snapshot}/") == Origin("model--7b", "some-one/model--7b", "0" * 40, licence)


def test_a_hub_name_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(LICENSED)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: str(tmp_path / "README.md"))
    found = origin_of("someone/model-7b", "abc")
    assert (found.name, found.hub, found.revision) == ("model-7b", "someone/model-7b", "abc")
    assert found.licence["license_name"] == "llama3"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    assert origin_of("someone/model-7b").licence == {}


@pytest.mark.parametrize(
    "text", [LICENSED, "no front matter", "---\nlicense: [\n---\n", "---\nlicense: 3\n---\n", None]
)
def test_a_folder_has_its_name_and_what_its_card_says(tmp_path, text):
    folder = tmp_path / "own: model"
    folder.mkdir()
    if text is not None:
        (folder / "README.md").write_text(text)
    found = origin_of(str(folder))
    assert (found.name, found.hub, found.revision) == ("own: model", None, None)
    assert found.licence.get("license") == ("other" if text == LICENSED else None)
    (folder / "weights.gguf").touch()
    assert origin_of(str(folder / "weights.gguf")) == Origin("weights")


def test_the_demo_is_known():
    assert origin_of("demo").hub == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_command_names_no_path(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    given = ["/opt/x/mean_cut_accuracy_experiments.py", "--model", str(snapshot), "--dataset", "/data/me/x-{split}.txt"]
    given += ["--output-dir=/home/me/results", "--vector-cut", "0", ".5", "1", "--mean", "0.3", "--quiet"]
    assert public_command(given) == (
        "python mean_cut_accuracy_experiments.py --model a/b --dataset 'x-{split}.txt' --output-dir=results"
        " --vector-cut 0 .5 1 --mean 0.3 --quiet"
    )
    assert public_command(["x.py", "--model=org/name"]) == "python x.py --model=org/name"
    assert public_command(["x.py", "--model", "demo"]) == "python x.py --model demo"
