"""Short names of models, texts and runs, for folders, tables and figures."""

from pathlib import Path

_NAME_BYTES = 80  # of a model's or a text's name in that of a folder: both, mean and hash fit the 255 there are


def shown(name: str) -> str:
    """A name with a mark in place of what no font and no terminal shows: bytes that are not UTF-8, line ends."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def short_model_name(name: str) -> str:
    """Last part of a hub name or path; of a snapshot in the hub's cache the model's name, not the commit."""
    path = Path(name)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return shown(path.name)


def text_name(source: str) -> str:
    """A short name for a text: the data set's, or the file's without folder, endings and {split}; where nothing is left
    of that, the folder's."""
    path = Path(source)
    stem = path.with_suffix("").stem if path.suffix in (".gz", ".xz") else path.stem
    names = (part.replace("{split}", "").strip("/._-") for part in (stem, *reversed(path.parent.parts)))
    return shown(next(filter(None, names), "text"))


def run_name(model: str, text: str, mean: float, key: str, inner_mean: float = 0.0) -> str:
    """Name of a run's folder: what a person looks for, and the beginning of the run's key."""
    path = Path(model)
    short = short_model_name(str(path.resolve()) if path.name in ("", "..") else model)
    inner = f"-inner{inner_mean:g}" if inner_mean else ""
    return f"{_folder_name(short)}-{_folder_name(text_name(text))}-mean{mean:g}{inner}-{key[:8]}"


def _folder_name(name: str) -> str:
    """A name that every file system takes, shortened where it is long: the hash tells the runs apart."""
    letters = "".join(character if character.isalnum() or character in "-._" else "_" for character in name)
    return letters.encode()[:_NAME_BYTES].decode(errors="ignore")
