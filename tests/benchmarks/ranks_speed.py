"""Seconds of a sweep by one rank and by several, a GPU each, as a user starts it, and how far their numbers differ.

    PYTHONPATH=. python tests/benchmarks/ranks_speed.py --shape 7b --ranks 2 1

A random model with the demo's tokenizer is saved, and mean_cut_accuracy_experiments.py slices it to all points of a
sweep, perplexity only. The seconds are those of the whole command, start-up and loading included.
`--folder` keeps model and results, so that the runs can be had one by one.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import ModelOptions, option, parse, random_model, redundancy
from timing import Table, machine, print_heading
from transformers import AutoConfig

from slicing.experiment.results import Results, read_results
from slicing.files import write_json
from slicing.loading import load_tokenizer

SCRIPT = Path(__file__).parents[2] / "mean_cut_accuracy_experiments.py"


@dataclass(frozen=True)
class Options(ModelOptions):
    """The options of this benchmark."""

    ranks: Sequence[int] = option((2, 1), "numbers of ranks, in the order of the runs", type=int, nargs="+")
    mean: float = option(0.3, "mean cut, SP")
    step: float = option(0.02, "between the amounts of the sweep")
    samples: int = option(128, "calibration windows")
    length: int = option(2048, "tokens a window, of calibration and perplexity")
    perplexity_samples: int | None = option(None, "perplexity windows (all of the text's test part)", type=int)
    dataset: str = option("demo", "the text, as of the script")
    tokenizer: str = option("demo", "of the text: demo, or a folder")
    folder: str | None = option(None, "keep model and results here (a temporary folder)", type=str)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure; the table goes to stdout, all figures to the JSON file."""
    options = parse(Options, __doc__, argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        model = folder / f"model-{options.shape}-{options.layers}-{options.dtype}-{options.seed}"
        _make_model(options, model)
        for count in options.ranks:
            seconds = _run(options, folder, model, count)
            write_json(folder / f"seconds-{count}.json", seconds)
        found = _table(folder)
    if options.json:
        write_json(Path(options.json), {"options": asdict(options), "machine": machine(options.torch_device), **found})


def _make_model(options: Options, folder: Path) -> None:
    """Save the random model with a tokenizer, unless it is there."""
    if (folder / "tokenizer_config.json").exists():
        return
    tokenizer = load_tokenizer(options.tokenizer)
    model = random_model(options, vocab_size=len(tokenizer))
    print_heading(model, options.shape, machine(options.torch_device))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if options.torch_device.type == "cuda":
        torch.cuda.empty_cache()  # the runs need the card


def _run(options: Options, folder: Path, model: Path, count: int) -> float:
    """Seconds of the command with this number of ranks."""
    shutil.rmtree(folder / f"results-{count}", ignore_errors=True)
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    command = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc-per-node={count}"] if count > 1 else [])]
    command += [str(SCRIPT), "--model", str(model), "--dataset", options.dataset, "--quiet"]
    command += ["--mean", f"{options.mean}", "--step", f"{options.step}", "--cuda-device", options.torch_device.type]
    command += ["--vector-cut", *(f"{value:.4f}" for value in redundancy(layers))]
    command += ["--calibration-samples", f"{options.samples}", "--calibration-length", f"{options.length}"]
    command += ["--perplexity-length", f"{options.length}", "--output-dir", str(folder / f"results-{count}")]
    if options.perplexity_samples is not None:
        command += ["--perplexity-samples", f"{options.perplexity_samples}"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=2)  # to stderr
    return time.perf_counter() - start


def _table(folder: Path) -> dict[str, Any]:
    """Print what the folder holds: seconds by number of ranks, and differences from the run by one."""
    seconds = {int(file.stem.split("-")[1]): json.loads(file.read_text()) for file in folder.glob("seconds-*.json")}
    results = {count: read_results(next((folder / f"results-{count}").iterdir())) for count in seconds}
    table = Table("ranks", "points", "seconds", "to one rank", "largest NLL difference", width=6)
    found: dict[str, Any] = {}
    for count in sorted(seconds):
        ratio = seconds[count] / seconds[1] if 1 in seconds else None
        difference = _difference(results[count], results[1]) if 1 in seconds else None
        points = len(results[count].points)
        shown = "-" if difference is None else f"{difference:.3g}"
        table.row(str(count), str(points), seconds[count], ratio, shown)
        found[str(count)] = {"seconds": seconds[count], "ratio": ratio, "points": points, "difference": difference}
    return found


def _difference(results: Results, reference: Results) -> float:
    """Of the windows' mean negative log likelihoods, over all points."""
    pairs = zip(results.points, reference.points, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one.nll, other.nll, strict=True))


if __name__ == "__main__":
    main()
