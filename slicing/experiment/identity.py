"""What a run's numbers depend on besides its options: the model's content, the text, versions, the card."""

import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicing.experiment.digests import content_key, weights_key
from slicing.experiment.options import Options
from slicing.experiment.results import Versions
from slicing.files import local_path
from slicing.loading import DEMO


def versions(options: Options) -> Versions:
    """Of Python and the libraries that make the numbers."""
    return Versions(
        python=platform.python_version(),
        torch=str(torch.__version__),  # a subclass of str, which is no JSON
        transformers=version("transformers"),
        lm_eval=version("lm_eval") if options.tasks else None,
    )


def device_name(device: torch.device) -> str:
    """The card's name, or cpu or mps."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_commit() -> str | None:
    """The commit of this repository, with "-dirty" where its files differ from it; None outside a checkout, also where
    the code is installed below somebody else's."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
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


def model_content(model: PreTrainedModel) -> dict[str, Any]:
    """What a model computes with, whatever its path and the other files beside it: config, weights, code of its own."""
    return {
        "config": _without_names(model.config.to_dict()),
        "attention": getattr(model.config, "_attn_implementation", None),
        "dtype": str(model.dtype),
        "weights": weights_key(model),
        "code": _own_code(model),
    }


def _without_names(config: Any) -> Any:
    """A config without what says where it was read and by which version it was written."""
    if isinstance(config, dict):
        names = ("_name_or_path", "transformers_version")
        return {str(key): _without_names(value) for key, value in config.items() if key not in names}
    if isinstance(config, list | tuple):
        return [_without_names(value) for value in config]
    return config if config is None or isinstance(config, str | int | float | bool) else str(config)


def _own_code(model: PreTrainedModel) -> str | None:
    """A hash of the modules that a checkpoint brings with it; None for a class of Transformers or this project."""
    module = type(model).__module__
    if not module.startswith("transformers_modules."):
        return None
    found = hashlib.sha256()
    for file in sorted(Path(sys.modules[module].__file__ or "").parent.glob("*.py")):
        found.update(f"{file.name}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides about the token ids of a prompt."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        whole: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    else:
        whole = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # of the last call
            whole.pop(state, None)
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    adds = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    return {"class": type(tokenizer).__name__, "whole": content_key(whole)} | special | adds
