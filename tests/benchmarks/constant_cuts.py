"""Perplexity of one width for all layers, for models that need their begin token before a text (Gemma).

PYTHONPATH=. python tests/benchmarks/constant_cuts.py gemma-3-270m-q4_k_m.gguf --dataset 'wiki.{split}.txt'
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import slicing
from slicing.families import find_family
from slicing.parts import part


def windows(options: argparse.Namespace, tokenizer: Any, split: str, count: int) -> torch.Tensor:
    """Token windows (count, length) that begin with the begin token."""
    found = slicing.token_windows(options.dataset, tokenizer, split=split, length=options.length - 1, count=count)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return torch.cat([torch.full((len(found), 1), begin), found], 1)


def decoder_parameters(model: Any, layers: str) -> int:
    """How many parameters the decoder layers have."""
    return slicing.count_parameters(part(model, layers))


def main(argv: Sequence[str] | None = None) -> None:
    """Slice, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=24, help="calibration windows")
    parser.add_argument("--test-windows", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where the figures go too")
    options = parser.parse_args(argv)

    model, tokenizer = slicing.load_model(options.model, device=options.device)
    calibration = windows(options, tokenizer, "train", options.samples)
    test = windows(options, tokenizer, "test", options.test_windows)
    layers = find_family(model.config).layers
    whole = decoder_parameters(model, layers)
    rows = [{"cut": 0.0, "rotations": 0, "perplexity": slicing.perplexity(model, test), "true cut": 0.0}]
    print("| cut of the widths | rotations | perplexity | true cut of the decoder layers |\n|---|---|---|---|")
    print(f"| dense | | {rows[0]['perplexity']:.2f} | |", flush=True)
    size, count = model.config.hidden_size, model.config.num_hidden_layers
    for cut in options.cuts:
        widths = slicing.slice_widths([cut] * count, size)
        for rotations in (2, 1):
            sliced = slicing.rotate_and_slice(model, calibration, widths, rotations=rotations)
            true = 1 - decoder_parameters(sliced, layers) / whole
            rows += [
                {
                    "cut": cut,
                    "rotations": rotations,
                    "perplexity": slicing.perplexity(sliced, test),
                    "true cut": true,
                }
            ]
            print(f"| {cut:g} | {rotations} | {rows[-1]['perplexity']:.2f} | {100 * true:.1f} % |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
