"""Rotating and slicing loses nothing where the stream has room for it, for every family, and has the right shapes."""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    CASES,
    HIDDEN,
    INNER,
    LAYERS,
    TOLERANCE,
    VOCAB,
    family_of,
    layer_norm,
    live_in,
    logits,
    output_axis,
    output_norms,
    random_model,
    relative_error,
    subspace,
    tolerance,
    windows,
)
from torch import nn
from transformers import PreTrainedModel

from slicing import pca
from slicing.bases import dense_bases
from slicing.families import FAMILIES, InputError
from slicing.likelihood import perplexity
from slicing.modeling import SlicedForCausalLM, SlicedLayer, count_parameters
from slicing.parts import input_axis, matrix, part
from slicing.pca import Covariance
from slicing.rotation import random_sliced, rotate_and_slice, slice_with_bases, sliced_parameters

RANK = 20
# r everywhere, and a mixture with larger widths, by whether the table is tied
LOSSLESS = {False: ([RANK] * 3, [HIDDEN, RANK, 32]), True: ([RANK] * 3, [RANK, 32, HIDDEN])}
NARROW = [16, 21, 12]  # below the rank of the stream, not all multiples of 8
PARALLEL = {
    "stablelm-parallel",
    "gpt_neox",
    "phi",
    "falcon",
    "falcon-two-norms",
    "falcon-one-norm",
    "gptj",
    "cohere",
}
# these add attention, MLP and stream up in another order than the sliced layer, so their last bits may differ
OTHER_ORDER = PARALLEL - {"stablelm-parallel", "cohere"}
LAYER_NORM_CASES = [case for case in CASES if layer_norm(case)]
RMS_NORM_CASES = [case for case in CASES if not layer_norm(case)]
every_case = pytest.mark.parametrize("case", CASES)
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
one_or_two = pytest.mark.parametrize("rotations", [1, 2], ids=["one_rotation", "two_rotations"])


def with_rotations(*cases: str) -> pytest.MarkDecorator:
    """Each case with two rotations, and with one where that is something else."""
    pairs = [(case, rotations) for case in cases for rotations in (2, 1) if rotations == 2 or case not in PARALLEL]
    return pytest.mark.parametrize(("case", "rotations"), pairs)


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
def narrow(case: str, tied: bool = False, rotations: int = 2) -> SlicedForCausalLM:
    """`full_rank` sliced to NARROW."""
    return rotate_and_slice(full_rank(case, tied)[0], windows(), NARROW, rotations=rotations)


def sliced_layers(sliced: SlicedForCausalLM) -> list[SlicedLayer]:
    """Its decoder layers."""
    return list(part(sliced, FAMILIES[sliced.config.dense_model_type].layers))


def narrow_layers(sliced: SlicedForCausalLM) -> Iterator[tuple[SlicedLayer, int, int]]:
    """Each layer of a model sliced to NARROW, with the width that it reads and the one that it writes."""
    return zip(sliced_layers(sliced), NARROW, [*NARROW[1:], HIDDEN], strict=True)


def matrices_of(case: str, layer: SlicedLayer, width: int, following: int) -> list[tuple[str, bool, int]]:
    """Each matrix on the stream: its path, whether it writes, and how much of the stream it should read or write."""
    block = layer.block
    experts = min(8 * math.ceil(max(width, following) / 8), HIDDEN)  # they return the width that they read
    return [
        *((path, False, width) for path in block.attention_in),
        *((path, False, experts if block.experts else width) for path in block.mlp_in),
        (block.attention_out, True, following if case in PARALLEL else width),
        *((path, True, experts if block.experts else following) for path in block.mlp_out),
    ]


# ---- lossless slicing


@with_rotations(*CASES)
@ties
def test_slicing_to_the_rank_of_the_stream_keeps_logits(case, rotations, tied):
    model, wanted = low_rank(case, tied, torch.float64)
    for widths in LOSSLESS[tied]:
        sliced = rotate_and_slice(model, windows(), widths, rotations=rotations)
        assert relative_error(logits(sliced, windows()), wanted) < tolerance(case), widths


@with_rotations(*CASES)
def test_slicing_to_the_rank_of_the_stream_keeps_logits_in_fp32(case, rotations):
    model, wanted = low_rank(case, rotations == 1, torch.float32)
    sliced = rotate_and_slice(model, windows(), [RANK, HIDDEN, RANK], rotations=rotations)
    assert {p.dtype for p in sliced.parameters()} == {torch.float32}
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case, torch.float32)


@pytest.mark.parametrize("case", ["llama", "gemma", "gpt2", "falcon", "gemma3_text", "olmo2"])
def test_slicing_to_the_rank_of_the_stream_keeps_logits_in_bf16(case):
    model, wanted = low_rank(case, False, torch.bfloat16)
    sliced = rotate_and_slice(model, windows(), [RANK, HIDDEN, RANK])
    assert {p.dtype for p in sliced.parameters()} == {torch.bfloat16}
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case, torch.bfloat16)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_sliced_experts_run_as_those_of_the_dense_model_do(experts):
    model = random_model("mixtral", dtype=torch.float32)
    live_in(model, subspace(RANK, centred=False))
    model.set_experts_implementation(experts)
    sliced = rotate_and_slice(model, windows(), [RANK, 32, 24])
    assert sliced.config._experts_implementation == experts
    assert relative_error(logits(sliced, windows()), logits(model, windows())) < tolerance("mixtral", torch.float32)


@with_rotations(*LAYER_NORM_CASES)
@ties
def test_layer_norm_families_lose_nothing_at_width_d_minus_1(case, rotations, tied):
    model, wanted = full_rank(case, tied)
    sliced = rotate_and_slice(model, windows(), [HIDDEN - 1] * LAYERS, rotations=rotations)
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case)


@pytest.mark.parametrize("case", LAYER_NORM_CASES)
def test_layer_norm_families_lose_nothing_around_a_layer_of_full_width(case):
    model, wanted = full_rank(case)
    sliced = rotate_and_slice(model, windows(), [HIDDEN - 1, HIDDEN, HIDDEN - 1])
    assert relative_error(logits(sliced, windows()), wanted) < tolerance(case)


@pytest.mark.parametrize("case", LAYER_NORM_CASES)
def test_layer_norm_families_lose_something_without_the_centring(case, monkeypatch):
    plain = Covariance.__init__
    monkeypatch.setattr(Covariance, "__init__", lambda self, size, device, centred=False: plain(self, size, device))
    monkeypatch.setattr(pca, "_centre", lambda matrix: matrix)
    model, wanted = full_rank(case)
    sliced = rotate_and_slice(model, windows(), [HIDDEN - 1] * LAYERS)
    assert relative_error(logits(sliced, windows()), wanted) > 1e-3


@pytest.mark.parametrize("case", RMS_NORM_CASES)
def test_rms_norm_families_lose_something_at_width_d_minus_1(case):
    model, wanted = full_rank(case)
    sliced = rotate_and_slice(model, windows(), [HIDDEN - 1] * LAYERS)
    assert relative_error(logits(sliced, windows()), wanted) > 1e-3


@every_case
@ties
def test_full_widths_change_nothing(case, tied):
    model, wanted = full_rank(case, tied)
    sliced = rotate_and_slice(model, windows(), [HIDDEN] * LAYERS)
    found = logits(sliced, windows())
    assert torch.equal(found, wanted) if case not in OTHER_ORDER else relative_error(found, wanted) < 1e-12
    assert [name for name, _ in sliced.named_modules()] == [name for name, _ in model.named_modules()]
    storage = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in sliced.named_parameters()} == storage
    assert count_parameters(sliced) == count_parameters(model)


@every_case
def test_a_random_sliced_model_has_the_shapes_and_dtypes_of_the_sliced_one_and_runs(case):
    model = random_model(case, dtype=torch.float32)
    state = torch.get_rng_state()
    found = random_sliced(model, NARROW, rotations=1)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = rotate_and_slice(model, windows(), NARROW, rotations=1)
    shapes = [{name: (one.shape, one.dtype) for name, one in each.named_parameters()} for each in (found, wanted)]
    assert shapes[0] == shapes[1]
    assert logits(found, windows(2)).isfinite().all()


def test_a_random_sliced_model_has_the_inner_widths_too():
    inner = [INNER, 24, 40]
    model = random_sliced(random_model("llama"), [HIDDEN] * 3, inner_widths=inner)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == inner


@pytest.mark.parametrize("case", sorted(PARALLEL))
def test_a_parallel_block_has_one_basis_whatever_the_rotations(case):
    one = rotate_and_slice(full_rank(case)[0], windows(), NARROW, rotations=1)
    assert torch.equal(logits(one, windows()), logits(narrow(case), windows()))
    assert count_parameters(one) == count_parameters(narrow(case))


# ---- below the rank: widths, counts, bases


@with_rotations(*CASES)
@ties
def test_slicing_below_the_rank_gives_finite_other_logits(case, rotations, tied):
    found = logits(narrow(case, tied, rotations), windows())
    assert found.shape == (*windows().shape, VOCAB)
    assert torch.isfinite(found).all()
    assert relative_error(found, full_rank(case, tied)[1]) > 0.01


@with_rotations(*CASES)
def test_every_matrix_has_the_width_of_the_stream_that_it_reads_or_writes(case, rotations):
    sliced = narrow(case, rotations=rotations)
    assert sliced.config.widths == NARROW
    assert sliced.config.rotations == rotations
    for layer, width, following in narrow_layers(sliced):
        for path, writes, wanted in matrices_of(case, layer, width, following):
            owner, name = matrix(layer, path)
            shape = getattr(owner, name).shape
            assert shape[output_axis(owner) if writes else input_axis(owner)] == wanted, path
            if writes and getattr(owner, "bias", None) is not None:
                assert owner.bias.shape == (wanted,)
        assert layer.mlp_shortcut is not None
        assert layer.mlp_shortcut.weight.shape == (following, width)
        assert (layer.attn_shortcut is None) == (case in PARALLEL or rotations == 1)
        assert layer.attn_shortcut is None or layer.attn_shortcut.weight.shape == (width, width)


@with_rotations(*CASES)
@ties
def test_parameters_of_a_sliced_model_are_those_of_the_formula(case, rotations, tied):
    model, sliced, family = full_rank(case, tied)[0], narrow(case, tied, rotations), family_of(case)
    change = 0
    if tied or family.whole_tables:
        change += NARROW[0] * HIDDEN  # the projection behind the table
    else:
        change += sum(part(model, path).num_embeddings for path in family.tables) * (NARROW[0] - HIDDEN)
    for dense, (layer, width, following) in zip(part(model, family.layers), narrow_layers(sliced), strict=True):
        for path, writes, new in matrices_of(case, layer, width, following):
            owner, name = matrix(dense, path)
            other_side = getattr(owner, name).numel() // HIDDEN  # of all experts together
            change += other_side * (new - HIDDEN)
            if writes and getattr(owner, "bias", None) is not None:
                change += new - HIDDEN
            if path in sliced.config.gained_biases:
                change += other_side
        for path in layer.block.norms():
            change += width - sum(parameter.numel() for parameter in part(dense, path).parameters())
        if layer.block.output_norms():
            change += width - HIDDEN + following - HIDDEN
            change += width * width if rotations == 1 else 0  # T has as many rows as columns here
        change += width * following  # mlp shortcut
        change += width * width if rotations == 2 and case not in PARALLEL else 0  # attention shortcut
    assert count_parameters(sliced) == count_parameters(model) + change
    assert sliced_parameters(model, NARROW, rotations) == count_parameters(sliced)


@one_or_two
def test_parameters_of_a_sliced_llama_are_those_counted_by_hand(rotations):
    keys = HIDDEN // 2  # two of four heads
    for tied in (False, True):
        wanted = VOCAB * HIDDEN + HIDDEN + (HIDDEN if tied else VOCAB) * 16  # head, final norm, projection or table
        for width, following in ((16, 21), (21, 12), (12, HIDDEN)):
            wanted += (HIDDEN + 2 * keys) * (width + 1)  # q, k, v with their biases
            wanted += width * (HIDDEN + 1)  # o
            wanted += 2 * INNER * (width + 1)  # gate, up
            wanted += following * (INNER + 1)  # down
            wanted += 2 * width  # norms
            wanted += width * following  # mlp shortcut
            wanted += width * width if rotations == 2 else 0  # attention shortcut
        assert count_parameters(narrow("llama", tied, rotations)) == wanted


@one_or_two
def test_parameters_of_a_sliced_mixtral_are_those_counted_by_hand(rotations):
    keys, experts = HIDDEN // 2, 4
    wanted = VOCAB * HIDDEN + HIDDEN + VOCAB * 16  # head, final norm, table
    for width, following, wider in ((16, 21, 24), (21, 12, 24), (12, HIDDEN, HIDDEN)):  # experts in steps of 8
        wanted += (2 * HIDDEN + 2 * keys) * width  # q, k, v, o
        wanted += experts * wider  # router
        wanted += experts * 3 * INNER * wider
        wanted += 2 * width  # norms
        wanted += width * following + (width * width if rotations == 2 else 0)  # shortcuts
    assert count_parameters(narrow("mixtral", rotations=rotations)) == wanted


@every_case
def test_a_tied_table_stays_whole_and_tied_and_is_counted_once(case):
    model, sliced = full_rank(case, True)[0], narrow(case, True)
    head, table = sliced.get_output_embeddings().weight, sliced.get_input_embeddings().weight
    assert head is table
    assert table.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert count_parameters(sliced) == sum({p.data_ptr(): p.numel() for p in sliced.parameters()}.values())
    assert sliced.config.tie_word_embeddings


@every_case
def test_an_untied_table_has_the_first_width_unless_the_body_needs_its_own(case):
    sliced = narrow(case)
    whole = CASES[case][0] in ("gpt2", "gptj")
    for path in family_of(case).tables:
        assert part(sliced, path).weight.shape[1] == (HIDDEN if whole else NARROW[0])
    assert (sliced_layers(sliced)[0].embedding_projection is not None) == whole
    assert not sliced.config.tie_word_embeddings


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon", "mixtral"])
def test_a_shortcut_stands_only_where_a_basis_changes(case):
    layers = sliced_layers(rotate_and_slice(full_rank(case)[0], windows(2), [HIDDEN, HIDDEN, 16]))
    assert [layer.mlp_shortcut is not None for layer in layers] == [False, True, True]
    assert [layer.attn_shortcut is not None for layer in layers] == [False, False, case not in PARALLEL]


@pytest.mark.parametrize("case", [case for case in CASES if not output_norms(case)])  # estimated in what is sliced
def test_each_layer_reads_the_principal_components_of_its_own_sliced_stream(case):
    sliced = narrow(case)
    streams: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(sliced_layers(sliced)):
        for path in layer.block.norms():

            def hook(_: nn.Module, args: Any, key: tuple[int, str] = (index, path)) -> None:
                streams[key] = args[0].flatten(0, 1)

            handles.append(part(layer, path).register_forward_pre_hook(hook))
    logits(sliced, windows())
    for handle in handles:
        handle.remove()
    assert len(streams) == len(handles)
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
    read = [layer.ln_1, layer.ln_2] if case == "gpt2" else [layer.input_layernorm, layer.post_attention_layernorm]
    handles = [norm.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1))) for norm in read]
    logits(model, windows())
    for handle in handles:
        handle.remove()
    if layer_norm(case):
        states = [found - found.mean(1, keepdim=True) for found in states]
    before, middle = (found.T @ found / found.square().sum() for found in states)
    basis = torch.linalg.eigh(before + 3 * middle).eigenvectors[:, -NARROW[0] :]
    projection = sliced_layers(narrow(case, True, 1))[0].embedding_projection
    assert projection is not None
    assert relative_error(projection.weight.T @ projection.weight, basis @ basis.T) < tolerance(case)


# ---- norms and biases


@every_case
def test_a_sliced_norm_has_weight_exactly_1_and_eps_times_d_over_width(case):
    check_norms(case, full_rank(case)[0], narrow(case))


@pytest.mark.parametrize("case", ["llama", "gemma", "gpt2", "olmo"])
def test_a_sliced_norm_has_weight_exactly_1_in_bf16_too(case):
    model = random_model(case, dtype=torch.bfloat16)
    check_norms(case, model, rotate_and_slice(model, windows(2), NARROW))


def check_norms(case: str, model: PreTrainedModel, sliced: SlicedForCausalLM) -> None:
    family = family_of(case)
    for dense, (layer, width, _) in zip(part(model, family.layers), narrow_layers(sliced), strict=True):
        for path in layer.block.norms():
            norm = part(layer, path)
            applied = torch.zeros if family.norm_offset else torch.ones  # Gemma adds 1
            assert torch.equal(norm.weight, applied(width, dtype=model.dtype))
            assert getattr(norm, "bias", None) is None
            assert type(norm) is (nn.RMSNorm if family.layer_norm else type(part(dense, path)))
            assert math.isclose(eps_of(norm), eps_of(part(dense, path)) * HIDDEN / width, rel_tol=1e-12)


def eps_of(norm: nn.Module) -> float:
    """The number that a norm adds to the mean square, whatever the family calls it; Olmo's is a constant."""
    found: float = getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5))
    return found


@pytest.mark.parametrize("case", [*LAYER_NORM_CASES, "gemma3_text", "olmo2"])
def test_a_layer_of_full_width_keeps_its_norms(case):
    model, _ = full_rank(case)
    layer = sliced_layers(rotate_and_slice(model, windows(2), [RANK, HIDDEN, RANK]))[1]
    dense = part(model, family_of(case).layers)[1]
    kept = layer.block.norms() | layer.block.output_norms() - {layer.block.mlp_output_norm}
    for path in kept:
        assert type(part(layer, path)) is type(part(dense, path))
        for name, parameter in part(dense, path).named_parameters():
            assert part(layer, f"{path}.{name}").data_ptr() == parameter.data_ptr()


@every_case
def test_only_readers_of_a_norm_with_a_bias_gain_one(case):
    falcon = ["self_attention.query_key_value", "mlp.dense_h_to_4h"]
    wanted = {
        "falcon": falcon,
        "falcon-two-norms": falcon,
        "falcon-one-norm": falcon,
        "gptj": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        "stablelm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
        "stablelm-parallel": ["mlp.gate_proj", "mlp.up_proj"],
    }
    assert narrow(case).config.gained_biases == wanted.get(case, [])


# ---- the dense model is left as it was


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that slicing could disturb, but the values of its tensors."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: (id(module), module.training) for name, module in modules.items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "numbers": {n: {k: v for k, v in vars(m).items() if isinstance(v, int | float)} for n, m in modules.items()},
        "parameters": {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        "config": (id(model.config), model.config.to_dict(), model.config._attn_implementation),
        "generation": model.generation_config.to_dict(),
    }


@every_case
@ties
def test_the_dense_model_is_left_as_it_was(case, tied):
    model = random_model(case, tied=tied)
    model.train()
    layers = part(model, family_of(case).layers)
    layers[1].eval()
    layers[0].requires_grad_(False)
    before, state = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    if tied:
        sliced = rotate_and_slice(model, windows(2), [16, HIDDEN, 24])
    else:
        sliced = slice_with_bases(model, dense_bases(model, windows(2), rotations=1), [16, HIDDEN, 24])
    assert not any(module.training for module in sliced.modules())
    assert snapshot(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---- one calibration for every width


@with_rotations(*CASES)
def test_bases_of_the_dense_model_slice_to_the_rank_of_its_stream_without_loss(case, rotations):
    model, wanted = low_rank(case, True, torch.float64)
    bases = dense_bases(model, windows(), rotations=rotations)
    assert {basis.dtype for basis in bases.inputs} == {torch.float32}
    assert [tuple(basis.shape) for basis in bases.inputs] == [(HIDDEN, HIDDEN)] * LAYERS
    sliced = slice_with_bases(model, bases, [RANK, HIDDEN, 28])
    assert sliced.config.rotations == rotations
    assert relative_error(logits(sliced, windows()), wanted) < TOLERANCE["fp32 bases"]


@pytest.mark.parametrize("case", ["llama", "falcon"])
@one_or_two
def test_bases_held_in_files_are_those_held_in_memory(case, rotations, tmp_path, monkeypatch):
    model, _ = full_rank(case)
    wanted = dense_bases(model, windows(2), rotations=rotations)
    mapped: list[Path] = []
    from_file = torch.from_file

    def noted(file, **how):
        mapped.append(Path(file))
        return from_file(file, **how)

    monkeypatch.setattr(torch, "from_file", noted)
    found = dense_bases(model, windows(2), rotations=rotations, folder=tmp_path)
    for kept, basis in zip((*found.inputs, *found.middles), (*wanted.inputs, *wanted.middles), strict=True):
        assert torch.equal(kept, basis)
    count = 2 * LAYERS if rotations == 2 and case not in PARALLEL else LAYERS
    assert [file.parent for file in mapped] == [tmp_path] * count
    assert list(tmp_path.iterdir()) == []  # a killed run leaves nothing behind


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon", "mixtral"])
@one_or_two
def test_both_calibrations_have_the_same_first_basis(case, rotations):
    model, _ = full_rank(case, True)
    once = slice_with_bases(model, dense_bases(model, windows(), rotations=rotations), NARROW)
    planes = []
    for sliced in (once, narrow(case, True, rotations)):
        projection = sliced_layers(sliced)[0].embedding_projection
        assert projection is not None
        planes.append(projection.weight.T @ projection.weight)
    assert relative_error(planes[0], planes[1]) < TOLERANCE["fp32 bases"]


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon", "mixtral"])
def test_both_calibrations_agree_bit_for_bit_where_nothing_is_sliced(case):
    model, _ = full_rank(case)
    every_point = rotate_and_slice(model, windows(2), [HIDDEN] * LAYERS)
    once = slice_with_bases(model, dense_bases(model, windows(2)), [HIDDEN] * LAYERS)
    assert torch.equal(logits(once, windows()), logits(every_point, windows()))


# ---- batches


@every_case
def test_the_batch_size_of_the_calibration_does_not_matter(case):
    assert len(windows()) % 4 > 0  # the last batch is smaller
    sliced = rotate_and_slice(full_rank(case)[0], windows(), NARROW, batch_size=4)
    assert relative_error(logits(sliced, windows()), logits(narrow(case), windows())) < TOLERANCE["batches"]


@pytest.mark.parametrize("case", ["llama", "mistral", "falcon-sequential", "gptj", "mixtral"])
def test_a_calibration_one_window_at_a_time_is_the_same(case):
    sliced = rotate_and_slice(full_rank(case)[0], windows(), NARROW, batch_size=1)
    assert relative_error(logits(sliced, windows()), logits(narrow(case), windows())) < TOLERANCE["batches"]


@pytest.mark.parametrize("case", ["llama", "falcon-sequential", "gptj"])
def test_the_batch_size_of_the_one_calibration_does_not_matter(case):
    model, ids = full_rank(case)[0], windows(5)
    wanted, found = (dense_bases(model, ids, rotations=1, batch_size=size) for size in (5, 3))
    for basis, other in zip(found.inputs, wanted.inputs, strict=True):
        planes = [leading[:, :16] @ leading[:, :16].T for leading in (basis, other)]
        assert relative_error(planes[0], planes[1]) < TOLERANCE["batches"]


@every_case
def test_rows_of_a_batch_are_not_mixed(case):
    alone = torch.cat([logits(narrow(case), row[None]) for row in windows()])
    assert relative_error(logits(narrow(case), windows()), alone) < tolerance(case)


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_calibration_has_no_dropout_whatever_the_mode_of_the_model(case):
    model = random_model(case)
    wanted = [rotate_and_slice(model, windows(2), NARROW), dense_bases(model, windows(2)).inputs[1]]
    model.train()
    found = [rotate_and_slice(model, windows(2), NARROW), dense_bases(model, windows(2)).inputs[1]]
    assert torch.equal(logits(found[0], windows()), logits(wanted[0], windows()))
    assert torch.equal(found[1], wanted[1])


# ---- bad input


@pytest.mark.parametrize("ids", [torch.ones(4, dtype=torch.long), torch.ones(0, 8, dtype=torch.long)])
def test_windows_of_a_wrong_shape_are_an_error(ids):
    with pytest.raises(InputError, match=r"shape \(N, S\)"):
        rotate_and_slice(full_rank("llama")[0], ids, NARROW)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_activations_that_are_not_finite_are_an_error(case):
    model = random_model(case)
    next(part(model, family_of(case).layers)[0].parameters()).data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        rotate_and_slice(model, windows(), NARROW)


def test_a_model_without_a_head_is_an_error():
    model = random_model("llama")
    model.lm_head = None
    with pytest.raises(InputError, match="no head"):
        rotate_and_slice(model, windows(), NARROW)


@pytest.mark.parametrize("widths", [[16, 16], [16, 16, 0], [16, 16, HIDDEN + 1]], ids=str)
def test_widths_that_do_not_fit_are_an_error(widths):
    with pytest.raises(ValueError, match=r"widths must be 3 .* from 1 to 48, got \[16, 16"):
        rotate_and_slice(full_rank("llama")[0], windows(), widths)


# perplexities measured before there were other bases, solved writers and inner widths, with one rotation and with two
PLAIN = {
    "llama": (118.2498052028333, 118.98549273457414),
    "gpt2": (125.72405288596735, 126.40812107506787),
    "phi": (137.66851339943543, 137.66851339943543),
    "mixtral": (150.74236989436753, 151.0056291559348),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_slicing_gives_the_figures_that_it_always_gave(case):
    for rotations, wanted in enumerate(PLAIN[case], start=1):
        sliced = rotate_and_slice(full_rank(case)[0], windows(), NARROW, rotations=rotations)
        assert perplexity(sliced, windows(), progress=False) == pytest.approx(wanted, rel=1e-6)
