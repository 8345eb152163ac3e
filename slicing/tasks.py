"""Accuracies of lm-eval tasks: evaluated on any number of models, with the requests built once.

What goes wrong in a task, its own functions included, costs that task's score alone: it has no value, and the reason.
"""

import contextlib
import copy
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from slicing.batches import evaluation_mode, first_batch, is_gpu, smaller_batch
from slicing.families import InputError
from slicing.progress import Progress
from slicing.task_requests import bars_of_lm_eval, build_requests, check_tokens, set_seeds
from slicing.task_scores import Metric, TaskScore, group_score, no_score, task_score
from slicing.task_set import TaskSet, check_fewshot, only_errors_logged, reason_of, resolve_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Metric", "TaskScore", "TaskSet", "check_fewshot", "check_tokens", "evaluate_tasks", "resolve_tasks"]


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: TaskSet,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: Progress = True,
) -> dict[str, TaskScore]:
    """Scores of the model, by task, as lm-eval's `simple_evaluate` gives them.

    tasks: from `resolve_tasks`; the documents are read once for all models.
    limit: the first so many documents of each task; None: all.
    num_fewshot: examples in the prompt; None: the task's own number. A task that sets 0 itself keeps it, as in lm-eval.
    batch_size: requests a batch; None starts with 64 (8 on a CPU) and halves when memory runs out.
    seed: of Python, NumPy, PyTorch and the choice of examples; None: lm-eval's own (0, 1234, 1234, 1234).

    The global seeds are set, as lm-eval does; model and tokenizer are left as they were. A group (mmlu) is reported as
    its aggregate. A task that fails, in its functions, its metrics or the model's forward, has the value None and the
    reason; where a GPU fails in every task, its error is raised. Raises InputError for documents that can't be loaded,
    for token ids outside the model's vocabulary and for a batch that does not fit.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit of documents is {limit}: it must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"the number of examples in the prompt is {num_fewshot}: it must be at least 0")
    size = first_batch(batch_size, 64 if is_gpu(model.device) else 8)
    which: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed}
    with contextlib.redirect_stdout(sys.stderr), bars_of_lm_eval(progress), evaluation_mode(model):
        check_tokens(tasks, tokenizer, model.config.get_text_config(decoder=True).vocab_size, **which)
        loaded, requests = tasks.loaded, build_requests(tasks, **which)
        set_seeds(seed)
        own_tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        answers, failures = _answers(model, own_tokenizer, requests.instances, size, batch_size)
        failures |= requests.failures
        scores = {
            name: _evaluated(loaded.tasks[name], requests.instances[name], answers, limit)
            for name in loaded.tasks
            if name not in failures
        }
    scores |= {name: no_score(reason) for name, reason in failures.items()}
    return {
        name: group_score(loaded, name, scores) if name in loaded.groups else scores[name] for name in loaded.reported
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
        if len(failures) == len(instances) and _is_of_device(failed):
            raise failed from None  # another time there may be scores
        return found, failures


def _is_of_device(error: Exception) -> bool:
    """Whether a GPU or its libraries failed: that is no score of a task, and nothing runs there any more."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("CUDA", "CUBLAS", "CUDNN", "NCCL", "HIP", "MPS")
    )


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
    process, of_documents = task.process_results, []

    def kept(*arguments: Any) -> Any:
        of_documents.append(process(*arguments))
        return of_documents[-1]

    task.process_results = kept
    try:
        only = {"tasks": {task.task_name: task}}
        results = evaluate(lm=_Answered(answers), task_dict=only, limit=limit, log_samples=False)
        return task_score(results["results"][task.task_name], _by_metric(of_documents, requests[0].filtered_resps))
    except (Exception, SystemExit) as error:  # functions and metrics are the task's own
        return no_score(reason_of(error))
    finally:
        del task.build_all_requests, task.process_results


def _by_metric(of_documents: Sequence[dict[str, Any]], filters: Iterable[str]) -> dict[str, list[Any]]:
    """What a task gave for each document, by lm-eval's keys: it goes through all documents for one filter, then for the
    next."""
    filters, found = list(filters), defaultdict(list)
    for place, metrics in enumerate(of_documents):
        kind = filters[place * len(filters) // len(of_documents)]
        for metric, value in metrics.items():
            found[f"{metric},{kind}"].append(value)
    return dict(found)
