"""Recover what slicing cost: train LoRA adapters on a saved sliced model, merge them, save it again, reload it.

python examples/recover.py results/demo-run/models/SB_0.0000-1a2b3c4d recovered --dataset demo
python examples/recover.py sliced recovered --dataset wikitext2 --steps 300 --batch 8

Prints the perplexity on the test split before, after, and of the reloaded folder. The adapters learn on every linear
layer, the shortcuts too. What is saved is a sliced model as before, with weights of the same shapes.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicing import InputError, flags
from slicing.command_line import exit_code
from slicing.flags import flag


@dataclass(frozen=True)
class Options:
    """The options of this script, a field a flag."""

    model: str = flag(help="folder of a sliced model", positional=True)
    output: str = flag(help="folder for the recovered model; it must not exist yet", positional=True, is_path=True)
    dataset: str = flag("wikitext2", help="text to learn (train split) and to test on (test split), as in the sweep")
    length: int = flag(1024, help="tokens per window", low=2)
    steps: int = flag(300, help="optimiser steps", low=1)
    batch: int = flag(8, help="windows a step", low=1)
    learning_rate: float = flag(5e-4, help="the highest; it falls to 0 along a cosine")
    rank: int = flag(32, help="rank of the adapters", low=1)
    test_samples: int | None = flag(None, help="windows of the test split", default="all", low=1)
    device: str = flag("auto", help="auto, cpu, mps, cuda or cuda:N")
    seed: int = flag(42, help="for the windows, the adapters and their order", low=0, high=2**32 - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    return exit_code(lambda: recover(flags.parse(Options, __doc__, argv)), "interrupted: nothing is saved")


def recover(options: Options) -> dict[str, float]:
    """Train, merge, save, reload; the perplexities by name."""
    from transformers import set_seed

    from slicing import SlicedForCausalLM, load_model, perplexity, token_windows

    if not options.learning_rate > 0:
        raise InputError(f"--learning-rate must be above 0, got {options.learning_rate}")
    if Path(options.output).exists():
        raise InputError(f"{options.output} is there already: give another folder")
    set_seed(options.seed)
    model, tokenizer = load_model(options.model, device=options.device)
    if not isinstance(model, SlicedForCausalLM):
        raise InputError(f"{options.model} is no sliced model: save one with --save-model best")
    train = token_windows(options.dataset, tokenizer, split="train", length=options.length)
    test = token_windows(options.dataset, tokenizer, split="test", length=options.length, count=options.test_samples)
    found = {"before": perplexity(model, test)}
    _say("before", found)

    trained = train_adapters(model, train, options)
    found["after"] = perplexity(trained, test)
    _say("after", found)
    trained.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    again, _ = load_model(options.output, device=options.device)
    found["reloaded"] = perplexity(again, test)
    _say("reloaded", found)
    return found


def train_adapters(model: Any, windows: Any, options: Options) -> Any:
    """The model after training LoRA adapters on windows (N, S), shuffled, again and again, and merging them."""
    import peft
    from transformers import Trainer, TrainingArguments

    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM", r=options.rank, lora_alpha=options.rank, target_modules="all-linear"
    )
    settings = TrainingArguments(
        output_dir=f"{options.output}-trainer",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(options.steps // 20, 1),
        bf16=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        logging_steps=max(options.steps // 10, 1),
        report_to=[],
        seed=options.seed,
    )
    adapted = peft.get_peft_model(model, adapters)
    rows = [{"input_ids": window, "labels": window} for window in windows]
    with redirect_stdout(sys.stderr):  # its log
        Trainer(adapted, settings, train_dataset=rows).train()
    return adapted.merge_and_unload().eval()


def _say(name: str, found: dict[str, float]) -> None:
    print(f"perplexity {name} {found[name]:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
