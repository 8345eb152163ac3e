"""The sweep: for each slice base, slice the model, measure perplexity and tasks, keep the point.

The same options go on where an earlier run stopped. Under a launcher the ranks share out the points; rank 0 reports.
"""

import gc
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from . import provenance
from .evaluation import evaluate_tasks, perplexity, window_nll
from .loading import load_model, resolve_device
from .model_card import write_model_card
from .modeling import count_parameters
from .options import REDUNDANCY_LENGTH, REDUNDANCY_SPLIT, REDUNDANCY_WINDOWS, Checked, Target
from .placement import must_offload, on_devices
from .ranks import Ranks
from .redundancy import layer_redundancy
from .results import SCHEMA_VERSION, Point, Results, best_dynamic_point
from .rotation import Bases, dense_bases, rotate_and_slice, slice_with_bases, sliced_parameters
from .search import golden_section
from .store import RunFolder, content_key, windows_key
from .text import token_windows

# Options that a point's numbers don't depend on, or that stand in its key by what they come to.
_NOT_IN_KEY = {"output_dir", "fresh", "quiet", "save_model", "compare", "find_base", "offload", "cuda_device"}
_NOT_IN_KEY |= {"vector_cut", "source_for_vector", "mean", "step", "rotations", "calibration", "round_interval"}
_BASE_TOLERANCE = 0.005  # of --find-base


class Experiment:
    """One run: the loaded model, what all points share, and the folder that they are kept in.

    `folder` is <output_dir>/<model>-<data set>-mean<SP>-<hash of the settings>.
    """

    def __init__(self, checked: Checked, ranks: Ranks) -> None:
        self.checked, self.options, self.ranks = checked, checked.options, ranks
        options = self.options
        self.folder = RunFolder(Path(options.output_dir) / _run_name(checked))
        if options.fresh and ranks.first:
            self.folder.clear()
        ranks.wait()
        self.device = resolve_device(_device_word(options.cuda_device, ranks))  # where the model runs
        self.model, self.tokenizer = load_model(
            options.model,
            device="cpu",
            dtype=options.dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        if not (options.offload or must_offload(self.model, self.device, self._calibration_tokens())):
            self.model.to(self.device)
        self.test_windows = self._windows(options.dataset, options.perplexity_split, options.perplexity_length)
        self.calibration_windows: torch.Tensor | None = None
        if options.mean > 0:
            self.calibration_windows = self._windows(
                options.dataset, "train", options.calibration_length, count=options.calibration_samples
            )
        self.bases: Bases | None = None
        self.results: Results = self._header()

    def run(self, on_point: Callable[[Point, Results], None]) -> Results:
        """Measure what is missing, call `on_point` for each point in order (in rank 0), and return the results."""
        vector = self._redundancy()
        targets = self.checked.targets(vector)
        if vector is not None and self.options.find_base:
            targets = [*targets[:2], self._best_base(vector)]
        self._measure(targets, on_point)
        if vector is not None and self.options.compare == "equal-parameters":
            self._measure([*targets, self._equal_parameters()], on_point)
        self._save_best()
        return self.results

    # ---- what the points share

    def _calibration_tokens(self) -> int:
        return self.options.calibration_samples * self.options.calibration_length if self.options.mean > 0 else 0

    def _windows(self, source: str, split: str, length: int, **more: Any) -> torch.Tensor:
        return token_windows(
            source,
            self.tokenizer,
            split=split,
            length=length,
            seed=self.options.seed,
            text_column=self.options.text_column,
            **more,
        )

    def _redundancy(self) -> list[float] | None:
        """LR: as given, or measured by rank 0; noted in the results."""
        if self.options.mean == 0:
            return None
        if self.checked.vector is not None:
            source = self.checked.source or {}
            found = {"normalised": self.checked.vector, "cosine": source.get("cosine"), "stderr": source.get("stderr")}
            self.results["redundancy"] = found
            self.results["data"]["redundancy"] = source.get("data")
            return self.checked.vector
        source_name = self.options.source_for_vector
        windows = self._windows(
            source_name, REDUNDANCY_SPLIT, REDUNDANCY_LENGTH, count=REDUNDANCY_WINDOWS, stride=REDUNDANCY_LENGTH
        )
        measured_here: dict[str, Any] = {}
        if self.ranks.first:
            with on_devices(self.model, self.device) as model:
                measured = layer_redundancy(
                    model, windows, batch_size=self.options.batch_size, progress=not self.options.quiet
                )
            measured_here = measured.as_dict()
        self.results["redundancy"] = self.ranks.from_first(measured_here)
        self.results["data"]["redundancy"] = provenance.text_entry(source_name, REDUNDANCY_SPLIT, windows)
        return list(self.results["redundancy"]["normalised"])

    def _header(self) -> Results:
        options, config = self.options, self.checked.config
        test, calibration = self.test_windows, self.calibration_windows
        head = self.model.get_output_embeddings()
        return {
            "schema_version": SCHEMA_VERSION,
            "arguments": asdict(options),
            "model": {
                "name": options.model,
                "revision": provenance.model_commit(options),
                "model_type": config.model_type,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "parameters": count_parameters(self.model),
                "hidden_size": config.get_text_config().hidden_size,
                "layers": config.get_text_config().num_hidden_layers,
                "tied": head is not None and head.weight is self.model.get_input_embeddings().weight,
            },
            "versions": provenance.versions(options),
            "git": provenance.git_commit(),
            "device": provenance.device_name(self.device),
            "seed": options.seed,
            "data": {
                "perplexity": provenance.text_entry(options.dataset, options.perplexity_split, test),
                "calibration": (
                    None if calibration is None else provenance.text_entry(options.dataset, "train", calibration)
                ),
                "redundancy": None,
            },
            "redundancy": None,
            "search": None,
            "points": [],
        }

    # ---- points

    def _measure(self, targets: list[Target], on_point: Callable[[Point, Results], None]) -> None:
        """Measure this rank's share of the targets that are not there; rank 0 reports all of them, in order."""
        keys = [self._key(target) for target in targets]
        missing = [pair for pair in zip(targets, keys, strict=True) if self.folder.read(pair[1]) is None]
        mine = {key for _, key in self.ranks.share(missing)}
        with tqdm(total=len(mine), desc="points", unit="point", disable=self.options.quiet or not mine) as bar:
            for target, key in zip(targets, keys, strict=True):
                if key in mine:
                    point = self._point(target, key)
                    self.folder.write(point)
                    bar.update()
                if self.ranks.count == 1:
                    self._report(key, on_point)
        if self.ranks.count > 1:
            self.ranks.wait()
            if self.ranks.first:
                for key in keys:
                    self._report(key, on_point)

    def _report(self, key: str, on_point: Callable[[Point, Results], None]) -> None:
        point = self.folder.read(key)
        assert point is not None
        if all(known["key"] != key for known in self.results["points"]):
            self.results["points"].append(point)
            self.folder.write_results(self.results)
            on_point(point, self.results)

    def _key(self, target: Target, windows: torch.Tensor | None = None) -> str:
        options = {name: value for name, value in asdict(self.options).items() if name not in _NOT_IN_KEY}
        sliced = target.widths is not None
        calibration = self.calibration_windows
        return content_key(
            {
                "schema": SCHEMA_VERSION,
                "target": asdict(target),
                "rotations": self.options.rotations if sliced else None,
                "options": options,
                "model": self.results["model"],
                "files": provenance.model_files(self.options.model),
                "versions": self.results["versions"],
                "device": self.results["device"],
                "calibration": windows_key(calibration) if sliced and calibration is not None else None,
                "perplexity": windows_key(self.test_windows if windows is None else windows),
            }
        )

    def _point(self, target: Target, key: str) -> Point:
        options, quiet = self.options, self.options.quiet
        seconds: dict[str, float | None] = dict.fromkeys(("slice", "perplexity", "tasks"))
        memory: dict[str, int | None] = dict.fromkeys(seconds)
        model = self.model
        if target.widths is not None:
            with self._part("slice", seconds, memory):
                model = self._sliced(target)
        tasks: dict[str, Any] = {}
        with on_devices(model, self.device):
            with self._part("perplexity", seconds, memory):
                nll = window_nll(model, self.test_windows, batch_size=options.batch_size, progress=not quiet)
            if self.checked.tasks is not None:
                with self._part("tasks", seconds, memory):
                    tasks = self._scores(model)
        parameters = count_parameters(model)
        point = {
            "key": key,
            "kind": target.kind,
            "mean": target.mean,
            "base": target.base,
            "amount": None if target.mean is None or target.base is None else target.mean - target.base,
            "slices": target.slices,
            "widths": target.widths,
            "rotations": None if target.widths is None else options.rotations,
            "calibration": target.calibration,
            "parameters": parameters,
            "cut": 1 - parameters / self.results["model"]["parameters"],
            "perplexity": nll.mean().exp().item(),
            "nll": nll.tolist(),
            "tasks": tasks,
            "mean_accuracy": sum(score["value"] for score in tasks.values()) / len(tasks) if tasks else None,
            "seconds": seconds,
            "peak_memory_bytes": memory,
        }
        if target.widths is not None and options.save_model == "all":
            self._save(model, point)
        del model
        gc.collect()
        return point

    def _scores(self, model: PreTrainedModel) -> dict[str, Any]:
        assert self.checked.tasks is not None
        options = self.options
        return dict(
            evaluate_tasks(
                model,
                self.tokenizer,
                self.checked.tasks,
                limit=options.accuracy_limit,
                num_fewshot=options.num_fewshot,
                batch_size=options.batch_size,
                seed=options.seed,
                progress=not options.quiet,
            )
        )

    def _sliced(self, target: Target) -> PreTrainedModel:
        assert target.widths is not None
        assert self.calibration_windows is not None
        options = self.options
        how: dict[str, Any] = {
            "rotations": options.rotations,
            "batch_size": options.batch_size,
            "device": self.device,
            "progress": not options.quiet,
        }
        if target.calibration == "every-point":
            return rotate_and_slice(self.model, self.calibration_windows, target.widths, **how)
        if self.bases is None:
            self.bases = dense_bases(self.model, self.calibration_windows, **how)
        return slice_with_bases(self.model, self.bases, target.widths, device=self.device)

    @contextmanager
    def _part(self, name: str, seconds: dict[str, float | None], memory: dict[str, int | None]) -> Iterator[None]:
        """Time a part of a point and note the highest memory in it (of the process so far, on a CPU)."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds[name] = time.perf_counter() - start
        if cuda:
            memory[name] = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            unit = 1 if sys.platform == "darwin" else 1024
            memory[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # ---- extra points and models

    def _best_base(self, vector: list[float]) -> Target:
        """The slice base with the lowest perplexity on the validation split, looked for with one calibration; it is to
        be confirmed with a calibration of its own. The search is kept, as points are."""
        options = self.options
        windows = self._windows(options.dataset, "validation", options.perplexity_length)
        key = self._key(self.checked.target(options.mean, 0.0, vector, kind="search"), windows)
        kept = self.folder.read(key) if self.ranks.first else {}
        if kept is None:
            trials: list[dict[str, float]] = []

            def trial(base: float) -> float:
                target = self.checked.target(options.mean, base, vector, calibration="once")
                with on_devices(self._sliced(target), self.device) as model:
                    found = perplexity(model, windows, batch_size=options.batch_size, progress=not options.quiet)
                trials.append({"base": base, "perplexity": found})
                return found

            base = golden_section(trial, 0.0, options.mean, _BASE_TOLERANCE)
            data = provenance.text_entry(options.dataset, "validation", windows)
            kept = {"key": key, "base": base, "data": data, "trials": trials}
            self.folder.write(kept)
        found: dict[str, Any] = self.ranks.from_first(kept)
        self.results["search"] = {name: found[name] for name in ("base", "data", "trials")}
        return self.checked.target(options.mean, found["base"], vector, kind="confirm", calibration="every-point")

    def _equal_parameters(self) -> Target:
        """Constant slicing with the true parameter count of the best dynamic point, its mean found by the count."""
        best = best_dynamic_point(self.results, None) if self.ranks.first else None
        wanted: int = self.ranks.from_first(best["parameters"] if best else 0)
        layers = self.checked.config.num_hidden_layers
        flat = [i / (layers - 1) for i in range(layers)]  # with SB = SP the vector plays no part
        low, high = 0.0, 1.0 - self.options.round_interval / self.checked.hidden_size
        nearest: tuple[int, Target] | None = None
        for _ in range(24):
            middle = (low + high) / 2
            target = self.checked.target(middle, middle, flat, kind="equal-parameters")
            assert target.widths is not None
            found = sliced_parameters(self.model, target.widths, self.options.rotations)
            if nearest is None or abs(found - wanted) < nearest[0]:
                nearest = abs(found - wanted), target
            low, high = (low, middle) if found < wanted else (middle, high)
        assert nearest is not None
        return nearest[1]

    def _save_best(self) -> None:
        """Slice the best point once more and save it."""
        if self.options.save_model != "best" or not self.ranks.first:
            return
        sliced = [point for point in self.results["points"] if point["kind"] in ("sweep", "confirm")]
        if sliced:
            best = min(sliced, key=lambda point: point["perplexity"])
            names = ("kind", "mean", "base", "slices", "widths", "calibration")
            self._save(self._sliced(Target(**{name: best[name] for name in names})), best)

    def _save(self, model: PreTrainedModel, point: Point) -> None:
        options, results = self.options, self.results
        folder = self.folder.folder / "models" / f"SB_{point['base']:.4f}"
        if folder.exists():
            return
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        data = results["data"]["calibration"]
        dense = next((known for known in results["points"] if known["kind"] == "dense"), None)
        write_model_card(
            partial,
            model_name=options.model,
            revision=results["model"]["revision"],
            slice_percentage=point["mean"],
            slice_base=point["base"],
            widths=point["widths"],
            rotations=point["rotations"],
            calibration=f"{data['windows']} windows of {data['length']} tokens of {options.dataset} (train)",
            perplexity={
                "data": f"{options.dataset} ({options.perplexity_split}), windows of {options.perplexity_length}",
                "dense": None if dense is None else dense["perplexity"],
                "sliced": point["perplexity"],
            },
            parameters=(results["model"]["parameters"], point["parameters"]),
            command=provenance.command_line(),
        )
        partial.rename(folder)


def _run_name(checked: Checked) -> str:
    options = checked.options
    numbers = {name: value for name, value in asdict(options).items() if name not in ("output_dir", "fresh", "quiet")}
    slug = "".join(c if c.isalnum() or c in "-._" else "_" for c in options.model.rstrip("/").split("/")[-1])
    data = Path(options.dataset).name.split(".")[0]
    return f"{slug}-{data}-mean{options.mean:g}-{content_key(numbers)[:8]}"


def _device_word(wanted: str, ranks: Ranks) -> str:
    """`auto` is a rank's own card."""
    return f"cuda:{ranks.local}" if wanted == "auto" and ranks.count > 1 and torch.cuda.is_available() else wanted
