"""Tools that people use on a model, tried on a sliced one as on the dense one; those that aren't installed are skipped
(`docs/downstream.md` says which were tried)."""

import importlib
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_examples import example
from tiny_models import HIDDEN, LAYERS, VOCAB, logits, random_model, relative_error, windows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import Parameter
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    QuantoConfig,
    TorchAoConfig,
)

from slicing.layouts import SHORTCUTS
from slicing.likelihood import perplexity
from slicing.modeling import count_parameters
from slicing.report.model_card import UNQUANTISED
from slicing.rotation import rotate_and_slice

WIDTHS = [32, 24, 40]
TRUSTED: dict[str, Any] = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sliced llama as it is saved, with its tokenizer; its code is copied to a cache of this module's own."""
    root: Path = tmp_path_factory.mktemp("downstream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        dense = random_model("llama", tied=True, dtype=torch.float32, mlp_bias=False, attention_bias=False)
        rotate_and_slice(dense, windows(), WIDTHS).save_pretrained(root / "model")
        tokenizer().save_pretrained(root / "model")
        yield root / "model"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w0", eos_token="w1", pad_token="w2")


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **TRUSTED, **options)


def texts(count: int = 24) -> list[str]:
    """Texts of different lengths that a model can learn: a few phrases again and again."""
    return [
        " ".join(f"w{token}" for token in row[: 6 + index % 8])
        for index, row in enumerate(windows(4)[[0, 1] * 12][:count].tolist())
    ]


# ---- tracing


class Step(torch.nn.Module):
    """A causal LM as it is exported: the logits of a prompt, with a cache asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True).logits
        return found


@pytest.mark.parametrize("whole", [True, False], ids=["model", "step"])
def test_torch_export_takes_any_length(folder, whole):
    model = load(folder).eval()
    length = torch.export.Dim("length", min=2, max=64)
    ids = windows(2, 8)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dynamic: dict[str, Any] = {name: {1: length} for name in kwargs}
    if whole:
        kwargs["use_cache"], dynamic["use_cache"] = False, None
    program = torch.export.export(model if whole else Step(model), (), kwargs, dynamic_shapes=dynamic).module()
    ids = windows(2, 13, seed=9)
    found = program(**(kwargs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    assert relative_error(found.logits if whole else found, logits(model, ids)) < 1e-6


def test_the_forward_is_the_familys_own(folder):
    """Tools read its signature and its source, and pass what it names."""
    model = load(folder)
    dense = type(random_model("llama", dtype=torch.float32))
    assert type(model).forward is dense.forward
    assert isinstance(model, dense)
    assert model.base_model is model.model is not model
    assert model.base_model(input_ids=windows(2)).last_hidden_state.shape == (2, 16, 48)


# ---- training


def sft(folder: Path, out: Path, **settings: Any) -> tuple[Any, list[float]]:
    """A trainer that ran 8 steps, and the losses."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    peft_config = settings.pop("peft_config", None)
    options = {"learning_rate": 1e-2, "max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1}
    options |= {
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "max_length": 16,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = trl.SFTTrainer(
        model=load(folder),
        args=trl.SFTConfig(output_dir=str(out), **(options | settings)),
        train_dataset=datasets.Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["full", "lora", "packing"])
def test_trl_fine_tunes_a_sliced_model(folder, tmp_path, kind):
    import peft

    settings: dict[str, Any] = {"packing": True} if kind == "packing" else {}
    if kind == "lora":
        settings["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer, losses = sft(folder, tmp_path, **settings)
    assert losses[-1] < 0.9 * losses[0]
    trained = trainer.model.merge_and_unload() if kind == "lora" else trainer.model
    trained.save_pretrained(tmp_path / "trained")
    again = load(tmp_path / "trained")
    assert torch.equal(logits(again, windows()), logits(trained.eval(), windows()))


def test_trl_prefers_by_dpo(folder, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = {"prompt": texts(8), "chosen": [" w5 w6"] * 8, "rejected": [" w7 w8"] * 8}
    trainer = trl.DPOTrainer(
        model=load(folder),
        ref_model=load(folder),
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=tokenizer(),
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0]


# ---- quantisation


def four_bits(tool: str, keep: list[str]) -> Any:
    """What `from_pretrained` takes to quantise with a tool that runs on a CPU."""
    pytest.importorskip(tool)
    if tool == "bitsandbytes":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=keep)
    if tool == "torchao":
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)), modules_to_not_convert=keep)
    return QuantoConfig(weights="int4", modules_to_not_convert=keep)


@pytest.mark.parametrize("tool", ["bitsandbytes", "torchao", "optimum.quanto"])
def test_four_bits_leave_alone_what_the_model_card_says(tmp_path, tool, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "attention_bias": False, "mlp_bias": False}
    dense = random_model("llama", tied=True, dtype=torch.float32, **sizes)
    sliced = rotate_and_slice(dense, windows(), [64, 64, 128])
    sliced.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", quantization_config=four_bits(tool, UNQUANTISED), device_map="cpu")
    plain = {name for name, module in model.named_modules() if type(getattr(module, "weight", None)) is Parameter}
    shortcuts = {name for name, _ in model.named_modules() if name.endswith(SHORTCUTS)}
    assert len(shortcuts) == 5
    assert shortcuts | {"lm_head"} <= plain
    assert plain.isdisjoint(name for name, _ in model.named_modules() if name.endswith("_proj") and "embed" not in name)
    assert relative_error(logits(model, windows(2)), logits(sliced, windows(2))) < 0.2
    assert perplexity(model, windows(2), progress=False) == pytest.approx(perplexity(sliced, windows(2)), rel=0.5)


class Packed(torch.Tensor):
    """A quantiser's own kind of tensor, which knows few operations."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "aminmax" in str(function):
            raise NotImplementedError(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_in_a_quantisers_own_tensors_are_not_searched_for_nan(folder):
    model = load(folder)
    wanted = perplexity(model, windows(2), progress=False)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)
    assert perplexity(model, windows(2), progress=False) == wanted


def test_llm_compressor_runs_gptq_with_its_default_pipeline(folder, tmp_path):
    llmcompressor, datasets = pytest.importorskip("llmcompressor"), pytest.importorskip("datasets")
    from llmcompressor.modifiers.quantization import GPTQModifier

    model = load(folder)
    rows = {"input_ids": windows(8).tolist(), "attention_mask": torch.ones(8, 16, dtype=torch.int64).tolist()}
    llmcompressor.oneshot(
        model=model,
        processor=tokenizer(),
        dataset=datasets.Dataset.from_dict(rows),
        trust_remote_code_model=True,
        recipe=GPTQModifier(
            config_groups={"all": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
            ignore=[f"re:{name}" for name in UNQUANTISED],
        ),
        num_calibration_samples=8,
        max_seq_length=16,
        output_dir=str(tmp_path / "quantised"),
    )
    layer = model.model.layers[0]
    assert hasattr(layer.mlp.up_proj, "quantization_scheme")
    assert not hasattr(layer.mlp_shortcut, "quantization_scheme")
    assert relative_error(logits(model, windows(2)), logits(load(folder), windows(2))) < 0.2


# ---- llama.cpp


def inner_folder(case: str, inner: list[int], folder: Path, **settings: Any) -> PreTrainedModel:
    """A model of which only MLPs are cut, as it is saved."""
    dense = random_model(case, tied=True, dtype=torch.float32, **settings)
    model = rotate_and_slice(dense, windows(60), [HIDDEN] * LAYERS, inner_widths=inner)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model.eval()


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GGUF_CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "equal": ("llama", [48, 48, 48], {}),
    "by-layer": ("llama", [32, 48, 64], {}),
    "scaled": ("llama", [32, 48, 64], {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "window": ("mistral", [32, 48, 64], {}),
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_inner_widths_by_layer_are_written_for_llama_cpp(name, tmp_path, capsys):
    case, inner, settings = GGUF_CASES[name]
    model = inner_folder(case, inner, tmp_path / "model", **settings)
    file = tmp_path / "model.gguf"
    assert example("to_gguf").main([str(tmp_path / "model"), str(file), "--dtype", "f32"]) == 0
    assert f"inner width {'48' if name == 'equal' else '32 to 64'}" in capsys.readouterr().out
    reader = gguf.GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    assert arch == ("llama" if name == "equal" else "deci")
    assert reader.fields[f"{arch}.feed_forward_length"].contents() == (48 if name == "equal" else inner)
    assert reader.fields[f"{arch}.context_length"].contents() == (8 if name == "window" else 64)
    assert [tensor.shape.tolist() for tensor in reader.tensors if "ffn_down.weight" in tensor.name] == [
        [width, HIDDEN] for width in inner
    ]
    held = sum(tensor.n_elements for tensor in reader.tensors if tensor.name != "rope_freqs.weight")
    assert held == count_parameters(model)


@pytest.mark.parametrize("name", GGUF_CASES)
def test_llama_cpp_gives_the_same_logits(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    llama_cpp = importlib.import_module("llama_cpp")
    try:
        llama_cpp.binding()
    except (ImportError, OSError):
        pytest.skip("no binding of llama.cpp that loads")
    case, inner, settings = GGUF_CASES[name]
    model = inner_folder(case, inner, tmp_path / "model", **settings)
    assert example("to_gguf").main([str(tmp_path / "model"), str(tmp_path / "model.gguf"), "--dtype", "f32"]) == 0
    found = llama_cpp.compare(model, str(tmp_path / "model.gguf"), windows(4)[:, :8])
    assert found["difference"] < 1e-5 * found["largest"]
    assert found["llama.cpp"] == pytest.approx(found["Transformers"], rel=1e-4)


def test_a_tokenizer_is_taken_over_from_the_parents_file(tmp_path):
    inner_folder("llama", [32, 48, 64], tmp_path / "model")
    writer = gguf.GGUFWriter(tmp_path / "parent.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{index}" for index in range(VOCAB)])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    given = [str(tmp_path / "model"), str(tmp_path / "a.gguf"), "--tokenizer", str(tmp_path / "parent.gguf")]
    assert example("to_gguf").main(given) == 0
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"w{VOCAB - 1}"


def test_what_llama_cpp_has_no_place_for_is_one_line(folder, tmp_path, capsys):
    parts = ("3 of 3 layers", "is a qwen2", ".gguf", "can't be read")
    inner_folder("qwen2", [32, 48, 64], tmp_path / "qwen2")
    to_gguf, out = example("to_gguf"), str(tmp_path / "a.gguf")
    (tmp_path / "no.gguf").write_text("no")
    assert to_gguf.main([str(folder), out]) == 2
    assert to_gguf.main([str(tmp_path / "qwen2"), out]) == 2
    assert to_gguf.main([str(folder), str(tmp_path / "a.bin")]) == 2
    assert to_gguf.main([str(folder), out, "--tokenizer", str(tmp_path / "no.gguf")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert [part in line for part, line in zip(parts, said, strict=True)] == [True] * 4
    assert not Path(out).exists()
