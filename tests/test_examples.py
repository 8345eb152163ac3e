"""The recipes under examples/ run as they are documented."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_model, write_text

from slicing import load_model, rotate_and_slice, token_windows

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sliced(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a tiny sliced model with its tokenizer, and a text for it."""
    root = tmp_path_factory.mktemp("examples")
    write_model(root / "dense")
    text = write_text(root / "text", train=600, validation=300, test=320)
    model, tokenizer = load_model(str(root / "dense"), device="cpu")
    windows = token_windows(text, tokenizer, split="train", length=16, count=8)
    widths = [model.config.hidden_size // 2] * model.config.num_hidden_layers
    rotate_and_slice(model, windows, widths, rotations=1).save_pretrained(root / "sliced")
    tokenizer.save_pretrained(root / "sliced")
    return root / "sliced", text


def recover(sliced: tuple[Path, str], output: Path, *more: str) -> int:
    folder, text = sliced
    sizes = ["--length", "16", "--steps", "20", "--batch", "4", "--rank", "4", "--learning-rate", "1e-2"]
    given = [str(folder), str(output), "--dataset", text, "--device", "cpu", *sizes, *more]
    return int(example("recover").main(given))


def test_recovery_lowers_the_perplexity_and_the_saved_folder_keeps_it(sliced, tmp_path, capsys):
    assert recover(sliced, tmp_path / "recovered") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [["perplexity", name] for name in ("before", "after", "reloaded")]
    before, after, reloaded = (float(row[2]) for row in rows)
    assert after < 0.98 * before
    assert reloaded == after
    old, _ = load_model(str(sliced[0]), device="cpu")
    new, _ = load_model(str(tmp_path / "recovered"), device="cpu")
    assert {name: weight.shape for name, weight in new.state_dict().items()} == {
        name: weight.shape for name, weight in old.state_dict().items()
    }
    assert not torch.equal(new.model.layers[0].mlp_shortcut.weight, old.model.layers[0].mlp_shortcut.weight)
    assert not (tmp_path / "recovered-trainer").exists() or not any((tmp_path / "recovered-trainer").iterdir())


def test_what_can_not_be_recovered_is_one_line(sliced, tmp_path, capsys):
    assert recover(sliced, tmp_path) == 2
    assert recover((sliced[0].parent / "dense", sliced[1]), tmp_path / "new") == 2
    assert recover(sliced, tmp_path / "new", "--learning-rate", "0") == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error")] == [
        f"error: {tmp_path} is there already: give another folder",
        f"error: {sliced[0].parent / 'dense'} is no sliced model: save one with --save-model best",
        "error: --learning-rate must be above 0, got 0.0",
    ]
