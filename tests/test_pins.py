"""Numbers and keys that a change of structure must leave as they are: of a dozen sets of options, and of a tiny sweep.

python tests/test_pins.py writes tests/data/pins.json anew, where a change is meant.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_runs import TASKS, Runs

import mean_cut_accuracy_experiments as script
from slicing import load_model
from slicing.experiment.checks import check
from slicing.experiment.keys import Keys
from slicing.experiment.results import Versions

PINS = Path(__file__).parent / "data" / "pins.json"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another mean": {"mean": 0.2},
    "another vector": {"vector_cut": ("0", "0.3", "1")},
    "another step": {"step": 0.05},
    "widths of multiples of 4": {"round_interval": 4},
    "one rotation": {"rotations": 1},
    "calibrated once": {"calibration": "once"},
    "other calibration windows": {"calibration_samples": 9, "calibration_length": 17},
    "other perplexity windows": {"perplexity_split": "validation", "perplexity_length": 17, "perplexity_samples": 3},
    "a search": {"find_base": True},
    "tasks": {"tasks": ("tiny_endings",), "include_path": str(TASKS), "num_fewshot": 0, "accuracy_limit": 3},
    "a batch and a seed": {"batch_size": 2, "seed": 43},
    "nothing that changes a number": {"quiet": True, "save_model": "all", "compare": "equal-parameters"},
}
# What differs between machines and versions, in the keys on purpose.
FIXED = {
    "slicing.experiment.identity.versions": Versions("3", "2", "5", "0"),
    "slicing.experiment.identity.model_content": {"weights": "pinned"},
    "slicing.experiment.identity.tokenizer_content": {"whole": "pinned"},
}


def keys(runs: Runs) -> dict[str, list[str]]:
    """The run's key and its points', by set of options."""
    found = {}
    with mock.patch.multiple(
        "slicing.experiment.identity",
        **{name.rpartition(".")[2]: mock.Mock(return_value=value) for name, value in FIXED.items()},
    ):
        for name, changed in OPTIONS.items():
            inputs = check(replace(script.parse(runs.arguments("pins")), **changed))
            model, tokenizer = load_model(inputs.options.model, device="cpu")
            by = Keys(inputs, model, tokenizer, torch.device("cpu"))
            found[name] = [by.run(), *map(by.point, inputs.plan.targets(inputs.vector))]
    return found


def points(runs: Runs) -> list[dict[str, Any]]:
    """What a sweep measures, with a comparison at equal size and a task."""
    more = ("--compare", "equal-parameters", "--round-interval", "2", "--tasks", "tiny_colours")
    _, results = runs.run("pinned", *more, "--include-path", str(TASKS))
    names = ("kind", "mean", "base", "amount", "widths", "parameters", "perplexity", "mean_accuracy")
    return [{name: getattr(point, name) for name in names} for point in results.points]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("pins"))


def test_keys_are_what_they_were(runs: Runs) -> None:
    assert keys(runs) == json.loads(PINS.read_text())["keys"]


def test_a_sweep_gives_what_it_gave(runs: Runs) -> None:
    pinned = json.loads(PINS.read_text())["points"]
    found = points(runs)
    assert len(found) == len(pinned)
    for point, old in zip(found, pinned, strict=True):
        assert point == old | {"perplexity": pytest.approx(old["perplexity"], rel=1e-4)}


if __name__ == "__main__":
    sys.path.insert(0, str(PINS.parents[2]))
    with tempfile.TemporaryDirectory() as folder:
        tiny = Runs(Path(folder))
        PINS.write_text(json.dumps({"keys": keys(tiny), "points": points(tiny)}, indent=1) + "\n")
