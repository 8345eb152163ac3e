"""Measure the layer redundancy (LR) of a decoder LLM and print it as one line, to paste into --vector-cut.

python calculate_LR.py demo --samples 16
python calculate_LR.py mistralai/Mistral-7B-v0.1 --device cuda --output mistral.json --plot mistral.png
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slicing import InputError
from slicing.command_line import Parser, Screen, at_least, check_output, check_seed, exit_code, path
from slicing.experiment.options import check_positions


@dataclass(frozen=True)
class Options:
    """The options of this script, a field a flag."""

    model: str
    dataset: str
    split: str = "validation"
    text_column: str | None = None
    samples: int = 256
    max_seq_len: int = 1024
    stride: int = 1024
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 42
    revision: str | None = None
    trust_remote_code: bool = False
    output: str | None = None
    plot: str | None = None
    quiet: bool = False


def parse(argv: Sequence[str] | None) -> Options:
    """The options on the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="hub name, local folder, .gguf file, or demo")
    add(
        "--dataset",
        help="wikitext2, ptb, c4, alpaca, pg19, demo, or a text file (default: pg19; demo for the demo model)",
    )
    add("--split", default="validation", help="part of the data set (default: validation)")
    add("--text-column", help="field of a .jsonl or .parquet file that holds the text (default: text)")
    add("--samples", type=int, default=256, help="windows (default: 256)")
    add("--max-seq-len", type=int, default=1024, help="tokens a window (default: 1024)")
    add("--stride", type=int, default=1024, help="tokens between the starts of two windows (default: 1024; paper: 256)")
    add("--batch-size", type=int, help="windows run at once (default: as many as the device holds)")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: auto, the best there is)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto, the checkpoint's)")
    add("--seed", type=int, default=42, help="of the choice of windows (default: 42)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--trust-remote-code", action="store_true", help="run model code from the hub")
    add(
        "--output",
        type=path,
        metavar="FILE.json",
        help="write the vector, cosines and settings; --vector-cut takes this file",
    )
    add("--plot", type=path, metavar="FILE.png", help="draw LR and cosine by layer")
    add("--quiet", action="store_true", help="no progress bars")
    given = vars(parser.parse_args(argv))
    given["dataset"] = given["dataset"] or ("demo" if given["model"] == "demo" else "pg19")
    return Options(**given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(argv)
    return exit_code(lambda: measure(options), "interrupted")


def measure(options: Options) -> None:
    """Check, load, measure, print, write."""
    for name in ("samples", "max_seq_len", "stride", "batch_size"):
        at_least(1, name, getattr(options, name))
    check_seed(options.seed)
    check_output("--output", options.output, (".json",))
    check_output("--plot", options.plot, (".png", ".pdf", ".svg"))
    if options.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # the bars of libraries too; read when tqdm is imported

    from slicing.batches import check_token_ids
    from slicing.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_dtype
    from slicing.text import check_source, token_windows

    device = resolve_device(options.device)
    resolve_dtype(options.dtype)
    check_source(options.dataset, options.split, options.text_column)
    where: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.model, **where)
    if config.model_type == "sliced":
        raise InputError(f"{options.model!r} is sliced already: measure LR on the model that it was made of")
    check_positions(config, "--max-seq-len", options.max_seq_len)
    windows = token_windows(
        options.dataset,
        load_tokenizer(options.model, **where),
        split=options.split,
        length=options.max_seq_len,
        count=options.samples,
        stride=options.stride,
        seed=options.seed,
        text_column=options.text_column,
    )
    check_token_ids(windows, config.get_text_config(decoder=True).vocab_size)
    model, _ = load_model(options.model, device="cpu", dtype=options.dtype, **where)

    from slicing.devices import must_offload, on_devices
    from slicing.experiment.identity import text_entry
    from slicing.files import write_json
    from slicing.redundancy import layer_redundancy

    if not must_offload(model, device, calibration_tokens=0):
        model.to(device)
    with on_devices(model, device):
        redundancy = layer_redundancy(model, windows, batch_size=options.batch_size, progress=not options.quiet)
    print(redundancy.table(), file=sys.stderr)
    screen = Screen()
    screen.show(redundancy.line())
    if options.output:
        data = text_entry(options.dataset, options.split, windows)
        write_json(Path(options.output), redundancy.as_dict() | {"arguments": asdict(options), "data": data})
    if options.plot:
        from slicing.report.labels import shown
        from slicing.report.plots import plot_layer_redundancy

        plot_layer_redundancy(redundancy.as_dict(), shown(options.model), Path(options.plot))
    screen.close()


if __name__ == "__main__":
    sys.exit(main())
