"""The closed-form pass over the layers: writers solved anew against the dense stream, and MLPs of fewer neurons.

The dense stream X runs beside the sliced one, Z. Once the basis that a layer writes in is known, with decoder Q and
encoder E, its writers and its shortcut are solved together, by least squares over all calibration tokens, so that the
sliced stream comes near X E: the error of the layers before is mended where it can be, rather than handed on. What is
solved for is the change from the rotated weights, so nothing changes where these are exact.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from slicing.bases import BasisFinder
from slicing.branches import Branches
from slicing.calibration import Step, Stream, attention_step, mlp_step, on_device, parallel_step
from slicing.experts import Experts
from slicing.families import Block, Family, InputError
from slicing.fit import Fit
from slicing.narrow import inner_matrices
from slicing.parts import find_block, input_axis, is_parallel, matrix, part
from slicing.pca import Basis, Covariance
from slicing.regression import TOKENS_PER_UNKNOWN
from slicing.weights import LayerPlan, Solved


class _Streams(NamedTuple):
    """A working stream in the model's basis: its batches (B, S, D), and their covariance (D, D)."""

    batches: Callable[[], Iterator[torch.Tensor]]
    covariance: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Stage:
    """Attention, or the MLP, or both at once, of one layer."""

    index: int
    layer: nn.Module
    block: Block
    branches: Branches
    step: Step  # of the dense layer
    shortcut: str
    cut: tuple[str, int] | None = None  # the writer that keeps so many of its inputs


class _Read(NamedTuple):
    states: torch.Tensor  # (B, S, d)
    read: torch.Tensor  # (B S, n)
    fixed: torch.Tensor | None  # (B S, D)


Find = Callable[[int, _Streams], Basis]


class ClosedForm:
    """The pass: `plans` gives each layer's plan, in order.

    finder: bases of the working stream, what a sliced layer gives before it is cut to the next basis. inner: widths of
        the MLPs; None keeps them. The streams are lists of batches (B, S, d).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        stream: Stream,
        finder: BasisFinder,
        rotations: int,
        refit: bool,
        inner: list[int] | None,
    ) -> None:
        self.family, self.finder, self.rotations, self.refit, self.inner = family, finder, rotations, refit, inner
        self.layers = part(model, family.layers)
        self.device, self.centred, self.calls = stream.device, stream.centred, stream.calls
        self.sliced = list(torch.split(stream.buffer, stream.batch_size))
        self.dense: list[torch.Tensor] = []  # where it is needed, and another one than the sliced stream
        self.untouched = True  # the sliced stream is the dense one, in the model's basis

    def plans(self) -> Iterator[LayerPlan]:
        """Run the streams through the layers."""
        streams = _Streams(lambda: iter(self.sliced), lambda: self._covariance(self.sliced))
        basis = self._next_basis(0, streams) if self.finder.narrow(0) else None
        self._enter(basis)
        for index, module in enumerate(self.layers):
            layer = on_device(module, self.device)
            block = find_block(layer, self.family)
            parallel = is_parallel(layer, block)
            solved = Solved()
            middle = basis
            if not parallel:
                branches = Branches(layer, block, self.device, attention=True, mlp=False)
                find = self._middle_basis if self.rotations == 2 and basis is not None else None
                stage = _Stage(index, layer, block, branches, attention_step(layer, block, None), "attn_shortcut")
                middle = self._run(stage, basis, find, basis, solved)
            branches = Branches(layer, block, self.device, attention=parallel, mlp=True)
            step = parallel_step(layer, block, None) if parallel else mlp_step(layer, block, None)
            stage = _Stage(index, layer, block, branches, step, "mlp_shortcut", self._cut(index, layer, block))
            narrow = self.finder.narrow(index + 1)
            following = self._run(stage, middle, self._next_basis if narrow else None, None, solved)
            del layer, branches, step, stage  # where the model is elsewhere: one layer's copy at a time
            yield LayerPlan(basis, middle, following, solved)
            basis = following

    def _cut(self, index: int, layer: nn.Module, block: Block) -> tuple[str, int] | None:
        """The writer whose inputs are to be fewer, and how many stay."""
        if self.inner is None:
            return None
        if not block.mlp_out:
            return None
        ((path, (size, _)),) = inner_matrices(layer, block).items()
        return (path, self.inner[index]) if self.inner[index] < size else None

    def _enter(self, basis: Basis | None) -> None:
        """From here on the sliced stream is in a basis; it has been the dense one."""
        if basis is not None:
            self._part()
            encoder = basis.encoder.to(self.sliced[0])
            self.sliced = [batch @ encoder for batch in self.sliced]

    def _part(self) -> None:
        """From here on the sliced stream is another one than the dense one."""
        self.untouched = False
        self.dense = list(self.sliced) if self.refit else []

    def _middle_basis(self, index: int, streams: "_Streams") -> Basis:
        return self.finder.at_middle(index - 1, streams.covariance())

    def _next_basis(self, index: int, streams: "_Streams") -> Basis:
        """E of layer `index`, from the streams that enter it."""
        covariance = streams.covariance()
        layer = on_device(self.layers[index], self.device)
        block = find_block(layer, self.family)
        if self.rotations == 2 or is_parallel(layer, block):
            return self.finder.at_input(index, covariance)
        step = attention_step(layer, block, None)  # the unsliced attention gives the middle
        middles = (step(batch, *self.calls[len(batch)][index]) for batch in streams.batches())
        return self.finder.of_layer(index, covariance, self._covariance(middles))

    def _covariance(self, batches: Iterable[torch.Tensor]) -> torch.Tensor:
        total = Covariance(self.finder.hidden_size, self.device, centred=self.centred)
        for batch in batches:
            total.add(batch)
        return total.matrix()

    def _run(
        self, stage: _Stage, source: Basis | None, find: Find | None, otherwise: Basis | None, solved: Solved
    ) -> Basis | None:
        """Take the streams through a stage that reads `source`, and give the basis that it writes: what `find` gives
        for the next place, or `otherwise`."""
        index = stage.index
        last = stage.shortcut == "mlp_shortcut" and index == len(self.layers) - 1  # its output is not needed
        if self.untouched and stage.cut is None:
            for place, batch in enumerate(self.sliced if not last else []):
                self.sliced[place] = stage.step(batch, *self.calls[len(batch)][index])
            streams = _Streams(lambda: iter(self.sliced), lambda: self._covariance(self.sliced))
            target = otherwise if find is None else find(index + 1, streams)
            self._enter(target)
            return target
        if self.untouched:
            self._part()
        experts = self._experts(stage, source) if self.refit or stage.cut else None
        fit = Fit(stage.branches, source, self.finder.hidden_size, self.device)
        if self.refit or stage.cut or find:
            self._measure(stage, source, fit)
        target = otherwise
        if find is not None:
            target = find(index + 1, _Streams(lambda: self._decoded(stage, source, fit), fit.covariance))
        free = not (target is source or (target is None and source is None))
        found = fit.solve(target, shortcut=free, refit=self.refit, centred=self.centred)
        fit.note(found, solved, stage.shortcut if free else None, refit=self.refit)
        if not last or (experts is not None and self.refit):
            self._advance(stage, source, target, fit, found, free)
        if experts is not None:
            if self.refit:
                experts.refit(self.dense, self.sliced, target, centred=self.centred)
            experts.note(target, solved)
        return target

    def _experts(self, stage: _Stage, source: Basis | None) -> Experts | None:
        """The stage's routed experts, with the neurons that they keep."""
        path = stage.branches.experts
        if path is None:
            return None
        routed = []
        for states in self.sliced:
            stream = states if source is None else states @ source.decoder.T.to(states)
            call = stage.branches.routed(stream, *self.calls[len(states)][stage.index])
            if call is None:
                if stage.cut is None:
                    return None  # they stay as they are
                raise InputError(
                    f"the experts of layer {stage.index} are not called by token: their width can't be cut"
                )
            routed.append(call)
        found = Experts(stage.layer, stage.block, path, routed, self.device)
        if stage.cut is not None:
            found.cut(stage.cut[1])
            stage.branches.put_experts(found.module)
        return found

    def _reads(self, stage: _Stage, source: Basis | None, fit: Fit) -> Iterator[_Read]:
        """For each batch: z, what the writers read of it (those inputs that stay), and what experts add."""
        decoder = None if source is None else source.decoder.T.to(self.sliced[0])
        for states in self.sliced:
            args, kwargs = self.calls[len(states)][stage.index]
            stream = states if decoder is None else states @ decoder
            read = stage.branches.read(stream, args, kwargs)
            read = read if fit.kept is None else read[:, fit.kept.to(read.device)]
            yield _Read(states, read, stage.branches.written_by_experts(stream, args, kwargs))

    def _measure(self, stage: _Stage, source: Basis | None, fit: Fit) -> None:
        """Take the dense stream through the stage, and the sums of what both streams are."""
        for place, (states, read, fixed) in enumerate(self._reads(stage, source, fit)):
            target = None
            if self.refit:
                args, kwargs = self.calls[len(states)][stage.index]
                self.dense[place] = stage.step(self.dense[place], args, kwargs)
                target = self.dense[place].flatten(0, 1)
            fit.add(torch.cat((states.flatten(0, 1), read), dim=1), target, fixed)
        fit.end()
        if stage.cut is not None and stage.branches.experts is None:
            fit.cut(*stage.cut)

    def _decoded(self, stage: _Stage, source: Basis | None, fit: Fit) -> Iterator[torch.Tensor]:
        """The working stream behind a stage, (B, S, D) in the model's basis."""
        decoded = fit.decoded.to(self.sliced[0])
        for states, read, fixed in self._reads(stage, source, fit):
            stream = states.flatten(0, 1) @ decoded[: fit.width] + read @ decoded[fit.width :]
            yield (stream if fixed is None else stream + fixed).view(*states.shape[:2], -1)

    def _advance(
        self, stage: _Stage, source: Basis | None, target: Basis | None, fit: Fit, found: torch.Tensor, free: bool
    ) -> None:
        """Take the sliced stream through the stage as it has been solved."""
        found = found.to(self.sliced[0])
        for place, (states, read, fixed) in enumerate(self._reads(stage, source, fit)):
            stream = states.flatten(0, 1)
            stream = (stream @ found[: fit.width] if free else stream) + read @ found[fit.width :]
            if fixed is not None:
                stream = stream + (fixed if target is None else fixed @ target.encoder.to(fixed))
            self.sliced[place] = stream.view(*states.shape[:2], -1)


def check_added(blocks: Iterable[Block], model_type: str, what: str) -> None:
    """InputError where every one of these layouts norms what its branches write."""
    if all(block.output_norms() for block in blocks):
        raise InputError(
            f"{what}: the layers of a {model_type!r} model norm what their branches write, and writers are solved for"
            " what is added as it is: slice it without"
        )


def check_tokens(
    model: PreTrainedModel, family: Family, tokens: int, widths: list[int], inner: list[int] | None, *, refit: bool
) -> None:
    """InputError where the calibration has too few tokens for what is solved on them in some layer, or where what a
    layer's writers give isn't added up."""
    for index, layer in enumerate(part(model, family.layers)):
        block = find_block(layer, family)
        if refit or inner is not None:
            check_added((block,), model.config.model_type, "refit" if refit else "inner widths")
        sizes = {path: _inputs(layer, path) for path in block.writers()}
        kept = {} if inner is None else dict.fromkeys(inner_matrices(layer, block), inner[index])
        unknowns = max((kept[path] for path in kept if kept[path] < sizes[path]), default=0)
        if refit:
            sizes |= kept
            attention = sum(sizes[path] for path in block.attention_outs())
            mlp = sum(sizes[path] for path in block.mlp_out if getattr(*matrix(layer, path)).ndim == 2)
            unknowns = widths[index] + (attention + mlp if is_parallel(layer, block) else max(attention, mlp))
        needed = TOKENS_PER_UNKNOWN * unknowns
        if tokens < needed:
            what = "refit" if refit else "inner widths"
            raise InputError(
                f"{what}: {tokens} calibration tokens are too few for the {unknowns} unknowns of layer {index}: "
                f"at least {needed} are needed, and many times more are better; use more or longer windows"
            )


def _inputs(layer: nn.Module, path: str) -> int:
    owner, name = matrix(layer, path)
    size: int = getattr(owner, name).shape[input_axis(owner)]
    return size
