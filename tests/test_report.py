"""Results read again, compared, tabulated and drawn. The runs are made up: 6 layers, 5 windows."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.text
import pytest
from msgspec.structs import replace

from slicing.experiment.comparison import mean_accuracy, paired_standard_error
from slicing.experiment.names import text_name
from slicing.experiment.results import SCHEMA_VERSION, Point, Results, check_results, read_results, results_of
from slicing.experiment.run_folder import RunFolder
from slicing.families import InputError
from slicing.report.labels import run_labels, text_label
from slicing.report.plots import (
    layer_redundancy_figure,
    log_ticks,
    plot_layer_redundancy,
    plot_redundancy,
    plot_sweep,
    redundancy_figure,
    sweep_figure,
)
from slicing.report.table import equal_size_summary, format_row, format_table, header, main, write_csv, write_files
from slicing.schedule import final_slices, slice_widths, sweep_amounts
from slicing.structure import as_json, keys
from slicing.task_scores import no_score

LR = [0.0, 0.4, 0.8, 0.9, 1.0, 0.5]
NOISE = [0.2, -0.1, 0.05, -0.25, 0.1]  # of the windows, mean 0


def content(
    *,
    name: str = "someone/small-model",
    dense: float = 18.46,
    mean: float = 0.3,
    step: float = 0.1,
    tasks: tuple[str, ...] = ("piqa", "arc_easy"),
    rotations: int = 2,
    calibration: str = "every-point",
    equal: bool = False,
    confirm: bool = False,
    redundancy: list[float] = LR,
    hidden_size: int = 64,
    source: str = "wikitext2",
    split: str | None = "test",
    seed: int = 42,
) -> dict[str, Any]:
    """What results.json holds of a finished run in which dynamic slicing beats constant slicing; with mean 0 of the
    dense model alone."""
    parameters = 134_500_000

    def point(
        kind: str, key: str, sp: float | None, amount: float | None, perplexity: float, count: int
    ) -> dict[str, Any]:
        sliced = sp is not None
        slices = final_slices(redundancy, mean=sp, base=sp - amount) if sliced else None
        wobble = 0.0 if not sliced else 0.01 * (1 + amount)
        scores = {
            task: {
                "metric": "acc_norm",
                "value": 0.9 - 0.1 * math.log(perplexity) - 0.05 * i,
                "stderr": 0.011 + 0.002 * i,
                "reason": None,
                "documents": 1838,
                "metrics": {"acc": {"value": 0.6, "stderr": 0.011}},
            }
            for i, task in enumerate(tasks)
        }
        return {
            "key": key,
            "git": None,
            "kind": kind,
            "mean": sp,
            "base": sp - amount if sliced else None,
            "amount": amount,
            "slices": slices,
            "widths": slice_widths(slices, hidden_size) if sliced else None,
            "rotations": rotations if sliced else None,
            "calibration": ("every-point" if kind == "confirm" else calibration) if sliced else None,
            "metric": "pca" if sliced else None,
            "refit": False if sliced else None,
            "inner_mean": None,
            "inner_base": None,
            "inner_widths": None,
            "parameters": count,
            "cut": 1 - count / parameters,
            "perplexity": perplexity,
            "nll": [math.log(perplexity) + x + wobble * y for x, y in zip(NOISE, NOISE[1:] + NOISE[:1], strict=True)],
            "tasks": scores,
            "mean_accuracy": sum(score["value"] for score in scores.values()) / len(scores) if scores else None,
            "seconds": {"slice": 12.5 if sliced else None, "perplexity": 30.25, "tasks": 100.0 if tasks else None},
            "peak_memory_bytes": {"slice": 2_000_000_000 if sliced else None, "perplexity": 10**9, "tasks": None},
        }

    points = [point("dense", "dense", None, None, dense, parameters)]
    for i, amount in enumerate(sweep_amounts(mean, step) if mean > 0 else []):
        perplexity = dense * math.exp(mean * (2.8 - 0.73 * amount / mean + 0.1 * (amount / mean) ** 2))
        points.append(point("sweep", f"sweep-{i}", mean, amount, perplexity, 112_600_000 + round(10**7 * amount)))
    best = points[-1]
    if equal:
        points.append(point("equal-parameters", "equal", 0.26, 0.0, 1.15 * best["perplexity"], best["parameters"]))
    if confirm:
        points.append(point("confirm", "confirm", mean, mean, 0.94 * best["perplexity"], best["parameters"]))
    text = {"source": source, "split": split, "windows": len(NOISE), "length": 2048, "tokens": len(NOISE) * 2048}
    return {
        "schema_version": SCHEMA_VERSION,
        "arguments": {"model": name, "mean": mean},
        "model": {
            "name": name,
            "revision": None,
            "model_type": "llama",
            "dtype": "float32",
            "parameters": parameters,
            "hidden_size": hidden_size,
            "layers": len(redundancy),
            "tied": True,
        },
        "versions": {"python": "3.11.7", "torch": "2.11.0", "transformers": "5.24.0", "lm_eval": None},
        "git": None,
        "device": "cpu",
        "seed": seed,
        "data": {"calibration": text | {"split": "train"}, "perplexity": text, "redundancy": None},
        "redundancy": None
        if mean == 0
        else {
            "normalised": redundancy,
            "cosine": [0.5 + 0.4 * lr for lr in redundancy],
            "stderr": [0.004] * len(redundancy),
        },
        "search": {
            "base": 0.1,
            "data": text | {"split": "validation"},
            "trials": [{"base": 0.1, "perplexity": dense * 2}, {"base": 0.2, "perplexity": dense * 3}],
        },
        "points": points,
    }


def make_run(**settings: Any) -> Results:
    """The run of which `content` is what results.json holds."""
    return results_of(content(**settings))


@pytest.fixture
def run() -> Results:
    return make_run()


def save(run: Results, folder: Path) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(as_json(run)), encoding="utf-8")
    return folder


# ---- what results.json holds


KEYS = {key: kind for key, kind, _ in keys(Results)}


def of_this(node: Any, path: str = "") -> set[str]:
    """Dotted names of all keys, as `keys` writes them."""
    if isinstance(node, list):
        return set().union(*(of_this(item, path) for item in node))
    if not isinstance(node, dict) or path == "arguments":
        return set()
    if path in ("tasks", "points.tasks", "points.tasks.*.metrics"):
        return set().union(*(of_this(item, f"{path}.*") for item in node.values()))
    paths = {name: f"{path}.{name}".lstrip(".") for name in node}
    return set(paths.values()).union(*(of_this(node[name], paths[name]) for name in node))


def is_required(key: str) -> bool:
    """Whether files and points of earlier versions have a key too."""
    parts = key.split(".")
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return not any(KEYS.get(parent, "").endswith(" or absent") for parent in parents)


REQUIRED = {key for key in KEYS if is_required(key)}


def test_every_documented_key_is_written_and_read_back_the_same(run, tmp_path):
    run.data.redundancy = run.data.perplexity
    RunFolder(tmp_path).write_results(run)
    assert read_results(tmp_path) == run
    assert REQUIRED <= of_this(json.loads((tmp_path / "results.json").read_text())) <= set(KEYS)


def remove(run: dict[str, Any], key: str) -> str:
    """Remove a key from the last place that has it; returns the name that the error must have."""
    node, label = run, ""
    *parents, last = key.split(".")
    for i, part in enumerate(parents):
        name = {"tasks": "piqa", "metrics": "acc"}[parents[i - 1]] if part == "*" else part
        node, label = node[name], f"{label}.{name}"
        if isinstance(node, list):
            label += f"[{len(node) - 1}]"
            node = node[-1]
    del node[last]
    return f"{label}.{last}".lstrip(".")


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_a_missing_key_is_named(key):
    raw = content()
    raw["data"]["redundancy"] = dict(raw["data"]["perplexity"])
    name = remove(raw, key)
    with pytest.raises(InputError, match="schema_version is None" if key == "schema_version" else re.escape(name)):
        results_of(raw)


def test_points_of_before_the_inner_widths_are_read(run):
    raw = content()
    for point in raw["points"]:
        for key in ("metric", "refit", "inner_mean", "inner_base", "inner_widths"):
            del point[key]
    read = results_of(raw)
    assert format_table([read]) == format_table([run])
    assert {point.inner_widths for point in read.points} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(schema_version=1), f"schema_version is 1, known are 2 and {SCHEMA_VERSION}"),
        (lambda run: run.update(schema_version=4, git="abc"), "read it with the code that wrote it, commit abc"),
        (lambda run: run["model"].update(parameters=1.5), "model.parameters is '1.5' of type float: it must be int"),
        (lambda run: run["model"].update(tied=1), "model.tied is '1' of type int: it must be bool"),
        (lambda run: run.update(seed=True), "seed is 'True'"),
        (lambda run: run["points"][2].update(perplexity="34"), r"points\[2\].perplexity is '34' of type str"),
        (lambda run: run["points"][2].update(kind="best"), r"points\[2\].kind is 'best' .* one of dense, sweep, equal"),
        (lambda run: run["points"][2]["nll"].append(None), r"points\[2\].nll\[5\] is 'None' .* must be number"),
        (lambda run: run["points"][1]["nll"].pop(), r"points\[1\].nll has 4 values: there must be 5"),
        (lambda run: run["points"][1]["widths"].pop(), r"points\[1\].widths has 5 values: there must be 6"),
        (lambda run: run["redundancy"].update(normalised=[0, 1]), "redundancy.normalised has 2 values"),
        (lambda run: run["points"][1].update(note="x"), r"points\[1\].note is not a known key"),
        (lambda run: run.update(points=[None]), r"points\[0\] is 'None' .* it must be object"),
        (lambda run: run["points"][1]["tasks"]["piqa"].pop("stderr"), r"points\[1\].tasks.piqa.stderr is missing"),
        (lambda run: run["points"][1]["tasks"].update(odd=[]), r"points\[1\].tasks.odd is '\[\]' .* must be object"),
    ],
)
def test_wrong_values_are_named_with_their_place(change, message):
    raw = content()
    change(raw)
    with pytest.raises(InputError, match=message):
        results_of(raw)


def test_results_of_the_version_before_are_read(run):
    old = content() | {"schema_version": 2}
    for point in old["points"]:
        for score in point["tasks"].values():
            del score["reason"]
    assert results_of(old) == run


def test_a_score_without_a_value_is_a_dash_an_empty_cell_and_no_mean(run, tmp_path):
    point = run.points[1]
    point.tasks["piqa"] = no_score("KeyError: 'body'", 1838)
    point.mean_accuracy = mean_accuracy(point.tasks)
    check_results(run)
    cells = ["-", *_cells(point, "arc_easy"), *"---"]
    assert format_row(point, run, tasks=["piqa", "arc_easy"]).split()[-7:-1] == cells
    write_csv([run], tmp_path / "results.csv")
    row = list(csv.DictReader((tmp_path / "results.csv").open()))[1]
    assert (row["piqa"], row["piqa_stderr"], row["mean_accuracy"], row["mean_accuracy_stderr"]) == ("", "", "", "")


def _cells(point: Point, task: str) -> list[str]:
    score = point.tasks[task]
    return f"{score.value:.3f} ±{score.stderr:.3f}".split()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "give the folder of a run"),
        (b'{"schema_version": 2, "poi', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "it is '[]' of type list: it must be object"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}'.encode(), "arguments is missing"),
    ],
)
def test_damaged_results_end_in_one_line_and_exit_code_2(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: .*results\.json.*{re.escape(message)}.*\n", captured.err)


# ---- comparisons


def test_paired_standard_error_is_that_of_the_differences():
    # Differences 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14 / 3, SE sqrt(14 / 3 / 4).
    assert paired_standard_error([11, 22, 33, 46], [10, 20, 30, 40]) == pytest.approx(math.sqrt(14 / 12))
    assert paired_standard_error([2.0, 3.0], [1.0, 2.0]) == 0
    assert paired_standard_error([2.0], [1.0]) is None


def test_summary_says_how_much_of_the_gain_is_left_at_equal_size():
    run = make_run(equal=True)
    constant, best, equal = run.points[1], run.points[-2], run.points[-1]
    constant.perplexity, best.perplexity, equal.perplexity = 40.0, 32.0, 36.0
    lines = equal_size_summary(run)
    assert len(lines) == 3
    assert "SB 0.000. Perplexity 32.000" in lines[0]
    assert "against 40.000" in lines[0]
    assert "(-20.0%, paired SE " in lines[0]
    assert "against 36.000 with 115.6M for constant slicing of mean 0.2600 (-11.1%" in lines[1]
    assert f"{math.log(36 / 32) / math.log(40 / 32):.0%} of the gain" in lines[2]  # 53 %


@pytest.mark.parametrize(
    ("constant", "equal"),
    [(32.0001, 36.0), (40.0, 32.0001), (32.0001, 32.0001), (31.9999, 36.0)],
    ids=["no-gain", "nothing-left", "neither", "no-loss"],
)
def test_summary_gives_no_share_of_a_difference_within_two_standard_errors(constant, equal):
    run = make_run(equal=True)
    run.points = [*run.points[:2], *run.points[-2:]]
    for point, perplexity in zip(run.points[1:], (constant, 32.0, equal), strict=True):
        point.perplexity = perplexity
    lines = equal_size_summary(run)
    told = [abs(math.log(reference / 32.0)) > 0.1 for reference in (constant, equal)]
    assert ["in log perplexity: no difference can be told)" not in line for line in lines[:2]] == told
    assert lines[2].startswith("No share of a gain is given")
    assert not any("of the gain" in line for line in lines)


def test_summary_of_one_window_which_has_no_standard_error_gives_the_share():
    run = make_run(equal=True)
    for point in run.points:
        point.nll = point.nll[:1]
    assert "of the gain" in equal_size_summary(run)[2]


def test_summary_warns_where_sizes_differ_and_says_where_they_do_not(run):
    assert "2.7% more parameters" in equal_size_summary(run)[1]
    for point in run.points[1:]:
        point.parameters = 112_600_000
    assert "same number of parameters" in equal_size_summary(run)[1]


def test_summary_compares_only_points_made_in_the_same_way():
    run = make_run(confirm=True, calibration="once")
    assert run.points[-1].perplexity < run.points[-2].perplexity
    assert f"Perplexity {run.points[-2].perplexity:.3f}" in equal_size_summary(run)[0]


def test_a_run_without_dynamic_points_has_no_summary_but_the_searchs(run):
    run.points = run.points[:2]
    assert equal_size_summary(replace(run, search=None)) == []
    assert equal_size_summary(run) == ["The search found no slice base better than constant slicing."]


# ---- table


def test_rows_are_as_wide_as_the_header_and_aligned_with_it():
    run = make_run(equal=True, confirm=True)
    first, second, rule = header(run).split("\n")
    rows = [format_row(point, run) for point in run.points]
    assert {len(row) for row in rows} == {len(second)} == {len(rule)}
    for title in ("SB", "SP", "perplexity", "constant", "cut", "arc_easy", "accuracy", "seconds"):
        end = second.index(title) + len(title)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows), title
    assert re.search(r" acc_norm +acc_norm +mean of 2 ", first)
    assert [row.split()[0] for row in rows] == ["dense", "constant", *["dynamic"] * 3, "equal", "confirmed"]


def test_a_row_shows_changes_errors_size_and_time(run):
    dense, constant, best = run.points[0], run.points[1], run.points[-1]
    row = format_row(best, run)
    for expected in (
        f"{best.perplexity:.3f}",
        f"{best.perplexity / dense.perplexity - 1:+.1%}",
        f"{paired_standard_error(best.nll, dense.nll):.4f}",
        f"{best.perplexity / constant.perplexity - 1:+.1%}",
        f"{paired_standard_error(best.nll, constant.nll):.4f}",
        "115.6M",
        "14.1%",
        f"{best.tasks['piqa'].value:.3f} ±0.011",
        f"{best.mean_accuracy:.3f} ±{math.hypot(0.011, 0.013) / 2:.3f}",
    ):
        assert expected in row
    assert row.endswith(" 143")  # 12.5 + 30.25 + 100


@pytest.mark.parametrize(
    ("factor", "shown"),
    [(0.9996, "+0.0%"), (1.0004, "+0.0%"), (0.9994, "-0.1%"), (100.0, "+9900.0%"), (102.0, ">9999%"), (1e12, ">9999%")],
)
def test_changes_have_no_negative_zero_and_stay_in_their_column(run, factor, shown):
    dense, constant, point = run.points[:3]
    dense.perplexity = constant.perplexity = 10.0
    point.perplexity = 10.0 * factor
    row = format_row(point, run)
    assert [row.split()[4], row.split()[6]] == [shown, shown]
    assert len(row) == len(header(run).split("\n")[1])


@pytest.mark.parametrize(("cut", "shown"), [(-0.0001, "0.0%"), (-0.1234, "-12.3%")])
def test_the_true_cut_has_no_negative_zero_and_stays_in_its_column(run, cut, shown):
    run.points[1].cut = cut
    row = format_row(run.points[1], run)
    assert f" {shown} " in row
    assert len(row) == len(header(run).split("\n")[1])


def test_rows_can_be_printed_before_the_other_points_exist(run):
    finished = run.points
    run.points = []
    names = ["piqa", "arc_easy"]
    early = [format_row(finished[0], run, tasks=names), format_row(finished[2], run, tasks=names)]
    titles = header(run, tasks=names).split("\n")[1].split()
    assert titles[-8:] == ["piqa", "arc_easy", "accuracy", "against", "dense", "against", "constant", "seconds"]
    assert early[1].split()[4:8] == ["-"] * 4
    run.points = finished
    assert format_row(finished[0], run) == early[0]


def test_a_run_without_tasks_has_no_task_columns():
    text = "\n".join(format_table([make_run(tasks=())]))
    assert "accuracy" not in text
    assert max(map(len, text.split("\n"))) <= 100


def test_a_table_of_several_runs_names_model_rotations_and_calibration():
    lines = format_table([make_run(), make_run(name="/models/other", rotations=1, calibration="once", tasks=())])
    assert lines[2].split()[:4] == ["small-model", "2", "every-point", "constant"]
    assert lines[-1].split()[:4] == ["other", "1", "once", "dynamic"]
    assert lines[-1].split()[-4:-1] == ["-", "-", "-"]  # the tasks that only the other run has, and their mean


def test_a_table_has_columns_for_text_and_seed_only_where_they_differ():
    def titles(*runs: Results) -> list[str]:
        return format_table(runs)[0].split("\n")[1].split()[:3]

    assert titles(make_run(), make_run(mean=0.2)) == ["model", "tions", "calibrated"]
    assert titles(make_run(), make_run(source="ptb")) == ["model", "text", "tions"]
    assert titles(make_run(), make_run(seed=7)) == ["model", "seed", "tions"]
    assert titles(make_run(), make_run(source="ptb", seed=7)) == ["model", "text", "seed"]
    lines = format_table([make_run(), make_run(source="/texts/novels.{split}.txt", split="validation", seed=7)])
    assert lines[1].split()[:4] == ["small-model", "wikitext2", "test", "42"]
    assert lines[-1].split()[:4] == ["small-model", "novels", "validation", "7"]


def test_a_table_has_full_names_of_models_only_where_their_last_parts_are_equal():
    lines = format_table([make_run(name="/run-a/step-500"), make_run(name="/run-b/step-500")])
    assert [lines[1].split()[0], lines[-1].split()[0]] == ["/run-a/step-500", "/run-b/step-500"]
    lines = format_table([make_run(name="/run-a/step-500"), make_run(name="/run-b/step-600")])
    assert [lines[1].split()[0], lines[-1].split()[0]] == ["step-500", "step-600"]


def test_csv_has_every_point_at_full_precision(run, tmp_path):
    write_csv([run], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [point.key for point in run.points]
    for row, point in zip(rows, run.points, strict=True):
        for name in ("perplexity", "cut", "parameters", "mean_accuracy"):
            assert float(row[name]) == getattr(point, name)
        assert float(row["arc_easy"]) == point.tasks["arc_easy"].value
        assert float(row["arc_easy_stderr"]) == 0.013
    assert (rows[0]["base"], rows[0]["change_dense"], rows[1]["change_constant"]) == ("", "", "")
    where = ("model", "text", "split", "window_length", "seed")
    assert {tuple(row[name] for name in where) for row in rows} == {
        ("someone/small-model", "wikitext2", "test", "2048", "42")
    }
    constant, best = run.points[1], run.points[-1]
    assert float(rows[-1]["paired_se_constant"]) == paired_standard_error(best.nll, constant.nll)


# ---- labels


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("wikitext2", "wikitext2"),
        ("/work/texts/wikitext-2/wiki.{split}.txt", "wiki"),
        ("novels-{split}.jsonl.gz", "novels"),
        ("text_{split}.txt.xz", "text"),
        ("/work/novels/{split}.txt", "novels"),
        ("novels/{split}/{split}.parquet", "novels"),
        ("v1.5.txt", "v1.5"),
        ("{split}.txt", "text"),
        ("/{split}.txt", "text"),
    ],
)
def test_a_text_has_a_short_name(source, name):
    assert text_name(source) == name


def test_a_long_text_keeps_its_beginning_its_end_and_its_split():
    run = make_run(source="/texts/corpus-cleaned-and-deduplicated-v2.{split}.jsonl.gz")
    assert text_label(run) == "corpus-clean…ated-v2 test"
    assert len(text_label(run)) == 25
    assert text_label(make_run(source="novels.txt", split=None)) == "novels"


COMMON = "small-model, SP = 0.3, 2 rotations, calibrated at every point"


@pytest.mark.parametrize(
    ("others", "labels"),
    [
        ([{"mean": 0.2}], ["", COMMON.replace("0.3", "0.2")]),
        ([{"source": "ptb"}], [", wikitext2 test", ", ptb test"]),
        ([{"split": "validation"}], [", wikitext2 test", ", wikitext2 validation"]),
        ([{"seed": 7}], [", seed 42", ", seed 7"]),
        ([{"name": "/mine/small-model"}], [", someone/small-model", ", /mine/small-model"]),
        ([{"source": "ptb", "seed": 7}], [", wikitext2 test, seed 42", ", ptb test, seed 7"]),
        ([{"tasks": ()}], [", tasks: piqa, arc_easy", ", no tasks"]),
        ([{}, {}], [" (1)", " (2)", " (3)"]),
        ([{}, {"seed": 7}], [", seed 42 (1)", ", seed 42 (2)", ", seed 7"]),
    ],
    ids=["mean", "text", "split", "seed", "model", "text-and-seed", "tasks", "nothing", "seed-of-one"],
)
def test_labels_of_runs_say_what_differs(others, labels):
    expected = [label if label.startswith("small") else COMMON + label for label in labels]
    assert run_labels([make_run(**settings) for settings in [{}, *others]]) == expected


# ---- plots


def test_sweep_figure_has_labelled_panels_and_one_curve_a_run():
    runs = [make_run(), make_run(mean=0.2, rotations=1)]
    figure = sweep_figure(runs)
    perplexity, accuracy = figure.axes
    assert perplexity.get_ylabel() == "perplexity (wikitext2 test)"
    assert accuracy.get_ylabel() == "mean accuracy of 2 tasks"
    assert accuracy.get_xlabel().startswith("slice base SB")
    for axes, value in ((perplexity, "perplexity"), (accuracy, "mean_accuracy")):
        curves = [container.lines[0] for container in axes.containers]
        assert [len(curve.get_xdata()) for curve in curves] == [4, 3]
        assert list(curves[0].get_ydata()) == [getattr(point, value) for point in reversed(runs[0].points[1:])]
        level = {
            line.get_linestyle(): line.get_ydata()[0] for line in axes.lines if line.get_linestyle() in ("--", ":")
        }
        assert level == {":": getattr(runs[0].points[0], value), "--": getattr(runs[1].points[1], value)}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "small-model, dense",
        "small-model, SP = 0.3, 2 rotations, calibrated at every point",
        "small-model, SP = 0.2, 1 rotation, calibrated at every point",
        "constant slicing (SB = SP), the right end of each curve",
        "bars and band: one standard error of the accuracy",
    ]


def test_accuracy_has_error_bars_of_one_standard_error(run):
    bars = sweep_figure([run]).axes[1].containers[0].lines[2][0].get_segments()
    assert bars[0][1][1] - bars[0][0][1] == pytest.approx(2 * math.hypot(0.011, 0.013) / 2)


def test_dense_accuracy_has_a_band_of_one_standard_error(run):
    dense, error = run.points[0].mean_accuracy, math.hypot(0.011, 0.013) / 2
    perplexity, accuracy = sweep_figure([run]).axes
    (band,) = accuracy.patches
    assert (band.get_y(), band.get_height()) == pytest.approx((dense - error, 2 * error))
    assert len(perplexity.patches) == 0


def test_runs_without_tasks_have_no_accuracy_panel():
    figure = sweep_figure([make_run(tasks=())])
    assert len(figure.axes) == 1
    assert not any("accuracy" in text.get_text() for text in figure.legends[0].get_texts())


def legend(*runs: Results) -> dict[str, str]:
    """What each line and marker of the sweep figure stands for, and its colour."""
    box = sweep_figure(runs).legends[0]
    return {
        text.get_text(): handle.get_color()
        for text, handle in zip(box.get_texts(), box.legend_handles, strict=True)
        if hasattr(handle, "get_color")
    }


def test_each_dense_model_is_drawn_once_and_told_apart_by_text_and_full_name():
    assert legend(make_run(), make_run(mean=0.2), make_run(tasks=()))["small-model, dense"] == "black"
    texts = legend(make_run(), make_run(source="ptb", dense=30))
    assert texts["small-model, dense, wikitext2 test"] != texts["small-model, dense, ptb test"]
    names = legend(make_run(name="/a/step-500"), make_run(name="/b/step-500", dense=20))
    assert names["step-500, dense, /a/step-500"] != names["step-500, dense, /b/step-500"]


@pytest.mark.parametrize(
    ("tasks", "label"),
    [
        ([("piqa",), ("piqa",)], "accuracy"),
        ([("piqa", "arc_easy"), ("arc_easy", "piqa")], "mean accuracy of 2 tasks"),
        ([("piqa", "arc_easy"), ()], "mean accuracy of 2 tasks"),
        ([("piqa",), ("arc_easy",)], "accuracy\n(tasks differ between runs)"),
        ([("piqa", "arc_easy"), ("piqa",)], "mean accuracy\n(tasks differ between runs)"),
    ],
)
def test_the_accuracy_axis_says_where_the_tasks_differ(tasks, label):
    assert sweep_figure([make_run(tasks=names) for names in tasks]).axes[1].get_ylabel() == label


def test_the_accuracy_axis_counts_only_the_tasks_that_the_mean_is_of(run):
    for point in run.points:
        point.tasks["lambada"] = replace(point.tasks["piqa"], metric="perplexity")
    assert sweep_figure([run]).axes[1].get_ylabel() == "mean accuracy of 2 tasks"


def test_the_perplexity_axis_says_where_the_texts_differ(run):
    axes = sweep_figure([run, make_run(source="ptb")]).axes[0]
    assert axes.get_ylabel() == "perplexity\n(texts differ between runs)"


def test_perplexities_far_apart_get_a_logarithmic_axis(run):
    assert sweep_figure([run]).axes[0].get_yscale() == "linear"
    assert sweep_figure([run, make_run(dense=300)]).axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (62, 325, [60, 80, 100, 150, 200, 300, 400]),
        (5.3, 106, [5, 10, 20, 30, 50, 100, 200]),
        (5.2, 4000, [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]),
        (5.2, 522_000, [3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_numbers_on_both_sides_of_the_values(low, high, expected):
    assert log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        *((1.0, 5.1), (9.999, 60), (5.25, 106), (3.7, 400), (5.25, 5000), (62, 1e5), (5.25, 1e6), (1.0, 1e8)),
        *((9.999, 1e10), (5.25, 1e13), (5.25, 1e20), (5.25, 1e100)),
    ],
)
def test_labels_of_a_logarithmic_axis_do_not_overlap(low, high):
    run = make_run(tasks=())
    for index, point in enumerate(run.points):
        point.perplexity = low if index == 0 else high
    figure = sweep_figure([run])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = axes.get_yticklabels()
    assert len(labels) >= 5
    ticks, (bottom, top) = log_ticks(low, high), axes.get_ylim()
    assert bottom <= ticks[0] <= low
    assert high <= ticks[-1] <= top
    boxes = [label.get_window_extent() for label in labels]
    assert all(below.y1 < above.y0 for below, above in pairwise(boxes))
    assert boxes[-1].x0 >= 0


def test_extra_points_are_drawn_and_explained():
    texts = [text.get_text() for text in sweep_figure([make_run(equal=True, confirm=True)]).legends[0].get_texts()]
    assert texts[-3].startswith("constant slicing with as many parameters")
    assert texts[-2].startswith("confirmed")


LONG = {"name": "a/" + "long-name-" * 8, "source": "/texts/" + "long-text-" * 8 + "{split}.jsonl.gz"}


def assert_nothing_overlaps_or_lies_outside(figure: matplotlib.figure.Figure) -> None:
    """Panels and the legend stand below each other, and no axis label is longer than its panel."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [artist.get_tightbbox() for artist in [*figure.axes, *figure.legends]]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    for axes in figure.axes:
        assert axes.yaxis.label.get_window_extent().height <= axes.get_window_extent().height


@pytest.mark.parametrize("tasks", [(), ("piqa", "arc_easy")], ids=["perplexity", "tasks"])
@pytest.mark.parametrize(("count", "step"), [(1, 0.15), (1, 0.06), (1, 0.02), (2, 0.15), (6, 0.02)])
def test_nothing_overlaps_or_lies_outside_the_sweep_figure(count, step, tasks):
    runs = [make_run(**LONG, step=step, tasks=tasks, equal=True, confirm=True)]
    runs += [make_run(name=f"b/{'M' * 30}-{i}", dense=20 * 3**i, step=step, tasks=tasks[:i]) for i in range(1, count)]
    assert_nothing_overlaps_or_lies_outside(sweep_figure(runs))


def test_nothing_overlaps_or_lies_outside_the_figure_by_layer():
    assert_nothing_overlaps_or_lies_outside(redundancy_figure(make_run(**LONG)))


def test_redundancy_figure_shows_vector_and_widths_by_layer(run):
    figure = redundancy_figure(run)
    top, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches] == LR
    constant, best = (list(patch.get_data().values) for patch in bottom.patches)
    assert constant == run.points[1].widths
    assert best == run.points[-1].widths
    assert (bottom.get_xlabel(), bottom.get_ylabel()) == ("decoder layer", "width (hidden size kept)")
    assert top.get_ylabel() == "layer redundancy LR"


def test_layer_redundancy_has_error_bars_and_starts_at_0(run):
    for figure in (redundancy_figure(run), layer_redundancy_figure(run.redundancy, "small-model")):
        axes = figure.axes[0]
        assert axes.get_ylim()[0] == 0
        (bars,) = axes.collections
        assert [high - low for (_, low), (_, high) in bars.get_segments()] == pytest.approx([2 * 0.004 / 0.4] * 6)


def test_layers_with_equal_cosines_are_drawn_without_error_bars(run):
    figure = layer_redundancy_figure(replace(run.redundancy, cosine=[0.5] * 6), "small-model")
    assert len(figure.axes[0].patches) == 6
    assert len(figure.axes[0].collections) == 0


def test_a_run_without_redundancy_cannot_be_drawn_by_layer(run):
    run.redundancy = None
    with pytest.raises(InputError, match="no layer redundancy"):
        redundancy_figure(run)


def test_plots_of_unfinished_runs_are_written(run, tmp_path):
    for count in range(3):
        unfinished = replace(run, points=run.points[:count])
        plot_sweep([unfinished], tmp_path / "sweep.png")
        plot_redundancy(unfinished, tmp_path / "redundancy.png")
        assert (tmp_path / "sweep.png").stat().st_size > 5000
        assert (tmp_path / "redundancy.png").stat().st_size > 5000


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_figure_has_the_format_of_its_ending(run, tmp_path, ending):
    plot_layer_redundancy(run.redundancy, "small-model", tmp_path / f"lr.{ending}")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending]
    assert (tmp_path / f"lr.{ending}").read_bytes().startswith(start)


# ---- files


@pytest.mark.parametrize("name", ["results.csv", "sweep.png", "redundancy.png"])
def test_a_write_that_fails_leaves_the_old_file(run, tmp_path, monkeypatch, name):
    write_files([run], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"results.csv", "sweep.png", "redundancy.png"}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def partly_written(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"\x89PN")
        if name in path.name:
            full()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", partly_written)
    if name == "results.csv":
        monkeypatch.setattr(csv.DictWriter, "writerows", full)
    with pytest.raises(InputError, match=rf"can't write .*{name} \(No space left on device\)"):
        write_files([run], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    assert (tmp_path / name).read_bytes() == before[name]


def test_a_run_in_which_nothing_was_sliced_has_no_figures(tmp_path):
    dense = make_run(mean=0)
    check_results(dense)
    write_files([dense], tmp_path / "dense")
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {"results.csv"}
    write_files([dense, make_run()], tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"results.csv", "sweep.png"}


def test_a_plot_that_fails_costs_no_other_file_and_says_why(run, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("no\nfont")

    monkeypatch.setattr("slicing.report.plots._add_legend", fail)
    with pytest.raises(InputError, match=r"can't draw .*sweep\.png \(RuntimeError: no font\): the numbers are kept"):
        write_files([run], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "redundancy.png"}


ODD = {"name": "m$x_{$", "source": "/texts/a$\\x${split}.txt"}


def test_names_are_drawn_as_they_are(tmp_path):
    run = make_run(**ODD)
    write_files([run, make_run()], tmp_path)
    plot_redundancy(run, tmp_path / "redundancy.png")
    plot_layer_redundancy(run.redundancy, ODD["name"], tmp_path / "lr.svg")
    figures = [sweep_figure([run]), redundancy_figure(run), layer_redundancy_figure(run.redundancy, "m$x_{$")]
    texts = [text for figure in figures for text in figure.findobj(matplotlib.text.Text) if "$" in text.get_text()]
    assert len(texts) >= 4
    assert not any(text.get_parse_math() for text in texts)
    assert figures[0].axes[0].get_ylabel() == r"perplexity (a$\x$ test)"


def test_names_that_are_not_utf_8_are_written_and_drawn(tmp_path, capsys):
    run = make_run(name="m\udce9\n", source="caf\udce9.txt")
    assert main([str(save(run, tmp_path / "a")), str(save(make_run(), tmp_path / "b")), "--output", str(tmp_path)]) == 0
    assert "m\ufffd\ufffd" in capsys.readouterr().out
    assert r"caf\udce9.txt" in (tmp_path / "results.csv").read_text("utf-8")


def test_a_sliced_model_is_not_called_dense(tmp_path):
    sliced = make_run(mean=0, name="a/mine")
    sliced.model.model_type = "sliced"
    assert format_row(sliced.points[0], sliced).startswith("sliced model  ")
    assert len(header(sliced).split("\n")[1]) == len(format_row(sliced.points[0], sliced))
    assert "mine, sliced model" in legend(sliced, make_run())
    write_csv([sliced], tmp_path / "a.csv")
    assert "sliced model" in (tmp_path / "a.csv").read_text()


def test_figures_need_neither_a_notebooks_backend_nor_a_good_matplotlibrc(run, tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"text.usetex: True\nfont.size: 40\n# caf\xe9\n")
    environment = {"MPLBACKEND": "module://no_such_package.backend", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    command = [sys.executable, "-m", "slicing.report", str(save(run, tmp_path / "run"))]
    subprocess.run(
        command, check=True, env=os.environ | environment, cwd=Path(__file__).parents[1], capture_output=True
    )
    plot_sweep([run], tmp_path / "sweep.png")
    assert (tmp_path / "run" / "sweep.png").read_bytes() == (tmp_path / "sweep.png").read_bytes()


@pytest.mark.parametrize("coding", ["ascii", "utf-8"])
def test_the_table_is_printed_with_what_the_terminal_can_show(run, tmp_path, monkeypatch, coding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=coding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("slicing.report.table.write_files", lambda *_: None)
    assert main([str(save(run, tmp_path / "run"))]) == 0
    text = stream.buffer.getvalue().decode(coding)
    _, titles, rule, *rows = text.splitlines()
    assert "0.011" in rows[0]
    assert (" ±" if coding == "utf-8" else "+-") in rows[0]
    assert {len(row) for row in rows[:5]} == {len(titles), len(rule)}


# ---- command


def test_report_of_one_run_writes_beside_it(run, tmp_path, capsys):
    folder = save(run, tmp_path / "run")
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[:3] == header(run).split("\n")
    assert lines[3:8] == [format_row(point, run) for point in run.points]
    assert lines[8].startswith("Best dynamic point")
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.csv", "sweep.png", "redundancy.png"}
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_two_runs_is_one_table_and_one_figure(tmp_path, capsys):
    folders = [save(make_run(), tmp_path / "a"), save(make_run(name="x/other", mean=0.2), tmp_path / "b")]
    output = tmp_path / "new" / "report"
    assert main([*map(str, folders), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert text.count("perplexity  ") == 1
    assert text.count("small-model  ") == 5
    assert text.count("other  ") == 4
    assert "other, SP = 0.2, 2 rotations, calibrated at every point: Best dynamic point" in text
    assert {path.name for path in output.iterdir()} == {"results.csv", "sweep.png", "size.png"}
    assert len((output / "results.csv").read_text().splitlines()) == 1 + 5 + 4


def test_lines_below_a_table_of_equal_runs_say_which_run_they_are_of(tmp_path, capsys):
    folders = [save(make_run(seed=seed), tmp_path / str(seed)) for seed in (1, 2)]
    assert main([*map(str, folders), "--each-seed"]) == 0
    text = capsys.readouterr().out
    for seed in (1, 2):
        assert f"{COMMON}, seed {seed}: Best dynamic point" in text


def test_an_output_folder_that_cannot_be_written_ends_in_exit_code_2(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(save(run, tmp_path / "run")), "--output", str(tmp_path / "file" / "report")]) == 2
    assert re.fullmatch(r"error: can't write .*results\.csv \(.*\): choose another place\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: FOLDER"), (["run", "--out", "x"], "unrecognized arguments: --out x")],
    ids=["no-folder", "short-flag"],
)
def test_a_wrong_command_line_ends_in_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert re.fullmatch(rf"error: .*{message}; see --help\n", capsys.readouterr().err)


def test_help_has_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m slicing.report ")


def test_ctrl_c_ends_in_one_line_and_exit_code_130(run, tmp_path, capsys, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slicing.report.table.plot_sweep", interrupt)
    assert main([str(save(run, tmp_path / "run"))]) == 130
    assert capsys.readouterr().err == "interrupted\n"
