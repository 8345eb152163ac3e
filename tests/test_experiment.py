"""The run as a whole: what it writes and prints, that it goes on where it stopped, that nothing is measured twice."""

import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model, windows
from tiny_runs import REPOSITORY, TASKS, Runs, comparable, write_model, write_text
from transformers import PreTrainedModel

import calculate_LR
import mean_cut_accuracy_experiments as script
import slicing.experiment.measure
import slicing.experiment.slicer
from slicing import count_parameters, load_model, perplexity, rotate_and_slice, token_windows
from slicing.experiment.checks import check
from slicing.experiment.keys import Keys
from slicing.experiment.measure import Measurement
from slicing.experiment.names import run_name
from slicing.experiment.options import Options
from slicing.experiment.repeat import STAMP
from slicing.experiment.results import Point, Results, read_results
from slicing.experiment.run_folder import RunFolder
from slicing.experiment.saving import is_saved_model
from slicing.report.table import equal_size_summary
from slicing.rotation import sliced_parameters


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    torch.set_num_threads(1)
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(runs: Runs) -> tuple[Path, Results]:
    """A sweep of five points in output folder "finished"."""
    return runs.run("finished")


@pytest.fixture(autouse=True)
def quick_vector(monkeypatch) -> None:
    """Where no vector is given, LR is measured on a few short windows."""
    monkeypatch.setattr("slicing.experiment.checks.REDUNDANCY_WINDOWS", 8)
    monkeypatch.setattr("slicing.experiment.checks.REDUNDANCY_LENGTH", 32)


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Kinds of the points that this test measures, in order."""
    kinds: list[str] = []
    measure = Measurement.point

    def counted(measurement, target, key):
        kinds.append(target.kind)
        return measure(measurement, target, key)

    monkeypatch.setattr(Measurement, "point", counted)
    return kinds


def points(results: Results, kind: str) -> list[Point]:
    return [point for point in results.points if point.kind == kind]


# ---- what a sweep writes and prints


def test_a_sweep_of_mean_03_and_step_002_has_the_dense_model_then_constant_slicing_then_15_more(runs, capsys):
    folder, results = runs.run("sweep", step=0.02, plots=True)
    first, constant, *dynamic = results.points
    assert (first.kind, first.base, constant.base, constant.amount) == ("dense", None, 0.3, 0)
    assert [point.base for point in dynamic] == pytest.approx([0.3 - 0.02 * k for k in range(1, 16)])
    assert {path.name for path in folder.iterdir()} == {
        STAMP,
        "points",
        "results.csv",
        "results.json",
        "sweep.png",
        "redundancy.png",
    }
    assert len(list(csv.DictReader((folder / "results.csv").open()))) == 17
    printed = capsys.readouterr()
    rows = [line.split()[0] for line in printed.out.splitlines() if line.split()[0] in ("dense", "constant", "dynamic")]
    assert rows == ["dense", "constant", *["dynamic"] * 15]
    assert "%|" not in printed.out
    assert "point 17 of 17, SB 0.000: perplexity" in printed.err


def test_two_runs_with_one_seed_give_the_same_numbers_bit_for_bit(runs, monkeypatch):
    found = [runs.run(f"again{i}", "--source-for-vector", runs.text)[1] for i in (0, 1)]
    assert comparable(found[0]) == comparable(found[1])
    assert found[0].redundancy.cosine is not None


def test_a_perplexity_that_is_no_number_is_an_error_and_not_a_point(runs, monkeypatch, capsys):
    monkeypatch.setattr(
        slicing.experiment.measure, "window_nll", lambda *args, **how: torch.full((3,), 800.0, dtype=torch.float64)
    )
    assert script.main(runs.arguments("overflow", "--quiet", mean=0)) == 2
    assert (
        "the mean negative log likelihood is 800 nats, more than 200: this is no language model"
        in capsys.readouterr().err
    )


def test_tasks_are_scored_at_every_point(runs, capsys):
    tasks = ("--tasks", "tiny_endings", "tiny_colours", "--include-path", str(TASKS), "--accuracy-limit", "5")
    _, results = runs.run("tasks", *tasks, step=0.3, plots=True)
    for point in results.points:
        scores = [point.tasks[name] for name in ("tiny_endings", "tiny_colours")]
        assert [score.documents for score in scores] == [5, 5]
        assert point.mean_accuracy == sum(score.value for score in scores) / 2
        assert point.seconds.tasks > 0
    assert "tiny_endings" in capsys.readouterr().out


# ---- what is reused


def test_the_same_command_again_measures_nothing_and_gives_the_same(runs, finished, measured, capsys):
    assert comparable(runs.run("finished", "--quiet")[1]) == comparable(finished[1])
    assert runs.run("finished", "--offload")[1].points == finished[1].points
    assert measured == []
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows.count("dynamic") == 6


def test_results_hold_the_seconds_of_the_check_of_the_layers(runs, monkeypatch):
    monkeypatch.setattr("slicing.check._passed", set())  # another run of this process checked these layers
    folder, first = runs.run("seconds", step=0.3)
    assert first.check_seconds is not None
    assert 0.001 < first.check_seconds < 60
    again, more = runs.run("seconds", "--compare", "equal-parameters", step=0.3)  # which measures one point
    assert (again, len(more.points)) == (folder, 4)
    assert more.check_seconds == first.check_seconds
    assert runs.run("seconds-dense", mean=0)[1].check_seconds is None


def test_a_run_that_goes_on_never_shortens_its_results(runs, monkeypatch):
    more = ("--compare", "equal-parameters")
    folder, first = runs.run("never-shorter", *more, step=0.15)
    (folder / STAMP).unlink()  # without it the finished points are read one by one
    written: list[int] = []
    write = RunFolder.write_results

    def noted(folder, results):
        written.append(len(results.points))
        write(folder, results)

    monkeypatch.setattr(RunFolder, "write_results", noted)
    assert runs.run("never-shorter", *more, step=0.15)[1].points == first.points
    assert written == [len(first.points)] == [5]
    assert len(runs.run("never-shorter", step=0.15)[1].points) == 4  # the comparison is not wanted any more
    assert written == [5, 4]


def test_points_stay_when_a_comparison_or_models_are_asked_for_later(runs, measured):
    folder, _ = runs.run("later", step=0.3)
    measured.clear()
    again, results = runs.run("later", "--compare", "equal-parameters", "--save-model", "all", step=0.3)
    assert again == folder
    assert measured == ["equal-parameters"]
    assert len(list((folder / "models").iterdir())) == 3
    assert len(results.points) == 4


def keys(options: Options) -> set[str]:
    inputs = check(options)
    model, tokenizer = load_model(options.model, device="cpu", dtype=options.dtype)
    by = Keys(inputs, model, tokenizer, torch.device("cpu"))
    return {by.point(target) for target in inputs.plan.targets(inputs.vector)}


@pytest.fixture(scope="module")
def known(runs) -> tuple[Options, set[str]]:
    """Options, and keys of their points."""
    options = replace(
        script.parse(runs.arguments("keys")), tasks=("tiny_endings",), include_path=str(TASKS), num_fewshot=0
    )
    return options, keys(options)


CHANGES = {
    "vector_cut": ("0", "0.5", "1"),
    "dtype": "float64",
    "round_interval": 4,
    "rotations": 1,
    "calibration": "once",
    "calibration_samples": 9,
    "calibration_length": 17,
    "perplexity_split": "validation",
    "perplexity_length": 17,
    "perplexity_samples": 3,
    "tasks": ("tiny_endings", "tiny_colours"),
    "accuracy_limit": 3,
    "num_fewshot": 1,
    "batch_size": 2,
    "seed": 43,
}
OF_SLICED_POINTS_ALONE = {"vector_cut", "round_interval", "rotations", "calibration"}
OF_SLICED_POINTS_ALONE |= {"calibration_samples", "calibration_length", "seed"}  # no examples, so no random ones


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_numbers_never_meets_an_old_point(known, name):
    options, old = known
    new = keys(replace(options, **{name: CHANGES[name]}))
    # the dense model's point, and constant slicing's, may be the same
    expected = {"vector_cut": 2}.get(name, 1 if name in OF_SLICED_POINTS_ALONE else 0)
    assert len(new & old) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"quiet": True},
        {"fresh": True},
        {"save_model": "all"},
        {"speed": True},
        {"offload": True},
        {"output_dir": "elsewhere"},
    ],
)
def test_a_setting_that_changes_no_number_reuses_all_points(known, change):
    options, old = known
    assert keys(replace(options, **change)) == old


def test_a_run_at_another_mean_takes_over_the_dense_model_and_fresh_does_not(runs, measured):
    runs.run("means", step=0.3)
    measured.clear()
    assert script.main(runs.arguments("means", mean=0.2, step=0.2)) == 0
    assert measured == ["sweep", "sweep"]
    measured.clear()
    assert script.main(runs.arguments("means", "--fresh", mean=0.2, step=0.2)) == 0
    assert measured == ["dense", "sweep", "sweep"]


def test_a_model_is_known_by_its_content_whatever_its_path_and_what_lies_beside_it(runs, tmp_path, monkeypatch):
    old = keys(script.parse(runs.arguments("paths")))
    copied = shutil.copytree(runs.model, tmp_path / "copy")  # other times
    for name in ("lr.json", "README.md", ".DS_Store"):
        (copied / name).write_text("{}")
    assert keys(script.parse(runs.arguments("paths", "--model", str(copied)))) == old
    monkeypatch.chdir(runs.model)
    for name in (f"{runs.model}/", "../model", "."):
        assert keys(script.parse(runs.arguments("paths", "--model", name))) == old
    (runs.model / "results").mkdir()
    (runs.model / "results" / "results.json").write_text("{}")
    assert keys(script.parse(runs.arguments("paths"))) == old


@pytest.mark.parametrize("changed", ["weight", "config"])
def test_a_model_that_differs_in_one_value_is_another(runs, tmp_path, changed):
    old = keys(script.parse(runs.arguments("paths")))
    copied = shutil.copytree(runs.model, tmp_path / "copy")
    if changed == "weight":
        tensors = load_file(copied / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
        save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    else:
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))
    assert not keys(script.parse(runs.arguments("paths", "--model", str(copied)))) & old


@pytest.mark.parametrize(
    ("model", "dataset", "start"),
    [
        ("a/b-1", "wikitext2", "b-1-wikitext2-mean0.3-"),
        ("a/b/", "texts/wiki.{split}.txt", "b-wiki-mean0.3-"),
        ("a", "novels/{split}.txt", "a-novels-mean0.3-"),
        ("a", "x.txt.gz", "a-x-mean0.3-"),
        ("hub/models--org--b-1/snapshots/0123abc", "x.txt", "b-1-x-mean0.3-"),
        ("m" * 240, "é" * 120 + ".txt", f"{'m' * 80}-{'é' * 40}-mean0.3-"),
        ("a$\\x${", "caf\udce9.txt", "a__x__-caf_-mean0.3-"),
    ],
)
def test_a_run_is_named_after_model_text_and_mean(model, dataset, start):
    name = run_name(model, dataset, 0.3, "0123456789abcdef")
    assert name.startswith(start)
    assert len(name) == len(start) + 8


def test_two_models_of_one_path_have_a_folder_each(tmp_path, monkeypatch):
    """As `cd A; run --model model --output-dir ../shared; cd ../B; ...` and where a model is trained on in place."""
    here = Runs(tmp_path)
    first = here.run("shared", mean=0)
    write_model(here.model, seed=1)
    assert script.main(here.arguments("shared", mean=0)) == 0
    assert len(list((tmp_path / "shared").iterdir())) == 2
    assert read_results(first[0]) == first[1]


def test_a_task_that_fails_costs_its_cell_and_is_not_measured_again(runs, measured, tmp_path, capsys):
    shutil.copytree(TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tasks" / "own.py").write_text("def score(document, results):\n    import not_there\n")
    settings = "include: tiny_colours.yaml\ntask: failing\ntag: pair\nprocess_results: !function own.score\n"
    (tmp_path / "tasks" / "failing.yaml").write_text(settings)
    (tmp_path / "tasks" / "good.yaml").write_text("include: tiny_colours.yaml\ntask: good\ntag: pair\n")
    more = ("--tasks", "pair", "--include-path", str(tmp_path / "tasks"))
    for _ in range(2):
        _, results = runs.run("cell", *more, mean=0)
        (point,) = results.points
        assert point.tasks["failing"].value is None
        assert point.tasks["failing"].reason == "ModuleNotFoundError: No module named 'not_there'"
        assert (point.mean_accuracy, measured) == (None, ["dense"])
        head, row = capsys.readouterr().out.splitlines()[1::2]
        assert head.split()[-4:] == ["failing", "good", "accuracy", "seconds"]  # a column for each task of the tag
        assert row.split()[-4] == f"±{point.tasks['good'].stderr:.3f}" or row.split()[-5] == "-"
    runs.run("cell", *more, "--fresh", mean=0)
    assert measured == ["dense", "dense"]


@pytest.mark.parametrize("changed", ["train", "test", "model", "task"])
def test_files_with_another_content_never_meet_an_old_point(tmp_path, changed):
    here = Runs(tmp_path)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for file in TASKS.iterdir():
        if file.is_file():
            (tasks / file.name).write_bytes(file.read_bytes())
    options = script.parse(here.arguments("keys", "--tasks", "tiny_endings", "--include-path", str(tasks)))
    old = keys(options)
    assert keys(options) == old
    if changed == "model":  # other weights in files that look alike
        before = {file: file.stat() for file in here.model.iterdir()}
        write_model(here.model, seed=1)
        for file, was in before.items():
            assert file.stat().st_size == was.st_size
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    elif changed == "task":
        (tasks / "endings.jsonl").write_text('{"start": "It", "first": "is.", "second": "was.", "label": 0}\n')
    else:
        write_text(tmp_path / "text", seed=1, **{changed: 600})
    assert len(keys(options) & old) == (1 if changed == "train" else 0)


# ---- ends before its time


def point_files(output: Path) -> dict[str, int]:
    """Finished points: key and time of writing."""
    return {path.stem: path.stat().st_mtime_ns for path in output.glob("*/points/[!.]*.json")}


def test_a_run_killed_at_20_random_moments_ends_as_an_undisturbed_one_and_measures_no_point_twice(runs):
    def start(output: str) -> BaseProcess:
        return runs.start(output, "--quiet", "--round-interval", "2", mean=0.2, step=0.02)

    for output in ("first", "undisturbed"):  # the first also waits for the server
        begin = time.monotonic()
        process = start(output)
        process.join()
        length = time.monotonic() - begin
        assert process.exitcode == 0
    undisturbed = comparable(runs.found("undisturbed")[1])
    order = [point["key"] for point in undisturbed["points"]]
    assert len(set(order)) == 12

    moments = random.Random(7)
    kills = sweeps = 0
    left_with = set()  # numbers of finished points that kills left
    while kills < 20:
        output = f"killed{sweeps}"
        sweeps += 1
        finished: dict[str, int] = {}
        exitcode = None
        while exitcode != 0:
            begun_before = len(runs.begun(output))
            process = start(output)
            # a run that goes on is shorter, so this covers the writing of plots as well
            disturbed = kills < 20 and len(finished) < len(order)
            if disturbed and kills % 2:  # after some more points, whatever else the machine does
                goal = len(finished) + moments.randint(1, 3)
                while process.is_alive() and len(point_files(runs.folder / output)) < goal:
                    time.sleep(0.005)
                process.join(moments.uniform(0, 0.1))
            else:
                process.join(moments.uniform(0, 0.6 * length) if disturbed else None)
            if process.exitcode is None:
                process.kill()
                process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL), runs.printed(output, "stderr")
            assert not set(runs.begun(output)[begun_before:]) & finished.keys(), "a finished point was measured again"
            now = point_files(runs.folder / output)
            assert now | finished == now, "a finished point was written again"
            finished = now
            if exitcode != 0:
                kills += 1
                left_with.add(len(finished))
            if any((runs.folder / output).glob("*/results.json")):
                results = runs.found(output)[1]
                assert [point.key for point in results.points] == order[: len(results.points)]
                assert len(results.points) >= len(finished) - 1
        assert comparable(runs.found(output)[1]) == undisturbed
    assert len(left_with) > 2, "the kills were not spread over the runs"


def test_ctrl_c_ends_with_130_and_one_line_and_keeps_the_finished_points(runs):
    process = runs.start("interrupted", "--quiet", "--round-interval", "1", mean=0.3, step=0.001)
    while len(point_files(runs.folder / "interrupted")) < 3:
        time.sleep(0.02)
        assert process.is_alive(), runs.printed("interrupted", "stderr")
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert runs.printed("interrupted", "stderr").splitlines() == [
        "interrupted: the finished points are kept; the same command goes on from there"
    ]
    files = point_files(runs.folder / "interrupted")
    assert len(runs.found("interrupted")[1].points) >= len(files) - 1 >= 2


# ---- several ranks


def rank_environment(rank: int, port: int) -> dict[str, str]:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(runs: Runs, output: str, *more: str, **environment: str) -> list[int]:
    """Exit codes of a run by two ranks."""
    port = free_port()
    processes = [runs.start(output, *more, environment=rank_environment(rank, port) | environment) for rank in (0, 1)]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def table(printed: str) -> list[list[str]]:
    """Rows without the last column, seconds."""
    return [line.split()[:-1] for line in printed.splitlines()]


def test_two_ranks_print_and_write_what_one_rank_does(runs, capsys):
    more = ("--compare", "equal-parameters", "--round-interval", "2")
    _, alone = runs.run("alone", *more)
    printed = capsys.readouterr().out
    assert run_ranks(runs, "together", *more) == [0, 0]
    folder, together = runs.found("together")
    assert comparable(together) == comparable(alone)
    assert table(runs.printed("together", "stdout")) == table(printed)
    assert (runs.printed("together", "stdout", 1), runs.printed("together", "stderr", 1)) == ("", "")
    assert sorted(runs.begun("together")) == sorted(point.key for point in alone.points)
    assert {"results.csv", "sweep.png"} <= {path.name for path in folder.iterdir()}


def test_one_calibration_over_two_ranks_is_one_pass(runs):
    _, alone = runs.run("once-alone", "--calibration", "once")
    assert run_ranks(runs, "once-together", "--calibration", "once", "--metric", "gradient") == [0, 0]
    _, gradient = runs.run("once-gradient", "--calibration", "once", "--metric", "gradient")
    assert run_ranks(runs, "once-pca", "--calibration", "once") == [0, 0]
    for output, wanted in (("once-together", gradient), ("once-pca", alone)):
        folder, together = runs.found(output)
        assert comparable(together) == comparable(wanted)
        assert (runs.folder / f"{output}.passes").read_text() == "0\n"
        assert not (folder / "bases.pt").exists()


def test_a_rank_that_fails_ends_the_other_and_its_finished_points_are_reused(runs):
    codes = run_ranks(runs, "failing", FAILING_RANK="1")
    assert codes == [2, 1]
    assert "RuntimeError: a card fell out" in runs.printed("failing", "stderr", 1)
    assert "error: another rank of the run has ended" in runs.printed("failing", "stderr", 0)
    finished = point_files(runs.folder / "failing")
    assert len(finished) == 3
    assert len(runs.found("failing")[1].points) == 3
    runs.run("failing")
    assert point_files(runs.folder / "failing").items() >= finished.items()


def test_torchrun_shares_out_the_points_and_quiet_leaves_stderr_empty(runs, finished):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(REPOSITORY / "mean_cut_accuracy_experiments.py"), *runs.arguments("torchrun", "--quiet")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # unset, torchrun says that it sets it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[3:6]] == ["dense", "constant", "dynamic"]
    assert comparable(runs.found("torchrun")[1]) == comparable(finished[1])


# ---- comparison at equal size


@pytest.mark.parametrize(
    ("name", "settings", "more"),
    [
        ("untied", {}, ()),
        ("tied", {"tied": True}, ()),
        ("one-rotation", {}, ("--rotations", "1")),
        ("once", {}, ("--calibration", "once")),
    ],
)
def test_the_comparison_at_equal_size_is_within_half_a_percent_or_one_step_of_width(tmp_path, name, settings, more):
    here = Runs(tmp_path, **settings)
    _, results = here.run(name, "--compare", "equal-parameters", "--round-interval", "2", *more, step=0.15, plots=True)
    (equal,) = points(results, "equal-parameters")
    dynamic = min((point for point in points(results, "sweep") if point.amount > 0), key=lambda point: point.perplexity)
    model, _ = load_model(str(here.model), device="cpu")
    one_step = max(
        abs(sliced_parameters(model, changed(equal.widths, i, by), equal.rotations) - equal.parameters)
        for i in range(3)
        for by in (-2, 2)
    )
    assert abs(equal.parameters - dynamic.parameters) <= max(0.005 * dynamic.parameters, one_step)
    assert equal.base == equal.mean
    assert equal.calibration == dynamic.calibration
    assert results.points[-1] is equal
    assert any(line.startswith("At equal size: Perplexity") for line in equal_size_summary(results))


def changed(widths: list[int], index: int, by: int) -> list[int]:
    return [min(48, width + by) if i == index else width for i, width in enumerate(widths)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rotations", [1, 2])
@pytest.mark.parametrize("widths", [[48, 48, 48], [48, 40, 24], [16, 48, 33], [24, 24, 24]])
def test_parameters_are_counted_without_slicing(tied, rotations, widths):
    model = random_model("llama", tied=tied, dtype=torch.float32)
    sliced = rotate_and_slice(model, windows(), widths, rotations=rotations)
    assert sliced_parameters(model, widths, rotations) == count_parameters(sliced)


# ---- search and calibration


def test_find_base_looks_on_the_validation_split_alone_and_confirms_with_a_calibration_of_its_own(
    runs, measured, monkeypatch
):
    tried = []
    search = Measurement.perplexity

    def trial(measurement: Measurement, target, windows):
        assert (windows.split, windows.key) == ("validation", measurement.inputs.validation.key)
        assert target.calibration == "once"
        tried.append(target.base)
        return search(measurement, target, windows)

    monkeypatch.setattr(Measurement, "perplexity", trial)
    more = ("--find-base", "--compare", "equal-parameters", "--round-interval", "2")
    _, results = runs.run("search", *more, plots=True)
    best = min(results.search.trials, key=lambda found: found.perplexity)
    assert results.search.base == best.base
    assert results.search.data.split == "validation"
    assert tried == [found.base for found in results.search.trials]
    assert len(tried) > 8
    dense, constant, confirmed = results.points[:3]
    assert (dense.kind, constant.amount, confirmed.kind) == ("dense", 0, "confirm")
    assert confirmed.base == best.base
    assert {point.calibration for point in results.points[1:]} == {"every-point"}
    assert results.data.perplexity.split == "test"

    tried.clear()
    measured.clear()
    assert comparable(runs.run("search", *more)[1]) == comparable(results)
    assert (tried, measured) == ([], [])


def test_a_search_with_other_widths_is_not_taken_over(runs, monkeypatch):
    tried: list[float] = []
    monkeypatch.setattr(
        Measurement, "perplexity", lambda _, target, windows: tried.append(target.base) or 9 + target.base
    )
    more = ("--find-base", "--vector-cut", "0", "0.5", "1", "--round-interval")
    for interval in ("4", "1"):  # the same widths at SB = 0
        tried.clear()
        assert script.main(runs.arguments("searches", *more, interval, mean=0.25)) == 0
        assert len(tried) > 2


def test_an_interrupted_search_goes_on_after_its_last_trial(runs, monkeypatch):
    tried = []
    search = Measurement.perplexity

    def trial(measurement: Measurement, target, windows):
        if len(tried) == 4:
            raise KeyboardInterrupt
        tried.append(target.base)
        return search(measurement, target, windows)

    arguments = runs.arguments("searching", "--find-base", "--round-interval", "2")
    monkeypatch.setattr(Measurement, "perplexity", trial)
    assert script.main(arguments) == 130
    first = tried.copy()
    tried.clear()
    monkeypatch.setattr(Measurement, "perplexity", lambda *given: tried.append(given[1].base) or search(*given))
    assert script.main(arguments) == 0
    assert not set(first) & set(tried)
    assert [found.base for found in runs.found("searching")[1].search.trials] == first + tried


def test_one_calibration_serves_all_points_and_leaves_unsliced_ones_as_they_are(runs, finished, monkeypatch):
    passes = []
    dense_bases = slicing.experiment.slicer.dense_bases
    monkeypatch.setattr(
        "slicing.experiment.slicer.dense_bases", lambda *a, **k: passes.append(1) or dense_bases(*a, **k)
    )
    _, results = runs.run("once", "--calibration", "once")
    assert len(passes) == 1
    every, once = finished[1].points, results.points
    assert once[0].nll == every[0].nll
    assert [point.widths for point in once] == [point.widths for point in every]
    assert all(a.nll != b.nll for a, b in zip(once[1:], every[1:], strict=True))


# ---- saved models


@pytest.mark.parametrize("rotations", ["1", "2"])
def test_a_saved_model_loads_again_with_the_same_perplexity(runs, rotations, capsys, monkeypatch):
    sliced = []
    slice_one = slicing.experiment.slicer.rotate_and_slice
    monkeypatch.setattr(
        "slicing.experiment.slicer.rotate_and_slice", lambda *a, **k: sliced.append(1) or slice_one(*a, **k)
    )
    if rotations == "2":  # where memory is short, the best one is sliced again
        monkeypatch.setattr("slicing.experiment.saving.can_keep", lambda _: False)
    folder, results = runs.run(f"save{rotations}", "--save-model", "best", "--rotations", rotations, step=0.15)
    (saved,) = (folder / "models").iterdir()
    best = min(points(results, "sweep"), key=lambda point: point.perplexity)
    assert len(sliced) == len(points(results, "sweep")) + (rotations == "2")
    assert saved.name == f"SB_{best.base:.4f}-{best.key[:8]}"
    assert "pipeline_tag" in (saved / "README.md").read_text()
    for file in saved.iterdir():  # what is pushed tells nothing of this machine
        assert str(runs.folder).encode() not in file.read_bytes(), file.name
    model, tokenizer = load_model(str(saved), device="cpu")
    assert count_parameters(model) == best.parameters
    test = token_windows(runs.text, tokenizer, split="test", length=16)
    assert perplexity(model, test, progress=False) == best.perplexity

    capsys.readouterr()
    _, again = runs.run(f"alone{rotations}", "--model", str(saved), mean=0, plots=True)
    (alone,) = again.points
    assert (alone.kind, alone.nll) == ("dense", best.nll)
    assert (alone.parameters, alone.cut) == (best.parameters, best.cut)
    assert (again.model.model_type, again.model.parameters) == ("sliced", results.model.parameters)
    row = capsys.readouterr().out.splitlines()[3]
    assert row.startswith("sliced model  ")
    assert f"{best.cut:.1%}" in row
    assert again.data.calibration is None


def test_save_model_all_saves_every_sliced_point_and_a_deleted_one_again(runs):
    folder, results = runs.run("save-all", "--save-model", "all", step=0.15)
    names = sorted(path.name for path in (folder / "models").iterdir())
    assert len(names) == len(results.points) - 1 == 3
    shutil.rmtree(folder / "models" / names[0])
    code = folder / "models" / names[1] / "families.py"
    code.unlink()
    runs.run("save-all", "--save-model", "all", step=0.15)
    assert sorted(path.name for path in (folder / "models").iterdir()) == names
    assert code.exists()
    cards = {(folder / "models" / name / "README.md").read_text().count("not measured") for name in names}
    assert cards == {0}


def test_two_equal_runs_at_once_end_well_with_the_same_models_and_none_is_without_weights(runs):
    more = ("--save-model", "all", "--quiet")
    processes = [runs.start("twice", *more, step=0.15) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], runs.printed("twice", "stderr")
    models = runs.found("twice")[0] / "models"
    names = sorted(path.name for path in models.iterdir())
    assert len(names) == 3
    assert not any(name.startswith(".") for name in names)
    assert all(is_saved_model(models / name) and (models / name / "README.md").exists() for name in names)

    (models / names[0] / "model.safetensors").unlink()
    runs.run("twice", *more, step=0.15)
    assert is_saved_model(models / names[0])
    assert (models / names[0] / "README.md").exists()


@pytest.mark.parametrize("which", ["all", "best"])
def test_a_full_disk_while_a_model_is_saved_costs_no_point(runs, measured, capsys, which):
    command = runs.arguments(f"full-{which}", "--save-model", which, step=0.3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores the signal
    try:
        assert script.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(
        r"^error: can't save the sliced model as .*File too large.*: make room", capsys.readouterr().err, re.M
    )
    before = list(measured)
    assert before == ["dense", "sweep"] if which == "all" else ["dense", "sweep", "sweep"]
    folder, _ = runs.found(f"full-{which}")
    assert list((folder / "models").iterdir()) == []
    runs.run(f"full-{which}", "--save-model", which, step=0.3)
    assert measured == ["dense", "sweep", "sweep"]
    assert all(map(is_saved_model, (folder / "models").iterdir()))


def test_a_fault_of_the_program_while_a_model_is_saved_keeps_its_traceback_and_the_point(runs, measured, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_, **__: {}["x"])
    with pytest.raises(KeyError):
        script.main(runs.arguments("fault", "--save-model", "all", step=0.3))
    assert measured == ["dense", "sweep"]
    assert len(list(runs.folder.glob("fault/*/points/*.json"))) == 2


def test_models_are_not_saved_below_a_name_that_safetensors_can_not_write(runs, measured, capsys):
    for more, code in ((("--save-model", "best"), 2), (("--quiet",), 0)):
        assert script.main(runs.arguments("odd-\udce9", *more, step=0.3)) == code
        assert measured == ([] if code else ["dense", "sweep", "sweep"])
    assert re.search(r"^error: --output-dir is .*in UTF-8 only; choose another", capsys.readouterr().err, re.M)


# ---- the vector


def test_the_vector_is_taken_from_the_command_line_from_a_file_or_measured(runs, tmp_path, monkeypatch, capsys):
    file = tmp_path / "lr.json"
    lr = ["--dataset", runs.text, "--samples", "8", "--max-seq-len", "32", "--stride", "32", "--device", "cpu"]
    assert calculate_LR.main([str(runs.model), *lr, "--output", str(file)]) == 0
    line = capsys.readouterr().out.split()

    _, measured = runs.run("measured", "--source-for-vector", runs.text, step=0.3)
    _, from_file = runs.run("from-file", "--vector-cut", str(file), step=0.3)
    _, pasted = runs.run("pasted", "--vector-cut", *line, step=0.3)
    for name in ("normalised", "cosine", "stderr"):
        assert getattr(measured.redundancy, name) == pytest.approx(getattr(from_file.redundancy, name), rel=1e-6)
    assert measured.data.redundancy == from_file.data.redundancy
    assert pasted.redundancy.normalised == pytest.approx(from_file.redundancy.normalised, abs=5e-5)
    assert (pasted.redundancy.cosine, pasted.data.redundancy) == (None, None)


def test_lr_that_was_measured_is_kept(runs, monkeypatch):
    first = runs.run("kept", "--source-for-vector", runs.text, step=0.3)
    monkeypatch.setattr(Measurement, "redundancy", None)
    assert comparable(runs.run("kept", "--source-for-vector", runs.text, step=0.3)[1]) == comparable(first[1])


def test_a_vector_whose_ends_are_not_0_and_1_is_stretched_with_a_note_on_stderr(runs, capsys):
    _, results = runs.run("stretched", "--vector-cut", "0.2", "0.5", "0.7", step=0.3)
    assert results.redundancy.normalised == pytest.approx([0, 0.6, 1])
    assert "note: the vector goes from 0.2 to 0.7" in capsys.readouterr().err


def test_seeds_measure_the_dense_model_once_and_give_one_table_of_means(runs, measured, capsys, monkeypatch):
    more = ("--seeds", "1", "2", "--tasks", "tiny_colours", "--include-path", str(TASKS))
    runs_of = runs.folder / "seeds"
    for plot in ("plot_sweep", "plot_redundancy"):
        monkeypatch.setattr(f"slicing.report.table.{plot}", lambda *_: None)
    assert script.main(runs.arguments("seeds", *more, step=0.3)) == 0
    assert measured == ["dense", "sweep", "sweep", "sweep", "sweep"]
    first, second = (read_results(path.parent) for path in sorted(runs_of.glob("*/results.json")))
    assert {first.seed, second.seed} == {1, 2}
    assert "seeds  perplexity  " in capsys.readouterr().out
    rows = list(csv.DictReader((runs_of / "results.csv").open()))
    assert [(row["kind"], row["seeds"]) for row in rows] == [("dense", ""), ("sweep", "2"), ("sweep", "2")]
    values = [run.points[1].perplexity for run in (first, second)]
    assert float(rows[1]["perplexity"]) == pytest.approx(sum(values) / 2)
    assert float(rows[1]["perplexity_sd"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_a_seed_changes_the_dense_model_where_tasks_take_random_examples(runs, measured):
    for seed in ("1", "2"):
        more = ("--seed", seed, "--num-fewshot", "1", "--tasks", "tiny_endings", "--include-path", str(TASKS))
        assert script.main(runs.arguments("shots", *more, mean=0)) == 0
    assert measured == ["dense", "dense"]


def test_a_finished_run_is_printed_again_without_the_model(runs, measured, capsys, monkeypatch):
    arguments = runs.arguments("again", step=0.3)
    for plot in ("plot_sweep", "plot_redundancy"):
        monkeypatch.setattr(f"slicing.report.table.{plot}", lambda _, file: Path(file).touch())
    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr("slicing.experiment.sweep.load_model", None)
        assert script.main(arguments) == 0
    assert capsys.readouterr().out == first
    code = f"import sys, mean_cut_accuracy_experiments as s; s.main({arguments!r}); print('torch' in sys.modules)"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert again.stdout == f"{first}False\n"  # so in well under a second
    assert len(measured) == 3


@pytest.mark.parametrize("changed", ["weights", "text", "point"])
def test_a_finished_run_with_a_changed_file_is_looked_at_again(runs, measured, tmp_path, monkeypatch, changed):
    own = Runs(tmp_path)
    folder, _ = own.run("run", mean=0)
    file = {
        "weights": own.model / "model.safetensors",
        "text": tmp_path / "text" / "test.txt",
        "point": next((folder / "points").iterdir()),
    }[changed]
    state, content = file.stat(), bytearray(file.read_bytes())
    if changed == "point":
        file.unlink()
    else:
        content[-9:-1] = b"kettle a" if changed == "text" else bytes(8)
        file.write_bytes(content)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # of the same size and time
    assert script.main(own.arguments("run", mean=0)) == 0
    assert measured == ["dense", "dense"]


def test_documents_that_lie_anywhere_are_compared_before_a_finished_run_is_printed_again(runs, measured, tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(
        f"task: own\ndataset_path: {documents}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{start}}'\ndoc_to_choice: ['on', 'off']\ndoc_to_target: answer\n"
    )
    scores = []
    for answer in (0, 1, 1):
        (documents / "test.jsonl").write_text(json.dumps({"start": "the kettle began", "answer": answer}))
        command = runs.arguments("documents", "--tasks", "own", "--include-path", str(tmp_path / "tasks"), mean=0)
        assert script.main(command) == 0
        newest = max(
            (runs.folder / "documents").iterdir(), key=lambda folder: (folder / "results.json").stat().st_mtime
        )
        scores.append(read_results(newest).points[0].tasks["own"].value)
    assert sorted(scores[:2]) == [0, 1]
    assert scores[1] == scores[2]
    assert measured == ["dense", "dense"]
