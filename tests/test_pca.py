"""Covariances are those of a direct fp64 product, and bases are what PCA promises."""

import pytest
import torch

from slicing.families import InputError
from slicing.pca import Covariance, leading_eigenvectors

SIZE = 130  # no multiple of a column block
TOKENS = 16_500  # no multiple of a token block, of either size
# relative error of a covariance, by the dtype of the states; bf16 and fp16 products are summed in fp32
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random_states(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """States (3, TOKENS / 3, SIZE) with directions of very different energy and a mean that is not 0."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, SIZE, dtype=torch.float64)
    states = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64) * scales + 0.1
    return states.view(3, TOKENS // 3, SIZE).to(dtype)


def covariance_of(*parts: torch.Tensor, centred: bool = False) -> torch.Tensor:
    covariance = Covariance(parts[0].shape[-1], torch.device("cpu"), centred=centred)
    for states in parts:
        covariance.add(states)
    return covariance.matrix()


def low_rank_covariance(rank: int) -> torch.Tensor:
    """The covariance of states that span `rank` directions."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(SIZE, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T


# ---- covariance


@every_dtype
def test_covariance_is_the_direct_product_of_the_states(dtype):
    states = random_states(dtype)
    found = covariance_of(states)
    flat = states.double().flatten(0, 1)
    wanted = flat.T @ flat
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert (found - wanted).norm() < TOLERANCE[dtype] * wanted.norm()


@every_dtype
def test_centred_covariance_is_that_of_the_states_less_their_means(dtype):
    states = random_states(dtype)
    flat = states.double().flatten(0, 1)
    flat = flat - flat.mean(1, keepdim=True)
    wanted = flat.T @ flat
    assert (covariance_of(states, centred=True) - wanted).norm() < TOLERANCE[dtype] * wanted.norm()


@every_dtype
def test_covariance_does_not_depend_on_how_the_tokens_are_handed_over(dtype):
    states = random_states(dtype)
    wanted = covariance_of(states)
    for parts in (states.flatten(0, 1).split(1000), states.split([1, 2])):
        assert (covariance_of(*parts) - wanted).norm() < TOLERANCE[dtype] * wanted.norm()


def test_adding_states_leaves_them_as_they_are():
    states = random_states()
    before = states.clone()
    covariance_of(states, centred=True)
    assert torch.equal(states, before)


def test_a_normalised_covariance_has_trace_1():
    covariance = Covariance(SIZE, torch.device("cpu"))
    covariance.add(random_states())
    assert covariance.normalised().trace().item() == pytest.approx(1, abs=1e-12)
    ratio = covariance.normalised() / covariance.matrix()
    assert torch.allclose(ratio, ratio[0, 0], rtol=1e-12)


# ---- bases


@pytest.mark.parametrize("rank", [SIZE, 40], ids=["full_rank", "low_rank"])
@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("count", [1, 24, SIZE - 1])
def test_a_basis_is_orthonormal_and_in_the_order_of_its_energies(rank, centred, count):
    covariance = low_rank_covariance(rank)
    basis = leading_eigenvectors(covariance, count, centred=centred)
    assert basis.shape == (SIZE, count)
    assert basis.dtype == torch.float64
    assert torch.allclose(basis.T @ basis, torch.eye(count, dtype=torch.float64), atol=1e-12)
    energies = (basis.T @ covariance @ basis).diagonal()
    assert (energies.diff() <= 1e-10 * energies[0]).all()


@pytest.mark.parametrize("count", [1, 24, SIZE - 1])
def test_no_basis_keeps_more_energy(count):
    covariance = low_rank_covariance(SIZE)
    basis = leading_eigenvectors(covariance, count)
    wanted = torch.linalg.eigvalsh(covariance)[-count:].sum()
    assert torch.allclose((basis.T @ covariance @ basis).trace(), wanted, rtol=1e-12)


@pytest.mark.parametrize("rank", [SIZE, 40, 1], ids=["full_rank", "low_rank", "rank_1"])
@pytest.mark.parametrize("count", [24, SIZE - 1])
def test_a_centred_basis_is_orthogonal_to_the_ones_vector(rank, count):
    for covariance in (low_rank_covariance(rank), low_rank_covariance(rank) + 5.0):  # the means' energy on top
        basis = leading_eigenvectors(covariance, count, centred=True)
        assert basis.sum(0).abs().max() < 1e-12


def test_a_centred_basis_of_width_d_minus_1_keeps_all_that_centring_leaves():
    basis = leading_eigenvectors(low_rank_covariance(40) + 5.0, SIZE - 1, centred=True)
    centring = torch.eye(SIZE, dtype=torch.float64) - 1 / SIZE
    assert torch.allclose(basis @ basis.T, centring, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_covariance_that_is_not_finite_is_an_error(value):
    states = random_states(torch.float32)
    states[0, 7, 3] = value
    with pytest.raises(InputError, match="not finite: use --dtype"):
        leading_eigenvectors(covariance_of(states), 8)
