"""Perplexity of a saved sliced model in four bits, with its shortcuts quantised like the rest and with them left alone.

    PYTHONPATH=. python tests/benchmarks/four_bits.py results/demo-run/models/SB_0.0000-1a2b3c4d --dataset demo
    PYTHONPATH=. python tests/benchmarks/four_bits.py sliced --tools torchao quanto bitsandbytes --json four_bits.json

Weights only, by rounding, in groups of 32 (bitsandbytes: nf4 in blocks of 64). The tools are not part of the
requirements; those that are not installed are left out.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import slicing
from slicing.files import write_json
from slicing.report.model_card import UNQUANTISED

GROUPS = {"torchao": 32, "bitsandbytes": 64}  # widths that don't divide by it are refused, by bitsandbytes on a CPU
MODULES = {"torchao": "torchao", "quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes"}


def main(argv: Sequence[str] | None = None) -> None:
    """A row a tool goes to stdout, all figures to the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a sliced model")
    parser.add_argument("--tools", nargs="+", default=list(MODULES), choices=list(MODULES))
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window of the test split")
    parser.add_argument("--samples", type=int, default=None, help="windows, from the first on; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    whole, tokenizer = slicing.load_model(options.model, device=options.device)
    test = slicing.token_windows(options.dataset, tokenizer, split="test", length=options.length)[: options.samples]
    found: dict[str, Any] = {"as saved": slicing.perplexity(whole, test)}
    print("| | all layers | without shortcuts |\n|---|---:|---:|")
    print(f"| as saved | {found['as saved']:.3f} | |", flush=True)
    widths = whole.config.widths
    del whole
    for tool in options.tools:
        if not _installed(MODULES[tool]):
            print(f"| {tool} | not installed | |", flush=True)
            continue
        if any(width % GROUPS.get(tool, 1) for width in widths):
            print(f"| {tool} | needs widths in multiples of {GROUPS[tool]} | |", flush=True)
            continue
        everything, careful = (
            slicing.perplexity(_quantised(options.model, tool, keep, options.device), test)
            for keep in (["lm_head"], UNQUANTISED)
        )
        found[tool] = {"all layers": everything, "without shortcuts": careful}
        print(f"| {tool} | {everything:.3f} | {careful:.3f} |", flush=True)
    if options.json:
        write_json(Path(options.json), found)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its package
        return False


def _quantised(folder: str, tool: str, keep: list[str], device: str) -> Any:
    """The model in four bits but for the modules to keep; in bf16 on a GPU, as these tools are used."""
    config: Any
    if tool == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=keep)
    elif tool == "torchao":
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        config = TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)), modules_to_not_convert=keep)
    else:
        config = QuantoConfig(weights="int4", modules_to_not_convert=keep)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device, dtype=dtype)


if __name__ == "__main__":
    main()
