"""lm-eval tasks by name: looked up, and read with their documents, before a model is loaded."""

import contextlib
import difflib
import functools
import importlib.util
import inspect
import logging
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicing.families import InputError

# Settings of a task that may be functions, which run after the seeds are set; documents are processed before.
_SEEDED_PARTS = ("doc_to_text", "doc_to_target", "doc_to_choice", "process_results")


@dataclass
class Loaded:
    """Tasks with their documents.

    tasks, groups: lm-eval's Task and Group objects by name.
    reported: tasks and groups to report, in the order asked for; of a tag or a group without aggregate, its tasks.
    num_fewshot: examples in the prompt of the task's own configuration.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    reported: list[str]
    num_fewshot: dict[str, int | None]

    def leaves(self, name: str) -> list[str]:
        """Names of the tasks in a group, or of the one task."""
        return _leaf_names(self.groups.get(name) or self.tasks[name])

    def fewshot(self, name: str, given: int | None) -> int:
        """How many examples a task gets; a task that sets 0 itself keeps it, as in lm-eval."""
        own = self.num_fewshot[name]
        return (own or 0) if given is None or own == 0 else given

    def shots(self, name: str, given: int | None) -> int | None:
        """How many examples each task of a group, or the one task, gets; None where they differ."""
        found = {self.fewshot(leaf, given) for leaf in self.leaves(name)}
        return found.pop() if len(found) == 1 else None

    def takes_chance(self, given: int | None) -> bool:
        """Whether a seed might change the scores: by examples in the prompt, texts that are generated, a class of the
        task's own, or a function in a module that speaks of `random`."""
        return any(
            self.fewshot(name, given) > 0
            or task.OUTPUT_TYPE == "generate_until"
            or type(task).__name__ != "ConfigurableTask"
            or any(_speaks_of_random(task.get_config(part)) for part in _SEEDED_PARTS)
            for name, task in self.tasks.items()
        )

    def version(self, name: str) -> str | None:
        """lm-eval's version of a task or group; None where it has none."""
        group = self.groups.get(name)
        found = self.tasks[name].VERSION if group is None else (group.metadata or {}).get("version")
        return None if found is None else str(found)


@dataclass
class TaskSet:
    """Tasks that exist; their documents are read at the first use of `loaded`, and kept.

    names: as asked for: tasks, groups or tags of lm-eval.
    manager: the lm-eval TaskManager that knows them.
    built: requests of the last evaluation, which the next one with the same settings uses again.
    """

    names: list[str]
    manager: Any
    built: Any = None

    @functools.cached_property
    def loaded(self) -> Loaded:
        """Reads (downloads, where need be) all documents. InputError, which names the task, where that fails."""
        built: list[Any] = []
        reported: list[str] = []
        origin: dict[str, str] = {}
        with contextlib.redirect_stdout(sys.stderr), only_errors_logged():
            for name in self.names:
                item = _build(self.manager, name)
                parts = item if isinstance(item, list) else [item]  # a tag is a list of tasks
                if not any(map(_leaf_names, parts)):
                    where = _file_of(self.manager.task_index, name)
                    raise InputError(f"the group {name} has no tasks: mend {where}, or leave it out")
                built += parts
                for part in parts:
                    leaves = _leaf_names(part)
                    reported += [part.name] if getattr(part, "has_aggregation", False) else leaves
                    for leaf in leaves:
                        if origin.setdefault(leaf, name) != name:
                            raise InputError(f"task {leaf} is in both {origin[leaf]} and {name}: leave one of them out")
            found = self.manager.load(built)
            for name, task in found["tasks"].items():
                _prepare(self.manager, name, task)
        defaults = {name: task.get_config("num_fewshot") for name, task in found["tasks"].items()}
        return Loaded(found["tasks"], found["groups"], list(dict.fromkeys(reported)), defaults)


def resolve_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskSet:
    """Look the names up in `include_path` (a folder of lm-eval task files) and in lm-eval's own tasks.

    lm-eval's own tasks are indexed (some ten seconds) only if the folder lacks a name that their files have. Reads no
    documents. Raises InputError for a folder that is not there, for no name, for an unknown one (with near matches),
    and for a group that names an unknown task or itself.
    """
    check_known(tasks, include_path)
    names = list(dict.fromkeys(tasks))

    from lm_eval.tasks import TaskManager

    manager: Any = None
    index: dict[str, Any] = {}
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        index = manager.task_index
    unknown = _unknown(names, index)
    if unknown and all(name in _own_names().mentioned for name in unknown):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        index = manager.task_index
        unknown = _unknown(names, index)
    for name, group in unknown.items():
        if group is not None:
            raise InputError(
                f"the group {group} names the task {name!r}, which is unknown: mend {_file_of(index, group)}"
            )
        reason = _unreadable(name, include_path, manager)
        if reason is not None:
            raise InputError(f"task {name!r} can't be used: {reason}")
        raise _unknown_task(name, {*index, *_own_names().defined})
    return TaskSet(names, manager)


def check_known(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Raise InputError, as `resolve_tasks` does, for a folder that is not there, no name, and a name that no task file
    so much as mentions: told from the files' text in a second, before lm-eval or PyTorch is imported."""
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(
            f"the folder of tasks {str(include_path)!r} is not there: give a folder with lm-eval task files"
        )
    if not tasks:
        raise InputError("no task was given: name at least one, such as hellaswag")
    folders = [] if include_path is None else [_names_in(Path(include_path))]
    for name in tasks:
        if any(name in found.mentioned for found in folders) or name in _own_names().mentioned:
            continue
        raise _unknown_task(name, _own_names().defined.union(*(found.defined for found in folders)))


def _unknown_task(name: str, known: Collection[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=3)
    remedy = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists what there is"
    return InputError(f"task {name!r} is unknown: {remedy}")


def check_fewshot(tasks: TaskSet, num_fewshot: int | None) -> None:
    """Raise InputError for a task with too few documents for the examples in its prompt. Reads all documents."""
    for name, task in tasks.loaded.tasks.items():
        wanted = tasks.loaded.fewshot(name, num_fewshot)
        sampler, settings = getattr(task, "sampler", None), getattr(task, "fewshot_cfg", None)
        if wanted == 0 or sampler is None or settings is None:
            continue
        # lm-eval draws one more where the document in question may be among them, and takes splits of None for equal
        there = len(sampler.df) - (settings.split == task.config.test_split)
        if wanted > there:
            raise InputError(
                f"task {name} has {there} examples for its prompt, not {wanted}: use a lower --num-fewshot"
            )


# ---- names


def _unknown(names: Sequence[str], index: dict[str, Any]) -> dict[str, str | None]:
    """Names that the index lacks, of those given and those in their groups, with the group that names them (None: it
    was given). InputError for a group that contains itself."""
    found: dict[str, str | None] = {}
    checked: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = " > ".join([*above[above.index(name) :], name])
            raise InputError(f"the group {name} contains itself ({circle}): mend {_file_of(index, name)}")
        if name not in index:
            found.setdefault(name, above[-1] if above else None)
        elif name not in checked:
            for member in _members(index[name]):
                visit(member, (*above, name))
            checked.add(name)

    for name in names:
        visit(name, ())
    return found


def _members(entry: Any) -> list[str]:
    """Names that an index's entry refers to: a group's tasks, as far as they are not defined in place."""
    members = (entry.cfg or {}).get("task")
    return [member for member in members if isinstance(member, str)] if isinstance(members, list) else []


def _file_of(index: dict[str, Any], name: str) -> str:
    return str(getattr(index.get(name), "yaml_path", None) or "its file")


@dataclass(frozen=True)
class _Names:
    """Names in task files: of tasks and groups, and every word that may be one."""

    defined: frozenset[str]
    mentioned: frozenset[str]


@functools.cache
def _own_names() -> _Names:
    """Those of lm-eval's own files."""
    package = importlib.util.find_spec("lm_eval")  # importing it takes seconds
    (place,) = (package and package.submodule_search_locations) or [""]
    return _names_in(Path(place, "tasks"))


def _names_in(path: Path) -> _Names:
    """Read from the files' text, lm-eval's own in a second; reading these as YAML, as it does, takes ten."""
    texts = []
    for folder, _, files in os.walk(path):
        for file in files:
            if not file.endswith((".py", ".pyc", ".md", ".txt", ".csv", ".json", ".jsonl")):  # what is included has any
                texts.append(Path(folder, file).read_text(encoding="utf-8", errors="replace"))
    text = "\n".join(texts)
    defined = re.findall(r"^(?:task|group): *['\"]?([\w.:+-]+)", text, re.MULTILINE)
    return _Names(frozenset(defined), frozenset(re.findall(r"[^\s,\[\]'\"#]+", text)))


def _unreadable(name: str, folder: str | Path | None, manager: Any) -> str | None:
    """Why a file of the folder that has this name in it is not in the index: lm-eval leaves such files out silently."""
    if folder is None:
        return None
    known = {entry.yaml_path for entry in manager.task_index.values()}
    for path in sorted(Path(folder).rglob("*.yaml")):
        if path in known or name not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        try:
            manager.load([str(path)])
        except Exception as error:  # whatever YAML and lm-eval raise
            return f"{path} can't be read ({reason_of(error)})"
    return None


# ---- reading


def _build(manager: Any, name: str) -> Any:
    """lm-eval's Task, Group or (for a tag) list of Tasks, with documents."""
    try:
        with _seeded():
            found = manager.load([name])
    except (Exception, SystemExit) as error:  # a task's file and functions can raise anything
        raise _refusal(manager, name, error) from error
    return found["groups"].get(name) or found["tasks"].get(name) or list(found["tasks"].values())


def _prepare(manager: Any, name: str, task: Any) -> None:
    """Process the documents; InputError for a task that can't be evaluated here."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name} runs generated code or needs more than text: it can't be evaluated here")
    if task.get_config("process_docs") is not None:
        task.set_config("process_docs", _once(task.get_config("process_docs")))
        try:
            with _seeded():
                _ = task.eval_docs
        except (Exception, SystemExit) as error:  # the function is the task's own
            raise _refusal(manager, name, error) from error


def _refusal(manager: Any, name: str, error: BaseException) -> InputError:
    """What to raise for a task that lm-eval can't load; of a group or tag the member that fails is named."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    entry = manager.task_index.get(name)
    for member in [] if entry is None else [*_members(entry), *sorted(entry.tags if entry.yaml_path is None else ())]:
        try:
            manager.load([member])
        except (Exception, SystemExit) as inner:  # the same as before
            return _refusal(manager, member, inner)
    # RuntimeError: data sets that are scripts; ValueError: another part of the data set is in the cache.
    kinds: dict[type[BaseException], str] = {RuntimeError: "script", ValueError: "cache"}
    said = kinds.get(type(error))
    if isinstance(error, (OSError, DatasetsError, HfHubHTTPError)) or (said is not None and said in str(error)):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return InputError(
            f"the documents of task {name} can't be loaded ({reason}): check the network and HF_HUB_OFFLINE, "
            "or give a folder of tasks with local files (--include-path)"
        )
    where = _file_of(manager.task_index, name)
    return InputError(f"task {name} can't be used ({reason_of(error)}): mend {where}, or leave the task out")


def reason_of(error: BaseException) -> str:
    """An error of somebody else's code in one line: its kind and what it says, or else where it arose."""
    text = " ".join(str(error).split())
    if text:
        return f"{type(error).__name__}: {text[:200]}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} in {frames[-1].name}" if frames else type(error).__name__


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Documents that a task shuffles are the same in every process, with lm-eval's own seeds."""
    import numpy as np

    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`process` run once for each split: lm-eval runs it three times an evaluation, over all documents."""
    kept: dict[int, tuple[Any, Any]] = {}  # by identity, which the kept split makes sure of

    @functools.wraps(process)
    def processed(documents: Any) -> Any:
        if id(documents) not in kept:
            kept[id(documents)] = (documents, process(documents))
        return kept[id(documents)][1]

    return processed


def _speaks_of_random(setting: Any) -> bool:
    """Whether a setting is a function whose module has the word in its source, or can't be read."""
    if not callable(setting):
        return False
    module = inspect.getmodule(inspect.unwrap(setting))
    try:
        return module is None or "random" in inspect.getsource(module)
    except OSError:
        return True


def _leaf_names(part: Any) -> list[str]:
    tasks = part.get_all_tasks() if hasattr(part, "get_all_tasks") else [part]
    return [task.task_name for task in tasks]


@contextlib.contextmanager
def only_errors_logged() -> Iterator[None]:
    """lm-eval warns about each task of local files and each model object, once a point of a sweep."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
