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

from slicing import InputError, flags
from slicing.command_line import Screen, check_output, exit_code
from slicing.experiment.inputs import check_positions
from slicing.flags import flag


@dataclass(frozen=True)
class Options:
    """The options of this script, a field a flag."""

    model: str = flag(help="hub name, local folder, .gguf file, or demo", positional=True)
    dataset: str = flag(
        "pg19",
        help="text: wikitext2, ptb, c4, alpaca, pg19, demo, or a .txt, .jsonl or .parquet file",
        for_demo="demo",
    )
    split: str = flag("validation", help="split of the data set")
    text_column: str | None = flag(None, help="field of a .jsonl or .parquet file that holds the text", default="text")
    samples: int = flag(256, help="windows to measure on", low=1)
    max_seq_len: int = flag(1024, help="tokens per window", low=1)
    stride: int = flag(1024, help="tokens from the start of one window to the next; the paper has 256", low=1)
    batch_size: int | None = flag(None, help="windows that run at once", default="what the device holds", low=1)
    device: str = flag(
        "auto",
        help="auto, cpu, mps, cuda or cuda:N; a model that doesn't fit there is spread over all GPUs and the CPU",
        default="auto, the best there is",
    )
    dtype: str = flag("auto", help="auto, float32, bfloat16, float16 or float64", default="auto, the checkpoint's own")
    seed: int = flag(42, help="for the choice of windows", low=0, high=2**32 - 1)
    revision: str | None = flag(None, help="branch, tag or commit of a model on the hub", default="main")
    trust_remote_code: bool = flag(False, help="run model code from the hub")
    output: str | None = flag(
        None,
        help="write vector, cosines and settings; --vector-cut takes this file",
        default="not written",
        metavar="FILE.json",
        is_path=True,
    )
    plot: str | None = flag(
        None, help="draw LR and cosine by layer", default="not drawn", metavar="FILE.png", is_path=True
    )
    quiet: bool = flag(False, help="show no progress bars")


def parse(argv: Sequence[str] | None) -> Options:
    """The options on the command line."""
    return flags.parse(Options, __doc__, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(argv)
    return exit_code(lambda: measure(options), "interrupted")


def measure(options: Options) -> None:
    """Check, load, measure, print, write."""
    flags.check_limits(options)
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
    config = load_config(options.model, dtype=options.dtype, **where)
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

    from msgspec.structs import replace

    from slicing.devices import must_offload, on_devices
    from slicing.experiment.results import VectorFile
    from slicing.experiment.windows import Windows
    from slicing.files import write_json
    from slicing.redundancy import layer_redundancy
    from slicing.structure import as_json, from_json

    if not must_offload(model, device, calibration_tokens=0):
        model.to(device)
    with on_devices(model, device):
        redundancy = layer_redundancy(model, windows, batch_size=options.batch_size, progress=not options.quiet)
    print(redundancy.table(), file=sys.stderr)
    screen = Screen()
    screen.show(redundancy.line())
    found = from_json(redundancy.as_dict(), VectorFile)
    if options.output:
        data = Windows(options.dataset, options.split, windows).entry()
        written = replace(found, arguments=asdict(options), data=data)
        write_json(Path(options.output), as_json(written))
    if options.plot:
        from slicing.experiment.names import shown
        from slicing.report.plots import plot_layer_redundancy

        plot_layer_redundancy(found, shown(options.model), Path(options.plot))
    screen.close()


if __name__ == "__main__":
    sys.exit(main())
