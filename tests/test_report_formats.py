"""The report's formats, columns and width; runs with several seeds as one; the figure of sizes."""

import csv
import io
import re
from pathlib import Path

import pytest
from msgspec.structs import replace
from test_accuracy import paired_run, with_documents
from test_report import make_run, save

from slicing.experiment.comparison import compare, dense_point
from slicing.experiment.results import Results, Task
from slicing.report.column import chosen
from slicing.report.columns import columns_for
from slicing.report.csv_file import csv_rows
from slicing.report.formats import latex
from slicing.report.labels import run_labels
from slicing.report.seeds import PooledPoint, pooled
from slicing.report.size_plot import size_curves, size_figure
from slicing.report.table import main
from slicing.task_scores import document_scores


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose accuracies can be compared in pairs; nothing is drawn."""
    for name in ("plot_sweep", "plot_redundancy", "plot_size"):
        monkeypatch.setattr(f"slicing.report.table.{name}", lambda *_: None)
    run = paired_run()
    run.tasks = {name: Task("1.0", f"hash-{name}", 2) for name in ("piqa", "arc_easy")}
    run.arguments |= {"round_interval": 8, "accuracy_limit": 100, "num_fewshot": 2}
    return save(run, tmp_path / "run")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_table_names_metric_and_shots_and_compares_in_pairs(folder, capsys):
    first, second, _, dense, constant, *rest = printed(capsys, folder).splitlines()
    for title, name in (("acc 2-shot", "piqa"), ("acc 2-shot", "arc_easy"), ("mean of 2", "accuracy")):
        end = second.index(f" {name}") + 1 + len(name)
        assert first[:end].endswith(title)
    assert re.search(r"0\.\d{3} ±0\.\d{3} +- +- +\d+$", dense)
    assert re.search(r" -0\.188 ±0\.140 +- +\d+$", constant)
    assert rest[-1] == "Mean accuracy: of piqa (acc 2-shot, 8 documents), arc_easy (acc 2-shot, 4 documents)."


def test_markdown_has_a_row_a_point(folder, capsys):
    head, marks, *rows = printed(capsys, folder, "--format", "markdown").splitlines()
    assert head.startswith("| point | SB | SP | perplexity | against dense | paired SE(ln) |")
    assert marks.count("---") == head.count("|") - 1 == rows[0].count("|") - 1
    assert [row.split()[1] for row in rows] == ["dense", "constant", *["dynamic"] * 3]


def test_latex_is_a_tabular_of_booktabs(folder, capsys):
    lines = printed(capsys, folder, "--format", "latex").splitlines()
    assert re.fullmatch(r"\\begin\{tabular\}\{lr+\}", lines[0])
    assert [line for line in lines if line.startswith("\\") and "begin" not in line] == [
        r"\toprule",
        *[r"\midrule"] * 2,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    text = "\n".join(lines)
    assert r"arc\_easy" in text
    assert r"$\pm$" in text
    assert "$+$" in text
    assert "%" not in text.replace(r"\%", "")
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len({row.count("&") for row in rows}) == 1
    assert len(rows) == 2 + 5


def test_a_dense_model_that_runs_share_has_one_row(capsys, folder, tmp_path):
    beside = save(make_run(mean=0.2), tmp_path / "beside")
    other = save(make_run(mean=0.1, dense=20.0), tmp_path / "other")
    again = save(make_run(mean=0.1), tmp_path / "again")
    rows = printed(capsys, beside, other, again, "--format", "markdown", "--columns", "point", "SP").splitlines()[2:]
    kinds = [row.split()[1] for row in rows]
    assert kinds.count("dense") == 2  # the other one has another perplexity
    assert kinds[0] == "dense"
    assert kinds.count("constant") == 3
    lines = printed(capsys, beside, again, "--format", "latex", "--columns", "point", "SP").splitlines()
    assert lines.count(r"\midrule") == 3
    assert printed(capsys, beside, again, "--format", "csv", "--columns", "kind").splitlines().count("dense") == 2


def test_signs_of_latex_in_names_are_escaped():
    run = make_run(name="a/b_c%d&e#f", tasks=())
    lines = latex(chosen(columns_for([run]), ["model", "point"]), [run])[5:-2]
    (row,) = {line.split(" & ")[0] for line in lines if line != r"\midrule"}
    assert row == r"b\_c\%d\&e\#f"


def test_csv_on_stdout_is_the_file_or_chosen_columns_of_it(folder, capsys):
    assert printed(capsys, folder, "--format", "csv") == (folder / "results.csv").read_text().replace("\r\n", "\n")
    text = printed(capsys, folder, "--format", "csv", "--columns", "base", "perplexity")
    assert text.splitlines()[0] == "base,perplexity"
    assert len(list(csv.DictReader(io.StringIO(text)))) == 5


def test_a_row_of_the_csv_says_what_it_is(folder, capsys):
    row = list(csv.DictReader(io.StringIO(printed(capsys, folder, "--format", "csv"))))[1]
    settings = ("calibration_text", "calibration_samples", "calibration_length", "round_interval", "dtype", "windows")
    assert all(row[name] for name in (*settings, "window_length", "limit", "shots"))
    assert (row["limit"], row["shots"], row["round_interval"]) == ("100", "2", "8")
    task = ("piqa_metric", "piqa_shots", "piqa_version", "piqa_hash", "piqa_documents")
    assert [row[name] for name in task] == ["acc", "2", "1.0", "hash-piqa", "8"]
    assert float(row["piqa_against_dense"]) == pytest.approx(-1 / 8)
    assert float(row["piqa_paired_se_dense"]) == pytest.approx(1 / 8)
    assert row["piqa_against_constant"] == ""
    assert row["mean_accuracy_of"].startswith("piqa (acc 2-shot, 8 documents); arc_easy")


def test_columns_are_chosen_in_the_order_given(folder, capsys):
    lines = printed(capsys, folder, "--columns", "perplexity", "SB", "piqa:constant", "memory_perplexity").splitlines()
    assert lines[1].split() == ["perplexity", "SB", "piqa", "perplexity"]
    assert "against constant" in lines[0]
    assert main([str(folder), "--columns", "colour"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: there is no column 'colour': the columns are .*perplexity.*\n", error)
    assert main([str(folder), "--columns", "colour", "--format", "csv"]) == 2


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_table_is_no_wider_than_the_terminal_unless_asked(folder, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([str(folder)]) == 0
    narrow = capsys.readouterr()
    assert max(map(len, narrow.out.splitlines())) <= width
    assert f"left out to fit {width} characters: seconds" in narrow.err
    assert max(map(len, printed(capsys, folder, "--wide").splitlines())) > 120


# ---- settings


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [("round_interval", 64, "multiples of"), ("accuracy_limit", 7, "documents a task")],
)
def test_labels_and_rows_say_in_which_setting_runs_differ(argument, value, words):
    task = {"piqa": Task(None, "x", 0)}
    runs = [replace(make_run(), tasks=task, arguments={argument: given}) for given in (8, value)]
    assert all(words in label for label in run_labels(runs))
    assert len(set(run_labels(runs))) == 2
    column = "round_interval" if argument == "round_interval" else "limit"
    assert column in [one.name for one in chosen(columns_for(runs, labelled=True), None)]
    assert column not in [one.name for one in chosen(columns_for(runs[:1] * 2, labelled=True), None)]


# ---- seeds


def seeded(seed: int, factor: float) -> Results:
    run = replace(paired_run(), seed=seed, arguments={"seed": seed, "mean": 0.3})
    run.points = [
        point
        if point.kind == "dense"
        else replace(point, key=f"{point.key}-{seed}", perplexity=factor * point.perplexity)
        for point in run.points
    ]
    return run


def test_runs_that_differ_by_their_seed_are_one_with_the_spread_over_seeds():
    runs = [seeded(seed, factor) for seed, factor in ((1, 0.9), (2, 1.0), (3, 1.1))]
    (one,) = pooled(runs)
    dense, constant = one.points[:2]
    assert dense == runs[0].points[0]
    assert isinstance(constant, PooledPoint)
    middle = runs[1].points[1].perplexity
    assert (constant.seeds, constant.perplexity) == (3, pytest.approx(middle))
    assert constant.perplexity_sd == pytest.approx(0.1 * middle)
    assert constant.accuracy_sd == 0
    assert compare(constant, dense)[1] == pytest.approx(compare(runs[1].points[1], dense_point(runs[1]))[1])
    names = [column.name for column in chosen(columns_for([one]), None)]
    assert {"seeds", "perplexity_sd", "accuracy_sd"} <= set(names)
    row = csv_rows([one])[1][1]
    assert (row["seeds"], row["perplexity_sd"]) == (3, pytest.approx(0.1 * middle))
    assert row["piqa_paired_se_dense"] == pytest.approx(1 / 8)


def test_a_row_of_several_seeds_names_none_of_them():
    one, two, three = seeded(1, 1.0), seeded(2, 1.0), seeded(3, 1.0)
    other = replace(three, arguments={**three.arguments, "rotations": 1})
    runs = pooled([one, two, other])
    (seed,) = chosen(columns_for(runs, labelled=True), ["seed"])
    assert [seed.cell(point, run) for run in runs for point in run.points[:2]] == ["-", "-", "3", "3"]
    assert seed.shown
    assert [row["seed"] for row in csv_rows(runs)[1]][:: len(one.points)] == [None, 3]
    assert [label.rpartition(", ")[2] for label in run_labels(runs)] == ["mean over seeds", "seed 3"]


def test_other_runs_and_the_same_seed_twice_stay_apart():
    one, two = seeded(1, 1.0), seeded(2, 1.0)
    other = replace(two, arguments={**two.arguments, "rotations": 1})
    assert pooled([one, other]) == [one, other]
    assert pooled([one, one]) == [one, one]
    assert [isinstance(run.points[1], PooledPoint) for run in pooled([one, other, two])] == [True, False]


def test_scores_of_documents_are_pooled_one_by_one():
    runs = [replace(make_run(), seed=seed) for seed in (1, 2)]
    for run, kept in zip(runs, ("1100", "1010"), strict=True):
        run.points = [replace(with_documents(run.points[1], piqa=kept), key=kept)]
    score = pooled(runs)[0].points[0].tasks["piqa"]
    assert document_scores(score.metrics["acc"]) == [1, 0.5, 0.5, 0]
    assert score.value == 0.5


# ---- sizes


def test_runs_that_cut_the_inner_width_alone_are_one_curve_over_their_means_without_rotations():
    runs = [make_run(mean=mean) for mean in (0.1, 0.2)]
    for run, mean in zip(runs, (0.1, 0.2), strict=True):
        run.arguments |= {"mean": 0.0, "inner_mean": mean}
        for point in run.points[1:]:
            point.inner_mean, point.inner_base, point.refit = point.mean, point.base, True
    name = "small-model, inner width, calibrated at every point, refit"
    assert [label for label, _ in size_curves(runs)] == [f"{name}, constant", f"{name}, dynamic, best SB"]
    (rotations,) = chosen(columns_for(runs), ["rotations"])
    assert {rotations.cell(point, run) for run in runs for point in run.points} == {"-"}
    assert run_labels(runs)[0] == "small-model, inner SP = 0.1, calibrated at every point, refit"


def test_size_figure_has_a_curve_of_constant_and_one_of_dynamic_slicing():
    runs = [make_run(mean=mean) for mean in (0.1, 0.2, 0.3)]
    curves = dict(size_curves(runs))
    assert list(curves) == [
        "small-model, 2 rotations, calibrated at every point, constant",
        "small-model, 2 rotations, calibrated at every point, dynamic, best SB",
    ]
    assert all(len(points) == 3 for points in curves.values())
    figure = size_figure(runs)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_ylabel() == "perplexity\n(wikitext2 test)"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted([*curves, "small-model, dense"])
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert line.get_xdata()[0] == pytest.approx(134.5)
