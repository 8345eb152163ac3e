"""Requests of lm-eval tasks: built once for all models, their token ids checked before one is loaded."""

import contextlib
import functools
import io
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from slicing.families import InputError
from slicing.progress import Progress, Report
from slicing.task_set import TaskSet, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


UNNAMED = "prompts of tasks"  # what lm-eval counts without a name: the documents whose prompts it builds


@dataclass
class Requests:
    """lm-eval's Instances by task, and why a task has none."""

    settings: tuple[int | None, int | None, int | None]
    instances: dict[str, list[Any]]
    failures: dict[str, str]


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
    with bars_of_lm_eval(False):
        built = build_requests(tasks, limit, num_fewshot, seed)
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


def build_requests(tasks: TaskSet, limit: int | None, num_fewshot: int | None, seed: int | None) -> Requests:
    """Requests of all tasks, kept for the next model. A task whose functions fail has none."""
    settings = (limit, num_fewshot, seed)
    if tasks.built is None or tasks.built.settings != settings:
        loaded, built = tasks.loaded, Requests(settings, {}, {})
        set_seeds(seed)
        with contextlib.redirect_stdout(sys.stderr):
            for name, task in loaded.tasks.items():
                task.set_config("num_fewshot", loaded.fewshot(name, num_fewshot))
                task.set_fewshot_seed(1234 if seed is None else seed)
                try:
                    task.build_all_requests(limit=limit, rank=0, world_size=1)
                    built.instances[name] = list(task.instances)
                except (Exception, SystemExit) as error:  # the functions are the task's own
                    built.failures[name] = reason_of(error)
        tasks.built = built
    requests: Requests = tasks.built
    return requests


def set_seeds(seed: int | None) -> None:
    import numpy as np

    random.seed(0 if seed is None else seed)
    np.random.seed(1234 if seed is None else seed)  # noqa: NPY002
    torch.manual_seed(1234 if seed is None else seed)


@contextlib.contextmanager
def bars_of_lm_eval(progress: Progress) -> Iterator[None]:
    """lm-eval has no switch for its progress bars, and some have no name: here each has one, and they are shown, hidden
    or told as `progress` says."""
    import lm_eval.api.metrics as metrics
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import tqdm as bars

    def named(*args: Any, name: str = UNNAMED, **kwargs: Any) -> Any:
        kwargs["desc"] = kwargs.get("desc") or name
        if callable(progress):
            return _Told(progress, *args, **kwargs)
        return tqdm(*args, **kwargs | {"disable": kwargs.get("disable") or not progress})

    def bootstrapped(metric: Any, *args: Any, **kwargs: Any) -> Any:
        """It imports its bar when it is called, and prints what it is about to do."""
        bars.tqdm = functools.partial(named, name=f"standard error of {metric.__name__}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return bootstrap(metric, *args, **kwargs)
        finally:
            bars.tqdm = tqdm

    modules = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    before, bootstrap = [module.tqdm for module in modules], metrics.bootstrap_stderr
    try:
        for module in modules:
            module.tqdm = named
        metrics.bootstrap_stderr = bootstrapped
        yield
    finally:
        metrics.bootstrap_stderr = bootstrap
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar


class _Told:
    """In the place of a tqdm bar: what lm-eval does with one, told to a function."""

    def __init__(self, report: Report, iterable: Any = None, *, desc: str, total: int | None = None, **_: Any) -> None:
        self.iterable, self.name, self.done, self.report = iterable, desc, 0, report
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total or 0
        self.update(0)

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.done += count
        self.report(self.name, self.done, max(self.total, self.done), "request")

    def close(self) -> None:
        """There is nothing to close."""
