"""Output norms are sliced: what a branch writes in a basis tells how large it is in the model's own."""

import pytest
import torch
from tiny_models import LAYERS, live_in, logits, random_model, relative_error, subspace, tolerance, windows
from torch import nn

from slicing import narrow
from slicing.bases import dense_bases
from slicing.families import FAMILIES, InputError
from slicing.narrow import OutputRMSNorm
from slicing.output_norms import magnitude, turned, unit_outputs
from slicing.parts import part
from slicing.pca import Basis
from slicing.rotation import rotate_and_slice, slice_with_bases

D, TOKENS = 40, 500


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(rank: int) -> torch.Tensor:
    """What a branch gives, (TOKENS, D), of falling variances in `rank` directions, each token of its own size."""
    spread = torch.logspace(0, -1.5, rank, dtype=torch.float64)
    sizes = random(TOKENS, 1, seed=3).exp()
    return sizes * (random(TOKENS, rank, seed=1) * spread) @ random(rank, D, seed=2)


def unit(states: torch.Tensor) -> torch.Tensor:
    return states / states.square().mean(-1, keepdim=True).sqrt()


def estimated(states: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
    """The mean squares (TOKENS) that T and w tell from what is written in a basis."""
    encoder = scale[:, None] * basis
    found = unit(states)
    form, rest = magnitude(found.T @ found, encoder, rows)
    assert form.shape == (rows, basis.shape[1])
    written = states @ encoder
    return (written @ form.T).square().sum(-1) + written.square() @ rest


def test_the_size_is_exact_where_all_that_is_written_lies_in_the_basis():
    states = outputs(12)
    scale = 0.5 + random(D, seed=4).abs()
    directions = (unit(states) * scale).T @ (unit(states) * scale)
    basis = torch.linalg.eigh(directions).eigenvectors[:, -16:]  # wider than what is written
    wanted = states.square().mean(-1)
    assert relative_error(estimated(states, basis, scale, 16), wanted) < 1e-9


def test_where_something_is_lost_the_mean_size_is_right_and_more_rows_tell_more():
    states, scale = outputs(D), torch.ones(D, dtype=torch.float64)
    scale[3] = 0.0  # as some of Gemma's
    basis = torch.linalg.qr(random(D, 24, seed=5)).Q
    ratios = [estimated(states, basis, scale, rows) / states.square().mean(-1) for rows in (24, 8, 2)]
    assert all(abs(ratio.mean() - 1) < 1e-9 for ratio in ratios)
    plain = (states * scale @ basis).square().sum(-1) / states.square().mean(-1)
    assert ratios[0].std() < 0.7 * (plain / plain.mean()).std()
    assert ratios[0].std() < ratios[1].std() < ratios[2].std()


def test_a_basis_turned_to_its_branch_needs_no_rows():
    states, scale = outputs(D), 0.5 + random(D, seed=4).abs()
    basis = torch.linalg.qr(random(D, 24, seed=5)).Q
    found = turned(Basis(basis, basis), unit(states).T @ unit(states), scale)
    assert relative_error(found.encoder @ found.decoder.T, basis @ basis.T) < 1e-12
    wanted = estimated(states, basis, scale, 24)
    assert relative_error(estimated(states, found.encoder, scale, 0), wanted) < 1e-9


def test_a_branch_that_writes_nothing_has_a_finite_size():
    form, rest = magnitude(torch.zeros(D, D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)[:, :8], 8)
    assert form.shape == (8, 8)
    assert not form.isnan().any()
    assert not rest.isnan().any()


@pytest.mark.parametrize(("width", "rows"), [(16, 16), (64, 64), (448, 64), (1040, 72), (4096, 256)])
def test_attention_in_the_basis_of_the_mlp_has_a_sixteenth_of_rows_and_at_least_64(width, rows):
    assert narrow.magnitude_rows(width) == rows


@pytest.mark.parametrize("rows", [0, 4])
def test_an_output_norm_divides_by_the_size_in_fp32(rows):
    norm = OutputRMSNorm(16, rows, 1e-6, torch.empty(0, dtype=torch.bfloat16))
    nn.init.ones_(norm.weight)
    states = random(3, 16, seed=6).bfloat16()
    wide = states.double()
    square = wide.square().sum(-1)
    if rows:
        square += (wide @ nn.init.normal_(norm.magnitude.weight).double().T).square().sum(-1)
    found = norm(states)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, wide / (square + 1e-6).sqrt()[:, None]) < 1e-2


def test_outputs_are_seen_before_the_norm_and_the_hook_goes_away():
    layer = random_model("gemma3_text", dtype=torch.float32).model.layers[0]
    norm = layer.post_attention_layernorm
    states = random(2, 3, 48, seed=7).float()
    states[0, 0] = 0
    with unit_outputs(layer, "post_attention_layernorm", torch.device("cpu")) as total:
        norm(states)
    norm(2 * states)
    assert total is not None
    wanted = unit(states.reshape(-1, 48)[1:]).double()
    assert relative_error(total.matrix(), wanted.T @ wanted) < 1e-6
    with unit_outputs(layer, "", torch.device("cpu")) as nothing:
        assert nothing is None


@pytest.mark.parametrize("case", ["gemma3_text", "olmo2"])
def test_a_sliced_branch_is_nearly_as_large_as_the_dense_one(case):
    model = random_model(case)
    sliced = rotate_and_slice(model, windows(), [40] * LAYERS)
    sizes: list[torch.Tensor] = []
    for each in (model, sliced):
        norm = part(each, FAMILIES[case].layers)[0].post_attention_layernorm
        handle = norm.register_forward_hook(lambda _, args, found: sizes.append(found.norm(dim=-1)))
        logits(each, windows())
        handle.remove()
    assert ((sizes[1] / sizes[0]) - 1).abs().max() < 0.3  # it lacks what is outside the basis


@pytest.mark.parametrize("rotations", [1, 2])
@pytest.mark.parametrize("case", ["gemma3_text", "olmo2"])
def test_the_gradient_metric_and_one_calibration_for_all_lose_nothing_where_there_is_room(case, rotations):
    model = random_model(case)
    live_in(model, subspace(20, centred=False))
    wanted = logits(model, windows())
    sliced = rotate_and_slice(model, windows(), [20, 48, 32], rotations=rotations, metric="gradient")
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case)
    for metric in ("pca", "gradient"):
        bases = dense_bases(model, windows(), rotations=rotations, metric=metric)
        for widths in ([20, 48, 32], [24, 20, 40]):
            sliced = slice_with_bases(model, bases, widths)
            assert relative_error(logits(sliced, windows()), wanted) < tolerance(case), (metric, widths)


@pytest.mark.parametrize("more", [{"refit": True}, {"inner_widths": [32] * LAYERS}], ids=["refit", "inner widths"])
def test_what_solves_for_writers_refuses_output_norms(more, request):
    what = request.node.callspec.id
    with pytest.raises(InputError, match=f"{what}: the layers of a 'olmo2' model norm what their branches write"):
        rotate_and_slice(random_model("olmo2"), windows(60), [32] * LAYERS, **more)
