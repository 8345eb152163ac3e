"""Accuracies of lm-eval tasks: evaluated on any number of models, with the requests built once.

What goes wrong in a task, its own functions included, costs that task's score alone: it has no value, and the reason.
"""

import contextlib
import copy
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from tqdm import tqdm

from slicing.batches import evaluation_mode, first_batch, is_gpu, smaller_batch
from slicing.families import InputError
from slicing.task_set import Loaded, TaskSet, check_fewshot, only_errors_logged, reason_of, resolve_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Metric", "TaskScore", "TaskSet", "check_fewshot", "check_tokens", "evaluate_tasks", "resolve_tasks"]


class Metric(TypedDict):
    """One metric of a task. value is None where it is no finite number, stderr where lm-eval has none."""

    value: float | None
    stderr: float | None


class TaskScore(TypedDict):
    """Result of one task or group, ready for JSON.

    metric: the metric that stands for the task: acc_norm where there is one, else acc, else the task's first; None
        where lm-eval gives none.
    value, stderr: of that metric; None where there is none, or no finite number.
    reason: why there is no value; None where there is one.
    documents: how many were evaluated.
    metrics: every metric of the task by name.
    subtasks: of a group, the value of its metric (of each task's own, where the group has none) for each task in it.
    """

    metric: str | None
    value: float | None
    stderr: float | None
    reason: str | None
    documents: int
    metrics: dict[str, Metric]
    subtasks: NotRequired[dict[str, float | None]]


@dataclass
class _Requests:
    """lm-eval's Instances by task, and why a task has none."""

    settings: tuple[int | None, int | None, int | None]
    instances: dict[str, list[Any]]
    failures: dict[str, str]


# ---- before a model is loaded


def check_tokens(
    tasks: TaskSet,
    tokenizer: "PreTrainedTokenizerBase",
    vocabulary: int,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int | None = None,
) -> None:
    """InputError where the tasks would give a model token ids that are not in [0, vocabulary), or need a token that the
    tokenizer lacks. The requests are tokenised only where the tokenizer has such ids at all. Arguments as for
    `evaluate_tasks`."""
    remedy = "use the tokenizer that belongs to the model"
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise InputError(f"the tokenizer has neither a begin nor an end token, and tasks need one: {remedy}")
    for name, task in tasks.loaded.tasks.items():
        used = {"begin": begin} if task.OUTPUT_TYPE == "loglikelihood_rolling" else {}
        if task.OUTPUT_TYPE == "generate_until":
            if tokenizer.eos_token_id is None:
                raise InputError(f"the tokenizer has no end token, and the task {name} needs one: {remedy}")
            used = {"padding": _padding(tokenizer)}
        for kind, token in used.items():
            if token >= vocabulary:
                raise InputError(
                    f"the {kind} token, which the task {name} needs, has id {token}, the model's vocabulary ends at"
                    f" {vocabulary - 1}: {remedy}"
                )
    if max(begin, *tokenizer.get_vocab().values()) < vocabulary:
        return
    with _no_bars():
        built = _built(tasks, limit, num_fewshot, seed)
    for name, requests in built.instances.items():
        highest = max((_highest(request, tokenizer, begin) for request in requests), default=0)
        if highest >= vocabulary:
            token = str(tokenizer.convert_ids_to_tokens(highest))
            raise InputError(
                f"the task {name} has the token {token[:40]!r}, of id {highest}, the model's vocabulary ends at"
                f" {vocabulary - 1}: {remedy}"
            )


def _padding(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that lm-eval pads with."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next(int(token) for token in candidates if token is not None)


def _highest(request: Any, tokenizer: "PreTrainedTokenizerBase", begin: int) -> int:
    """The highest token id that lm-eval gives the model for a request."""
    context, *rest = request.args
    texts = [context]
    if request.request_type == "loglikelihood":  # encoded together, then split where the context's own tokens end
        texts.append(f"{context}{rest[0]}")
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return max([*ids, *([] if context else [begin])], default=0)


def _built(tasks: TaskSet, limit: int | None, num_fewshot: int | None, seed: int | None) -> _Requests:
    """Requests of all tasks, kept for the next model. A task whose functions fail has none."""
    settings = (limit, num_fewshot, seed)
    if tasks.built is None or tasks.built.settings != settings:
        loaded, built = tasks.loaded, _Requests(settings, {}, {})
        _set_seeds(seed)
        with contextlib.redirect_stdout(sys.stderr):
            for name, task in loaded.tasks.items():
                task.set_config("num_fewshot", loaded.fewshot(name, num_fewshot))
                task.set_fewshot_seed(1234 if seed is None else seed)
                try:
                    task.build_all_requests(limit=limit, rank=0, world_size=1)
                    built.instances[name] = list(task.instances)
                except Exception as error:  # the functions are the task's own
                    built.failures[name] = reason_of(error)
        tasks.built = built
    requests: _Requests = tasks.built
    return requests


def _set_seeds(seed: int | None) -> None:
    import numpy as np

    random.seed(0 if seed is None else seed)
    np.random.seed(1234 if seed is None else seed)  # noqa: NPY002
    torch.manual_seed(1234 if seed is None else seed)


# ---- evaluation


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
    its aggregate. A task that fails, in its functions or its metrics, has the value None and the reason; where the
    model fails in every task, its error is raised. Raises InputError for documents that can't be loaded, for token ids
    outside the model's vocabulary and for a batch that does not fit.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit of documents is {limit}: it must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"the number of examples in the prompt is {num_fewshot}: it must be at least 0")
    size = first_batch(batch_size, 64 if is_gpu(model.device) else 8)
    which: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed}
    bars = contextlib.nullcontext() if progress else _no_bars()
    with contextlib.redirect_stdout(sys.stderr), bars, evaluation_mode(model):
        check_tokens(tasks, tokenizer, model.config.get_text_config(decoder=True).vocab_size, **which)
        loaded, requests = tasks.loaded, _built(tasks, **which)
        _set_seeds(seed)
        own_tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        answers, failures = _answers(model, own_tokenizer, requests.instances, size, batch_size)
        failures |= requests.failures
        scores = {
            name: _evaluated(loaded.tasks[name], requests.instances[name], answers, limit)
            for name in loaded.tasks
            if name not in failures
        }
    scores |= {name: _no_score(reason) for name, reason in failures.items()}
    return {
        name: _group_score(loaded, name, scores) if name in loaded.groups else scores[name] for name in loaded.reported
    }


_Answers = dict[int, list[Any]]  # the model's, by the request's id(): one for each repetition


def _answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    instances: dict[str, list[Any]],
    size: int,
    given: int | None,
) -> tuple[_Answers, dict[str, str]]:
    """Answers to the requests of all tasks, and why a task has none. All run together, the longest first; where one
    task makes that fail, each by itself."""
    from lm_eval.models.huggingface import HFLM

    def answered(requests: Sequence[Any]) -> _Answers:
        nonlocal size
        while True:
            with only_errors_logged():
                wrapper = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
            try:
                return _ask(wrapper, requests)
            except RuntimeError as error:  # the longest requests run first, so this comes early or never
                size = smaller_batch(error, size, given, "task requests")

    if not instances:
        return {}, {}
    try:
        return answered([request for requests in instances.values() for request in requests]), {}
    except InputError:
        raise
    except Exception:  # settings of a generation, say
        found: _Answers = {}
        failures: dict[str, str] = {}
        for name, requests in instances.items():
            try:
                found |= answered(requests)
            except InputError:
                raise
            except Exception as error:  # the same
                failures[name] = reason_of(error)
                failed = error
        if isinstance(failed, RuntimeError) and len(failures) == len(instances):
            raise failed from None  # the model's, not a task's
        return found, failures


def _ask(wrapper: Any, requests: Sequence[Any]) -> _Answers:
    by_type: dict[str, list[Any]] = defaultdict(list)
    for request in requests:
        by_type[request.request_type] += [request] * request.repeats
    found: _Answers = defaultdict(list)
    for kind, repeated in by_type.items():
        for request, answer in zip(repeated, getattr(wrapper, kind)(repeated), strict=True):
            found[id(request)].append(answer)
    return dict(found)


class _Answered:
    """A model as lm-eval's `evaluate` sees it, that has answered all requests already."""

    rank, world_size = 0, 1

    def __init__(self, answers: _Answers) -> None:
        self.answers = answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        left = {id(request): iter(self.answers[id(request)]) for request in requests}
        return [next(left[id(request)]) for request in requests]

    loglikelihood_rolling = generate_until = loglikelihood


def _evaluated(task: Any, requests: Sequence[Any], answers: _Answers, limit: int | None) -> TaskScore:
    """A task's score by the model's answers."""
    from lm_eval.evaluator import evaluate

    for request in requests:  # of the model before
        request.resps, request.filtered_resps = [], {}
    task.build_all_requests = lambda **_: None  # they are there already
    try:
        only = {"tasks": {task.task_name: task}}
        results = evaluate(lm=_Answered(answers), task_dict=only, limit=limit, log_samples=False)
        return _score(results["results"][task.task_name])
    except Exception as error:  # functions and metrics are the task's own
        return _no_score(reason_of(error))
    finally:
        del task.build_all_requests


# ---- scores


def _no_score(reason: str, documents: int = 0) -> TaskScore:
    return {"metric": None, "value": None, "stderr": None, "reason": reason, "documents": documents, "metrics": {}}


def _score(result: dict[str, Any]) -> TaskScore:
    """From lm-eval's flat result: keys "metric,filter" and "metric_stderr,filter"."""
    metrics: dict[str, Metric] = {}
    said: dict[str, Any] = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if kind == "none" else key
        metrics[name] = {"value": _number(value), "stderr": _number(result.get(f"{metric}_stderr,{kind}"))}
        said[name] = value
    documents = int(result.get("sample_len", 0))
    if not metrics:
        return _no_score("lm-eval gives no metric for it", documents)
    chosen = next((metric for metric in ("acc_norm", "acc") if metric in metrics), next(iter(metrics)))
    value = metrics[chosen]["value"]
    return {
        "metric": chosen,
        "value": value,
        "stderr": metrics[chosen]["stderr"],
        "reason": None if value is not None else f"{chosen} is {str(said[chosen])[:40]}, no finite number",
        "documents": documents,
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    """A finite number as such, anything else as None: lm-eval's "N/A", what a metric of one's own returns."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _group_score(loaded: Loaded, name: str, scores: dict[str, TaskScore]) -> TaskScore:
    """A group's aggregate of its tasks' scores; where a task has none, neither has the group."""
    leaves = {leaf: scores[leaf] for leaf in loaded.leaves(name)}
    failed = {leaf: score["reason"] for leaf, score in leaves.items() if score["value"] is None}
    documents = sum(score["documents"] for score in leaves.values())
    if failed:
        leaf, reason = next(iter(failed.items()))
        score = _no_score(f"{len(failed)} of its {len(leaves)} tasks have no score; {leaf}: {reason}", documents)
    else:
        try:
            score = _score(loaded.groups[name].aggregate({leaf: _flat(score) for leaf, score in leaves.items()}))
        except Exception as error:  # what is aggregated is the tasks' own
            score = _no_score(reason_of(error), documents)
        if score["metric"] is None and score["reason"] is not None:
            score["reason"] = "its tasks have none of the metrics that it aggregates"
    metric = score["metric"]
    score["subtasks"] = {
        leaf: part["value"] if metric is None else part["metrics"][metric]["value"]
        for leaf, part in leaves.items()
        if metric is None or metric in part["metrics"]
    }
    return score


def _flat(score: TaskScore) -> dict[str, Any]:
    """A score as lm-eval has it, which `_score` read."""
    flat: dict[str, Any] = {"sample_len": score["documents"]}
    for key, metric in score["metrics"].items():
        name, _, kind = key.partition(",")
        flat[f"{name},{kind or 'none'}"] = metric["value"]
        flat[f"{name}_stderr,{kind or 'none'}"] = "N/A" if metric["stderr"] is None else metric["stderr"]
    return flat


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
