"""Seconds and memory of slicing a model that stays on the CPU, a layer at a time on the GPU, under a memory limit.

    PYTHONPATH=. python tests/benchmarks/offload_memory.py --shape 13b

A random model is sliced twice: on the GPU as a whole, without a limit, then from the CPU with as much GPU memory as a
third of the model and the activations take (`torch.cuda.set_per_process_memory_fraction`); more would be an
out-of-memory error. Both must give the same weights, bit for bit. Nothing is warmed up. GB are 10^9 bytes.
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import SlicingOptions, option, parse, random_model, random_windows, widths_of
from timing import Table, machine, print_heading

from slicing.devices import model_bytes
from slicing.files import write_json
from slicing.rotation import rotate_and_slice
from slicing.speed import timed


@dataclass(frozen=True)
class Options(SlicingOptions):
    """The options of this benchmark."""

    shape: str = option("13b", "shape of the model")
    share: float = option(1 / 3, "of the model's bytes, what the GPU may hold beside the activations")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure; the table goes to stdout, all figures to the JSON file."""
    options = parse(Options, __doc__, argv)
    device = options.torch_device
    if device.type != "cuda":
        raise SystemExit("error: there is no CUDA device, whose memory this is about")
    model = random_model(options)
    where = machine(device)
    print_heading(model, options.shape, where)
    windows = random_windows(model.config, options.windows, options.length, options.seed)
    widths = widths_of(model.config, options.mean, 0.0, options.round_interval)
    more: dict[str, Any] = {"rotations": options.rotations, "batch_size": options.batch_size, "device": device}
    activations = windows.numel() * model.config.hidden_size * model.dtype.itemsize
    total = torch.cuda.get_device_properties(device).total_memory
    limit = int(options.share * model_bytes(model)) + activations
    results: dict[str, Any] = {"options": asdict(options), "machine": where, "widths": widths}
    results |= {"model_bytes": model_bytes(model), "activations_bytes": activations, "limit_bytes": limit}
    table = Table("model", "limit, GB", "peak, GB", "seconds", width=12)

    def measure(name: str, limit: int | None) -> Any:
        torch.cuda.reset_peak_memory_stats(device)
        seconds, sliced = timed(device, lambda: rotate_and_slice(model, windows, widths, **more))
        peak = torch.cuda.max_memory_allocated(device)
        table.row(name, None if limit is None else limit / 1e9, peak / 1e9, seconds)
        results[name] = {"seconds": seconds, "peak_bytes": peak}
        return sliced

    whole = measure("on the GPU", None).cpu()
    model.cpu()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        offloaded = measure("on the CPU", limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    pairs = zip(whole.parameters(), offloaded.parameters(), strict=True)
    results["same_weights"] = all(torch.equal(one, other) for one, other in pairs)
    ratio = results["on the CPU"]["seconds"] / results["on the GPU"]["seconds"]
    print(
        f"\nmodel {model_bytes(model) / 1e9:.1f} GB, activations {activations / 1e9:.1f} GB; offloaded / on the GPU: "
        f"{ratio:.2f} x the time; same weights: {'yes' if results['same_weights'] else 'NO'}"
    )
    if options.json:
        write_json(Path(options.json), results)


if __name__ == "__main__":
    main()
