"""What the scores of a task depend on besides the model: a hash of its documents, its settings and its functions' code.

No path and no time of a file is in it: task files that are moved are the same tasks, changed data is another task.
"""

import functools
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from slicing.task_set import TaskSet

# Of a task's settings: where its documents come from, which stand in the hash themselves; what it is called; how many
# examples are in its prompt, which an evaluation sets.
_NOT_HASHED = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "task", "task_alias", "tag"}
_NOT_HASHED |= {"num_fewshot", "metadata"}


def task_content(tasks: TaskSet, *, limit: int | None = None, num_fewshot: int | None = None) -> dict[str, str]:
    """A hash of each task and group by its name, for an evaluation of the first `limit` documents. Reads them."""
    loaded = tasks.loaded
    found = {}
    for name, task in loaded.tasks.items():
        examples = loaded.fewshot(name, num_fewshot)
        content = hashlib.sha256()
        documents = task.eval_docs
        _add_documents(content, documents if limit is None else _first(documents, limit))
        if examples > 0 and hasattr(task, "sampler"):
            content.update(b"examples")
            _add_documents(content, task.sampler.df)
        modules: dict[str, ModuleType] = {}
        settings = {"class": _described(type(task), modules), "version": str(task.VERSION), "examples": examples}
        settings |= {
            key: _described(value, modules) for key, value in _settings(task).items() if key not in _NOT_HASHED
        }
        content.update(json.dumps(settings, sort_keys=True).encode())
        for code in sorted(_code(modules.values())):
            content.update(code)
        found[name] = content.hexdigest()[:16]
    for name, group in loaded.groups.items():
        aggregates = _described(group.aggregate_metric_list, {})
        text = json.dumps([loaded.leaves(name), aggregates], sort_keys=True)
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def _first(documents: Iterable[Any], limit: int) -> Iterable[Any]:
    return (document for _, document in zip(range(limit), documents, strict=False))


def _add_documents(content: Any, documents: Iterable[Any]) -> None:
    for document in documents:
        content.update(json.dumps(document, sort_keys=True, default=_value).encode() + b"\n")


def _value(value: Any) -> str:
    """A value that JSON has no word for, such as bytes, a date or an array."""
    from datasets.fingerprint import Hasher

    return f"{type(value).__name__} {Hasher.hash(value)}"


def _settings(task: Any) -> dict[str, Any]:
    config = getattr(task, "config", None)
    return {field.name: getattr(config, field.name) for field in fields(config)} if is_dataclass(config) else {}


def _described(value: Any, modules: dict[str, ModuleType]) -> Any:
    """A setting in JSON; functions by their names, and their modules into `modules`."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, dict):
        return {str(key): _described(item, modules) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        items = sorted(value, key=str) if isinstance(value, set) else value
        return [_described(item, modules) for item in items]
    if isinstance(value, functools.partial):
        return ["partial", *(_described(part, modules) for part in (value.func, value.args, value.keywords))]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _described(getattr(value, field.name), modules) for field in fields(value)}
    if callable(value):
        value = inspect.unwrap(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    module = _module(named)
    if module is not None:
        modules[module.__name__] = module
    return f"function {named.__qualname__}"


def _module(value: Any) -> ModuleType | None:
    """The module that a function or class was written in."""
    return sys.modules.get(str(getattr(value, "__module__", "")))


def _code(modules: Iterable[ModuleType]) -> list[bytes]:
    """The sources of modules and of those that they use, leaving out installed packages, which have versions."""
    seen: dict[str, bytes] = {}
    left = list(modules)
    while left:
        module = left.pop()
        file = getattr(module, "__file__", None)
        if file is None or module.__name__ in seen or not file.endswith(".py") or _is_installed(Path(file)):
            continue
        seen[module.__name__] = Path(file).read_bytes()
        for value in list(vars(module).values()):
            written = inspect.isfunction(value) or inspect.isclass(value)
            used = value if isinstance(value, ModuleType) else _module(value) if written else None
            if used is not None:
                left.append(used)
    return list(seen.values())


@functools.cache
def _installed_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def _is_installed(file: Path) -> bool:
    return any(file.resolve().is_relative_to(folder) for folder in _installed_folders())
