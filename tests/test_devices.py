"""Where models are kept: what fits on a GPU, by arithmetic, and that all is put back."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from tiny_models import random_model, windows

from slicing import perplexity, rotate_and_slice
from slicing.bases import dense_bases
from slicing.devices import free_bytes, free_memory, model_bytes, must_offload, on_devices
from slicing.rotation import slice_with_bases

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GB = 2**30
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def memory(monkeypatch):
    """A GPU of 80 GB with `free` bytes, of which a process may take a part."""
    state = {"free": 80 * GB, "fraction": 1.0, "allocated": 0, "cached": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state["free"], 80 * GB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: state["fraction"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["allocated"] + state["cached"])
    return state


def test_the_bytes_of_a_model_are_those_of_its_tensors_a_tied_table_once():
    untied, tied = (random_model("llama", tied=tied, dtype=torch.bfloat16) for tied in (False, True))
    numbers = sum(parameter.numel() for parameter in untied.parameters())
    assert model_bytes(untied) == 2 * numbers + sum(4 * buffer.numel() for buffer in untied.buffers())
    assert model_bytes(untied) - model_bytes(tied) == 2 * 96 * 48


def test_free_memory_is_what_the_card_has_and_the_process_may_take(memory):
    assert free_bytes(GPU) == 80 * GB
    memory["fraction"] = 0.25
    assert free_bytes(GPU) == 20 * GB
    memory["allocated"] = 5 * GB
    assert free_bytes(GPU) == 15 * GB
    memory["free"] = 3 * GB
    assert free_bytes(GPU) == 3 * GB
    memory["cached"] = 4 * GB
    assert free_bytes(GPU) == 7 * GB


def control_group(folder: Path, *, limit: object, usage: int, cache: int, version: int) -> None:
    """Write the files of a control group."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names[:2], "memory.stat"), (limit, usage, f"anon 5\n{names[2]} {cache}"), strict=True):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("version", "line", "base"), [(2, "0::/job/step", ""), (1, "4:cpu,memory:/job/step", "memory")]
)
def test_free_memory_knows_the_limits_of_containers_and_batch_jobs(tmp_path, monkeypatch, version, line, base):
    available = SimpleNamespace(available=100 * GB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: available)
    groups, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    assert free_memory(groups, mounted) == 100 * GB
    groups.write_text(f"7:pids:/other\n{line}\n")
    assert free_memory(groups, mounted) == 100 * GB
    control_group(mounted / base / "job", limit=8 * GB, usage=5 * GB, cache=GB, version=version)
    assert free_memory(groups, mounted) == 4 * GB
    control_group(mounted / base / "job/step", limit="max", usage=5 * GB, cache=GB, version=version)
    assert free_memory(groups, mounted) == 4 * GB
    control_group(mounted / base / "job/step", limit=6 * GB, usage=5 * GB, cache=0, version=version)
    assert free_memory(groups, mounted) == GB
    available.available = GB // 2
    assert free_memory(groups, mounted) == GB // 2


def test_in_a_container_the_limit_is_where_its_control_groups_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    (tmp_path / "cgroup").write_text("0::/../not/there\n")
    control_group(tmp_path / "mounted", limit=2 * GB, usage=3 * GB, cache=0, version=2)
    assert free_memory(tmp_path / "cgroup", tmp_path / "mounted") == 0


def test_a_model_stays_on_the_cpu_where_two_of_it_and_the_activations_and_6_gb_do_not_fit(memory):
    model = random_model("llama", dtype=torch.float32)
    tokens = 1_000_000
    needed = 2 * model_bytes(model) + tokens * 48 * 4 + 6 * GB
    memory["free"] = needed
    assert not must_offload(model, GPU, tokens)
    memory["free"] = needed - 1
    assert must_offload(model, GPU, tokens)


def test_a_model_that_is_only_evaluated_needs_room_for_one(memory):
    model = random_model("llama", dtype=torch.float32)
    memory["free"] = model_bytes(model) + 6 * GB
    assert not must_offload(model, GPU, 0)
    assert must_offload(model, GPU, 1)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_only_gpus_with_memory_of_their_own_offload(device):
    assert not must_offload(random_model("llama"), torch.device(device), 10**15)


def test_on_the_cpu_a_model_is_given_as_it_is():
    model = random_model("llama")
    with on_devices(model, CPU) as placed:
        assert placed is model
    assert all(parameter.device == CPU for parameter in model.parameters())


def test_a_model_goes_to_another_device_and_comes_back_even_after_an_error():
    model = random_model("llama", dtype=torch.float32)
    moves = []
    model.to = lambda place: moves.append(torch.device(place)) or model

    def fail() -> None:
        with on_devices(model, torch.device("mps")) as placed:
            assert placed is model
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert moves == [torch.device("mps"), CPU]


@pytest.fixture
def cramped(monkeypatch, tmp_path):
    """No room for the second layer and the tables: as a GPU borrows them from the CPU, here the CPU does from disk."""

    def layout(model, memory, no_split_module_classes):
        assert memory == {"cpu": 2 * model_bytes(model)}
        assert no_split_module_classes
        parts = [f"model.layers.{i}" for i in range(3)] + ["model.norm", "model.rotary_emb"]
        lent = ["model.embed_tokens", "model.layers.1", "lm_head"]
        return dict.fromkeys(parts, "cpu") | dict.fromkeys(lent, "disk")

    dispatch = accelerate.dispatch_model

    def dispatch_to_disk(model, layout):
        return dispatch(model, layout, offload_dir=tempfile.mkdtemp(dir=tmp_path))

    monkeypatch.setattr("accelerate.dispatch_model", dispatch_to_disk)
    monkeypatch.setattr("accelerate.infer_auto_device_map", layout)
    monkeypatch.setattr("slicing.devices.free_bytes", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_is_spread_to_be_evaluated_is_put_back_as_it_was(tied, cramped):
    model = random_model("llama", tied=tied, dtype=torch.float32)
    ids = windows()
    sliced = rotate_and_slice(model, ids, [40, 24, 32])
    for place in (sliced, model, sliced):
        wanted = perplexity(place, ids, progress=False)
        with on_devices(place, GPU) as placed:
            assert any(parameter.device.type == "meta" for parameter in placed.parameters())
            assert perplexity(placed, ids, progress=False) == wanted
        assert all(parameter.device == CPU for parameter in place.parameters())
        assert (place.get_output_embeddings().weight is place.get_input_embeddings().weight) == tied
        assert perplexity(place, ids, progress=False) == wanted


@pytest.mark.parametrize("rotations", [1, 2])
def test_a_model_that_was_spread_is_sliced_as_if_it_had_not_been(rotations, cramped, monkeypatch):
    model = random_model("llama", dtype=torch.float32)
    ids, widths = windows(), [40, 24, 32]
    wanted = perplexity(rotate_and_slice(model, ids, widths, rotations=rotations), ids, progress=False)
    attributes = [set(vars(module)) for module in model.modules()]
    with on_devices(model, GPU) as placed:
        perplexity(placed, ids, progress=False)
    assert [set(vars(module)) for module in model.modules()] == attributes
    monkeypatch.setattr("slicing.check._passed", set())  # its layers are checked again
    assert perplexity(rotate_and_slice(model, ids, widths, rotations=rotations), ids, progress=False) == wanted
    bases = dense_bases(model, ids, rotations=rotations)
    assert slice_with_bases(model, bases, widths).config.widths == widths


@needs_gpu
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_the_cpu_is_sliced_on_the_gpu_and_stays_where_it_is(tied):
    model = random_model("llama", tied=tied, dtype=torch.float32)
    ids = windows()
    sliced = rotate_and_slice(model, ids, [40, 24, 32], device=GPU)
    assert {parameter.device for parameter in [*model.parameters(), *sliced.parameters()]} == {CPU}
    expected = perplexity(rotate_and_slice(model, ids, [40, 24, 32]), ids, progress=False)
    with on_devices(sliced, GPU) as placed:
        assert {parameter.device for parameter in placed.parameters()} == {GPU}
        assert perplexity(placed, ids, progress=False) == pytest.approx(expected, rel=1e-4)
    assert {parameter.device for parameter in sliced.parameters()} == {CPU}


@needs_gpu
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_does_not_fit_is_evaluated_on_gpu_and_cpu_and_put_back(tied, monkeypatch):
    model = random_model("llama", tied=tied, dtype=torch.float32)
    ids = windows()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("slicing.devices.free_bytes", lambda device: model_bytes(model))  # 80 % of it are used
    for place in (model, rotate_and_slice(model, ids, [40, 24, 32])):
        wanted = perplexity(place, ids, progress=False)
        with on_devices(place, GPU) as placed:
            assert {parameter.device.type for parameter in placed.parameters()} == {"cuda", "meta"}
            assert perplexity(placed, ids, progress=False) == pytest.approx(wanted, rel=1e-4)
        assert {parameter.device for parameter in place.parameters()} == {CPU}
        assert (place.get_output_embeddings().weight is place.get_input_embeddings().weight) == tied
        assert perplexity(place, ids, progress=False) == wanted
