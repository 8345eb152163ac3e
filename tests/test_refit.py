"""Refitted writers: exact where slicing is, the least squares that they claim to be, and nearer to the dense model."""

from typing import Any

import pytest
import torch
from tiny_models import (
    CASES,
    HIDDEN,
    LAYERS,
    layer_norm,
    live_in,
    logits,
    output_norms,
    random_model,
    relative_error,
    subspace,
    tolerance,
    windows,
)
from torch import nn

from slicing.families import FAMILIES, InputError
from slicing.modeling import SlicedForCausalLM
from slicing.parts import part
from slicing.regression import Moments, ridge_solve
from slicing.rotation import rotate_and_slice

RANK = 20
NARROW = [32, 40, 24]
MANY = windows(60)  # more than three tokens for each unknown of the widest MLP
every_case = pytest.mark.parametrize("case", [case for case in CASES if not output_norms(case)])


@every_case
def test_slicing_to_the_rank_of_the_stream_keeps_logits(case):
    model = random_model(case)
    live_in(model, subspace(RANK, centred=layer_norm(case)))
    sliced = rotate_and_slice(model, MANY, [RANK, HIDDEN, 32], metric="gradient", refit=True)
    assert relative_error(logits(sliced, windows()), logits(model, windows())) < tolerance(case)


@pytest.mark.parametrize("case", ["llama", "granite", "gpt2", "falcon-sequential", "qwen2_moe", "falcon_h1"])
def test_one_rotation_and_a_tied_table_keep_logits_too(case):
    model = random_model(case, tied=True)
    live_in(model, subspace(RANK, centred=layer_norm(case)))
    sliced = rotate_and_slice(model, MANY, [RANK, RANK + 4, HIDDEN], rotations=1, refit=True)
    assert relative_error(logits(sliced, windows()), logits(model, windows())) < tolerance(case)


@pytest.mark.parametrize("case", ["opt", "stablelm-parallel"])
def test_layer_norm_families_lose_nothing_at_width_d_minus_1(case):
    model = random_model(case)
    sliced = rotate_and_slice(model, MANY, [HIDDEN - 1, HIDDEN, HIDDEN - 1], refit=True)
    assert relative_error(logits(sliced, windows()), logits(model, windows())) < tolerance(case)


@every_case
def test_a_refitted_model_is_nearer_to_the_dense_one(case):
    model = random_model(case)
    wanted = logits(model, MANY)
    plain = rotate_and_slice(model, MANY, NARROW, rotations=1)
    refitted = rotate_and_slice(model, MANY, NARROW, rotations=1, refit=True)
    assert relative_error(logits(refitted, MANY), wanted) < 0.85 * relative_error(logits(plain, MANY), wanted)
    assert {name: p.shape for name, p in refitted.named_parameters()} == {
        name: p.shape for name, p in plain.named_parameters()
    }


def inputs_of(model: SlicedForCausalLM, path: str, ids: torch.Tensor) -> torch.Tensor:
    """What a module reads, (T, n), when a model runs."""
    found: list[torch.Tensor] = []

    def note(_: nn.Module, args: Any) -> None:
        found.append(args[0].flatten(0, -2))

    handle = part(model, path).register_forward_pre_hook(note)
    logits(model, ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("rotations", [1, 2], ids=["one_rotation", "two_rotations"])
def test_the_last_writers_are_the_ridge_regression_on_the_dense_stream(rotations):
    model = random_model("llama", tied=True)
    sliced = rotate_and_slice(model, MANY, NARROW, rotations=rotations, refit=True)
    layer = "model.layers.2."
    stream = inputs_of(sliced, f"{layer}post_attention_layernorm", MANY)
    inner = inputs_of(sliced, f"{layer}mlp.down_proj", MANY)
    read = torch.cat((stream, inner, torch.ones(len(inner), 1, dtype=inner.dtype)), dim=1)
    dense = inputs_of(model, "model.norm", MANY)

    def weights(sliced: SlicedForCausalLM) -> torch.Tensor:
        down = part(sliced, f"{layer}mlp.down_proj")
        return torch.cat((part(sliced, f"{layer}mlp_shortcut").weight.T, down.weight.T, down.bias[None]))

    # what is solved for is the change from the dense layer's own weights, since the last layer writes in its basis
    start = weights(sliced).clone()
    down = part(model, f"{layer}mlp.down_proj")
    start[24:-1], start[-1] = down.weight.T, down.bias
    square = read.T @ read
    # at the optimum the gradient of |y - r W|^2 + 1e-3 sum_j (r^T r)_jj |W_j - W0_j|^2 is 0; the shortcut's W0, the
    # decoder, is not in the sliced model any more
    gradient = read.T @ (read @ weights(sliced) - dense)
    penalty = 1e-3 * square.diagonal()[:, None] * (weights(sliced) - start)
    rest = (gradient + penalty)[24:]
    assert rest.norm() < 1e-3 * gradient[24:].norm()
    assert gradient[24:].norm() > 0


def test_the_ridge_goes_by_each_inputs_own_size():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1e-2, 1, 1, 1e3, 1, 0], dtype=torch.float64)
    plain, scaled = (ridge_solve(r.T @ r, r.T @ targets, 1e-3) for r in (inputs, inputs * scales))
    wanted = torch.linalg.solve(
        inputs.T @ inputs + 1e-3 * torch.diag((inputs.T @ inputs).diagonal()), inputs.T @ targets
    )
    torch.testing.assert_close(plain, wanted)
    without_last = ridge_solve(inputs[:, :5].T @ inputs[:, :5], inputs[:, :5].T @ targets, 1e-3)
    torch.testing.assert_close((scaled * scales[:, None])[:5], without_last)
    assert not scaled[5].any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-13), (torch.bfloat16, 1e-5)])
def test_moments_are_the_direct_products(dtype, bound):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(9000, size, generator=generator).to(dtype) for size in (37, 11))
    moments = Moments(37, torch.device("cpu"))
    for part_in, part_out in zip(inputs.split(5000), targets.split(5000), strict=True):
        moments.add(part_in, part_out)
    square, cross = moments.square(), moments.cross()
    assert relative_error(square, inputs.double().T @ inputs.double()) < bound
    assert relative_error(cross, inputs.double().T @ targets.double()) < bound
    assert relative_error(square.T, square) < bound


def test_layers_before_the_first_cut_are_the_dense_models_own():
    model = random_model("llama", tied=True)
    sliced = rotate_and_slice(model, MANY, [HIDDEN, HIDDEN, 24], refit=True)
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    first = {name: p.data_ptr() for name, p in sliced.named_parameters() if ".layers.0." in name}
    assert first == {name: own[name] for name in first}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rotate_and_slice(model, MANY, [24, HIDDEN, HIDDEN], refit=True)
    for name, parameter in model.named_parameters():  # a refitted layer of full width has writers of its own
        assert torch.equal(parameter, before[name]), name


def test_bf16_gives_what_fp32_gives():
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model("mistral", dtype=dtype)
        sliced = rotate_and_slice(model, MANY, NARROW, metric="gradient", refit=True)
        assert {parameter.dtype for parameter in sliced.parameters()} == {dtype}
        errors[dtype] = relative_error(logits(sliced, MANY), logits(random_model("mistral"), MANY))
    assert errors[torch.bfloat16] < 1.1 * errors[torch.float32]


@pytest.mark.parametrize("batch_size", [7, 60])
def test_the_batch_size_changes_nothing_but_rounding(batch_size):
    model = random_model("qwen2_moe")
    more: dict[str, Any] = {"metric": "gradient", "refit": True, "inner_widths": [16, 48, 16]}
    wanted = logits(rotate_and_slice(model, MANY, NARROW, **more), windows())
    found = logits(rotate_and_slice(model, MANY, NARROW, batch_size=batch_size, **more), windows())
    assert relative_error(found, wanted) < 1e-4


def test_too_few_tokens_are_refused_with_the_number_that_is_needed():
    model = random_model("llama")
    with pytest.raises(
        InputError, match=r"refit: 96 calibration tokens are too few for the 96 unknowns of layer 0: at least 288 are"
    ):
        rotate_and_slice(model, windows(), [32] * LAYERS, refit=True)
    with pytest.raises(InputError, match="inner widths: 96 calibration tokens are too few for the 40 unknowns"):
        rotate_and_slice(model, windows(), [HIDDEN] * LAYERS, inner_widths=[64, 40, 64])


@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral"])
def test_a_saved_model_is_the_one_in_memory(case, tmp_path):
    model = random_model(case, dtype=torch.float32)
    inner = {"gpt2": 96}.get(case, 32)
    sliced = rotate_and_slice(model, MANY, NARROW, refit=True, inner_widths=[inner] * LAYERS)
    sliced.save_pretrained(tmp_path)
    loaded = SlicedForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    assert loaded.config.inner_widths == [inner] * LAYERS
    assert torch.equal(logits(loaded, windows()), logits(sliced, windows()))
    layers = part(sliced, FAMILIES[sliced.config.dense_model_type].layers)
    assert len(layers) == LAYERS
