"""Bases in the gradient metric: gradients are autograd's, the projection is the best one, and nothing is lost where
nothing has to be."""

import pytest
import torch
from tiny_models import (
    CASES,
    HIDDEN,
    LAYERS,
    layer_norm,
    live_in,
    logits,
    random_model,
    relative_error,
    subspace,
    tolerance,
    windows,
)
from torch import nn

from slicing import metric
from slicing.bases import dense_bases
from slicing.families import InputError, find_family
from slicing.metric import damped, gradient_metric, metric_basis, oblique
from slicing.parts import find_block, is_parallel, part
from slicing.pca import leading_eigenvectors
from slicing.rotation import rotate_and_slice, slice_with_bases

RANK = 20
SIZE = 24
every_case = pytest.mark.parametrize("case", CASES)
one_or_two = pytest.mark.parametrize("rotations", [1, 2], ids=["one_rotation", "two_rotations"])


def random_covariance(seed: int) -> torch.Tensor:
    factor = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ torch.diag(torch.logspace(0, -2, SIZE, dtype=torch.float64)) @ factor.T


def autograd_sums(case: str, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """G at each layer's input and middle over its trace, by hooks on the model's own forward and one backward pass."""
    model = random_model(case)
    family = find_family(model.config)
    inputs, middles = [], []

    def note(points: list[torch.Tensor]):
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            points.append(args[0] if args else kwargs["hidden_states"])
            points[-1].requires_grad_().retain_grad()

        return hook

    for layer in part(model, family.layers):
        block = find_block(layer, family)
        layer.register_forward_pre_hook(note(inputs), with_kwargs=True)
        if not is_parallel(layer, block):
            part(layer, block.mlp_norm or block.mlp[0]).register_forward_pre_hook(note(middles), with_kwargs=True)
    found = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(found.float(), ids[:, 1:].flatten(), reduction="sum").backward()

    def total(point: torch.Tensor) -> torch.Tensor:
        gradients = point.grad.reshape(-1, HIDDEN)
        if layer_norm(case):
            gradients = gradients - gradients.mean(1, keepdim=True)
        matrix = gradients.T @ gradients
        return matrix / matrix.trace()

    return [total(point) for point in inputs], [total(point) for point in middles]


@every_case
def test_the_metric_is_the_sum_of_the_loss_gradients_outer_products(case):
    model, ids = random_model(case), windows(3)
    inputs, middles = autograd_sums(case, ids)
    found = gradient_metric(model, find_family(model.config), ids, 2, None)
    for matrix, wanted in zip(found.inputs, inputs, strict=True):
        assert relative_error(matrix, wanted) < 1e-5
    for matrix, wanted in zip([matrix for matrix in found.middles if matrix is not None], middles, strict=True):
        assert relative_error(matrix, wanted) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_metric_takes_windows_from_all_over_the_text(monkeypatch):
    monkeypatch.setattr(metric, "GRADIENT_WINDOWS", 2)
    model, ids = random_model("llama"), windows(6)
    family = find_family(model.config)
    found = gradient_metric(model, family, ids, None, None)
    assert torch.equal(found.inputs[0], gradient_metric(model, family, ids[[0, 3]], None, None).inputs[0])


@pytest.mark.parametrize("count", [1, 7, SIZE - 1])
def test_no_projection_of_the_rank_loses_less_in_the_metric(count):
    covariance, weights = random_covariance(0), damped(random_covariance(1), torch.device("cpu"))
    basis = metric_basis(covariance, weights, count)
    root = torch.linalg.cholesky(weights)
    rest = torch.eye(SIZE, dtype=torch.float64) - basis.decoder @ basis.encoder.T
    lost = torch.trace(root.T @ rest @ covariance @ rest.T @ root)
    wanted = torch.linalg.eigvalsh(root.T @ covariance @ root)[: SIZE - count].sum()  # Eckart-Young in the metric
    torch.testing.assert_close(lost, wanted)
    eye = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(basis.decoder.T @ basis.decoder, eye)
    torch.testing.assert_close(basis.encoder.T @ basis.decoder, eye)


def test_the_unit_metric_is_pca():
    covariance = random_covariance(0)
    basis = metric_basis(covariance, torch.eye(SIZE, dtype=torch.float64), 7)
    wanted = leading_eigenvectors(covariance, 7)
    torch.testing.assert_close(basis.decoder @ basis.decoder.T, wanted @ wanted.T)
    torch.testing.assert_close(basis.encoder, basis.decoder)


def test_a_narrow_basis_is_the_beginning_of_the_whole_decoder():
    covariance, weights = random_covariance(0), damped(random_covariance(1), torch.device("cpu"))
    whole, wanted = metric_basis(covariance, weights, SIZE), metric_basis(covariance, weights, 9)
    found = oblique(whole.decoder[:, :9], weights)
    torch.testing.assert_close(found.decoder @ found.encoder.T, wanted.decoder @ wanted.encoder.T)


@every_case
@one_or_two
def test_slicing_to_the_rank_of_the_stream_keeps_logits(case, rotations):
    model = random_model(case, tied=rotations == 1)
    live_in(model, subspace(RANK, centred=layer_norm(case)))
    wanted = logits(model, windows())
    sliced = rotate_and_slice(model, windows(), [RANK, HIDDEN, RANK + 4], rotations=rotations, metric="gradient")
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case)
    bases = dense_bases(model, windows(), rotations=rotations, metric="gradient")
    sliced = slice_with_bases(model, bases, [RANK, RANK + 4, HIDDEN])
    assert relative_error(logits(sliced, windows()), wanted) < 1e-5  # bases are kept in fp32


@pytest.mark.parametrize("case", [case for case in CASES if layer_norm(case)])
def test_layer_norm_families_lose_nothing_at_width_d_minus_1(case):
    model = random_model(case)
    sliced = rotate_and_slice(model, windows(), [HIDDEN - 1] * LAYERS, metric="gradient")
    assert relative_error(logits(sliced, windows()), logits(model, windows())) < tolerance(case)


def test_an_unknown_metric_is_refused():
    with pytest.raises(InputError, match=r"unknown metric 'fisher': choose one of pca, gradient"):
        rotate_and_slice(random_model("llama"), windows(), [16] * LAYERS, metric="fisher")


def test_a_model_that_cant_be_differentiated_is_refused():
    class Kernel(torch.autograd.Function):  # as those of quantised weights
        @staticmethod
        def forward(context: object, states: torch.Tensor) -> torch.Tensor:
            return states.clamp(min=0)

    class Activation(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return Kernel.apply(states)

    model = random_model("llama")
    model.model.layers[1].mlp.act_fn = Activation()
    with pytest.raises(InputError, match="needs a model that can be differentiated, and layer 1 can't be"):
        gradient_metric(model, find_family(model.config), windows(), None, None)


def test_gradients_that_are_not_finite_are_refused():
    model = random_model("llama", dtype=torch.float32)
    model.lm_head.weight.data *= 1e38
    with pytest.raises(InputError, match=r"are 0 or not finite with torch\.float32"):
        rotate_and_slice(model, windows(), [16] * LAYERS, metric="gradient")
