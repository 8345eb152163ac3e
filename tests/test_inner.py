"""The MLP's inner width: the neurons that matter least go, and what they wrote is taken over."""

import pytest
import torch
from tiny_models import (
    CASES,
    HIDDEN,
    INNER,
    LAYERS,
    family_of,
    logits,
    output_norms,
    random_model,
    relative_error,
    windows,
)
from tiny_models import tolerance as bound
from transformers import PreTrainedModel

from slicing.families import InputError
from slicing.inner import check_inner_widths, inner_sizes, kept_neurons, leverage, taken_over
from slicing.modeling import count_parameters
from slicing.narrow import inner_matrices, outputs_of
from slicing.parts import find_block, input_axis, matrix, part
from slicing.rotation import rotate_and_slice
from slicing.weights import rows_of

MANY = windows(60)
GONE = 8  # neurons of each MLP that never say anything
LAYERS_WITHOUT = "nemotron_h"  # an MLP: their inner width is 0
every_case = pytest.mark.parametrize("case", [*(case for case in CASES if not output_norms(case)), LAYERS_WITHOUT])


def silence(model: PreTrainedModel, case: str) -> None:
    """Make every third of the first neurons 0, by its readers' rows, in place."""
    neurons = 3 * torch.arange(GONE)
    for layer in part(model, family_of(case).layers):
        if not find_block(layer, family_of(case)).mlp_out:
            continue
        for width, readers in inner_matrices(layer, find_block(layer, family_of(case))).values():
            for path in readers:
                owner, name = matrix(layer, path)
                weight = getattr(owner, name).data
                rows = rows_of(neurons, width, outputs_of(layer, path), True)
                weight.index_fill_(weight.ndim - 3 - input_axis(owner), rows, 0.0)
                if getattr(owner, "bias", None) is not None:
                    owner.bias.data[rows] = 0.0


def silent_model(case: str) -> tuple[PreTrainedModel, list[int]]:
    model = random_model(case)
    silence(model, case)
    return model, inner_sizes(model, family_of(case))


@every_case
def test_neurons_that_say_nothing_go_without_a_loss(case):
    model, sizes = silent_model(case)
    fewer = [size and size - GONE for size in sizes]
    sliced = rotate_and_slice(model, MANY, [HIDDEN] * len(sizes), inner_widths=fewer, refit=case != "llama")
    assert relative_error(logits(sliced, windows()), logits(model, windows())) < bound(case)
    assert inner_sizes(sliced, family_of(case)) == fewer == sliced.config.inner_widths


@every_case
def test_inner_widths_of_the_model_change_nothing(case):
    model, sizes = silent_model(case)
    plain = rotate_and_slice(model, windows(), [16, 21, 12, 16][: len(sizes)])
    same = rotate_and_slice(model, windows(), [16, 21, 12, 16][: len(sizes)], inner_widths=sizes)
    assert same.config.inner_widths is None
    assert torch.equal(logits(same, windows()), logits(plain, windows()))


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2", "falcon", "phi", "qwen2_moe"])
def test_taking_over_and_refit_each_come_nearer_to_the_dense_model(case, monkeypatch):
    model = random_model(case)
    wanted = logits(model, MANY)
    half = [size // 2 for size in inner_sizes(model, family_of(case))]

    def error(refit: bool) -> float:
        return relative_error(
            logits(rotate_and_slice(model, MANY, [40] * 3, inner_widths=half, refit=refit), MANY), wanted
        )

    plain, refitted = error(False), error(True)
    for module in ("slicing.fit", "slicing.experts"):
        monkeypatch.setattr(f"{module}.taken_over", lambda square, writer, neurons: writer[neurons])
    assert refitted < plain < error(False)


def test_only_the_mlp_changes_where_no_width_is_cut():
    model = random_model("llama", tied=True)
    sliced = rotate_and_slice(model, MANY, [HIDDEN] * LAYERS, inner_widths=[INNER, 32, 40])
    assert [name for name, _ in sliced.named_modules()] == [name for name, _ in model.named_modules()]
    fewer = INNER - 32 + INNER - 40
    assert count_parameters(sliced) == count_parameters(model) - fewer * (3 * HIDDEN + 2)  # two readers with biases
    shared = {p.data_ptr() for p in model.parameters()}
    own = [name for name, p in sliced.named_parameters() if p.data_ptr() not in shared]
    assert all(".mlp." in name for name in own)


def test_each_expert_keeps_neurons_of_its_own():
    model = random_model("mixtral")
    sliced = rotate_and_slice(model, MANY, [HIDDEN] * LAYERS, inner_widths=[32] * LAYERS)
    dense, cut = (m.model.layers[0].mlp.experts.gate_up_proj for m in (model, sliced))
    assert cut.shape == (4, 64, HIDDEN)
    kept = [
        {int((rows - row).abs().sum(1).argmin()) for row in mine[:32]} for rows, mine in zip(dense, cut, strict=True)
    ]
    assert len({frozenset(neurons) for neurons in kept}) > 1


def test_leverage_is_the_formulas():
    factor = torch.randn(30, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    square = factor @ factor.T
    damped = square + 0.01 * square.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(leverage(square), (square @ torch.linalg.inv(damped)).diagonal())
    assert kept_neurons(square, 5).tolist() == sorted(leverage(square).argsort(descending=True)[:5].tolist())


def test_what_is_taken_over_is_the_least_squares_share():
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    inner[:, 8:] = inner[:, :4] @ torch.randn(4, 4, generator=generator, dtype=torch.float64)  # combinations of others
    writer = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    found = taken_over(inner.T @ inner, writer, torch.arange(8))
    assert relative_error(inner[:, :8] @ found, inner @ writer) < 1e-3


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([INNER, 0, INNER], r"the inner width of layer 1 is 0: it must lie in \[1, 64\]"),
        ([INNER, INNER, 65], r"the inner width of layer 2 is 65: it must lie in \[1, 64\]"),
        ([32], "got 1 inner widths for 3 layers"),
    ],
)
def test_inner_widths_that_dont_fit_are_refused(widths, message):
    with pytest.raises(InputError, match=message):
        rotate_and_slice(random_model("llama"), MANY, [HIDDEN] * LAYERS, inner_widths=widths)
    with pytest.raises(InputError, match="the inner width of layer 0 is 16: it must be 0, since it has no MLP"):
        check_inner_widths(random_model("mamba"), family_of("mamba"), [16] * LAYERS)
