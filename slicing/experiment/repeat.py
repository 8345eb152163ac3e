"""A finished run printed again without reading the model: a stamp says what it was made from, file by file.

The run's key holds every byte of the weights, which takes seconds for each GB. Where no file has changed since the run
ended, as size, times and number of each say, its key can't have changed either. Documents of tasks may come from
anywhere, so these are read and compared. The stamp is no more than that shortcut: without it, or where anything
differs, everything is read as ever.
"""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicing.experiment.results import Results, read_results
from slicing.families import InputError
from slicing.files import local_path, read_json, write_json
from slicing.flags import DEMO

if TYPE_CHECKING:
    from slicing.experiment.inputs import Inputs
    from slicing.experiment.options import Options
    from slicing.task_set import TaskSet

STAMP = "finished.json"
# options that change neither the numbers nor what is kept; --speed adds to what is there
_NO_MATTER = ("fresh", "quiet", "output_dir", "seeds", "speed")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "lm_eval")
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")

Tree = dict[str, list[int]]  # files by name: size, times of change in ns, number of the inode


def finished_run(options: "Options") -> tuple[Path, Results, list[str]] | None:
    """Folder, results and notes of the run of these options that ended here, if nothing that it was made from has
    changed since; None otherwise."""
    settings = _settings(options)
    for file in Path(options.output_dir).glob(f"*/{STAMP}"):
        try:
            stamp = read_json(file)
            same = stamp["settings"] == settings and all(
                _tree(Path(root)) == was for root, was in stamp["trees"].items()
            )
            results, notes, tasks = read_results(file.parent), list(stamp["notes"]), stamp["tasks"]
        except (InputError, OSError, KeyError, TypeError, AttributeError):  # a damaged stamp is none
            continue
        if options.speed and any(point.speed is None for point in results.points):
            continue
        if same and _tasks(options) == tasks:
            return file.parent, results, notes
    return None


def write_stamp(folder: Path, inputs: "Inputs") -> None:
    """Note that the run in this folder is finished, and what it was made from."""
    options = inputs.options
    roots = [*_sources(options), folder / "results.json", folder / "points", folder / "models"]
    trees = {str(root.absolute()): _tree(root) for root in roots}
    content = None if inputs.tasks is None else _content(inputs.tasks, options)
    stamp = {"settings": _settings(options), "notes": list(inputs.notes), "trees": trees, "tasks": content}
    write_json(folder / STAMP, stamp)


def _tasks(options: "Options") -> dict[str, str] | None:
    """What the scores depend on, as it is now."""
    if not options.tasks:
        return None
    from slicing.tasks import resolve_tasks

    return _content(resolve_tasks(options.tasks, options.include_path), options)


def _content(tasks: "TaskSet", options: "Options") -> dict[str, str]:
    from slicing.task_content import task_content

    return task_content(tasks, limit=options.accuracy_limit, num_fewshot=options.num_fewshot)


def _settings(options: "Options") -> dict[str, Any]:
    """Options, as far as they matter, and what else decides about the numbers: versions and the machine."""
    given = {name: value for name, value in asdict(options).items() if name not in _NO_MATTER}
    versions = {name: _version(name) for name in _PACKAGES}
    machine = [platform.node(), platform.machine(), platform.python_version(), os.getcwd()]
    cards = sorted(str(card) for card in Path("/dev").glob("nvidia[0-9]*"))
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    content = {"options": given, "versions": versions, "machine": machine, "cards": cards, "variables": variables}
    found: dict[str, Any] = json.loads(json.dumps(content))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources(options: "Options") -> Iterator[Path]:
    """Files and folders that perplexities come from. Texts of the hub are read at fixed commits."""
    from slicing.text import SPLITS, file_of, is_file

    yield from _model(options)
    texts = (options.dataset, options.source_for_vector)
    for text in texts:
        if is_file(text):
            yield from (file_of(text, split) for split in {*SPLITS, options.perplexity_split})
    yield from (local_path(part) for part in options.vector_cut or () if part.lower().endswith(".json"))


def _model(options: "Options") -> Iterator[Path]:
    """The model's files; of one on the hub the commit's folder in the cache, and what the branch's name stands for."""
    from slicing.loading import demo_place

    path = local_path(options.model)
    if options.model == DEMO:
        yield Path(*demo_place())
    elif path.exists():
        yield path
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(options.model, "config.json", revision=options.revision or "main")
        if isinstance(found, str):
            yield Path(found).parent
            yield Path(found).parents[2] / "refs"


def _tree(root: Path) -> Tree:
    """The files of a folder, or the one file; nothing where there is none."""
    if root.is_dir():
        files = [file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        return {str(file.relative_to(root)): _state(file) for file in sorted(files)}
    return {"": _state(root)} if root.is_file() else {}


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
