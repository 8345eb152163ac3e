"""lm-eval tasks that are damaged, change or move: what is refused, what a failure costs, what a score depends on."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluation import TASKS, reader, tiny_model, tokenizer  # noqa: F401

from slicing import layer_redundancy
from slicing.families import InputError
from slicing.structure import as_json
from slicing.task_content import task_content
from slicing.task_set import resolve_tasks
from slicing.tasks import TaskSet, check_tokens, evaluate_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny tasks, to be changed."""
    return shutil.copytree(TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))


def write_task(folder: Path, name: str, *, code: str = "", base: str = "tiny_colours", **settings: str) -> None:
    """A task like another but for these settings, as YAML writes them; `code` is that of the module own.py."""
    lines = [f"include: {base}.yaml", f"task: {name}", *(f"{key}: {value}" for key, value in settings.items())]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    (folder / "own.py").write_text(code)


# ---- refused before a model is loaded

DAMAGED: dict[str, tuple[dict[str, str], str]] = {
    "a package that is not installed": (
        {"doc_to_text": "!function own.text", "code": "import not_installed_here"},
        "ModuleNotFoundError: No module named 'not_installed_here'",
    ),
    "a function that is not there": ({"doc_to_text": "!function own.text"}, "AttributeError: .*no function 'text'"),
    "an unknown field in the prompt": ({"doc_to_text": "'{{nothing}}'"}, "UndefinedError: 'nothing' is undefined"),
    "an unknown field in the answer": ({"doc_to_target": "'{{nothing}}'"}, "UndefinedError: 'nothing' is undefined"),
    "a function that raises": (
        {"doc_to_text": "!function own.text", "code": "def text(document):\n    return document['body']"},
        "KeyError: 'body'",
    ),
    "documents whose function raises": (
        {"process_docs": "!function own.process", "code": "def process(documents):\n    return documents['x']"},
        "ValueError: Column 'x' doesn't exist",
    ),
    "a split that is not there": ({"test_split": "exam"}, "KeyError: 'exam'"),
    "examples that are not there": ({"fewshot_split": "exam"}, "KeyError: 'exam'"),
    "an unknown filter": ({"filter_list": "[{name: x, filter: [{function: sieve}]}]"}, "KeyError: .*sieve"),
    "an unknown output type": ({"output_type": "telepathy"}, "ValueError: .*invalid output_type 'telepathy'"),
    "an unknown setting": ({"colour": "red"}, "TypeError: .*unexpected keyword argument 'colour'"),
    "no documents": ({"dataset_kwargs": "{data_files: {test: empty.jsonl}}"}, "IndexError: "),
    "a function that ends the program": (
        {"doc_to_text": "!function own.text", "code": "def text(document):\n    exit('a key is needed')"},
        "SystemExit: a key is needed",
    ),
    "no words for an error": (
        {"doc_to_text": "!function own.text", "code": "def text(document):\n    raise TypeError"},
        "TypeError in text",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_task_that_can_not_be_used_is_one_line_with_its_name_and_the_reason(folder: Path, case: str) -> None:
    settings, reason = DAMAGED[case]
    (folder / "empty.jsonl").write_text("")
    write_task(folder, "damaged", **settings)
    with pytest.raises(InputError, match=rf"^task damaged can't be used \({reason}[^\n]*\): mend .*damaged\.yaml, or"):
        _ = resolve_tasks(["tiny_endings", "damaged"], folder).loaded


def test_the_member_of_a_group_or_tag_that_can_not_be_used_is_named(folder: Path) -> None:
    write_task(folder, "damaged", doc_to_text="'{{nothing}}'", tag="mixed")
    (folder / "group.yaml").write_text("group: inner\ntask: [tiny_endings, damaged]\n")
    (folder / "outer.yaml").write_text("group: outer\ntask: [inner]\n")
    for name in ("outer", "mixed"):
        with pytest.raises(InputError, match=r"^task damaged can't be used"):
            _ = resolve_tasks([name], folder).loaded


def test_groups_of_unknown_tasks_or_of_themselves_are_refused(folder: Path) -> None:
    (folder / "gaps.yaml").write_text("group: gaps\ntask: [tiny_endings, qqqq]\n")
    with pytest.raises(InputError, match=r"group gaps names the task 'qqqq', which is unknown: mend .*gaps\.yaml"):
        resolve_tasks(["gaps"], folder)
    (folder / "empty.yaml").write_text("group: empty\ntask: []\n")
    with pytest.raises(InputError, match=r"the group empty has no tasks: mend .*empty\.yaml"):
        _ = resolve_tasks(["empty"], folder).loaded
    (folder / "one.yaml").write_text("group: one\ntask: [two]\n")
    (folder / "two.yaml").write_text("group: two\ntask: [one]\n")
    with pytest.raises(InputError, match=r"group one contains itself \(one > two > one\): mend .*one\.yaml"):
        resolve_tasks(["one"], folder)


def test_a_file_that_lm_eval_leaves_out_silently_is_named(folder: Path) -> None:
    (folder / "broken_for_test.yaml").write_text("task: broken_for_test\nmetric_list: [\n")
    with pytest.raises(
        InputError, match=r"task 'broken_for_test' can't be used: .*broken_for_test\.yaml can't be read \(ParserError"
    ):
        resolve_tasks(["broken_for_test"], folder)


def test_a_name_that_no_file_of_lm_eval_has_is_refused_without_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: pytest.fail("the index takes ten seconds"))
    with pytest.raises(InputError, match=r"task 'hellaswagg' is unknown: did you mean hellaswag"):
        resolve_tasks(["hellaswagg"])


def test_documents_that_a_task_shuffles_are_the_same_each_time(folder: Path) -> None:
    code = (
        "import random\ndef process(documents):\n    order = list(range(len(documents)))\n    random.shuffle(order)\n"
    )
    write_task(
        folder, "shuffled", process_docs="!function own.process", code=code + "    return documents.select(order)"
    )
    found = [[document["question"] for document in _documents(folder, "shuffled")] for _ in range(2)]
    assert found[0] == found[1]
    assert found[0] != [document["question"] for document in _documents(folder, "tiny_colours")]


def _documents(folder: Path, name: str) -> Any:
    return resolve_tasks([name], folder).loaded.tasks[name].eval_docs


# ---- token ids


def ids_beyond(vocabulary: int, name: str, folder: Path, tokenizer: Any) -> None:  # noqa: F811
    check_tokens(resolve_tasks([name], folder), tokenizer, vocabulary)


def test_token_ids_outside_the_vocabulary_are_refused(folder: Path, tokenizer: Any) -> None:  # noqa: F811
    write_task(
        folder, "written", output_type="generate_until", doc_to_choice="null", metric_list="[{metric: exact_match}]"
    )
    write_task(folder, "rolled", output_type="loglikelihood_rolling", metric_list="[{metric: word_perplexity}]")
    more = copy.deepcopy(tokenizer)  # 256 bytes, then the end token 256
    more.add_tokens(["colour"])  # 257
    ids_beyond(258, "tiny_colours", folder, more)
    ids_beyond(257, "tiny_endings", folder, more)
    with pytest.raises(InputError, match=r"task tiny_colours has the token 'colour', of id 257, .*ends at 256"):
        ids_beyond(257, "tiny_colours", folder, more)
    ids_beyond(257, "rolled", folder, tokenizer)
    with pytest.raises(InputError, match=r"begin token, which the task rolled needs, has id 256, .*ends at 255"):
        ids_beyond(256, "rolled", folder, tokenizer)
    ids_beyond(256, "tiny_endings", folder, tokenizer)
    more.pad_token = "<pad>"
    more.add_special_tokens({"pad_token": "<pad>"})  # 258
    ids_beyond(259, "written", folder, more)
    with pytest.raises(InputError, match=r"padding token, which the task written needs, has id 258, .*ends at 257"):
        ids_beyond(258, "written", folder, more)


# ---- a failure costs the task's own score

FAILING: dict[str, tuple[dict[str, str], str]] = {
    "scoring": (
        {"process_results": "!function own.score", "code": "def score(document, results):\n    import not_there"},
        "ModuleNotFoundError: No module named 'not_there'",
    ),
    "the prompt of a later document": (
        {
            "doc_to_text": "!function own.text",
            "code": "def text(document):\n    return {'What colour is fresh snow?': 'x'}[document['question']]",
        },
        "KeyError: ",
    ),
    "no metrics": (
        {"process_results": "!function own.score", "code": "def score(document, results):\n    return {}"},
        "lm-eval gives no metric for it",
    ),
    "a value that is no number": (
        {
            "process_results": "!function own.score",
            "code": "def score(document, results):\n    return {'acc': float('nan')}",
        },
        "acc is nan, no finite number",
    ),
    "settings of the generation": (
        {
            "output_type": "generate_until",
            "doc_to_choice": "null",
            "generation_kwargs": "{until: [x], max_gen_toks: 2, num_beams: many}",
            "metric_list": "[{metric: exact_match}]",
        },
        ".*Error: ",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_task_that_fails_has_no_value_and_the_reason_and_the_others_have_theirs(
    folder: Path,
    case: str,
    reader: Any,  # noqa: F811
    tokenizer: Any,  # noqa: F811
) -> None:
    settings, reason = FAILING[case]
    write_task(folder, "failing", **settings)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [failing, tiny_endings]\naggregate_metric_list: [{metric: acc}]\n"
    )
    (alone,) = evaluate_tasks(reader, tokenizer, resolve_tasks(["tiny_endings"], folder), progress=False).values()
    tasks = resolve_tasks(["both"], folder)
    for _ in range(2):
        score = evaluate_tasks(reader, tokenizer, tasks, progress=False)["both"]
        assert (score.metric, score.value, score.stderr) == (None, None, None)
        assert re.match(rf"1 of its 2 tasks have no score; failing: {reason}", score.reason or "")
        assert score.subtasks == {"failing": None, "tiny_endings": alone.value}
        json.dumps(as_json(score), allow_nan=False)
    scores = evaluate_tasks(reader, tokenizer, resolve_tasks(["failing", "tiny_endings"], folder), progress=False)
    assert re.match(reason, scores["failing"].reason or "")
    assert scores["failing"].value is None
    assert scores["tiny_endings"] == alone


def test_a_group_whose_tasks_lack_its_metric_has_their_scores(folder: Path, reader: Any, tokenizer: Any) -> None:  # noqa: F811
    group = "group: other\ntask: [tiny_endings, tiny_colours]\naggregate_metric_list: [{metric: f1}]\n"
    (folder / "other.yaml").write_text(group)
    score = evaluate_tasks(reader, tokenizer, resolve_tasks(["other"], folder), progress=False)["other"]
    assert (score.metric, score.value) == (None, None)
    assert score.reason == "its tasks have none of the metrics that it aggregates"
    alone = evaluate_tasks(reader, tokenizer, resolve_tasks(["tiny_endings", "tiny_colours"], folder), progress=False)
    assert score.subtasks == {name: part.value for name, part in alone.items()}


@pytest.mark.parametrize("reason", ["CUDA error: an illegal memory access", "the probabilities are not finite"])
def test_a_model_that_fails_has_no_score_and_a_gpu_that_fails_ends_the_evaluation(
    reader: Any,  # noqa: F811
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(reader.model, "forward", broken)
    tasks = resolve_tasks(["tiny_endings", "tiny_colours"], TASKS)
    if reason.startswith("CUDA"):
        with pytest.raises(RuntimeError, match=reason):
            evaluate_tasks(reader, tokenizer, tasks, progress=False)
        return
    scores = evaluate_tasks(reader, tokenizer, tasks, progress=False)
    assert {(score.value, score.reason) for score in scores.values()} == {(None, f"RuntimeError: {reason}")}


def test_requests_are_built_once_for_all_models(reader: Any, tokenizer: Any) -> None:  # noqa: F811
    tasks = resolve_tasks(["tiny_endings"], TASKS)
    evaluate_tasks(reader, tokenizer, tasks, progress=False)
    built = tasks.built
    evaluate_tasks(tiny_model(vocabulary=300, head_dim=16), tokenizer, tasks, progress=False)
    assert tasks.built is built
    evaluate_tasks(reader, tokenizer, tasks, limit=2, progress=False)
    assert len(tasks.built.instances["tiny_endings"]) == 4


# ---- what a score depends on


def content(folder: Path, *names: str, **which: Any) -> dict[str, str]:
    return task_content(resolve_tasks(names or ["tiny_endings", "tiny_processed"], folder), **which)


def test_tasks_that_are_moved_renamed_files_or_not_are_the_same(folder: Path, tmp_path: Path) -> None:
    before = content(folder)
    assert content(folder) == before
    assert content(TASKS) == before
    shutil.move(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "results").mkdir()
    (tmp_path / "elsewhere" / "results" / "results.json").write_text("{}")
    (tmp_path / "elsewhere" / "notes.yaml").write_text("a: 1\n")
    (tmp_path / "elsewhere" / "endings.jsonl").touch()
    assert content(tmp_path / "elsewhere") == before


def append(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).open("a").write(text)


CHANGED = {
    "documents": append("colours.jsonl", '{"question": "Snow?", "choices": ["red", "white", "blue"], "answer": 1}\n'),
    "settings": append("tiny_processed.yaml", "target_delimiter: ''\n"),
    "code": append("utils.py", "\nVERSION = 2\n"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_documents_settings_and_code_are_another_task(folder: Path, case: str) -> None:
    before = content(folder, "tiny_processed")
    CHANGED[case](folder)
    assert content(folder, "tiny_processed") != before


def test_documents_count_as_far_as_they_are_used(folder: Path) -> None:
    every, first, shots = ({}, {"limit": 2}, {"num_fewshot": 1})
    before = [content(folder, "tiny_endings", **which) for which in (every, first, shots)]
    assert len({json.dumps(one) for one in before}) == 3
    append("endings_train.jsonl", '{"start": "It", "first": "is.", "second": "was.", "label": 0}\n')(folder)
    after = [content(folder, "tiny_endings", **which) for which in (every, first, shots)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]
    append("endings.jsonl", '{"start": "It", "first": "is.", "second": "was.", "label": 0}\n')(folder)
    after = [content(folder, "tiny_endings", **which) for which in (every, first)]
    assert [a == b for a, b in zip(before, after, strict=False)] == [False, True]


def test_the_code_that_a_tasks_functions_use_counts_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.syspath_prepend(folder)
    (folder / "beside_for_test.py").write_text("MARK = 'a'\n")
    code = "import beside_for_test\ndef text(document):\n    return beside_for_test.MARK"
    write_task(folder, "own", doc_to_text="!function own.text", code=code)
    before = content(folder, "own")
    (folder / "beside_for_test.py").write_text("MARK = 'another'\n")
    importlib.reload(sys.modules["beside_for_test"])
    assert content(folder, "own") != before


def test_a_tag_is_reported_as_its_tasks(folder: Path) -> None:
    write_task(folder, "second", tag="pair")
    write_task(folder, "first", tag="pair")
    tasks: TaskSet = resolve_tasks(["pair", "tiny_group"], folder)
    with pytest.raises(InputError, match=r"unknown"):
        resolve_tasks(["pair_for_test"], folder)
    assert tasks.loaded.reported == ["first", "second", "tiny_group"]


def test_a_name_that_no_task_file_mentions_is_refused_before_anything_heavy_is_imported() -> None:
    code = """
import sys
import mean_cut_accuracy_experiments as script
assert script.main(["--model", "demo", "--mean", "0.3", "--tasks", sys.argv[1], "--include-path", sys.argv[2]]) == 2
print([name for name in ("torch", "transformers", "lm_eval", "datasets") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, "tiny_ending", str(TASKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, "[]\n")
    near = "did you mean tiny_endings, tiny_missing, tiny_damaged?"
    assert done.stderr == f"error: task 'tiny_ending' is unknown: {near}\n"


MEDIAN = "[{metric: acc, aggregation: median, higher_is_better: true}]"  # whose error lm-eval finds by resampling


def test_every_bar_of_an_evaluation_has_a_name(folder: Path, reader: Any, tokenizer: Any, capfd: Any) -> None:  # noqa: F811
    write_task(folder, "medians", metric_list=MEDIAN)
    scores = evaluate_tasks(reader, tokenizer, resolve_tasks(["tiny_endings", "medians"], folder), progress=True)
    assert scores["medians"].stderr is not None
    lines = [line.strip() for line in capfd.readouterr().err.replace("\r", "\n").splitlines()]
    shown = [line for line in lines if "%|" in line]
    assert {line.partition(":")[0] for line in shown} >= {"Running loglikelihood requests", "standard error of median"}
    assert all(line[0].isalpha() for line in shown)
    assert not [line for line in lines if "bootstrapping" in line]


def test_progress_can_be_told_to_a_function_instead(folder: Path, reader: Any, tokenizer: Any, capfd: Any) -> None:  # noqa: F811
    told: dict[str, list[float]] = {}

    def report(name: str, done: float, total: float, unit: str) -> None:
        told.setdefault(name, [0.0]).append(done / total)

    write_task(folder, "medians", metric_list=MEDIAN)
    capfd.readouterr()
    evaluate_tasks(reader, tokenizer, resolve_tasks(["medians"], folder), progress=report)
    windows = torch.randint(20, (3, 8))
    layer_redundancy(reader, windows, progress=report)
    pieces = {"prompts of tasks", "Tokenizing inputs", "Running loglikelihood requests", "standard error of median"}
    assert set(told) == pieces | {"LR"}
    assert all(sorted(parts) == parts and parts[-1] == 1 for parts in told.values())
    assert "|" not in capfd.readouterr().err
