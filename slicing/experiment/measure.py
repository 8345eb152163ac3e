"""The bench that a run's points are measured on: the loaded model, its windows and bases, which all points share."""

import functools
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from slicing.bases import Bases, dense_bases
from slicing.causality import check_causal
from slicing.devices import free_bytes, free_memory, model_bytes, must_offload, on_devices
from slicing.experiment import identity
from slicing.experiment.comparison import mean_accuracy
from slicing.experiment.options import REDUNDANCY_SPLIT, Checked, Options, Target
from slicing.experiment.results import (
    PARTS,
    SCHEMA_VERSION,
    Data,
    Model,
    Part,
    PeakMemory,
    Point,
    Results,
    Seconds,
    Task,
    VectorFile,
)
from slicing.experiment.store import content_key, is_saved_model, windows_key
from slicing.experiment.waiting import RunBar
from slicing.families import InputError
from slicing.files import new_folder, replacing
from slicing.flags import values_for
from slicing.likelihood import perplexity, window_nll
from slicing.loading import load_model
from slicing.metric import GRADIENT_WINDOWS, Metric
from slicing.modeling import count_parameters, dense_config
from slicing.redundancy import layer_redundancy
from slicing.rotation import check_sliceable, rotate_and_slice, slice_with_bases
from slicing.structure import as_json, from_json
from slicing.task_content import task_content
from slicing.task_scores import TaskScore
from slicing.tasks import evaluate_tasks

_WORST_NLL = 200  # nats a token; a perplexity of 10^87 is no result, and soon no number


class Bench:
    """A model on its device, ready to be sliced and measured.

    test_windows (N, S), calibration_windows (N, S): token ids; the latter None where nothing is sliced.
    processes: how many of the run may be on this machine, this one included.
    """

    def __init__(self, checked: Checked, device: torch.device, *, progress: bool, processes: int = 1) -> None:
        self.checked, self.options, self.device = checked, checked.options, device
        self.progress: bool | RunBar = progress
        self.processes = processes
        options = self.options
        self.model, self.tokenizer = load_model(
            options.model,
            device="cpu",
            dtype=options.dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        self._content = self._model_content()  # while the weights are on the CPU
        self.test_windows, self.calibration_windows = checked.test_windows, checked.calibration_windows
        calibration_tokens = 0 if self.calibration_windows is None else self.calibration_windows.numel()
        if not (options.offload or must_offload(self.model, device, calibration_tokens, self._solving_bytes())):
            self.model.to(device)
        self._bases: Bases | None = None
        self._git = identity.git_commit()

    # ---- what numbers depend on

    def _solving_bytes(self) -> int:
        """What the gradient metric, or the refit and a cut of the inner width, hold on the device: layers' inputs of
        the gradient windows, or a second stream and some matrices over all that a layer's writers read."""
        options, config = self.options, self.checked.config.get_text_config()
        size, found = int(config.hidden_size), 0
        if options.metric == "gradient":
            tokens = min(options.calibration_samples, GRADIENT_WINDOWS) * options.calibration_length
            found = config.num_hidden_layers * (tokens * size * self.model.dtype.itemsize + 8 * size**2)
        if options.refit or options.inner_mean:
            inputs = size + int(getattr(config, "intermediate_size", None) or 4 * size)
            tokens = options.calibration_samples * options.calibration_length
            found = max(found, 2 * tokens * size * self.model.dtype.itemsize + 4 * 8 * inputs**2)
        return found

    def header(self) -> Results:
        """Results without points: what they all depend on."""
        options = self.options
        test, calibration = self.test_windows, self.calibration_windows
        return Results(
            schema_version=SCHEMA_VERSION,
            arguments=asdict(options),
            model=self._model_entry,
            versions=identity.versions(options),
            git=self._git,
            device=identity.device_name(self.device),
            seed=options.seed,
            data=Data(
                perplexity=identity.text_entry(options.dataset, options.perplexity_split, test),
                calibration=None if calibration is None else identity.text_entry(options.dataset, "train", calibration),
                redundancy=None,
            ),
            redundancy=None,
            search=None,
            tasks=self._task_entries(),
            points=[],
        )

    @functools.cached_property
    def _model_entry(self) -> Model:
        head, config = self.model.get_output_embeddings(), self.checked.config
        return Model(
            name=self.options.model,
            revision=identity.model_commit(self.options),
            model_type=config.model_type,
            dtype=str(self.model.dtype).removeprefix("torch."),
            parameters=_dense_parameters(self.model),
            tied=head is not None and head.weight is self.model.get_input_embeddings().weight,
            hidden_size=config.get_text_config().hidden_size,
            layers=config.get_text_config().num_hidden_layers,
        )

    def run_key(self) -> str:
        """The key of all that the points of this run come from: runs with the same one have one folder."""
        checked = self.checked
        windows = (checked.calibration_windows, checked.validation_windows, checked.redundancy_windows)
        return content_key(
            self._content
            | {
                "options": values_for(self.options, "point", "run"),
                "vector": checked.vector,
                "perplexity": windows_key(self.test_windows),
                "windows": [None if one is None else windows_key(one) for one in windows],
                "tasks": self._tasks_content,
            }
        )

    def point_key(self, target: Target, windows: torch.Tensor | None = None) -> str:
        """The key of a point measured on evaluation windows (N, S), by default the test windows."""
        sliced = target.widths is not None
        calibration, options = self.calibration_windows, values_for(self.options, "point")
        tasks = self.checked.tasks
        if not sliced and not (tasks and tasks.loaded.takes_chance(self.options.num_fewshot)):
            options["seed"] = Options.seed  # a run with another seed takes the dense model's point over
        return content_key(
            self._content
            | {
                "target": {
                    name: value
                    for name, value in asdict(target).items()
                    if value is not None or not name.startswith("inner_")  # keys from before there were inner widths
                },
                "rotations": self.options.rotations if sliced else None,
                "options": options,
                "tasks": self._tasks_content,
                "calibration": windows_key(calibration) if sliced and calibration is not None else None,
                "perplexity": windows_key(self.test_windows if windows is None else windows),
            }
            | (self._solving if sliced else {})
        )

    @property
    def _solving(self) -> dict[str, Any]:
        """How the weights are found, where that is not the paper's way: keys of its points stay as they were."""
        how = {"metric": (self.options.metric, "pca"), "refit": (self.options.refit, False)}
        return {name: value for name, (value, plain) in how.items() if value != plain}

    def redundancy_key(self, windows: torch.Tensor) -> str:
        """The key of LR measured on windows (N, S)."""
        return content_key(self._content | {"windows": windows_key(windows), "batch_size": self.options.batch_size})

    def _model_content(self) -> dict[str, Any]:
        """What every number of this run depends on, by content."""
        versions = identity.versions(self.options)
        return {
            "schema": SCHEMA_VERSION,
            "model": identity.model_content(self.model),
            "versions": {name: value for name, value in as_json(versions).items() if name != "lm_eval"},
            "device": identity.device_name(self.device),
        }

    @functools.cached_property
    def _tasks_content(self) -> dict[str, Any] | None:
        """What the scores depend on besides; None where there are no tasks."""
        if self.checked.tasks is None:
            return None
        options = self.options
        return {
            "lm_eval": identity.versions(options).lm_eval,
            "tokenizer": identity.tokenizer_content(self.tokenizer),
            "tasks": task_content(self.checked.tasks, limit=options.accuracy_limit, num_fewshot=options.num_fewshot),
        }

    def _task_entries(self) -> dict[str, Task]:
        """What results.json says of the tasks that are reported."""
        if self.checked.tasks is None or self._tasks_content is None:
            return {}
        loaded, content = self.checked.tasks.loaded, self._tasks_content["tasks"]
        return {
            name: Task(loaded.version(name), content[name], loaded.shots(name, self.options.num_fewshot))
            for name in loaded.reported
        }

    # ---- measurements

    def redundancy(self, windows: torch.Tensor) -> VectorFile:
        """LR of the dense model on windows (N, S)."""
        with on_devices(self.model, self.device) as model:
            found = layer_redundancy(model, windows, batch_size=self.options.batch_size, progress=self.progress)
        data = identity.text_entry(self.options.source_for_vector, REDUNDANCY_SPLIT, windows)
        return replace(from_json(found.as_dict(), VectorFile), data=data)

    def perplexity(self, target: Target, windows: torch.Tensor) -> float:
        """Perplexity of a sliced model on windows (N, S)."""
        with on_devices(self.sliced(target), self.device) as model:
            return perplexity(model, windows, batch_size=self.options.batch_size, progress=self.progress)

    def sliced(self, target: Target) -> PreTrainedModel:
        """The model sliced to a target's widths."""
        assert target.widths is not None
        assert self.calibration_windows is not None
        how: dict[str, Any] = {
            "rotations": self.options.rotations,
            "metric": self.options.metric,
            "batch_size": self.options.batch_size,
            "device": self.device,
            "progress": self.progress,
        }
        with self._memory_told():
            if target.calibration == "every-point":
                how |= {"refit": self.options.refit, "inner_widths": target.inner_widths}
                return rotate_and_slice(self.model, self.calibration_windows, target.widths, **how)
            bases = self._dense_bases()
            return slice_with_bases(self.model, bases, target.widths, device=self.device, progress=self.progress)

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """What is to be done where memory does not suffice for slicing."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            offload = "--offload, " if self.model.device == self.device else ""
            remedy = f"use {offload}a smaller --batch-size or fewer --calibration-samples"
            raise InputError(f"out of memory while slicing: {remedy}") from error

    def _dense_bases(self) -> Bases:
        """Those of --calibration once, made when they are first needed."""
        if self._bases is None:
            assert self.calibration_windows is not None
            self._bases = dense_bases(
                self.model,
                self.calibration_windows,
                rotations=self.options.rotations,
                metric=self.options.metric,
                batch_size=self.options.batch_size,
                device=self.device,
                folder=self._bases_folder(),
                progress=self.progress,
            )
        return self._bases

    def write_bases(self, file: Path) -> None:
        """Keep the bases of --calibration once in a file, for another process."""
        with self._memory_told(), replacing(file) as partial:
            torch.save(self._dense_bases(), partial)

    def read_bases(self, file: Path) -> None:
        """Take the bases of another process of the run, mapped into memory, in place of a pass of one's own."""
        with torch.serialization.safe_globals([Bases, Metric]):
            self._bases = torch.load(file, mmap=True, weights_only=True)

    def _bases_folder(self) -> Path | None:
        """The folder of the results, where memory is short for the bases."""
        config = self.checked.config
        size = 4 * self.options.rotations * config.num_hidden_layers * config.hidden_size**2
        size *= 1 if self.options.metric == "pca" else 2
        if 2 * size * self.processes < free_memory():
            return None
        return Path(self.options.output_dir)

    def check_model(self) -> None:
        """Raise InputError, before a point is measured, where the model can't be measured or sliced as is wanted."""
        with on_devices(self.model, self.device) as model:
            check_causal(model)
        if self.options.mean > 0:
            check_sliceable(self.model, device=self.device)

    @contextmanager
    def waiting(self, targets: Sequence[Target]) -> Iterator[None]:
        """One bar while these points are measured, in order, in place of one for each piece of work."""
        if not (self.progress and targets):
            yield
            return
        tasks = ["tasks"] if self.checked.tasks is not None else []
        parts = [[*(["slice"] if target.widths else []), "perplexity", *tasks] for target in targets]
        before = self.progress
        with RunBar(parts) as self.progress:
            try:
                yield
            finally:
                self.progress = before

    def point(self, target: Target, key: str) -> tuple[Point, PreTrainedModel]:
        """Slice and measure: what results.json has of a point, and the model that was measured."""
        assert target.kind != "search"  # which stands for no point of its own
        options = self.options
        seconds, memory = Seconds(*[None] * len(PARTS)), PeakMemory(*[None] * len(PARTS))
        model = self.model
        if isinstance(self.progress, RunBar):
            self.progress.point("dense" if target.base is None else f"SB {target.base:.3f}")
        if target.widths is not None:
            with self._part("slice", seconds, memory):
                model = self.sliced(target)
        tasks: dict[str, TaskScore] = {}
        with on_devices(model, self.device):
            with self._part("perplexity", seconds, memory):
                nll = window_nll(model, self.test_windows, batch_size=options.batch_size, progress=self.progress)
            if nll.mean() > _WORST_NLL:
                raise InputError(
                    f"the mean negative log likelihood is {nll.mean():.4g} nats, more than {_WORST_NLL}: this is no"
                    " language model; check its weights and --dtype"
                )
            if self.checked.tasks is not None:
                with self._part("tasks", seconds, memory):
                    tasks = self._scores(model)
        parameters = count_parameters(model)
        point = Point(
            key=key,
            git=self._git,
            kind=target.kind,
            mean=target.mean,
            base=target.base,
            amount=target.amount,
            slices=target.slices,
            widths=target.widths,
            rotations=None if target.widths is None else options.rotations,
            metric=None if target.widths is None else options.metric,
            refit=None if target.widths is None else options.refit,
            inner_mean=target.inner_mean,
            inner_base=target.inner_base,
            inner_widths=target.inner_widths,
            calibration=target.calibration,
            parameters=parameters,
            cut=1 - parameters / self._model_entry.parameters,
            perplexity=nll.mean().exp().item(),
            nll=nll.tolist(),
            tasks=tasks,
            mean_accuracy=mean_accuracy(tasks),
            seconds=seconds,
            peak_memory_bytes=memory,
        )
        return point, model

    def _scores(self, model: PreTrainedModel) -> dict[str, TaskScore]:
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
                progress=self.progress,
            )
        )

    @contextmanager
    def _part(self, name: Part, seconds: Seconds, memory: PeakMemory) -> Iterator[None]:
        """Time a part of a point and note the highest memory in it (of the process so far, on a CPU)."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        with self.progress.part(name) if isinstance(self.progress, RunBar) else nullcontext():
            yield
        if cuda:
            torch.cuda.synchronize(self.device)
        setattr(seconds, name, time.perf_counter() - start)
        if cuda:
            setattr(memory, name, torch.cuda.max_memory_allocated(self.device))
        elif self.device.type == "cpu":
            unit = 1 if sys.platform == "darwin" else 1024
            setattr(memory, name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    # ---- models

    def can_keep(self, model: PreTrainedModel) -> bool:
        """Whether a sliced model can stay in memory while others are sliced and measured; it goes to the CPU where the
        device has less room."""
        needed = 3 * model_bytes(model)  # it is there already: the next one, and what measuring it takes
        if model.device.type == "cuda" and free_bytes(model.device) < needed:
            if free_memory() < needed:
                return False
            model.to("cpu")
        return model.device.type == "cuda" or free_memory() > needed

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Save a sliced model with its tokenizer, in one step; one that another run has saved meanwhile stays."""
        try:
            with new_folder(folder, is_saved_model) as partial:
                model.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
        except Exception as error:
            # a full disk comes as OSError, as SafetensorError, and as a bare Exception of `tokenizers`
            if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
                raise
            why = " ".join(str(error).split())[:200]
            raise InputError(
                f"can't save the sliced model as {folder} ({why}): make room, and the same command goes on; the points"
                " measured are kept"
            ) from error


def _dense_parameters(model: PreTrainedModel) -> int:
    """Unique parameters of the dense model: of one that was sliced before, by the config it was made of."""
    dense = dense_config(model.config)
    if dense is model.config:
        return count_parameters(model)
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(dense))
