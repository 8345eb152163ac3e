"""Runs of mean_cut_accuracy_experiments.py on a tiny random model: in this process, or in one of its own.

A process of its own is forked from a server that has imported everything, so that a test can start and kill many.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_models import random_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import mean_cut_accuracy_experiments as script
import slicing.experiment.slicer
from slicing.experiment.measure import Measurement
from slicing.experiment.results import Results, read_results
from slicing.structure import as_json

REPOSITORY = Path(script.__file__).parent
TASKS = Path(__file__).parent / "data" / "tiny_tasks"
VECTOR = ("0", "0.6", "1")
WORDS = ("the", "kettle", "began", "to", "sing", "and", "rain", "fell", "on", "a", "roof", "of", "tin")


def write_text(folder: Path, seed: int = 0, **words: int) -> str:
    """Random text with so many words a split; returns the --dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    choice = random.Random(seed)
    for split, count in words.items():
        (folder / f"{split}.txt").write_text(" ".join(choice.choices(WORDS, k=count)), encoding="utf-8")
    return str(folder / "{split}.txt")


def write_model(folder: Path, case: str = "llama", **settings: Any) -> None:
    """A model of 3 layers and width 48 with a tokenizer, as a folder."""
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    model = random_model(case, dtype=torch.float32, vocab_size=304, max_position_embeddings=256, **settings)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.3)  # perplexities of some hundreds
    model.save_pretrained(folder)


class Runs:
    """A model, a text, and runs on them with results below `folder`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.model = folder, folder / "model"
        write_model(self.model, **settings)
        self.text = write_text(folder / "text", train=600, validation=300, test=320)

    def arguments(self, output: str, *more: str, mean: float = 0.3, step: float = 0.1) -> list[str]:
        """A quick sweep; `more` comes last, so it wins."""
        given = ["--model", str(self.model), "--dataset", self.text, "--mean", str(mean), "--step", str(step)]
        given += ["--calibration-samples", "8", "--calibration-length", "16", "--perplexity-length", "16"]
        given += ["--cuda-device", "cpu", "--output-dir", str(self.folder / output)]
        if mean > 0 and "--source-for-vector" not in more:
            given += ["--vector-cut", *VECTOR]
        return [*given, *more]

    def run(self, output: str, *more: str, plots: bool = False, **numbers: float) -> tuple[Path, Results]:
        """A run in this process: its folder and what it wrote, which the schema must know. Plots take a second."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ))  # --quiet sets a variable
            if not plots:
                for name in ("plot_sweep", "plot_redundancy"):
                    stack.enter_context(mock.patch(f"slicing.report.table.{name}"))
            assert script.main(self.arguments(output, *more, **numbers)) == 0
        return self.found(output)

    def found(self, output: str) -> tuple[Path, Results]:
        """The one run's folder below an output folder, and its results."""
        (folder,) = (self.folder / output).iterdir()
        return folder, read_results(folder)

    def start(
        self, output: str, *more: str, environment: dict[str, str] | None = None, **numbers: float
    ) -> BaseProcess:
        """A run in a process of its own; stdout, stderr and a line for each point begun go to files in `folder`."""
        arguments = (str(self.folder / output), self.arguments(output, *more, **numbers), environment or {})
        process: BaseProcess = _SERVER.Process(target=_serve, args=arguments)
        path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
        with mock.patch.dict(os.environ, PYTHONPATH=path):  # the first one starts the server, which imports this file
            process.start()
        return process

    def begun(self, output: str) -> list[str]:
        """Keys of the points that runs in processes of their own have begun, in order."""
        log = self.folder / f"{output}.log"
        return log.read_text().split() if log.exists() else []

    def printed(self, output: str, stream: str, rank: int = 0) -> str:
        """What the last run in a process of its own wrote to stdout or stderr."""
        return (self.folder / f"{output}.{stream}{rank}").read_text()


def _serve(output: str, arguments: list[str], environment: dict[str, str]) -> None:
    """The process: log each point that is begun, run the script; FAILING_RANK fails at its first point."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start without it
    rank = environment.get("RANK", "0")
    log = os.open(f"{output}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{name}{rank}", os.O_WRONLY | os.O_TRUNC | os.O_CREAT), stream)
    measure: Callable[..., Any] = Measurement.point

    def logged(measurement: Measurement, target: Any, key: str) -> Any:
        os.write(log, f"{key}\n".encode())
        if rank == environment.get("FAILING_RANK"):
            raise RuntimeError("a card fell out")
        return measure(measurement, target, key)

    Measurement.point = logged  # type: ignore[method-assign]
    calibrate = slicing.experiment.slicer.dense_bases

    def noted(*given: Any, **named: Any) -> Any:
        with open(f"{output}.passes", "a") as passes:
            passes.write(f"{rank}\n")
        return calibrate(*given, **named)

    slicing.experiment.slicer.dense_bases = noted
    if "--quiet" in arguments or rank != "0":
        disable_progress_bar()  # TQDM_DISABLE, which the script sets, is read when tqdm is imported: here long ago
    torch.set_num_threads(1)
    sys.exit(script.main(arguments))


def comparable(results: Results) -> dict[str, Any]:
    """What results.json holds without what two equal runs may differ in: times, memory, where they went."""
    content: dict[str, Any] = json.loads(json.dumps(as_json(results)))
    for name in ("output_dir", "fresh", "quiet", "cuda_device"):
        del content["arguments"][name]
    del content["check_seconds"]
    for point in content["points"]:
        del point["seconds"], point["peak_memory_bytes"]
    return content


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tiny_runs", "slicing.experiment.sweep", "slicing.report.table", "matplotlib.figure"])
