"""Seconds of a whole sweep with perplexity on a random model of a given shape: the dense model, then every slice base.

    PYTHONPATH=. python tests/benchmarks/sweep_speed.py --shape 7b --json sweep.json
    PYTHONPATH=. python tests/benchmarks/sweep_speed.py --shape 7b --calibration once

The calls are those of slicing/experiment.py, on random tokens and with the published vector. Nothing is warmed up: the
total is what a sweep takes once the model is loaded.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shapes import ModelOptions, option, parse, random_model, random_windows, widths_of
from timing import Table, machine, print_heading, timed
from transformers import PreTrainedModel

from slicing.evaluation import window_nll
from slicing.modeling import count_parameters
from slicing.rotation import dense_bases, rotate_and_slice, slice_with_bases
from slicing.schedule import sweep_amounts
from slicing.store import write_json


@dataclass(frozen=True)
class Options(ModelOptions):
    """The options of this benchmark."""

    windows: int = option(128, "calibration windows")
    length: int = option(2048, "tokens a calibration window")
    perplexity_windows: int = option(166, "windows of the perplexity")
    perplexity_length: int = option(2048, "tokens in each")
    mean: float = option(0.3, "mean cut, SP")
    step: float = option(0.02, "of the amount, SP - SB")
    round_interval: int = option(8, "widths are multiples of this")
    rotations: int = option(2, "bases a layer", choices=(1, 2))
    calibration: str = option("every-point", "every-point, or once for all", choices=("every-point", "once"))
    batch_size: int | None = option(None, "windows run at once (what the library chooses)", type=int)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep; a row goes to stdout as each point ends, all figures to the JSON file."""
    options = parse(Options, __doc__, argv)
    device = options.torch_device
    loading, model = timed(device, lambda: random_model(options))
    where = machine(device)
    print_heading(model, options.shape, where)
    config, dense_parameters = model.config, count_parameters(model)
    calibration = random_windows(config, options.windows, options.length, options.seed)
    test = random_windows(config, options.perplexity_windows, options.perplexity_length, options.seed + 1)
    amounts = sweep_amounts(options.mean, options.step)
    parts = {"dense perplexity": 0.0, "bases": 0.0, "slicing": 0.0, "perplexity": 0.0}
    points: list[dict[str, Any]] = []
    results: dict[str, Any] = {"options": asdict(options), "machine": where, "loading_seconds": loading}
    more: dict[str, Any] = {"rotations": options.rotations, "batch_size": options.batch_size}

    def perplexity(evaluated: PreTrainedModel) -> tuple[float, float]:
        seconds, nll = timed(device, lambda: window_nll(evaluated, test, batch_size=options.batch_size, progress=False))
        return seconds, nll.mean().exp().item()

    table = Table("SB", "parameters", "slicing, s", "perplexity, s", "perplexity", width=16)
    start = time.perf_counter()
    parts["dense perplexity"], value = perplexity(model)
    table.row("dense", "1", None, parts["dense perplexity"], f"{value:.0f}")
    bases = None
    if options.calibration == "once":
        parts["bases"], bases = timed(device, lambda: dense_bases(model, calibration, **more))
        table.row("dense (bases)", None, parts["bases"], None, None)
    for amount in amounts:
        base = max(0.0, options.mean - amount)
        widths = widths_of(config, options.mean, base, options.round_interval)

        def sliced(widths: list[int] = widths) -> PreTrainedModel:
            if bases is not None:
                return slice_with_bases(model, bases, widths)
            return rotate_and_slice(model, calibration, widths, **more)

        slicing, point = timed(device, sliced)
        evaluation, value = perplexity(point)
        kept = count_parameters(point) / dense_parameters
        del point
        gc.collect()
        parts["slicing"] += slicing
        parts["perplexity"] += evaluation
        table.row(f"{base:.4f}", kept, slicing, evaluation, f"{value:.0f}")
        points.append(
            {
                "base": base,
                "widths": widths,
                "parameters_kept": kept,
                "slicing_seconds": slicing,
                "perplexity_seconds": evaluation,
                "perplexity": value,
            }
        )
    total = time.perf_counter() - start
    table = Table(f"{len(points)} points", "seconds", width=16)
    table.row("total", total)
    for name, seconds in (*parts.items(), ("all else", total - sum(parts.values()))):
        table.row(f"  {name}", seconds)
    if options.json:
        write_json(Path(options.json), results | {"seconds": total, "parts": parts, "points": points})


if __name__ == "__main__":
    main()
