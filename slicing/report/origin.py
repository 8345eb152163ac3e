"""Where a model came from, as its card may say it to anybody: name, commit and licence, and no path of this machine."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicing.experiment.names import short_model_name, shown
from slicing.files import local_path
from slicing.flags import DEMO

_LICENCE = ("license", "license_name", "license_link")  # as the hub spells it in a card
_DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Origin:
    """Of a model that was sliced.

    name: what people call it; without a folder.
    hub: its name on the hub, if it is known.
    revision: its commit there, if it is known.
    licence: what its own card says of the licence, by the hub's keys; {} where it says nothing.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    licence: dict[str, Any] = field(default_factory=dict)


def origin_of(model: str, revision: str | None = None) -> Origin:
    """The origin of what `load_model` takes: a hub name, a folder (of the hub's cache too), a .gguf file or "demo".

    revision: the commit of a hub name, where it is known.
    """
    if model == DEMO:
        return Origin(_DEMO.rpartition("/")[2], _DEMO, None, {"license": "apache-2.0"})
    path = local_path(model)
    if not path.exists():
        return Origin(short_model_name(model), model, revision, _licence(_cached_card(model, revision)))
    if hub := _hub_name(path):
        return Origin(short_model_name(hub), hub, path.absolute().name, _licence(path / "README.md"))
    path = path.resolve()
    return Origin(shown(path.name if path.is_dir() else path.stem), licence=_licence(path / "README.md"))


def _hub_name(path: Path) -> str | None:
    """Of a snapshot in the hub's cache, .../models--owner--name/snapshots/commit, what the hub calls the model."""
    snapshots = path.absolute().parent
    cached = snapshots.parent.name
    if snapshots.name != "snapshots" or not cached.startswith("models--"):
        return None
    return cached.removeprefix("models--").replace("--", "/", 1)


def _cached_card(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "README.md", revision=revision or "main")
    return Path(found) if isinstance(found, str) else None


def _licence(card: Path | None) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    if card is None or not card.is_file():  # beside a file there is none
        return {}
    try:
        said = metadata_load(card) or {}
    except Exception:  # of another's file: whatever YAML or its encoding makes of it
        return {}
    return {key: said[key] for key in _LICENCE if isinstance(said.get(key), str | list)}


def public_name(value: str) -> str:
    """A name as it is; of a path its last part."""
    return value if "/" not in value else shown(Path(value).name or Path(value).resolve().name)


def public_command(arguments: Sequence[str] | None = None) -> str:
    """The command of this process without paths of this machine: a folder's or file's name is left of them, and of a
    model in the hub's cache what the hub calls it."""
    script, *given = sys.argv if arguments is None else arguments
    said: list[str] = []
    flag = ""
    for argument in given:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (flag, "", argument)
        if argument.startswith("--") and not equals:
            flag = argument
            said.append(argument)
            continue
        origin = origin_of(value) if name == "--model" else None
        said.append(f"{name}=" if equals else "")
        said[-1] += public_name(value) if origin is None or value == DEMO else origin.hub or origin.name
    return shlex.join(["python", Path(script).name, *said])
