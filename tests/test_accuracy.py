"""Scores of single documents: those of lm-eval, kept compactly, and what differences between two models they give."""

import copy
import json
import math
import statistics
from typing import Any

import pytest
from msgspec.structs import replace
from test_evaluation import TASKS, reader, tiny_model, tokenizer  # noqa: F401
from test_report import make_run

from slicing.experiment.comparison import mean_accuracy, mean_accuracy_change, mean_accuracy_error, score_change
from slicing.experiment.results import Point, Results, check_results
from slicing.families import InputError
from slicing.structure import as_json
from slicing.task_scores import Metric, TaskScore, document_scores, task_score
from slicing.task_set import resolve_tasks
from slicing.tasks import evaluate_tasks


def lm_eval_samples(model: Any, tokenizer: Any, name: str) -> list[dict[str, Any]]:  # noqa: F811
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    wrapper = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
    samples: list[dict[str, Any]] = simple_evaluate(wrapper, tasks=[name], task_manager=manager)["samples"][name]
    return samples


def test_scores_of_documents_are_those_of_lm_eval(reader: Any, tokenizer: Any) -> None:  # noqa: F811
    (alone, together) = (
        evaluate_tasks(reader, tokenizer, resolve_tasks([name], TASKS), progress=False)[name]
        for name in ("tiny_endings", "tiny_group")
    )
    samples = lm_eval_samples(reader, tokenizer, "tiny_endings")
    for metric, found in alone.metrics.items():
        assert document_scores(found) == [sample[metric] for sample in samples]
        assert set(found.documents) <= {"0", "1"}
    whole = document_scores(together.metrics["acc"])
    assert whole is not None
    assert whole[: len(samples)] == document_scores(alone.metrics["acc"])
    assert statistics.fmean(whole) == pytest.approx(together.value)
    json.dumps(as_json([alone, together]), allow_nan=False)


@pytest.mark.parametrize(
    ("value", "given", "kept"),
    [
        (0.75, [1, 0, True, 1.0], "1011"),
        (0.5, [0.25, 0.75], [0.25, 0.75]),
        (0.3, [1, 0], None),  # no mean: a correlation, say
        (0.5, [(1, 2), (0, 3)], None),
        (0.5, [], None),
        (1.0, [1.0, float("nan")], None),
    ],
)
def test_scores_of_documents_are_kept_where_the_metric_is_their_mean(value: float, given: Any, kept: Any) -> None:
    metric = task_score({"acc,none": value, "acc_stderr,none": 0.1}, {"acc,none": given}).metrics["acc"]
    assert metric.documents == kept


def test_scores_of_documents_that_are_no_digits_are_refused() -> None:
    run = paired_run()
    check_results(run)
    run.points[1].tasks["piqa"].metrics["acc"].documents = "01x"
    with pytest.raises(
        InputError, match=r"metrics\.acc\.documents is '01x' of type str: it must be digits 0 and 1 or numbers"
    ):
        check_results(run)


def with_documents(point: Point, **documents: str) -> Point:
    """A point with these scores of documents in place of its tasks."""
    tasks = {}
    for name, kept in documents.items():
        value = kept.count("1") / len(kept)
        tasks[name] = TaskScore("acc", value, 0.1, None, len(kept), {"acc": Metric(value, 0.1, kept)})
    mean = statistics.fmean(score.value for score in tasks.values())
    return replace(point, tasks=tasks, mean_accuracy=mean)


def paired_run() -> Results:
    """A run whose points have scores of documents."""
    run = make_run()
    kept = [("11110000", "1111"), ("11010000", "0111"), ("11010010", "0111")]
    kept += [kept[-1]] * (len(run.points) - len(kept))
    points = [with_documents(point, piqa=a, arc_easy=b) for point, (a, b) in zip(run.points, kept, strict=True)]
    return replace(run, points=points)


def test_the_error_of_a_difference_is_that_of_the_pairs() -> None:
    dense, constant, *_ = paired_run().points
    difference, error = score_change(constant, dense, "piqa")
    assert difference == pytest.approx(-1 / 8)
    assert error == pytest.approx(statistics.stdev([0, 0, -1, 0, 0, 0, 0, 0]) / math.sqrt(8))
    both = score_change(constant, dense, "arc_easy")[1]
    assert mean_accuracy_change(constant, dense) == (
        pytest.approx((-1 / 8 - 1 / 4) / 2),
        pytest.approx(math.hypot(error or 0, both or 0) / 2),
    )


def test_what_can_not_be_compared_has_no_difference_or_no_error() -> None:
    dense, constant, *_ = paired_run().points
    assert score_change(dense, dense, "piqa") == mean_accuracy_change(constant, None) == (None, None)
    assert score_change(constant, dense, "boolq") == (None, None)
    assert mean_accuracy_change(constant, with_documents(dense, piqa="10")) == (None, None)
    shorter = with_documents(dense, piqa="10", arc_easy="11")
    assert score_change(constant, shorter, "piqa") == (pytest.approx(3 / 8 - 1 / 2), None)
    old = make_run().points  # from before documents were kept
    assert score_change(old[1], old[0], "piqa")[1] is mean_accuracy_change(old[1], old[0])[1] is None


def test_only_accuracies_are_averaged() -> None:
    accuracy = TaskScore("acc_norm", 0.5, 0.1, None, 9, {})
    perplexity_score = TaskScore("word_perplexity", 50.0, None, None, 9, {})
    assert mean_accuracy({"a": accuracy, "b": replace(accuracy, value=0.7), "c": perplexity_score}) == 0.6
    assert mean_accuracy({"c": perplexity_score}) is None
    assert mean_accuracy({"a": accuracy, "b": replace(accuracy, value=None)}) is None
    point = replace(make_run().points[1], tasks={"a": accuracy, "c": perplexity_score})
    assert mean_accuracy_error(point) == 0.1
