"""Seconds of a whole sweep with perplexity on a random model of a given shape: the dense model, then every slice base.

    PYTHONPATH=. python tests/benchmarks/sweep_speed.py --shape 7b --json sweep.json
    PYTHONPATH=. python tests/benchmarks/sweep_speed.py --shape 7b --calibration once

The calls are those of slicing/experiment/sweep.py, on random tokens and with the published vector. Nothing is warmed
up: the total is what a sweep takes once the model is loaded.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shapes import CalibrationOptions, option, parse, random_model, random_windows, widths_of
from timing import Table, machine, print_heading
from transformers import PreTrainedModel

from slicing.bases import dense_bases
from slicing.files import write_json
from slicing.likelihood import window_nll
from slicing.modeling import count_parameters
from slicing.rotation import rotate_and_slice, slice_with_bases
from slicing.schedule import sweep_amounts
from slicing.speed import timed


@dataclass(frozen=True)
class Options(CalibrationOptions):
    """The options of this benchmark."""

    step: float = option(0.02, "of the amount, SP - SB")
    perplexity_windows: int = option(166, "windows of the perplexity")
    perplexity_length: int = option(2048, "tokens in each")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep; a row goes to stdout as each point ends, all figures to the JSON file."""
    options = parse(Options, __doc__, argv)
    loading, model = timed(options.torch_device, lambda: random_model(options))
    where = machine(options.torch_device)
    print_heading(model, options.shape, where)
    sweep = _sweep(options, model)
    table = Table(f"{len(sweep['points'])} points", "seconds", width=18)
    table.row("total", sweep["seconds"])
    for name, seconds in sweep["parts"].items():
        table.row(f"  {name}", seconds)
    if options.json:
        found = {"options": asdict(options), "machine": where, "loading_seconds": loading, **sweep}
        write_json(Path(options.json), found)


def _sweep(options: Options, model: PreTrainedModel) -> dict[str, Any]:
    """Seconds in all, by part and by point; prints a row a point."""
    device, config = model.device, model.config
    calibration = random_windows(config, options.windows, options.length, options.seed)
    test = random_windows(config, options.perplexity_windows, options.perplexity_length, options.seed + 1)
    more: dict[str, Any] = {"rotations": options.rotations, "batch_size": options.batch_size}

    def evaluate(evaluated: PreTrainedModel) -> float:
        return window_nll(evaluated, test, batch_size=options.batch_size, progress=False).mean().exp().item()

    def cut(widths: list[int]) -> PreTrainedModel:
        if bases is not None:
            return slice_with_bases(model, bases, widths)
        return rotate_and_slice(model, calibration, widths, **more)

    table = Table("SB", "parameters", "slicing, s", "perplexity, s", "perplexity", width=18)
    start = time.perf_counter()
    dense_parameters = count_parameters(model)
    dense_seconds, perplexity = timed(device, lambda: evaluate(model))
    table.row("dense", "1", None, dense_seconds, f"{perplexity:.0f}")
    bases_seconds, bases = 0.0, None
    if options.calibration == "once":
        bases_seconds, bases = timed(device, lambda: dense_bases(model, calibration, **more))
        table.row("dense, bases", None, bases_seconds, None, None)
    points: list[dict[str, Any]] = []
    for amount in sweep_amounts(options.mean, options.step):
        base = max(0.0, options.mean - amount)
        widths = widths_of(config, options.mean, base, options.round_interval)
        slicing, point = timed(device, partial(cut, widths))
        evaluation, perplexity = timed(device, partial(evaluate, point))
        kept = count_parameters(point) / dense_parameters
        del point
        gc.collect()
        table.row(f"{base:.4f}", kept, slicing, evaluation, f"{perplexity:.0f}")
        points.append(
            {
                "base": base,
                "widths": widths,
                "parameters_kept": kept,
                "slicing_seconds": slicing,
                "perplexity_seconds": evaluation,
                "perplexity": perplexity,
            }
        )
    total = time.perf_counter() - start
    parts = {
        "dense perplexity": dense_seconds,
        "bases": bases_seconds,
        "slicing": sum(point["slicing_seconds"] for point in points),
        "perplexity": sum(point["perplexity_seconds"] for point in points),
    }
    return {"seconds": total, "parts": parts | {"all else": total - sum(parts.values())}, "points": points}


if __name__ == "__main__":
    main()
