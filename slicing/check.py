"""The self-check: a layer sliced as its row says, against the family's own forward.

A row only names modules; that a layer computes x + A(norm(x)), then h + M(norm(h)), is a claim about its code. Here it
is tried, before a slicing, on each layout of layer that a model has: a copy whose writers are projected into a subspace
of r directions loses nothing where it is sliced to width r, so both must give the same numbers.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slicing.batches import evaluation_mode
from slicing.calibration import Stream
from slicing.families import Block, Family, InputError
from slicing.modeling import SlicedConfig, SlicedLayer, of_family
from slicing.parts import bias_name, find_block, has, input_axis, matrix, part
from slicing.pca import Basis
from slicing.weights import LayerPlan, LayerWriter, gained_biases

TOLERANCE = 1e-3  # relative; a right row is off by some 1e-6 in fp32, a wrong one by 1e-2 or more
SMALL = 3e-3  # root mean square of the second input: its square is of the size of a norm's eps
RANK = 24  # directions of the input; the output has five more, so that padding and shortcuts take part
TOKENS = 9
ROWS_OF = "5.24"  # the release of Transformers that the rows in families.py were made with
SEEDS = (0, 1)  # a token on the border between two experts may go either way: a wrong row fails with both

_passed: set[Any] = set()  # layouts of this process that passed: a sweep slices one model again and again


def check_names(model: PreTrainedModel, family: Family) -> None:
    """Raise InputError where a causal LM lacks the layers, the tables or all layouts of a layer of its family's row. No
    weights are read."""
    missing = [path for path in (family.layers, *family.tables) if not has(model, path)]
    if missing:
        raise InputError(f"{type(model).__name__} has no {', '.join(missing)}: the row in families.py doesn't fit")
    for index, layer in enumerate(part(model, family.layers)):
        try:
            find_block(layer, family)
        except InputError as error:
            here = transformers.__version__
            why = "" if here.startswith(ROWS_OF) else f"; the row is for Transformers {ROWS_OF}, this is {here}"
            if not type(layer).__module__.startswith("transformers.models."):
                why = (
                    f"; the layer is code of its own: if it computes what Transformers' own {model.config.model_type}"
                    " does, convert the weights to the names that this has, and load them without --trust-remote-code"
                )
            raise InputError(
                f"can't slice this {model.config.model_type!r} model: layer {index}: {error}{why}"
            ) from None


def check_config(config: PretrainedConfig, family: Family) -> None:
    """`check_names` of Transformers' own model of a config, without memory; code of its own is left to loading."""
    if not getattr(config, "auto_map", None):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        check_names(model, family)


@torch.no_grad()
def check_layers(model: PreTrainedModel, family: Family, device: torch.device, rotations: int = 2) -> float:
    """Check every layout of layer of a causal LM against its family's row; the seconds that it took.

    device: where the layers are checked, in fp32 or better, one at a time; the model is left as it was. rotations: how
    many bases a layer it will be sliced with, 2 or 1.
    It does not see dropout, nor what layers hand to one another.
    Raises InputError that names layer, class and error where a sliced layer computes something else.
    """
    start = time.perf_counter()
    layers = part(model, family.layers)
    distinct: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        distinct.setdefault(_layout(layer, find_block(layer, family)), index)
    whole = (family, model.config.to_json_string(), device, rotations)
    new = {layout: index for layout, index in distinct.items() if (layout, whole) not in _passed}
    if new:
        table = model.get_input_embeddings().weight
        ids = torch.randint(table.shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(SEEDS[0]))
        with evaluation_mode(model), _exact_products():
            stream = Stream(model, family, ids, 1, device)
            for layout, index in new.items():
                error = _layer_error(model, family, index, stream, rotations)
                if not error <= TOLERANCE:
                    raise _refusal(model, layers[index], index, f"is off by {error:.2g} ({TOLERANCE:g} is allowed)")
                _passed.add((layout, whole))
    return time.perf_counter() - start


def _refusal(model: PreTrainedModel, layer: nn.Module, index: int, what: str) -> InputError:
    return InputError(
        f"can't slice this {model.config.model_type!r} model: its layer {index} ({type(layer).__name__}) does not"
        f" compute what the row in families.py says: sliced without loss it {what}"
    )


def _layout(layer: nn.Module, block: Block) -> Any:
    """What distinguishes layers that are to be checked apart: classes and their code, shapes, and the numbers of the
    layer and its norms (a scale, an eps), but not the layer's index."""
    modules = [(name, type(module), getattr(type(module), "forward", None)) for name, module in layer.named_modules()]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    numbers = [
        (path, name, value)
        for path in ("", *sorted(block.norms() | block.output_norms()))
        for name, value in vars(part(layer, path) if path else layer).items()
        if isinstance(value, bool | float | str)
    ]
    return block, tuple(modules), tuple(shapes), tuple(numbers)


def _layer_error(model: PreTrainedModel, family: Family, index: int, stream: Stream, rotations: int) -> float:
    """The relative error of a layer, the smaller one of two draws."""
    layer = part(model, family.layers)[index]
    error = math.inf
    try:
        for seed in SEEDS:
            error = min(error, _Trial(model, family, layer, index, stream, rotations, seed).error())
            if error <= TOLERANCE:
                break
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as wrong:
        reason = " ".join(str(wrong).split())[:200]
        raise _refusal(model, layer, index, f"ends with {type(wrong).__name__}: {reason}") from wrong
    return error


class _Trial:
    """One layer between bases of random directions: F of the output, and E and M (one with one rotation), which span r
    of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        layer: nn.Module,
        index: int,
        stream: Stream,
        rotations: int,
        seed: int,
    ) -> None:
        self.family, self.seed = family, seed
        self.hidden_size = stream.buffer.shape[-1]
        self.dense = _copy(layer, stream.device)
        self.like = next(self.dense.parameters())
        self.call = _cast(stream.calls[1][index], self.like.dtype)
        self.size = stream.buffer.double().square().mean().sqrt().item()
        writer = LayerWriter(family, self.hidden_size, stream.device)
        rank = min(RANK, self.hidden_size // 2)
        wide = min(rank + 5, self.hidden_size - 1)
        self.span = self._orthonormal(self.hidden_size, wide, centred=family.layer_norm).to(writer.device)
        within = self.span[:, :rank]
        self.basis = within @ self._orthonormal(rank, rank).to(writer.device)
        middle = within @ self._orthonormal(rank, rank).to(writer.device) if rotations == 2 else self.basis
        following = self.span @ self._orthonormal(wide, wide).to(writer.device)
        config = SlicedConfig.of(
            model.config,
            rotations=rotations,
            widths=[rank, wide, *[self.hidden_size] * model.config.num_hidden_layers][: model.config.num_hidden_layers],
            gained_biases=gained_biases(self.dense, find_block(self.dense, family)),
        )
        dense_class: Any = type(layer)
        self.sliced = of_family(SlicedLayer, dense_class)(_copy(layer, stream.device), family, config, 0, False).eval()
        block = self.sliced.block
        for path in sorted(block.output_norms()):  # a trained one may be 0 somewhere
            norm: Any = part(self.dense, path)
            self.seed += len(SEEDS)
            scale = 0.5 + _random(self.hidden_size, seed=self.seed).sigmoid()
            norm.weight = nn.Parameter((scale - family.norm_offset).to(self.like), requires_grad=False)
        between = Basis(middle, middle, attention_outputs=self._outputs(block.attention_output_norm, middle))
        if rotations == 2:
            between = writer.turned(self.dense, "attention", between)
        basis = Basis(self.basis, self.basis) if rotations == 2 else between
        after = Basis(following, following, mlp_outputs=self._outputs(block.mlp_output_norm, self.span))
        after = writer.turned(self.dense, "mlp", after)
        self.following = after.decoder
        writer.write(self.dense, self.sliced, LayerPlan(basis, between, after))

    def _orthonormal(self, rows: int, columns: int, *, centred: bool = False) -> torch.Tensor:
        """(rows, columns), fp64; orthogonal to the ones vector where centred. Each call draws other directions."""
        self.seed += len(SEEDS)
        directions = _random(rows, columns, seed=self.seed)
        if centred:
            directions -= directions.mean(0)
        basis: torch.Tensor = torch.linalg.qr(directions).Q
        return basis

    def error(self) -> float:
        """The largest relative error over two sizes of the input, of the part within F and the part outside."""
        self._check_norms()
        rank = self.basis.shape[1]
        unit = _random(1, TOKENS, rank, seed=self.seed) * math.sqrt(self.hidden_size / rank)
        states = [(unit * size).to(self.like) for size in (self.size, SMALL)]
        args, kwargs = self.call
        found = [self.sliced(state, *args, **kwargs) for state in states]
        self._project_writers()
        basis, following = self.basis.to(self.like), self.following.to(self.like)
        errors = [0.0]
        for state, given in zip(states, found, strict=True):
            wanted = self.dense(state @ basis.T, *args, **kwargs)
            if isinstance(wanted, tuple) != isinstance(given, tuple):
                raise ValueError(f"it returns a {type(wanted).__name__}, sliced a {type(given).__name__}")
            if bool(_hidden(wanted).isfinite().all()):  # else the weights are bad: the calibration says so
                errors += [_relative(_hidden(given) @ following.T, _hidden(wanted))]
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error)

    def _project_writers(self) -> None:
        """Let the dense layer write in the span of M (attention) and of F (the MLP) only."""
        block = self.sliced.block
        rank = self.basis.shape[1]
        for path in block.writers():
            span = self.span if self.sliced.parallel or path in block.mlp_out else self.span[:, :rank]
            scale = self._scale(block.output_norm(path))  # what is behind an output norm lies in the span
            projection = (span @ span.T / scale[:, None] * scale).to(self.like)
            owner, name = matrix(self.dense, path)
            weight = getattr(owner, name)
            projected = projection @ weight if input_axis(owner) == -1 else weight @ projection.T
            setattr(owner, name, nn.Parameter(projected, requires_grad=False))
            bias = getattr(owner, bias_name(name), None)
            if bias is not None:
                setattr(owner, bias_name(name), nn.Parameter(bias @ projection.T, requires_grad=False))

    def _scale(self, norm: str) -> torch.Tensor:
        """The weight of an output norm (D), fp64; ones where there is none."""
        if not norm:
            return torch.ones_like(self.span[:, 0])
        weight: torch.Tensor = part(self.dense, norm).weight
        return weight.to(self.span) + self.family.norm_offset

    def _outputs(self, norm: str, span: torch.Tensor) -> torch.Tensor | None:
        """A covariance of what a writer gives (D, D) where it lies, behind its output norm, in a span."""
        within = span / self._scale(norm)[:, None]
        return within @ within.T if norm else None

    def _check_norms(self) -> None:
        """A LayerNorm centres, and the row must say so: the ones vector is dropped from its bases alone."""
        for path in self.sliced.block.norms() | self.sliced.block.output_norms():
            norm = part(self.dense, path)
            state = _random(1, TOKENS, self.hidden_size, seed=self.seed).to(self.like)
            centres = _relative(norm(state + 1), norm(state)) < TOLERANCE
            if centres != self.family.layer_norm:
                does = "centres" if centres else "does not centre"
                raise ValueError(f"its norm {path} {does}, the row's layer_norm is {self.family.layer_norm}")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _copy(layer: nn.Module, device: torch.device) -> nn.Module:
    """A copy in fp32 or better on the device, with kernels that have this; tensors that are so already are shared."""
    memo: dict[int, Any] = {}
    for parameter in layer.parameters():
        moved = _cast(parameter.detach().to(device), torch.promote_types(parameter.dtype, torch.float32))
        memo[id(parameter)] = nn.Parameter(moved, requires_grad=False)
    memo |= {id(buffer): buffer.detach().to(device) for buffer in layer.buffers()}
    for module in layer.modules():
        config = vars(module).get("config")
        if config is not None and id(config) not in memo:
            memo[id(config)] = copy.deepcopy(config)
            if "flash" in (config._attn_implementation or ""):
                memo[id(config)]._attn_implementation = "sdpa"
            memo[id(config)]._experts_implementation = "eager"
    return copy.deepcopy(layer, memo)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in a dtype, also in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


@contextmanager
def _exact_products() -> Iterator[None]:
    """While this lasts, products of fp32 matrices are not rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
