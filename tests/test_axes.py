"""The second script with the gradient metric, the refit and the inner width: what it measures, keeps and refuses."""

import csv
import re

import pytest
from tiny_models import HIDDEN, INNER, LAYERS
from tiny_runs import VECTOR, Runs

import mean_cut_accuracy_experiments as script
from slicing.experiment.comparison import constant_point
from slicing.families import InputError
from slicing.modeling import SlicedForCausalLM, count_parameters
from slicing.report.labels import run_label
from slicing.report.table import format_table, write_csv
from slicing.schedule import inner_widths

MANY = ("--calibration-samples", "24", "--calibration-length", "32")  # enough tokens to solve on


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("axes"))


def test_both_axes_have_the_same_part_in_every_layer(runs, tmp_path):
    more = ("--inner-mean", "0.2", "--metric", "gradient", "--refit", "--save-model", "best", *MANY)
    folder, results = runs.run("both", *more)
    dense, constant, *dynamic = results.points
    assert (dense.metric, dense.refit, dense.inner_widths) == (None, None, None)
    for point in (constant, *dynamic):
        assert (point.metric, point.refit, point.inner_mean) == ("gradient", True, 0.2)
        assert point.inner_base / 0.2 == pytest.approx(point.base / 0.3)
        assert all(width % 8 == 0 for width in point.inner_widths)
        assert sum(point.inner_widths) == pytest.approx(0.8 * LAYERS * INNER, abs=8)
    assert dynamic[-1].inner_widths[0] == INNER  # LR 0 and SB 0: nothing goes
    assert dynamic[-1].inner_widths == inner_widths([0, 0.6, 1], [INNER] * 3, mean=0.2, base=0.0)
    (saved,) = folder.glob("models/*")
    model = SlicedForCausalLM.from_pretrained(saved)
    best = min((constant, *dynamic), key=lambda point: point.perplexity)
    assert model.config.inner_widths == best.inner_widths
    assert count_parameters(model) == best.parameters
    assert "writers solved anew" in (saved / "README.md").read_text()
    lines = "\n".join(format_table([results]))
    assert "gradient" in lines
    assert "inner" in lines
    assert run_label(results).endswith(
        "SP = 0.3, inner 0.2, 2 rotations, calibrated at every point, gradient metric, refit"
    )
    write_csv([results], tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["inner_mean"] for row in rows] == ["", *["0.2"] * (len(rows) - 1)]
    assert rows[-1]["metric"] == "gradient"


def test_the_inner_width_alone_leaves_the_stream(runs):
    _, results = runs.run(
        "inner", "--inner-mean", "0.3", "--vector-cut", *VECTOR, "--compare", "equal-parameters", *MANY, mean=0
    )
    points = [point for point in results.points if point.kind == "sweep"]
    assert [point.amount for point in points] == pytest.approx([0, 0.1, 0.2, 0.3])
    for point in results.points[1:]:
        assert point.widths == [HIDDEN] * LAYERS
        assert point.slices == [0.0] * LAYERS
        assert (point.base, point.mean) == (point.inner_base, point.inner_mean)
    assert constant_point(results) is points[0]
    assert points[0].inner_widths == [0.75 * INNER] * LAYERS  # the multiple of 8 that is next to 0.7 of it
    assert points[0].cut == pytest.approx(0.25 * 3 * INNER * (3 * HIDDEN + 2) / results.model.parameters, rel=0.1)
    (equal,) = [point for point in results.points if point.kind == "equal-parameters"]
    best = min(points[1:], key=lambda point: point.perplexity)
    assert abs(equal.parameters - best.parameters) <= 8 * (3 * HIDDEN + 2)
    assert "inner SP = 0.3" in run_label(results)


def test_equal_parameters_scale_both_axes(runs):
    _, results = runs.run("equal", "--inner-mean", "0.2", "--compare", "equal-parameters", "--step", "0.3", *MANY)
    (equal,) = [point for point in results.points if point.kind == "equal-parameters"]
    assert equal.inner_mean / equal.mean == pytest.approx(0.2 / 0.3)
    best = results.points[2]
    assert abs(equal.parameters / best.parameters - 1) < 0.02


def test_points_and_keys_of_plain_runs_are_as_before(runs):
    folder, results = runs.run("plain", "--step", "0.3")
    again, same = runs.run("plain-again", "--step", "0.3", "--metric", "pca", "--inner-mean", "0")
    assert folder.name == again.name
    assert [point.key for point in results.points] == [point.key for point in same.points]
    _, other = runs.run("other", "--step", "0.3", "--metric", "gradient")
    keys = {point.key for point in results.points[1:]} & {point.key for point in other.points[1:]}
    assert not keys


def test_one_calibration_takes_the_metric_too(runs):
    _, results = runs.run("once", "--calibration", "once", "--metric", "gradient", "--step", "0.3")
    assert {point.metric for point in results.points[1:]} == {"gradient"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--refit", "--calibration", "once"), "--refit needs --calibration every-point"),
        (("--inner-mean", "0.2", "--calibration", "once"), "--inner-mean needs --calibration every-point"),
        (("--refit", "--find-base"), "--refit can't be searched with --find-base"),
        (("--mean", "0", "--refit"), "--refit needs a mean above 0"),
        (("--mean", "0", "--metric", "gradient", "--inner-mean", "0.2"), "--metric gradient is of the bases"),
        (("--inner-mean", "0.9"), "--inner-mean is 0.9: it must be at most 0.875"),
        (("--inner-mean", "1"), r"the mean cut is 1: it must lie in \[0, 1\)"),
        (("--refit", "--calibration-samples", "2"), "refit: 32 calibration tokens are too few for the"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(runs, capsys, arguments, message):
    assert script.main(runs.arguments("refused", *arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1]), lines


def test_inner_widths_by_size():
    vector = [0.0, 0.5, 1.0, 0.5]
    assert inner_widths(vector, [64, 0, 128, 64], mean=0.25, base=0.25) == [48, 0, 96, 48]
    assert set(inner_widths(vector, [64] * 4, mean=0.3, base=0.3)) == {40, 48}
    assert inner_widths(vector, [64, 0, 128, 64], mean=0.3, base=0.3, alike=True) == [48, 0, 88, 48]
    found = inner_widths(vector, [64] * 4, mean=0.25, base=0.0)
    assert found[0] == 64
    assert sum(found) == 192
    with pytest.raises(InputError, match="no layer of the model has an MLP"):
        inner_widths(vector, [0] * 4, mean=0.25, base=0.0)
    with pytest.raises(InputError, match="widths in multiples of 100: at most 64"):
        inner_widths(vector, [64] * 4, mean=0.25, base=0.0, multiple=100)
