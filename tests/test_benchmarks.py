"""The benchmark scripts run and report what they say, on the smallest work there is. Their figures are not judged."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TASKS, Runs, write_model, write_text

from slicing import load_model, rotate_and_slice, token_windows

FOLDER = Path(__file__).parent / "benchmarks"
SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}
TINY = ["--shape", "demo", "--layers", "2", "--device", "cpu", "--windows", "2", "--length", "32"]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmarks' module of this name; its shape `demo` is a tiny one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("shapes")
    monkeypatch.setitem(module.SHAPES, "demo", ("llama", SHAPE))
    yield module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def run(shapes: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """run(script, *arguments) -> the table rows by their first cell, and what the JSON file holds."""

    def call(script: str, *arguments: str) -> tuple[dict[str, list[str]], dict[str, Any]]:
        file = tmp_path / "figures.json"
        importlib.import_module(script).main([*arguments, "--json", str(file)])
        lines = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        rows = {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines if cells}
        return rows, json.loads(file.read_text())

    return call


def test_slicing_speed_gives_total_and_parts_and_ratios_to_a_plain_forward(run: Any) -> None:
    rows, figures = run(
        "slicing_speed", *TINY, "--lr", "3", "32", "--perplexity", "3", "24", "--repeats", "1", "--batch-size", "2"
    )
    assert {"total, undisturbed", "forward, all else", "covariances", "eigenvectors", "weights"} <= set(rows)
    found = figures["slicing"]["rotate_and_slice"]
    assert min(found["parts"].values()) > 0  # nothing that is to be timed was missed
    assert sum(found["parts"].values()) == pytest.approx(found["seconds_with_waits"])
    assert rows["LR"][:3] == ["3", "32", "2"]
    assert rows["perplexity"][:3] == ["3", "24", "2"]
    assert figures["machine"]["device"].endswith("CPU")


def test_slicing_speed_with_one_calibration_times_bases_and_slicing_apart(run: Any) -> None:
    rows, figures = run("slicing_speed", *TINY, "--calibration", "once", "--rotations", "1")
    assert len(rows["total, undisturbed"]) == 2
    assert figures["slicing"]["dense_bases"]["parts"]["eigenvectors"] > 0
    assert figures["slicing"]["slice_with_bases"]["parts"]["eigenvectors"] == 0


def test_the_plain_forward_runs_in_the_batches_that_the_library_chose(run: Any) -> None:
    _, figures = run("slicing_speed", *TINY, "--skip-slicing", "--lr", "5", "1024", "--repeats", "1")
    assert "slicing" not in figures
    assert figures["lr"]["batch"] == 4  # 4,096 tokens on a CPU


def test_sliced_model_speed_has_a_row_for_each_combination(run: Any) -> None:
    tiny = [*TINY[:6], "--prefill", "2", "32", "--decode-steps", "2", "--cache-length", "8", "--repeats", "1"]
    rows, figures = run("sliced_model_speed", *tiny, "--cuts", "0.3", "--round-intervals", "4", "8")
    assert {f"0.3, {v}, {m}, {r}" for v in ("constant", "published") for m in (4, 8) for r in (1, 2)} <= set(rows)
    header = rows["cut, widths, multiple, bases"]
    assert header == ["parameters", "prefill", "x", "decode 1", "x", "decode 16", "x"]
    assert figures["decoding"] == "eager"
    assert [model["widths"] for model in figures["models"][:2]] == [[44, 44], [44, 44]]


def test_sliced_model_speed_refuses_a_cache_shorter_than_what_it_decodes(run: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("sliced_model_speed", "--decode-steps", "9", "--cache-length", "8")
    assert stopped.value.code == 2


@pytest.mark.parametrize("calibration", ["every-point", "once"])
def test_sweep_speed_has_a_row_a_point_and_a_total(run: Any, calibration: str) -> None:
    rows, figures = run(
        "sweep_speed",
        *(*TINY, "--calibration", calibration, "--step", "0.2"),
        *("--perplexity-windows", "2", "--perplexity-length", "16"),
    )
    assert {"dense", "0.3000", "0.1000", "0.0000", "total"} <= set(rows)
    assert ("dense, bases" in rows) == (calibration == "once")
    assert [point["base"] for point in figures["points"]] == pytest.approx([0.3, 0.1, 0.0])
    assert sum(figures["parts"].values()) == pytest.approx(figures["seconds"])


def test_the_published_vector_is_used_as_it_is_for_32_layers_and_interpolated_for_others(shapes: Any) -> None:
    assert shapes.redundancy(32) == list(shapes.PUBLISHED_LR)
    assert sum(shapes.PUBLISHED_LR) / 32 == pytest.approx(0.7957, abs=5e-5)
    assert shapes.redundancy(40)[0] == 0
    assert max(shapes.redundancy(40)) == 1
    assert shapes.redundancy(2) == [0, 1]


def test_offload_memory_needs_a_gpu(run: Any) -> None:
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        run("offload_memory", *TINY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_memory_keeps_to_its_limit_and_gives_the_same_weights(run: Any) -> None:
    rows, figures = run("offload_memory", *TINY, "--device", "cuda", "--share", "2000")
    assert list(rows)[-2:] == ["on the GPU", "on the CPU"]
    assert figures["on the CPU"]["peak_bytes"] <= figures["limit_bytes"]
    assert figures["same_weights"]


def test_ranks_speed_compares_runs_of_several_ranks_with_one(run: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    small = ["--samples", "1", "--length", "32", "--perplexity-samples", "2", "--step", "0.3"]
    where = ["--tokenizer", str(tmp_path / "tiny"), "--folder", str(tmp_path / "kept")]
    run("ranks_speed", *TINY[:-4], *small, *where, "--ranks", "2")
    rows, figures = run("ranks_speed", *TINY[:-4], *small, *where, "--ranks", "1")
    assert [rows[count][0] for count in ("1", "2")] == ["3", "3"]
    assert rows["2"][2] == f"{figures['2']['seconds'] / figures['1']['seconds']:.3f}"
    assert figures["2"]["difference"] == 0


def test_quality_study_compares_methods_at_equal_true_parameters(
    shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = importlib.import_module("quality_study")
    here = Runs(tmp_path)
    file, figure = tmp_path / "study.json", tmp_path / "study.png"
    small = ["--model", str(here.model), "--dataset", here.text, "--device", "cpu", "--samples", "4", "--length", "16"]
    tasks = ["--tasks", "tiny_endings", "--include-path", str(TASKS), "--limit", "3", "--task-means", "0.5"]
    more = ["--variations", "--other-text", here.text, "--json", str(file), "--plot", str(figure)]
    monkeypatch.setattr(study, "REDUNDANCY_LENGTH", 16)
    monkeypatch.setattr(study, "MULTIPLES", (1, 4))
    study.main([*small, *tasks, *more, "--means", "0.2", "0.5"])
    rows = json.loads(file.read_text())
    curves = [row for row in rows if row["method"] in study.METHODS]
    assert len(curves) == len(study.METHODS) * len(study.CALIBRATIONS) * 2
    assert rows[0]["method"] == "dense"
    assert {row["name"] for row in rows if row["tasks"]} == {
        "dense", *(f"{method}, every-point, mean 0.5" for method in study.METHODS)
    }  # fmt: skip
    printed = capsys.readouterr().out
    study.main(["--from-json", str(file)])
    assert capsys.readouterr().out == printed
    assert "| variation (mean 0.3, one rotation) |" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_constant_cuts_give_perplexity_and_true_cut_of_the_layers(run: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    text = write_text(tmp_path / "text", train=600, validation=10, test=300)
    small = ["--device", "cpu", "--length", "16", "--samples", "4", "--test-windows", "2", "--cuts", "0.5"]
    _, figures = run("constant_cuts", str(tmp_path / "model"), "--dataset", text, *small)
    assert [row["rotations"] for row in figures] == [0, 2, 1]
    assert figures[0]["true cut"] == 0 < figures[1]["true cut"] < figures[2]["true cut"] < 0.5


def test_quality_study_interpolates_log_perplexity_between_true_cuts(shapes: Any) -> None:
    study = importlib.import_module("quality_study")
    curve = [{"cut": cut, "perplexity": perplexity} for cut, perplexity in ((0.3, 80.0), (0.1, 20.0))]
    assert study.interpolated(curve, 0.2) == pytest.approx(40)
    assert study.interpolated(curve, 0.3) == pytest.approx(80)
    assert study.interpolated(curve, 0.31) is None


def test_four_bits_has_a_row_for_each_tool(run: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "dense")
    model, tokenizer = load_model(str(tmp_path / "dense"), device="cpu")
    widths = [model.config.hidden_size // 2] * model.config.num_hidden_layers
    text = write_text(tmp_path / "text", train=300, validation=300, test=300)
    windows = token_windows(text, tokenizer, split="train", length=16, count=4)
    rotate_and_slice(model, windows, widths).save_pretrained(tmp_path / "sliced")
    tokenizer.save_pretrained(tmp_path / "sliced")
    rows, figures = run(
        "four_bits", str(tmp_path / "sliced"), "--dataset", text, "--length", "16", "--tools", "torchao"
    )
    assert rows["as saved"][0] == f"{figures['as saved']:.3f}"
    assert rows["torchao"][0] in ("not installed", "needs widths in multiples of 32")  # they are 24
