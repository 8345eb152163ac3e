"""Accuracies of lm-eval tasks: looked up before a model is loaded, read once, evaluated on any number of models."""

import contextlib
import copy
import difflib
import functools
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from tqdm import tqdm

from slicing.batches import evaluation_mode, first_batch, is_gpu, smaller_batch
from slicing.families import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Metric(TypedDict):
    """One metric of a task. stderr is None where lm-eval has none."""

    value: float
    stderr: float | None


class TaskScore(TypedDict):
    """Result of one task or group, ready for JSON.

    metric: the metric that stands for the task: acc_norm where there is one, else acc, else the task's first.
    value, stderr: of that metric; stderr is None where lm-eval has none.
    documents: how many were evaluated.
    metrics: every metric of the task by name.
    subtasks: of a group, the value of its metric for each task in it.
    """

    metric: str
    value: float
    stderr: float | None
    documents: int
    metrics: dict[str, Metric]
    subtasks: NotRequired[dict[str, float]]


@dataclass
class _Loaded:
    tasks: dict[str, Any]  # lm-eval's Task objects with their documents, by name
    groups: dict[str, Any]
    reported: list[str]  # tasks and groups to report, in the order asked for
    num_fewshot: dict[str, int | None]  # of the task's own configuration


@dataclass
class TaskSet:
    """Tasks that exist; their documents are read at the first use of `loaded`, and kept.

    names: as asked for: tasks, groups or tags of lm-eval.
    manager: the lm-eval TaskManager that knows them.
    """

    names: list[str]
    manager: Any

    @functools.cached_property
    def loaded(self) -> _Loaded:
        """Reads (downloads, where need be) all documents. Raises InputError where that fails."""
        built: list[Any] = []
        reported: list[str] = []
        origin: dict[str, str] = {}
        with contextlib.redirect_stdout(sys.stderr), _only_errors_logged():
            for name in self.names:
                item = _build(self.manager, name)
                parts = item if isinstance(item, list) else [item]  # a tag is a list of tasks
                built += parts
                for part in parts:
                    leaves = _leaf_names(part)
                    reported += [part.name] if getattr(part, "has_aggregation", False) else leaves
                    for leaf in leaves:
                        if origin.setdefault(leaf, name) != name:
                            raise InputError(f"task {leaf} is in both {origin[leaf]} and {name}: leave one of them out")
            found = self.manager.load(built)
        tasks = found["tasks"]
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise InputError(f"task {name} runs generated code or needs more than text: it can't be evaluated here")
            if task.get_config("process_docs") is not None:
                task.set_config("process_docs", _once(task.get_config("process_docs")))
                _ = task.eval_docs
        defaults = {name: task.get_config("num_fewshot") for name, task in tasks.items()}
        return _Loaded(tasks, found["groups"], reported, defaults)


def resolve_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskSet:
    """Look the names up in `include_path` (a folder of lm-eval task files) and in lm-eval's own tasks.

    lm-eval's own tasks are indexed (some ten seconds) only if the folder lacks a name. Reads no documents.
    Raises InputError for a folder that is not there, for no name and for an unknown one (with near matches).
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(
            f"the folder of tasks {str(include_path)!r} is not there: give a folder with lm-eval task files"
        )
    names = list(dict.fromkeys(tasks))
    if not names:
        raise InputError("no task was given: name at least one, such as hellaswag")

    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(_is_complete(name, manager.task_index) for name in names):
            return TaskSet(names, manager)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            remedy = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists what there is"
            raise InputError(f"task {name!r} is unknown: {remedy}")
    return TaskSet(names, manager)


def check_fewshot(tasks: TaskSet, num_fewshot: int | None) -> None:
    """Raise InputError for a task with too few documents for the examples in its prompt. Reads all documents."""
    for name, task in tasks.loaded.tasks.items():
        wanted = _fewshot(tasks.loaded.num_fewshot[name], num_fewshot)
        sampler, settings = getattr(task, "sampler", None), getattr(task, "fewshot_cfg", None)
        if wanted == 0 or sampler is None or settings is None:
            continue
        # lm-eval draws one more where the document in question may be among them, and takes splits of None for equal
        there = len(sampler.df) - (settings.split == task.config.test_split)
        if wanted > there:
            raise InputError(
                f"task {name} has {there} examples for its prompt, not {wanted}: use a lower --num-fewshot"
            )


def _fewshot(own: int | None, given: int | None) -> int:
    """How many examples a task gets; a task that sets 0 itself keeps it, as in lm-eval."""
    return (own or 0) if given is None or own == 0 else given


def _is_complete(name: str, index: dict[str, Any]) -> bool:
    """Whether the index has the name and, for a group, everything that the group names."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return not isinstance(members, list) or all(
        _is_complete(member, index) for member in members if isinstance(member, str)
    )


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`process` run once for each split: lm-eval runs it three times an evaluation, over all documents."""
    kept: dict[int, tuple[Any, Any]] = {}  # by identity, which the kept split makes sure of

    @functools.wraps(process)
    def processed(documents: Any) -> Any:
        if id(documents) not in kept:
            kept[id(documents)] = (documents, process(documents))
        return kept[id(documents)][1]

    return processed


def _leaf_names(part: Any) -> list[str]:
    """Names of the tasks in a group, or of the one task."""
    tasks = part.get_all_tasks() if hasattr(part, "get_all_tasks") else [part]
    return [task.task_name for task in tasks]


def _build(manager: Any, name: str) -> Any:
    """lm-eval's Task, Group or (for a tag) list of Tasks, with documents."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = manager.load([name])
    # RuntimeError: data sets that are scripts; ValueError: another part of the data set is in the cache.
    except (OSError, DatasetsError, HfHubHTTPError, RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and "cache" not in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the documents of task {name} can't be loaded ({reason}): check the network and HF_HUB_OFFLINE, "
            "or give a folder of tasks with local files (--include-path)"
        ) from error
    return found["groups"].get(name) or found["tasks"].get(name) or list(found["tasks"].values())


@contextlib.contextmanager
def _only_errors_logged() -> Iterator[None]:
    """lm-eval warns about each task of local files and each model object, once a point of a sweep."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """lm-eval has no switch for its progress bars."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    def hidden(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **kwargs | {"disable": True})

    modules = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    before = [module.tqdm for module in modules]
    try:
        for module in modules:
            module.tqdm = hidden
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: TaskSet,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> dict[str, TaskScore]:
    """Scores of the model, by task, as lm-eval's `simple_evaluate` gives them.

    tasks: from `resolve_tasks`; the documents are read once for all models.
    limit: the first so many documents of each task; None: all.
    num_fewshot: examples in the prompt; None: the task's own number. A task that sets 0 itself keeps it, as in lm-eval.
    batch_size: requests a batch; None starts with 64 (8 on a CPU) and halves when memory runs out.
    seed: of Python, NumPy, PyTorch and the choice of examples; None: lm-eval's own (0, 1234, 1234, 1234).

    The global seeds are set, as lm-eval does; model and tokenizer are left as they were. A group (mmlu) is reported as
    its aggregate. Raises InputError for documents that can't be loaded and for a batch that does not fit.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit of documents is {limit}: it must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"the number of examples in the prompt is {num_fewshot}: it must be at least 0")
    import numpy as np
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = tasks.loaded
    for name, task in loaded.tasks.items():
        task.set_config("num_fewshot", _fewshot(loaded.num_fewshot[name], num_fewshot))
    own_tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
    size = first_batch(batch_size, 64 if is_gpu(model.device) else 8)
    results: dict[str, Any] | None = None
    bars = contextlib.nullcontext() if progress else _no_bars()
    with contextlib.redirect_stdout(sys.stderr), bars, evaluation_mode(model):
        while results is None:
            with _only_errors_logged():
                wrapper = HFLM(pretrained=model, tokenizer=own_tokenizer, batch_size=size)
            random.seed(0 if seed is None else seed)
            np.random.seed(1234 if seed is None else seed)  # noqa: NPY002
            torch.manual_seed(1234 if seed is None else seed)
            for task in loaded.tasks.values():
                task.set_fewshot_seed(1234 if seed is None else seed)
            try:
                results = evaluate(
                    lm=wrapper,
                    task_dict={"tasks": loaded.tasks, "groups": loaded.groups},
                    limit=limit,
                    log_samples=False,
                )
            except RuntimeError as error:  # the longest requests run first, so this comes early or never
                size = smaller_batch(error, size, batch_size, "task requests")
    scores = {name: _score(results["results"][name]) for name in loaded.reported}
    for name, score in scores.items():
        if name in loaded.groups:
            key = f"{score['metric']},none"
            parts = {leaf: results["results"][leaf] for leaf in _leaf_names(loaded.groups[name])}
            score["subtasks"] = {leaf: float(part[key]) for leaf, part in parts.items() if key in part}
    return scores


def _score(result: dict[str, Any]) -> TaskScore:
    """From lm-eval's flat result: keys "metric,filter" and "metric_stderr,filter"."""
    metrics: dict[str, Metric] = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = result.get(f"{metric}_stderr,{kind}")
        known = float(stderr) if isinstance(stderr, (int, float)) else None
        metrics[metric if kind == "none" else key] = {"value": float(value), "stderr": known}
    chosen = next((metric for metric in ("acc_norm", "acc") if metric in metrics), next(iter(metrics)))
    return {
        "metric": chosen,
        "value": metrics[chosen]["value"],
        "stderr": metrics[chosen]["stderr"],
        "documents": int(result["sample_len"]),
        "metrics": metrics,
    }
