"""Rotating and slicing loses nothing where the stream has room for it, for every family, and has the right shapes."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import (
    CASES,
    HIDDEN,
    LAYERS,
    TOLERANCE,
    VOCAB,
    family_of,
    layer_norm,
    live_in,
    logits,
    output_axis,
    random_model,
    relative_error,
    subspace,
    tolerance,
    windows,
)
from torch import nn
from transformers import PreTrainedModel

from slicing import rotation
from slicing.families import FAMILIES, InputError
from slicing.modeling import SlicedForCausalLM, SlicedLayer, count_parameters, input_axis, matrix, part
from slicing.pca import Covariance, leading_eigenvectors
from slicing.rotation import dense_bases, rotate_and_slice, slice_with_bases

RANK = 20
# r everywhere, then mixtures with larger widths: the full one first, in the middle and last
LOSSLESS = ([RANK] * 3, [HIDDEN, RANK, 32], [RANK, HIDDEN, 28], [32, RANK, HIDDEN])
NARROW = [16, 24, 12]  # below the rank of the stream
LAYER_NORM_CASES = [case for case in CASES if layer_norm(case)]
RMS_NORM_CASES = [case for case in CASES if not layer_norm(case)]
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
one_or_two = pytest.mark.parametrize("rotations", [1, 2], ids=["one_rotation", "two_rotations"])
every_case = pytest.mark.parametrize("case", CASES)


@cache
def low_rank(case: str, tied: bool, dtype: torch.dtype) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model whose stream has rank RANK, and its logits."""
    model = random_model(case, tied=tied, dtype=dtype)
    live_in(model, subspace(RANK, centred=layer_norm(case)))
    return model, logits(model, windows())


@cache
def full_rank(case: str, tied: bool = False) -> tuple[PreTrainedModel, torch.Tensor]:
    """A random fp64 model, whose stream has rank HIDDEN and means that are not 0, and its logits."""
    model = random_model(case, tied=tied)
    return model, logits(model, windows())


@cache
def narrow(case: str, tied: bool, rotations: int) -> SlicedForCausalLM:
    """`full_rank` sliced to NARROW."""
    return rotate_and_slice(full_rank(case, tied)[0], windows(), NARROW, rotations=rotations)


def sliced_layers(sliced: SlicedForCausalLM) -> list[SlicedLayer]:
    """Its decoder layers."""
    return list(part(sliced.model, FAMILIES[sliced.config.text_config.model_type].layers))


def size(layer: nn.Module, path: str, *, writes: bool) -> tuple[int, int]:
    """How many numbers of the stream the matrix at a path reads, or writes, and how many on its other side."""
    owner, name = matrix(layer, path)
    shape, axis = getattr(owner, name).shape, input_axis(owner)
    inner, outer = shape[axis], shape[output_axis(owner)]
    return (outer, inner) if writes else (inner, outer)


def bias_size(layer: nn.Module, path: str) -> int:
    """Numbers in the bias of the linear layer at a path."""
    bias = getattr(matrix(layer, path)[0], "bias", None)
    return 0 if bias is None else bias.numel()


# ---- lossless slicing


@every_case
@ties
@one_or_two
def test_slicing_to_the_rank_of_the_stream_keeps_logits(case, tied, rotations):
    model, wanted = low_rank(case, tied, torch.float64)
    for widths in LOSSLESS:
        sliced = rotate_and_slice(model, windows(), widths, rotations=rotations)
        assert relative_error(logits(sliced, windows()), wanted) < tolerance(case), widths


@every_case
@ties
@one_or_two
def test_slicing_to_the_rank_of_the_stream_keeps_logits_in_fp32(case, tied, rotations):
    model, wanted = low_rank(case, tied, torch.float32)
    sliced = rotate_and_slice(model, windows(), [RANK, HIDDEN, RANK], rotations=rotations)
    assert {p.dtype for p in sliced.parameters()} == {torch.float32}
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case, torch.float32)


@pytest.mark.parametrize("case", ["llama", "gemma", "gpt2", "falcon"])
def test_slicing_to_the_rank_of_the_stream_keeps_logits_in_bf16(case):
    model, wanted = low_rank(case, False, torch.bfloat16)
    sliced = rotate_and_slice(model, windows(), [RANK, HIDDEN, RANK])
    assert {p.dtype for p in sliced.parameters()} == {torch.bfloat16}
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case, torch.bfloat16)


@pytest.mark.parametrize("case", LAYER_NORM_CASES)
@ties
@one_or_two
def test_layer_norm_families_lose_nothing_at_width_d_minus_1(case, tied, rotations):
    model, wanted = full_rank(case, tied)
    for widths in ([HIDDEN - 1] * 3, [HIDDEN - 1, HIDDEN, HIDDEN - 1]):
        sliced = rotate_and_slice(model, windows(), widths, rotations=rotations)
        assert relative_error(logits(sliced, windows()), wanted) < tolerance(case), widths


@pytest.mark.parametrize("case", LAYER_NORM_CASES)
def test_layer_norm_families_need_the_centring(case, monkeypatch):
    monkeypatch.setattr(rotation, "Covariance", lambda hidden, device, centred: Covariance(hidden, device))
    monkeypatch.setattr(rotation, "leading_eigenvectors", lambda matrix, count, centred: leading_eigenvectors(matrix, count))
    model, wanted = full_rank(case)
    sliced = rotate_and_slice(model, windows(), [HIDDEN - 1] * 3)
    assert relative_error(logits(sliced, windows()), wanted) > 1e-3


@pytest.mark.parametrize("case", RMS_NORM_CASES)
def test_rms_norm_families_lose_something_at_width_d_minus_1(case):
    model, wanted = full_rank(case)
    sliced = rotate_and_slice(model, windows(), [HIDDEN - 1] * 3)
    assert relative_error(logits(sliced, windows()), wanted) > 1e-3


@every_case
def test_full_widths_change_nothing_at_all(case):
    for tied in (False, True):
        model, wanted = full_rank(case, tied)
        sliced = rotate_and_slice(model, windows(), [HIDDEN] * LAYERS)
        assert torch.equal(logits(sliced, windows()), wanted)
        assert [name for name, _ in sliced.model.named_modules()] == [name for name, _ in model.named_modules()]
        storage = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        assert {name: parameter.data_ptr() for name, parameter in sliced.model.named_parameters()} == storage


# ---- below the rank: widths, counts, bases


@every_case
@ties
@one_or_two
def test_slicing_below_the_rank_gives_finite_other_logits(case, tied, rotations):
    found = logits(narrow(case, tied, rotations), windows())
    assert found.shape == (6, 16, VOCAB)
    assert torch.isfinite(found).all()
    assert relative_error(found, full_rank(case, tied)[1]) > 0.01


@every_case
@one_or_two
def test_every_matrix_has_the_width_of_the_stream_that_it_reads_and_writes(case, rotations):
    sliced = narrow(case, False, rotations)
    assert sliced.config.widths == NARROW
    assert sliced.config.rotations == rotations
    for layer, width, following in zip(sliced_layers(sliced), NARROW, [*NARROW[1:], HIDDEN], strict=True):
        block = layer.block
        experts = max(width, following)  # experts return the width that they read
        for path in block.attention_in:
            assert size(layer, path, writes=False)[0] == width, path
        for path in block.mlp_in:
            assert size(layer, path, writes=False)[0] == (experts if block.experts else width), path
        assert size(layer, block.attention_out, writes=True)[0] == (following if layer.parallel else width)
        for path in block.mlp_out:
            assert size(layer, path, writes=True)[0] == (experts if block.experts else following), path
        assert layer.mlp_shortcut is not None
        assert layer.mlp_shortcut.weight.shape == (following, width)
        if layer.parallel or rotations == 1:
            assert layer.attn_shortcut is None
        else:
            assert layer.attn_shortcut is not None
            assert layer.attn_shortcut.weight.shape == (width, width)


@every_case
@ties
@one_or_two
def test_parameters_of_a_sliced_model_are_those_of_the_formula(case, tied, rotations):
    model, sliced = full_rank(case, tied)[0], narrow(case, tied, rotations)
    family = family_of(case)
    if tied or family.whole_tables:
        change = NARROW[0] * HIDDEN  # the projection behind the table
    else:
        change = sum(part(model, path).weight.shape[0] for path in family.tables) * (NARROW[0] - HIDDEN)
    dense_layers = part(model, family.layers)
    for dense, layer, width, following in zip(
        dense_layers, sliced_layers(sliced), NARROW, [*NARROW[1:], HIDDEN], strict=True
    ):
        block, parallel = layer.block, layer.parallel
        experts = max(width, following)
        writes = [(block.attention_out, following if parallel else width)]
        writes += [(path, experts if block.experts else following) for path in block.mlp_out]
        reads = [(path, width) for path in block.attention_in]
        reads += [(path, experts if block.experts else width) for path in block.mlp_in]
        for path, new in writes:
            whole, other = size(dense, path, writes=True)
            assert whole == HIDDEN
            matrices = part(dense, path).shape[0] if "experts" in path else 1
            change += matrices * other * (new - HIDDEN)
            change += new - HIDDEN if bias_size(dense, path) else 0
        for path, new in reads:
            whole, other = size(dense, path, writes=False)
            assert whole == HIDDEN
            matrices = part(dense, path).shape[0] if path.endswith("gate_up_proj") and "experts" in path else 1
            change += matrices * other * (new - HIDDEN)
            change += other if path in sliced.config.gained_biases else 0
        for path in {block.attention_norm, block.mlp_norm}:
            change += width - sum(p.numel() for p in part(dense, path).parameters())
        change += width * following + (0 if parallel or rotations == 1 else width * width)
    assert count_parameters(sliced) == count_parameters(model) + change


@one_or_two
def test_parameters_of_a_sliced_llama_are_those_counted_by_hand(rotations):
    keys, inner = HIDDEN // 2, 64  # two of four heads; the MLP's hidden size
    for tied in (False, True):
        wanted = VOCAB * HIDDEN + HIDDEN + (HIDDEN * 16 if tied else VOCAB * 16)  # head, final norm, what feeds E_0
        for width, following in ((16, 24), (24, 12), (12, HIDDEN)):
            wanted += (HIDDEN + 2 * keys) * (width + 1)  # q, k, v
            wanted += width * (HIDDEN + 1)  # o
            wanted += 2 * inner * (width + 1)  # gate, up
            wanted += following * (inner + 1)  # down
            wanted += 2 * width  # norms
            wanted += width * following  # mlp shortcut
            wanted += width * width if rotations == 2 else 0  # attn shortcut
        assert count_parameters(narrow("llama", tied, rotations)) == wanted


@one_or_two
def test_parameters_of_a_sliced_mixtral_are_those_counted_by_hand(rotations):
    keys, inner, experts = HIDDEN // 2, 64, 4
    wanted = VOCAB * HIDDEN + HIDDEN + VOCAB * 16  # head, final norm, table
    for width, following in ((16, 24), (24, 12), (12, HIDDEN)):
        wider = max(width, following)
        wanted += (2 * HIDDEN + 2 * keys) * width  # q, k, v, o
        wanted += experts * wider  # router
        wanted += experts * 3 * inner * wider
        wanted += 2 * width  # norms
        wanted += width * following + (width * width if rotations == 2 else 0)  # shortcuts
    assert count_parameters(narrow("mixtral", False, rotations)) == wanted


@every_case
def test_a_tied_table_stays_whole_tied_and_is_counted_once(case):
    model, sliced = full_rank(case, True)[0], narrow(case, True, 2)
    head, table = sliced.get_output_embeddings().weight, sliced.get_input_embeddings().weight
    assert head is table
    assert table.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert count_parameters(sliced) == sum({p.data_ptr(): p.numel() for p in sliced.parameters()}.values())
    assert sliced.config.tie_word_embeddings


@every_case
def test_an_untied_table_has_the_first_width_unless_the_body_needs_its_own(case):
    sliced = narrow(case, False, 2)
    whole = CASES[case][0] in ("gpt2", "gptj")
    for path in family_of(case).tables:
        assert part(sliced.model, path).weight.shape[1] == (HIDDEN if whole else NARROW[0])
    assert (sliced_layers(sliced)[0].embedding_projection is not None) == whole


@every_case
def test_a_shortcut_stands_only_where_a_basis_changes(case):
    model, _ = full_rank(case)
    first, second, third = sliced_layers(rotate_and_slice(model, windows(), [HIDDEN, HIDDEN, 16]))
    assert first.mlp_shortcut is None
    assert first.attn_shortcut is None
    assert second.mlp_shortcut is not None
    assert second.attn_shortcut is None
    assert third.mlp_shortcut is not None


@every_case
def test_each_layer_reads_the_principal_components_of_its_own_sliced_stream(case):
    sliced = narrow(case, False, 2)
    streams: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(sliced_layers(sliced)):
        for path in {layer.block.attention_norm, layer.block.mlp_norm}:

            def hook(_: nn.Module, args: Any, key: tuple[int, str] = (index, path)) -> None:
                streams[key] = args[0].flatten(0, 1)

            handles.append(part(layer, path).register_forward_pre_hook(hook))
    logits(sliced, windows())
    for handle in handles:
        handle.remove()
    assert len(streams) == sum(len({la.block.attention_norm, la.block.mlp_norm}) for la in sliced_layers(sliced))
    for states in streams.values():
        covariance = states.T @ states
        energies = covariance.diagonal()
        assert (covariance - energies.diag()).abs().max() < tolerance(case) * energies.max()
        assert (energies.diff() <= tolerance(case) * energies.max()).all()


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_one_rotation_weighs_the_middle_of_a_layer_three_times(case):
    model, _ = full_rank(case, True)
    layer = part(model, family_of(case).layers)[0]
    states: list[torch.Tensor] = []
    norms = [layer.ln_1, layer.ln_2] if case == "gpt2" else [layer.input_layernorm, layer.post_attention_layernorm]
    handles = [norm.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1))) for norm in norms]
    logits(model, windows())
    for handle in handles:
        handle.remove()
    if layer_norm(case):
        states = [found - found.mean(1, keepdim=True) for found in states]
    before, middle = (found.T @ found / found.square().sum() for found in states)
    basis = torch.linalg.eigh(before + 3 * middle).eigenvectors[:, -NARROW[0] :]
    found = sliced_layers(narrow(case, True, 1))[0].embedding_projection
    assert found is not None
    assert relative_error(found.weight.T @ found.weight, basis @ basis.T) < tolerance(case)


# ---- norms and biases


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_a_sliced_norm_has_weight_exactly_1_and_eps_times_d_over_width(case, dtype):
    model = full_rank(case)[0] if dtype == torch.float64 else low_rank(case, False, dtype)[0]
    sliced = narrow(case, False, 2) if dtype == torch.float64 else rotate_and_slice(model, windows(), NARROW)
    family = family_of(case)
    dense_layers = part(model, family.layers)
    for dense, layer, width in zip(dense_layers, sliced_layers(sliced), NARROW, strict=True):
        for path in {layer.block.attention_norm, layer.block.mlp_norm}:
            norm, dense_norm = part(layer, path), part(dense, path)
            assert norm.weight.dtype == dtype
            assert torch.equal(norm.weight, torch.full_like(norm.weight, 0 if CASES[case][0] == "gemma" else 1))
            assert norm.weight.shape == (width,)
            assert getattr(norm, "bias", None) is None
            assert type(norm) is (nn.RMSNorm if family.layer_norm else type(dense_norm))
            names = ("variance_epsilon", "eps")
            eps = [getattr(n, next((a for a in names if hasattr(n, a)), ""), 1e-5) for n in (norm, dense_norm)]
            assert math.isclose(eps[0], eps[1] * HIDDEN / width, rel_tol=1e-12)


@pytest.mark.parametrize("case", LAYER_NORM_CASES)
def test_a_layer_of_full_width_keeps_its_norm(case):
    model, _ = full_rank(case)
    layer = sliced_layers(rotate_and_slice(model, windows(), [RANK, HIDDEN, RANK]))[1]
    dense = part(model, family_of(case).layers)[1]
    for path in {layer.block.attention_norm, layer.block.mlp_norm}:
        assert type(part(layer, path)) is type(part(dense, path))
        for name, parameter in part(dense, path).named_parameters():
            assert part(layer, f"{path}.{name}").data_ptr() == parameter.data_ptr()


@every_case
def test_only_readers_of_a_norm_with_a_bias_gain_one(case):
    config = narrow(case, False, 2).config
    wanted = {
        "falcon": ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
        "falcon-two-norms": ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
        "falcon-one-norm": ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
        "gptj": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        "stablelm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
        "stablelm-parallel": ["mlp.gate_proj", "mlp.up_proj"],
    }
    assert config.gained_biases == wanted.get(case, [])


# ---- the dense model is left as it was


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that slicing could disturb."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: (id(module), module.training) for name, module in modules.items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "attributes": {n: {k: v for k, v in vars(m).items() if isinstance(v, int | float)} for n, m in modules.items()},
        "parameters": {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        "config": (id(model.config), model.config.to_dict(), model.config._attn_implementation),
        "generation": model.generation_config.to_dict(),
    }


@every_case
@ties
def test_the_dense_model_is_left_as_it_was(case, tied):
    model = random_model(case, tied=tied)
    model.train()
    part(model, family_of(case).layers)[1].eval()
    part(model, family_of(case).layers)[0].requires_grad_(False)
    before, state = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    bases = dense_bases(model, windows(2))
    for sliced in (
        rotate_and_slice(model, windows(2), [HIDDEN, 16, 24], rotations=2),
        rotate_and_slice(model, windows(2), [16, HIDDEN, HIDDEN], rotations=1),
        slice_with_bases(model, bases, NARROW),
    ):
        assert not sliced.training
        assert snapshot(model) == before
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---- one calibration for every width


@every_case
@one_or_two
def test_bases_of_the_dense_model_slice_to_its_rank_without_loss(case, rotations):
    model, wanted = low_rank(case, False, torch.float64)
    bases = dense_bases(model, windows(), rotations=rotations)
    assert {basis.dtype for basis in bases.inputs} == {torch.float32}
    assert [tuple(basis.shape) for basis in bases.inputs] == [(HIDDEN, HIDDEN)] * LAYERS
    for widths in LOSSLESS[:2]:
        sliced = slice_with_bases(model, bases, widths)
        assert sliced.config.rotations == rotations
        assert relative_error(logits(sliced, windows()), wanted) < TOLERANCE["fp32 bases"], widths


@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
def test_bases_of_the_dense_model_are_those_of_the_first_layer_sliced_alone(case):
    model, _ = full_rank(case, True)
    for rotations in (1, 2):
        bases = dense_bases(model, windows(), rotations=rotations)
        once = slice_with_bases(model, bases, [16, HIDDEN, HIDDEN])
        every_point = rotate_and_slice(model, windows(), [16, HIDDEN, HIDDEN], rotations=rotations)
        planes = [sliced_layers(sliced)[0].embedding_projection.weight for sliced in (once, every_point)]
        planes = [weight.T @ weight for weight in planes]
        assert relative_error(planes[0], planes[1]) < TOLERANCE["fp32 bases"]


@every_case
def test_both_calibrations_agree_bit_for_bit_where_nothing_is_sliced(case):
    model, wanted = full_rank(case)
    sliced = slice_with_bases(model, dense_bases(model, windows(2)), [HIDDEN] * LAYERS)
    assert torch.equal(logits(sliced, windows()), wanted)


# ---- batches


@every_case
@one_or_two
def test_the_batch_size_of_the_calibration_does_not_matter(case, rotations):
    model, _ = full_rank(case)
    ids = windows(5)
    wanted = logits(rotate_and_slice(model, ids, NARROW, rotations=rotations, batch_size=2), windows())
    for batch_size in (1, 5):
        sliced = rotate_and_slice(model, ids, NARROW, rotations=rotations, batch_size=batch_size)
        assert relative_error(logits(sliced, windows()), wanted) < TOLERANCE["batches"], batch_size


@every_case
def test_rows_of_a_batch_are_not_mixed(case):
    sliced, ids = narrow(case, False, 2), windows()
    alone = torch.cat([logits(sliced, row[None]) for row in ids])
    assert relative_error(logits(sliced, ids), alone) < tolerance(case)


def test_the_last_batch_may_be_smaller_than_the_others_in_the_dense_pass_too():
    model, _ = full_rank("falcon-sequential")
    wanted = dense_bases(model, windows(5), batch_size=5)
    found = dense_bases(model, windows(5), batch_size=3)
    for basis, other in zip(found.inputs, wanted.inputs, strict=True):
        planes = [leading[:, :16] @ leading[:, :16].T for leading in (basis, other)]
        assert relative_error(planes[0], planes[1]) < TOLERANCE["fp32 bases"]


@pytest.mark.parametrize("case", ["gpt2", "opt", "phi", "stablelm"])
def test_calibration_has_no_dropout_whatever_the_mode_of_the_model(case):
    model = random_model(case)
    wanted = logits(rotate_and_slice(model, windows(2), NARROW), windows())
    model.train()
    for sliced in (
        rotate_and_slice(model, windows(2), NARROW),
    ):
        assert torch.equal(logits(sliced, windows()), wanted)


# ---- bad input


@pytest.mark.parametrize("ids", [torch.ones(4, dtype=torch.long), torch.ones(0, 8, dtype=torch.long)])
def test_windows_of_a_wrong_shape_are_an_error(ids):
    with pytest.raises(InputError, match=r"shape \(N, S\)"):
        rotate_and_slice(full_rank("llama")[0], ids, NARROW)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_activations_that_are_not_finite_are_an_error(case):
    model = random_model(case)
    layer = part(model, family_of(case).layers)[0]
    next(layer.parameters()).data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        rotate_and_slice(model, windows(), NARROW)


def test_a_model_without_a_head_is_an_error():
    model = random_model("llama")
    model.lm_head = None
    with pytest.raises(InputError, match="no head"):
        rotate_and_slice(model, windows(), NARROW)


@pytest.mark.parametrize("widths", [[16, 16], [16, 16, 0], [16, 16, HIDDEN + 1]])
def test_widths_that_do_not_fit_are_an_error(widths):
    with pytest.raises(ValueError, match="widths must be 3 numbers from 1 to 48"):
        rotate_and_slice(full_rank("llama")[0], windows(), widths)
