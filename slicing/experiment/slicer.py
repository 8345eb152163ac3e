"""The dense model on its device, and the models that are sliced from it, with the bases that they share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slicing.bases import Bases, dense_bases
from slicing.causality import check_causal
from slicing.devices import free_memory, must_offload, on_devices
from slicing.experiment.inputs import Inputs
from slicing.experiment.plan import Target
from slicing.families import InputError
from slicing.files import replacing
from slicing.metric import GRADIENT_WINDOWS, Metric
from slicing.progress import Progress
from slicing.rotation import check_sliceable, rotate_and_slice, slice_with_bases


class Slicer:
    """`model` goes to the device, or stays on the CPU where it does not fit or is not wanted there.

    processes: how many of the run may be on this machine, this one included.
    """

    def __init__(self, inputs: Inputs, model: PreTrainedModel, device: torch.device, *, processes: int = 1) -> None:
        self.options, self.config, self.calibration = inputs.options, inputs.config, inputs.calibration
        self.model, self.device, self.processes = model, device, processes
        tokens = 0 if self.calibration is None else self.calibration.ids.numel()
        if not (self.options.offload or must_offload(model, device, tokens, self._solving_bytes())):
            model.to(device)
        if self.options.speed and model.device.type != device.type:
            raise InputError(
                "--speed needs dense and sliced model on the GPU together: they don't fit, so leave it out"
            )
        self._bases: Bases | None = None

    def check(self) -> float | None:
        """Raise InputError, before a point is measured, where the model can't be measured or sliced as is wanted. The
        seconds that the check of its layers took; None where it is not to be sliced."""
        with on_devices(self.model, self.device) as model:
            check_causal(model)
        if self.options.swept == 0:
            return None
        return check_sliceable(self.model, rotations=self.options.rotations, device=self.device)

    def sliced(self, target: Target, progress: Progress) -> PreTrainedModel:
        """The model sliced to a target's widths."""
        assert target.widths is not None
        assert self.calibration is not None
        with self._memory_told():
            if target.calibration == "once":
                bases = self._dense_bases(progress)
                return slice_with_bases(self.model, bases, target.widths, device=self.device, progress=progress)
            return rotate_and_slice(
                self.model,
                self.calibration.ids,
                target.widths,
                refit=self.options.refit,
                inner_widths=target.inner_widths,
                **self._how(progress),
            )

    def _how(self, progress: Progress) -> dict[str, Any]:
        options = self.options
        how = {"rotations": options.rotations, "metric": options.metric, "batch_size": options.batch_size}
        return how | {"device": self.device, "progress": progress}

    # ---- the bases of --calibration once

    def _dense_bases(self, progress: Progress) -> Bases:
        """Made when they are first needed."""
        if self._bases is None:
            assert self.calibration is not None
            folder = self._bases_folder()
            self._bases = dense_bases(self.model, self.calibration.ids, folder=folder, **self._how(progress))
        return self._bases

    def write_bases(self, file: Path, progress: Progress) -> None:
        """Keep them in a file, for another process."""
        with self._memory_told(), replacing(file) as partial:
            torch.save(self._dense_bases(progress), partial)

    def read_bases(self, file: Path) -> None:
        """Take those of another process of the run, mapped into memory, in place of a pass of one's own."""
        with torch.serialization.safe_globals([Bases, Metric]):
            self._bases = torch.load(file, mmap=True, weights_only=True)

    def _bases_folder(self) -> Path | None:
        """The folder of the results, where memory is short for the bases."""
        size = 4 * self.options.rotations * self.config.num_hidden_layers * self.config.hidden_size**2
        size *= 1 if self.options.metric == "pca" else 2
        if 2 * size * self.processes < free_memory():
            return None
        return Path(self.options.output_dir)

    # ---- memory

    def _solving_bytes(self) -> int:
        """What the gradient metric, or the refit and a cut of the inner width, hold on the device: layers' inputs of
        the gradient windows, or a second stream and some matrices over all that a layer's writers read."""
        options, config = self.options, self.config.get_text_config()
        size, found = int(config.hidden_size), 0
        if options.metric == "gradient":
            tokens = min(options.calibration_samples, GRADIENT_WINDOWS) * options.calibration_length
            found = config.num_hidden_layers * (tokens * size * self.model.dtype.itemsize + 8 * size**2)
        if options.refit or options.inner_mean:
            inputs = size + int(getattr(config, "intermediate_size", None) or 4 * size)
            tokens = options.calibration_samples * options.calibration_length
            found = max(found, 2 * tokens * size * self.model.dtype.itemsize + 4 * 8 * inputs**2)
        return found

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """What is to be done where memory does not suffice for slicing."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            offload = "--offload, " if self.model.device == self.device else ""
            remedy = f"use {offload}a smaller --batch-size or fewer --calibration-samples"
            raise InputError(f"out of memory while slicing: {remedy}") from error
