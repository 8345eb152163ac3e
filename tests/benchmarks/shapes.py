"""What the benchmarks run on: random models with the shapes of known ones, and random tokens.

Speed depends on shapes and dtypes, not on what a model has learned: nothing is downloaded, nothing is read.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slicing.families import InputError
from slicing.schedule import final_slices, normalise, slice_widths

DTYPES = ("auto", "bfloat16", "float16", "float32")
STD = 0.02  # of the random weights: activations stay finite and no covariance has equal eigenvalues

# name -> model_type, config
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "7b": (  # Mistral-7B
        "mistral",
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
    ),
    "13b": (  # Llama-2-13B
        "llama",
        {
            "num_hidden_layers": 40,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
    ),
    "demo": (  # SmolLM2-135M
        "llama",
        {
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    ),
}

# LR of the 32 layers of Mistral-7B-v0.1, as the paper's authors published it.
PUBLISHED_LR = (
    *(0.0, 0.4291, 0.6063, 0.6858, 0.6245, 0.6643, 0.7004, 0.7172),
    *(0.7473, 0.7836, 0.7842, 0.8073, 0.8310, 0.8477, 0.8281, 0.8459),
    *(0.8423, 0.8856, 0.8264, 0.8620, 0.9188, 0.9590, 0.9824, 0.9825),
    *(0.9978, 1.0, 0.9992, 0.9887, 0.9604, 0.9334, 0.9276, 0.4930),
)

Parsed = TypeVar("Parsed")


def option(default: Any, text: str, **argument: Any) -> Any:
    """A dataclass field that `parse` makes a flag of: its help, and what argparse is told besides."""
    known = {} if argument.get("action") else {"type": type(default)}
    return field(default=default, metadata={"help": text, **known, **argument})


@dataclass(frozen=True)
class ModelOptions:
    """The options of every benchmark: which random model, where, and where the figures go."""

    shape: str = option("7b", "shape of the model", choices=tuple(SHAPES))
    layers: int | None = option(None, "decoder layers, at least 2 (the shape's own)", type=int)
    dtype: str = option("auto", "of weights and activations (bfloat16, on a CPU float32)", choices=DTYPES)
    device: str = option("auto", "cuda, cuda:1, cpu (cuda where there is one)")
    seed: int = option(42, "of the random weights and tokens")
    json: str | None = option(None, "write all figures to this file", type=str, metavar="FILE")

    @property
    def torch_device(self) -> torch.device:
        """The device to run on; a CUDA device always with its number, as tensors have it."""
        name = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("cuda", 0) if name == "cuda" else torch.device(name)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        automatic = "float32" if self.torch_device.type == "cpu" else "bfloat16"
        return getattr(torch, automatic if self.dtype == "auto" else self.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SlicingOptions(ModelOptions):
    """What the benchmarks that slice share."""

    windows: int = option(128, "calibration windows")
    length: int = option(2048, "tokens a calibration window")
    mean: float = option(0.3, "mean cut, SP")
    round_interval: int = option(8, "widths are multiples of this")
    rotations: int = option(2, "bases a layer", choices=(1, 2))
    batch_size: int | None = option(None, "windows run at once (what the library chooses)", type=int)


@dataclass(frozen=True)
class CalibrationOptions(SlicingOptions):
    """For either calibration."""

    calibration: str = option("every-point", "every-point, or once for a whole sweep", choices=("every-point", "once"))


def parse(kind: type[Parsed], text: str | None, argv: Sequence[str] | None) -> Parsed:
    """The options from the command line, a flag a field of the dataclass `kind`; an InputError ends it with code 2."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for known in fields(kind):  # type: ignore[arg-type]
        parser.add_argument(f"--{known.name.replace('_', '-')}", default=known.default, **known.metadata)
    arguments = vars(parser.parse_args(argv))
    try:
        return kind(**arguments)
    except InputError as error:
        parser.error(str(error))


def random_model(options: ModelOptions, **changes: Any) -> PreTrainedModel:
    """A dense model of the shape, its weights drawn on the device: no copy of them is ever elsewhere. changes: of the
    config."""
    model_type, settings = SHAPES[options.shape]
    layers = options.layers or settings["num_hidden_layers"]
    config = AutoConfig.for_model(model_type, **(settings | {"num_hidden_layers": layers} | changes))
    torch.manual_seed(options.seed)
    with options.torch_device, _default_dtype(options.torch_dtype):
        model = AutoModelForCausalLM.from_config(config, dtype=options.torch_dtype)
    return _drawn(model)


@torch.no_grad()
def _drawn(model: Any) -> Any:
    """The model in evaluation mode, every matrix drawn anew; its norms keep their weights of 1."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=STD)
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_windows(config: PretrainedConfig, count: int, length: int, seed: int) -> torch.Tensor:
    """Random token ids (N, S), on the CPU as a tokenizer leaves them."""
    return torch.randint(config.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


def redundancy(layers: int) -> list[float]:
    """LR of L layers: the published vector, interpolated where the model has another number of layers."""
    last = len(PUBLISHED_LR) - 1
    found = []
    for index in range(layers):
        place = index * last / (layers - 1)
        low = min(int(place), last - 1)
        found.append(PUBLISHED_LR[low] + (place - low) * (PUBLISHED_LR[low + 1] - PUBLISHED_LR[low]))
    return normalise(found)


def widths_of(config: PretrainedConfig, mean: float, base: float, multiple: int) -> list[int]:
    """The widths that a sweep has at SP = mean and SB = base, with the vector of `redundancy`."""
    limit = 1 - multiple / config.hidden_size
    slices = final_slices(redundancy(config.num_hidden_layers), mean=mean, base=base, limit=limit)
    return slice_widths(slices, config.hidden_size, multiple=multiple)
