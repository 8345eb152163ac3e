"""Tokens a second of sliced models against the dense one: prefill, and decoding with a KV cache.

    PYTHONPATH=. python tests/benchmarks/sliced_model_speed.py --shape 7b --json speed.json
    PYTHONPATH=. python tests/benchmarks/sliced_model_speed.py --shape 7b --round-intervals 1 64 --cuts 0.3

Whole models with random weights; what is timed is in slicing/speed.py. On CUDA a decoded step is a CUDA graph, unless
--eager is given. Dense and sliced take turns; a ratio is that of the two medians.
"""

import gc
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from shapes import ModelOptions, option, parse, random_model, random_windows, widths_of
from timing import Table, machine, print_heading
from transformers import PreTrainedModel

from slicing.families import InputError
from slicing.files import write_json
from slicing.modeling import count_parameters
from slicing.rotation import random_sliced
from slicing.speed import WARM_UP_STEPS, Work, decoding, median_speeds, prefill, take_turns

VECTORS = ("constant", "published")


@dataclass(frozen=True)
class Options(ModelOptions):
    """The options of this benchmark."""

    cuts: Sequence[float] = option((0.2, 0.3, 0.4), "mean cuts, SP", type=float, nargs="+")
    vectors: Sequence[str] = option(
        VECTORS, "constant widths, and those of the published vector at SB 0", type=str, nargs="+", choices=VECTORS
    )
    round_intervals: Sequence[int] = option((8,), "widths are multiples of these", type=int, nargs="+")
    rotations: Sequence[int] = option((2, 1), "bases a layer", type=int, nargs="+", choices=(1, 2))
    prefill: Sequence[int] = option((8, 2048), "windows at once", type=int, nargs=2, metavar=("WINDOWS", "LENGTH"))
    decode_batches: Sequence[int] = option((1, 16), "sequences decoded at once", type=int, nargs="+")
    decode_steps: int = option(16, "tokens decoded in a turn")
    cache_length: int = option(512, "length of the static cache")
    eager: bool = option(False, "decode without CUDA graphs", action="store_true")
    repeats: int = option(5, "turns of dense and sliced")

    def __post_init__(self) -> None:
        needed = max(self.decode_steps, WARM_UP_STEPS)
        if self.cache_length < needed:
            raise InputError(f"--cache-length is {self.cache_length}, the decoded tokens need {needed}: raise it")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each combination of the options; a row goes to stdout as it is known, all figures to the JSON file."""
    options = parse(Options, __doc__, argv)
    model = random_model(options)
    where = machine(options.torch_device)
    print_heading(model, options.shape, where)
    graphs = model.device.type == "cuda" and not options.eager
    how = "CUDA graphs" if graphs else "eager"
    windows, length = options.prefill
    print(f"tokens/s; prefill {windows} x {length}; decoding: {how}, cache {options.cache_length}")
    models = _compare(options, model, graphs)
    if options.json:
        found = {"options": asdict(options), "machine": where, "decoding": how, "models": models}
        write_json(Path(options.json), found)


def _compare(options: Options, model: PreTrainedModel, graphs: bool) -> list[dict[str, Any]]:
    """The figures of each sliced model; prints a row for each, and one for the dense model."""
    names = ["prefill", *(f"decode {batch}" for batch in options.decode_batches)]
    columns = [column for name in names for column in (name, "x")]
    table = Table("cut, widths, multiple, bases", "parameters", *columns, width=30)
    dense_parameters = count_parameters(model)
    dense = _works(model, options, graphs)
    models: list[dict[str, Any]] = []
    for cut, vector, multiple, rotations in product(
        options.cuts, options.vectors, options.round_intervals, options.rotations
    ):
        widths = widths_of(model.config, cut, cut if vector == "constant" else 0.0, multiple)
        sliced_model = random_sliced(model, widths, rotations=rotations, seed=options.seed)
        sliced = _works(sliced_model, options, graphs)
        kept = count_parameters(sliced_model) / dense_parameters
        speeds = [_compared(model.device, *works, options.repeats) for works in zip(dense, sliced, strict=True)]
        del sliced_model, sliced
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        cells = [cell for speed in speeds for cell in (f"{speed['sliced']:.0f}", f"{speed['ratio']:.3f}")]
        table.row(f"{cut:g}, {vector}, {multiple}, {rotations}", kept, *cells)
        models.append(
            {
                "cut": cut,
                "vector": vector,
                "round_interval": multiple,
                "rotations": rotations,
                "widths": widths,
                "parameters_kept": kept,
                "tokens_per_second": dict(zip(names, speeds, strict=True)),
            }
        )
    medians = [statistics.median(entry["tokens_per_second"][name]["dense"] for entry in models) for name in names]
    table.row("dense, median of the rows", "1", *(cell for speed in medians for cell in (f"{speed:.0f}", "1")))
    return models


def _compared(device: torch.device, dense: Work, sliced: Work, repeats: int) -> dict[str, Any]:
    """Tokens a second of both from the medians, their ratio, and the seconds of each turn."""
    works = {"dense": dense, "sliced": sliced}
    seconds = take_turns(device, works, repeats)
    found = median_speeds(works, seconds)
    return {**found, "ratio": found["sliced"] / found["dense"], "seconds": seconds}


def _works(model: PreTrainedModel, options: Options, graphs: bool) -> list[Work]:
    """Prefill and decoding at each batch size of one model, warm."""

    def tokens(count: int, length: int) -> torch.Tensor:
        return random_windows(model.config.get_text_config(), count, length, options.seed).to(model.device)

    return [
        prefill(model, tokens(*options.prefill)),
        *(
            decoding(model, tokens(batch, 1), options.decode_steps, options.cache_length, graph=graphs)
            for batch in options.decode_batches
        ),
    ]


if __name__ == "__main__":
    main()
