"""--speed: measured of each point beside the dense model, kept beside the points, and shown where it is known."""

import csv
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from test_experiment import measured, run_ranks, runs  # noqa: F401
from test_report import make_run
from tiny_models import HIDDEN, INNER, random_model, windows
from tiny_runs import Runs

import mean_cut_accuracy_experiments as script
from slicing import InputError
from slicing.experiment import slicer, throughput
from slicing.experiment.checks import check
from slicing.experiment.results import Results, Speed, read_results
from slicing.report.column import chosen
from slicing.report.columns import columns_for
from slicing.report.csv_file import csv_rows
from slicing.report.seeds import pooled
from slicing.report.summary import speed_lines
from slicing.speed import ModelSpeed, Turns

TURNS = Turns(windows=1, length=8, steps=2, cache_length=8, repeats=1)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the models that this test times together; the figures are made up."""
    found: list[list[str]] = []

    figures = {"dense": ModelSpeed(200.0, 20.0, None), "sliced": ModelSpeed(300.0, 25.0, None)}

    def compared(models: dict[str, Any], *_: Any) -> dict[str, ModelSpeed]:
        found.append(list(models))
        return {name: figures[name] for name in models}

    monkeypatch.setattr(throughput, "compare_speeds", compared)
    return found


def speed(**changes: Any) -> Speed:
    figures = {"prefill": 300.0, "dense_prefill": 200.0, "decode": 25.0, "dense_decode": 20.0}
    given: dict[str, Any] = {"windows": 8, "length": 2048, "cache_length": 512, "repeats": 5}
    return Speed(**(given | figures | {"memory": 3_000_000_000, "dense_memory": 4_000_000_000} | changes))


def with_speed(run: Results, **changes: Any) -> Results:
    """A run whose points have speeds; the dense one's are those of the dense model in all."""
    own = {"prefill": 200.0, "decode": 20.0, "memory": 4_000_000_000}
    points = [replace(point, speed=speed(**((own if point.kind == "dense" else {}) | changes))) for point in run.points]
    return replace(run, points=points)


# ---- a point's


def test_a_sliced_point_is_timed_with_the_dense_model_by_its_widths(monkeypatch):
    made = []

    def compared(models, tokens, turns):
        made.append((models, tokens, turns))
        return {"dense": ModelSpeed(200.0, None, 40), "sliced": ModelSpeed(300.0, None, 30)}

    monkeypatch.setattr(throughput, "compare_speeds", compared)
    model, ids = random_model("llama"), windows()
    found = throughput.measured_speed(model, ids, [40, 32, 24], rotations=1, inner_widths=[8, 8, INNER], turns=TURNS)
    ((models, tokens, turns),) = made
    assert (models["dense"], tokens, turns) == (model, ids, TURNS)
    config = models["sliced"].config
    assert (config.widths, config.rotations, config.inner_widths) == ([40, 32, 24], 1, [8, 8, INNER])
    assert (found.prefill, found.dense_prefill, found.memory, found.dense_memory) == (300.0, 200.0, 30, 40)
    assert found.decode is found.dense_decode is None
    assert (found.windows, found.length, found.cache_length, found.repeats) == (1, 8, 8, 1)


def test_the_dense_model_is_timed_alone():
    found = throughput.measured_speed(random_model("llama"), windows(), None, rotations=2, turns=TURNS)
    assert found.prefill == found.dense_prefill > 0
    assert found.decode == found.dense_decode


def test_memory_that_does_not_suffice_is_an_error_with_the_way_out(monkeypatch):
    def failing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(throughput, "compare_speeds", failing)
    with pytest.raises(InputError, match="out of memory while the speed was measured: leave --speed out"):
        throughput.measured_speed(random_model("llama"), windows(), [HIDDEN] * 3, rotations=2, turns=TURNS)


# ---- a run's


def test_a_run_measures_the_speed_of_each_point_and_shows_it(runs: Runs, timed, capsys):  # noqa: F811
    folder, results = runs.run("speeds", "--speed", step=0.3)
    assert timed == [["dense"], ["dense", "sliced"], ["dense", "sliced"]]
    assert [point.speed.prefill for point in results.points] == [200.0, 300.0, 300.0]
    header, titles, _, dense, constant, _ = capsys.readouterr().out.splitlines()[:6]
    assert header.split()[-4:] == ["prefill", "x", "decode", "x"]
    assert titles.split()[-5:] == ["tokens/s", "dense", "tokens/s", "dense", "seconds"]
    assert dense.split()[-5:-1] == ["200", "-", "20.0", "-"]
    assert constant.split()[-5:-1] == ["300", "1.50", "25.0", "1.25"]
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["speed_prefill_tokens_per_second"] for row in rows] == ["200.0", "300.0", "300.0"]


def test_a_finished_run_gets_its_speeds_without_measuring_a_point_again(runs: Runs, timed, measured, capsys):  # noqa: F811
    folder, before = runs.run("later", step=0.3)
    measured.clear()
    assert "prefill" not in capsys.readouterr().out
    arguments = runs.arguments("later", "--speed", step=0.3)
    assert script.main(arguments) == 0
    assert (measured, len(timed)) == ([], 3)
    after = read_results(folder)
    assert all(point.speed is not None for point in after.points)
    assert [replace(point, speed=None) for point in after.points] == before.points
    shown = capsys.readouterr().out
    assert "prefill" in shown
    for more in ([], ["--speed"]):  # they are known from now on
        assert script.main(runs.arguments("later", *more, step=0.3)) == 0
        assert capsys.readouterr().out == shown
    assert (measured, len(timed)) == ([], 3)


def test_another_run_takes_over_the_dense_models_speed_and_fresh_does_not(runs: Runs, timed):  # noqa: F811
    runs.run("beside", "--speed", step=0.3)
    timed.clear()
    assert script.main(runs.arguments("beside", "--speed", mean=0.2, step=0.2)) == 0
    assert timed == [["dense", "sliced"]] * 2
    assert script.main(runs.arguments("beside", "--speed", "--fresh", mean=0.2, step=0.2)) == 0
    assert timed[2:] == [["dense"], ["dense", "sliced"], ["dense", "sliced"]]


def test_two_ranks_share_out_the_speeds_of_a_finished_run(runs: Runs):  # noqa: F811
    _, before = runs.run("ranks")
    assert run_ranks(runs, "ranks", "--speed") == [0, 0]
    after = runs.found("ranks")[1]
    assert all(point.speed is not None and point.speed.prefill > 0 for point in after.points)
    assert [replace(point, speed=None) for point in after.points] == before.points
    assert runs.begun("ranks") == []


def test_speed_of_a_model_that_stays_on_the_cpu_is_refused(runs: Runs, capsys):  # noqa: F811
    assert script.main(runs.arguments("offloaded", "--speed", "--offload")) == 2
    assert capsys.readouterr().err.startswith("error: --speed needs dense and sliced model on the GPU together")


def test_speed_of_a_model_that_does_not_fit_is_refused_before_anything_is_measured(runs: Runs, monkeypatch):  # noqa: F811
    inputs = check(script.parse(runs.arguments("large", "--speed")))
    monkeypatch.setattr(slicer, "must_offload", lambda *_: True)
    with pytest.raises(InputError, match="on the GPU together: they don't fit, so leave it out"):
        slicer.Slicer(inputs, random_model("llama"), torch.device("cuda"))


# ---- the report's


def test_the_columns_have_each_figure_and_its_ratio_to_the_dense_models():
    run = with_speed(make_run())
    columns = [one for one in chosen(columns_for([run]), None) if one.name.startswith(("prefill", "decode", "memory"))]
    dense, constant = ([column.cell(point, run) for column in columns] for point in run.points[:2])
    assert dense == ["200", "-", "20.0", "-", "4.00", "-"]
    assert constant == ["300", "1.50", "25.0", "1.25", "3.00", "0.75"]


def test_what_was_not_measured_has_no_column():
    names = [column.name for column in columns_for([make_run()])]
    assert not {"prefill", "decode", "memory"} & set(names)
    on_cpu = with_speed(make_run(), decode=None, dense_decode=None, memory=None, dense_memory=None)
    shown = [column.name for column in chosen(columns_for([on_cpu]), None)]
    assert "prefill_ratio" in shown
    assert not {"decode", "decode_ratio", "memory", "memory_ratio"} & set(shown)


def test_a_line_below_says_once_what_was_timed():
    (line,) = speed_lines([with_speed(make_run()), with_speed(make_run(mean=0.2)), make_run()])
    assert "prefill of 8 x 2048 tokens; one sequence decoded in a cache of 512; median of 5 turns" in line


def test_runs_with_and_without_speed_are_one_over_seeds_and_speeds_are_means():
    without = replace(make_run(), seed=2)
    first, second = with_speed(replace(make_run(), seed=1)), with_speed(without, prefill=500.0)
    second.arguments["speed"] = True
    (one,) = pooled([first, second])
    assert one.points[1].speed == speed(prefill=400.0)
    (part,) = pooled([first, without])
    assert part.points[1].speed is None
    assert csv_rows([one])[1][1]["speed_prefill_ratio"] == 2.0
