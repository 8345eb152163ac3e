"""What a run's numbers depend on besides its options: the model's files, the text, versions, the card."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from slicing.experiment.options import Options
from slicing.files import local_path
from slicing.loading import DEMO


def text_entry(source: str, split: str, windows: torch.Tensor) -> dict[str, Any]:
    """What results.json says of token windows (N, S)."""
    count, length = windows.shape
    return {"source": source, "split": split, "windows": count, "length": length, "tokens": windows.numel()}


def versions(options: Options) -> dict[str, str | None]:
    """Of Python and the libraries that make the numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval") if options.tasks else None,
    }


def device_name(device: torch.device) -> str:
    """The card's name, or cpu or mps."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_commit() -> str | None:
    """The commit of this repository, with "-dirty" where its files differ from it; None outside a checkout."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(Path(__file__).resolve().parents[2]), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def model_commit(options: Options) -> str | None:
    """The commit of a hub model, as the cache names it; None for files of one's own."""
    from huggingface_hub import try_to_load_from_cache

    if options.model == DEMO or local_path(options.model).exists():
        return None
    path = try_to_load_from_cache(options.model, "config.json", revision=options.revision or "main")
    return Path(path).parent.name if isinstance(path, str) else None


def model_files(name: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a local model, its folder's own ones. Nothing for the demo and hub
    models."""
    path = local_path(name)
    return [] if name == DEMO else _stamps(path, path.iterdir() if path.is_dir() else [path])


def task_files(folder: str | None) -> list[tuple[str, int, int]]:
    """The same of all files in a folder of tasks and the folders in it."""
    return [] if folder is None else _stamps(Path(folder), Path(folder).rglob("*"))


def _stamps(root: Path, found: Iterable[Path]) -> list[tuple[str, int, int]]:
    kept = [file for file in sorted(found) if file.is_file() and "__pycache__" not in file.parts]
    return [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in kept]


def command_line() -> str:
    """The command that this process was started with."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
