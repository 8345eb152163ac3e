"""The benchmark scripts run and report what they say, on the smallest work there is. Their figures are not judged."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
