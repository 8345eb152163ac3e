"""A sliced model is a Hugging Face model: saved, loaded, run, trained and copied as any other, for every family."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import (
    CASES,
    HIDDEN,
    LAYERS,
    VOCAB,
    family_of,
    logits,
    random_model,
    relative_error,
    tolerance,
    windows,
)
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from slicing.families import InputError
from slicing.loading import load_model
from slicing.modeling import SlicedConfig, SlicedForCausalLM, count_parameters
from slicing.parts import part
from slicing.rotation import rotate_and_slice

WIDTHS = [32, 24, 40]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
every_case = pytest.mark.parametrize("case", CASES)
# of each kind: tied and projected, whole tables, bodies that take tuples, parallel, experts
CODE = ("modeling.py", "families.py", "layouts.py", "narrow.py", "parts.py")
KINDS = ["llama", "gpt2", "falcon", "gptj", "phi", "qwen2_moe"]
each_kind = pytest.mark.parametrize("case", KINDS)


def tied(case: str) -> bool:
    """Half of the cases are tied."""
    return list(CASES).index(case) % 2 == 0


def rotations(case: str) -> int:
    """Half of the tied and half of the untied cases have one rotation."""
    return 1 + list(CASES).index(case) // 2 % 2


def new_sliced(
    case: str, *, tie: bool | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> SlicedForCausalLM:
    dense = random_model(case, tied=tied(case) if tie is None else tie, dtype=dtype, **settings)
    model = rotate_and_slice(dense, windows(), WIDTHS, rotations=rotations(case))
    if family_of(case).blocks[0].experts:
        model.set_experts_implementation("grouped_mm")  # what a model is loaded with
    return model


@cache
def kept(case: str) -> SlicedForCausalLM:
    """A sliced model in fp32 that no test changes."""
    return new_sliced(case)


def sliced(case: str) -> SlicedForCausalLM:
    """A copy of it that a test may change."""
    return copy.deepcopy(kept(case))


def cast(model: SlicedForCausalLM, dtype: torch.dtype) -> SlicedForCausalLM:
    """The model with its parameters, not its rotary frequencies, in another dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def projects(case: str) -> bool:
    """Whether the first layer projects the embeddings: those of a tied table, or of one that shapes the output."""
    return tied(case) or family_of(case).whole_tables


def save_tokenizer(folder: Path) -> None:
    vocab = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w0", model_max_length=4321
    ).save_pretrained(folder)


# Saved folders, loaded by a process that can't import this repository


@dataclass
class Elsewhere:
    """What fresh_process.py was given and what it found, by job."""

    folders: dict[str, Path]
    wanted: dict[str, torch.Tensor]
    results: dict[str, dict[str, Any]]
    found: dict[str, torch.Tensor]

    def equal(self, job: str) -> bool:
        """Whether the logits are the saved model's, bit for bit."""
        return self.found[job].dtype == self.wanted[job].dtype and torch.equal(self.found[job], self.wanted[job])


TRUSTED: dict[str, Any] = {"trust_remote_code": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "on-cpu": {"device_map": "cpu"},
    "on-auto": {"device_map": "auto"},
    "low-memory": {"low_cpu_mem_usage": True},
    "attention": {"attn_implementation": "eager"},
    "saved-again": {},
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """Every case saved in both dtypes, tied in one and untied in the other, and loaded in one fresh process."""
    root = tmp_path_factory.mktemp("elsewhere")
    ids = windows(2, 12, seed=5)
    folders: dict[str, Path] = {}
    wanted: dict[str, torch.Tensor] = {}
    jobs: list[dict[str, Any]] = []
    names: list[str] = []

    def add(job: str, folder: Path, model: PreTrainedModel, options: dict[str, Any] = TRUSTED, **more: Any) -> None:
        folders[job], wanted[job] = folder, logits(model, ids)
        names.append(job)
        jobs.append({"folder": str(folder), "ids": ids.tolist(), "options": options, **more})

    for case in CASES:
        for name, dtype in DTYPES.items():
            model = kept(case) if name == "fp32" else new_sliced(case, tie=not tied(case), dtype=dtype)
            folder = root / f"{case}-{name}"
            model.save_pretrained(folder)
            add(f"{case}-{name}", folder, model)

    llama = sliced("llama")
    llama.generation_config.update(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    llama.save_pretrained(root / "llama-greedy")
    add("generate", root / "llama-greedy", llama, generate=True)
    llama.save_pretrained(root / "llama-sharded", max_shard_size="20KB")
    add("sharded", root / "llama-sharded", llama)
    for name, options in OPTIONS.items():
        again = {"again": str(root / "again")} if name == "on-cpu" else {}
        folder = root / ("again" if name == "saved-again" else "llama-fp32")
        add(name, folder, llama, TRUSTED | options, **again)
    add("untrusted", root / "llama-fp32", llama, {"trust_remote_code": False})
    add("as-bf16", root / "llama-fp32", cast(llama, torch.bfloat16), TRUSTED | {"dtype": "bfloat16"})
    gptj = new_sliced("gptj", tie=not tied("gptj"), dtype=torch.bfloat16)
    add("as-fp32", folders["gptj-bf16"], cast(gptj, torch.float32), TRUSTED | {"dtype": "float32"})

    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("fresh_process.py")
    subprocess.run(
        [sys.executable, "-I", str(script), "jobs.json", "results.json"],
        cwd=root,
        env={"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        check=True,
        capture_output=True,
    )
    results = json.loads((root / "results.json").read_text())
    tensors = load_file(root / "logits.safetensors")
    found = {names[int(index)]: tensor for index, tensor in tensors.items()}
    return Elsewhere(folders, wanted, dict(zip(names, results, strict=True)), found)


@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_a_saved_model_gives_the_same_bits_without_this_repository(elsewhere, case, dtype):
    job = f"{case}-{dtype}"
    result = elsewhere.results[job]
    assert elsewhere.equal(job)
    assert result["unfit"] == [0, 0, 0]
    assert result["dtypes"] == [str(DTYPES[dtype])]
    assert result["one_table"] == (tied(case) == (dtype == "fp32"))
    assert result["attention"][0] == kept(case).config._attn_implementation
    assert result["module"].startswith("transformers_modules.")
    assert not result["training"]


@pytest.mark.parametrize("job", ["sharded", "on-cpu", "on-auto", "low-memory", "as-bf16", "as-fp32"])
def test_loading_options_change_no_bit(elsewhere, job):
    assert elsewhere.equal(job)
    assert elsewhere.results[job]["dtypes"] == [str(torch.bfloat16 if job == "as-bf16" else torch.float32)]


def test_a_loaded_model_is_saved_again_with_its_code(elsewhere):
    assert elsewhere.equal("saved-again")
    first, again = elsewhere.folders["llama-fp32"], elsewhere.folders["saved-again"]
    for file in (*CODE, "config.json", "model.safetensors"):
        assert (first / file).read_bytes() == (again / file).read_bytes(), file


def test_the_attention_implementation_reaches_the_layers(elsewhere):
    assert elsewhere.results["attention"]["attention"] == ["eager", "eager"]
    assert relative_error(elsewhere.found["attention"], elsewhere.wanted["attention"]) < tolerance(
        "llama", torch.float32
    )


def test_the_generation_config_is_saved_and_followed(elsewhere):
    ids = windows(2, 12, seed=5)
    tokens = kept("llama").generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, 17)
    assert elsewhere.results["generate"]["tokens"] == tokens.tolist()


def test_code_of_the_folder_runs_only_where_it_is_trusted(elsewhere):
    result = elsewhere.results["untrusted"]
    assert result["error"] == "ValueError"
    assert "trust_remote_code" in result["text"]
    assert result["remote"] == []


@every_case
def test_the_folder_holds_safetensors_and_readable_text_only(elsewhere, case):
    files = {path.name for path in elsewhere.folders[f"{case}-fp32"].iterdir()}
    code = set(CODE)
    assert files == {"config.json", "generation_config.json", "model.safetensors", *code}


def test_large_models_are_saved_in_shards(elsewhere):
    folder = elsewhere.folders["sharded"]
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_size_on_disk_is_parameters_times_bytes(tmp_path, case, tie):
    model = new_sliced(case, tie=tie, vocab_size=4096)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size == pytest.approx(4 * count_parameters(model), rel=0.02)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tables = [name for name in file.keys() if file.get_slice(name).get_shape()[0] == 4096]  # noqa: SIM118
    assert len(tables) == (1 if tie else 2)


# Within this repository


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@each_kind
def test_load_model_needs_no_remote_code(tmp_path, case):
    kept(case).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, tokenizer = load_model(str(tmp_path), device="cpu")
    assert model.any_family is SlicedForCausalLM
    assert len(tokenizer) == VOCAB
    assert torch.equal(logits(model, windows()), logits(kept(case), windows()))


def lose_a_shard(folder: Path) -> None:
    min(folder.glob("model-*.safetensors")).unlink()


def truncate(folder: Path) -> None:
    shard = min(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_shard, "lacks 1 of"),
        (truncate, "can't be read"),
        (lambda folder: change_config(folder, widths=[32, 24]), "widths must be 3 integers from 1 to 48"),
        (lambda folder: change_config(folder, widths=[32, 24, 49]), "widths must be 3 integers from 1 to 48"),
        (lambda folder: change_config(folder, widths=[32, 24, 32]), "another shape than config.json says"),
        (lambda folder: change_config(folder, rotations=2), "tensors missing"),
        (lambda folder: change_config(folder, rotations=3), "rotations must be 1 or 2"),
    ],
    ids=["missing_shard", "truncated", "too_few_widths", "too_wide", "other_widths", "other_rotations", "no_rotations"],
)
def test_a_damaged_folder_is_one_clear_error(folder, damage, message):
    assert rotations("llama") == 1
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, r"widths must be 3 integers from 1 to 48, got \[\]"),
        ({"widths": [32, 24, 0]}, "widths must be"),
        ({"widths": [32, 24, 24.5]}, "widths must be"),
        ({"widths": [32, 24, 40, 48]}, "widths must be"),
        ({"rotations": 0}, "rotations must be 1 or 2, got 0"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    dense = LlamaConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4)
    with pytest.raises(ValueError, match=message):
        SlicedConfig.of(dense, **({"widths": WIDTHS} | changes))


# Generation


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 5, 7 and 9 tokens, padded on the left: ids and mask (3, 9)."""
    ids = windows(3, 9, seed=5)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((4, 2, 0)):
        ids[row, :padding] = mask[row, :padding] = 0
    return ids, mask


def generator(case: str) -> SlicedForCausalLM:
    """A model that doesn't stop early."""
    model = kept(case)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def generate(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    ids, mask = prompts()
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, **({"do_sample": False} | options)
    )
    return tokens


@cache
def by_hand(case: str) -> torch.Tensor:
    """Greedy decoding by full forwards: past the window of 8 tokens that Mistral's case slides over the text."""
    ids, mask = prompts()
    for _ in range(10):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            output = kept(case)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@every_case
def test_greedy_generation_with_a_cache_is_full_forwards(case):
    assert torch.equal(generate(generator(case)), by_hand(case))


@each_kind
def test_greedy_generation_without_a_cache_is_full_forwards(case):
    assert torch.equal(generate(generator(case), use_cache=False), by_hand(case))


# the dense Falcon has no static cache with ALiBi
@pytest.mark.parametrize("case", [case for case in CASES if case != "falcon-sequential"])
def test_a_static_cache_generates_the_same(case):
    tokens = generate(generator(case), cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, by_hand(case))


@pytest.mark.parametrize("case", ["mistral", *KINDS])
def test_beam_search_with_a_cache_is_beam_search_without(case):
    model = generator(case)
    assert torch.equal(generate(model, num_beams=3), generate(model, num_beams=3, use_cache=False))


def test_a_seed_makes_sampling_repeatable():
    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return generate(generator("llama"), do_sample=True)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@each_kind
def test_generation_starts_from_embeddings_too(case):
    model, (ids, mask) = generator(case), prompts()
    embeddings = model.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(tokens, by_hand(case)[:, 9:])


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon", "mixtral"])
def test_the_compiled_forward_is_one_graph_and_gives_the_same(case):
    torch._dynamo.reset()
    model = sliced(case)
    if case == "mixtral":  # the family's eager experts loop over those that were hit
        model.set_experts_implementation("batched_mm")
    compiled = torch.compile(model, backend="aot_eager" if case == "llama" else "eager", fullgraph=True)
    assert relative_error(logits(compiled, windows()), logits(model, windows())) < 1e-6


# Training


# Transformers 5.24 has another name too, 5.17 has not
old_name = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")


def train_step(model: SlicedForCausalLM) -> tuple[float, dict[str, torch.Tensor | None]]:
    """The loss and the gradients of one step, with the same dropout each time."""
    torch.manual_seed(0)
    model.train().zero_grad()
    loss = model(input_ids=windows(), labels=windows()).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@old_name
@every_case
def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(case):
    model = sliced(case)
    loss, gradients = train_step(model)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    model.gradient_checkpointing_enable()
    again, checkpointed = train_step(model)
    assert again == loss
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, checkpointed[name])] == []


@old_name
def test_gradient_checkpointing_runs_the_layers_a_second_time():
    model = sliced("llama")
    model.gradient_checkpointing_enable()
    model.train()
    runs = []
    part(model, "model.layers.1.mlp").register_forward_hook(lambda *_: runs.append(1))
    loss = model(input_ids=windows(), labels=windows()).loss
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2


@each_kind
def test_the_loss_is_the_mean_cross_entropy_of_the_next_tokens(case):
    model, ids = kept(case), windows()
    found = model(input_ids=ids, labels=ids).loss
    predicted = logits(model, ids)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        ("qwen2", ["q_proj", "v_proj", "down_proj", "attn_shortcut", "mlp_shortcut", "embedding_projection"]),
        ("gpt2", ["c_attn", "c_proj", "mlp_shortcut", "embedding_projection"]),
        ("falcon", ["query_key_value", "dense_4h_to_h", "mlp_shortcut"]),
    ],
)
def test_a_lora_adapter_trains_and_is_saved_and_loaded(tmp_path, case, layers):
    base, ids = sliced(case), windows()
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=layers))
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }
    assert adapted == set(layers)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(load_model(str(tmp_path / "base"), device="cpu")[0], tmp_path / "adapter")
    assert torch.equal(logits(fresh, ids), logits(model, ids))
    tokens = fresh.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert tokens.shape == (len(ids), ids.shape[1] + 2)
    merged = logits(fresh.merge_and_unload(), ids)
    assert relative_error(merged, logits(model, ids)) < tolerance(case, torch.float32)


# What libraries ask of a model


@every_case
def test_tying_copying_and_pickling_leave_a_model_as_it_is(case):
    model, wanted = sliced(case), logits(kept(case), windows())
    model.tie_weights()
    model.tie_weights()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied(case)
    assert torch.equal(logits(model, windows()), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), windows()), wanted)


@every_case
def test_resized_tables_keep_the_old_tokens_and_train(case):
    model, ids = sliced(case), windows()
    wanted = logits(model, ids)
    model.resize_token_embeddings(VOCAB + 8)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape == (VOCAB + 8, HIDDEN if projects(case) else WIDTHS[0])
    assert head.shape == (VOCAB + 8, HIDDEN)
    assert (table is head) == tied(case)
    assert model.config.vocab_size == VOCAB + 8
    assert torch.equal(logits(model, ids)[..., :VOCAB], wanted)
    assert model(input_ids=ids, labels=ids).loss.isfinite()


@every_case
def test_hidden_states_are_what_the_layers_read(case):
    model = kept(case)
    states = model(input_ids=windows(), output_hidden_states=True).hidden_states
    first = HIDDEN if projects(case) else WIDTHS[0]
    assert [tuple(state.shape) for state in states] == [(6, 16, width) for width in (first, *WIDTHS[1:], HIDDEN)]
    body = model.get_decoder()(input_ids=windows()).last_hidden_state
    assert torch.equal(states[-1], body)


@every_case
def test_attention_weights_are_given_and_sum_to_one(case):
    model = sliced(case)
    model.set_attn_implementation("eager")
    weights = model(input_ids=windows(), output_attentions=True).attentions
    assert len(weights) == LAYERS
    for layer in weights:
        assert layer.shape == (6, 4, 16, 16)
        torch.testing.assert_close(layer.sum(-1), torch.ones(6, 4, 16))


@each_kind
def test_parameters_embeddings_and_dtype_are_the_models(case):
    model = sliced(case)
    assert model.num_parameters() == count_parameters(model)
    assert model.get_input_embeddings() is part(model, family_of(case).tables[0])
    assert model.get_output_embeddings().weight.shape == (VOCAB, HIDDEN)
    half = sliced(case).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert relative_error(logits(half, windows()), logits(kept(case), windows())) < tolerance(case, torch.bfloat16)


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon", "gptj"])
def test_lm_eval_takes_the_folder_with_the_models_context_length(tmp_path, case, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    kept(case).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    lm = HFLM(pretrained=str(tmp_path / "model"), trust_remote_code=True, device="cpu", batch_size=2)
    assert lm.max_length == 64  # not the tokenizer's
    assert lm.backend == "causal"
    assert torch.equal(logits(lm.model, windows()), logits(kept(case), windows()))


@each_kind
def test_a_model_made_without_weights_starts_as_its_family_does(case):
    config = copy.deepcopy(kept(case).config)
    config.dtype = torch.bfloat16  # a constructor goes by the default dtype
    torch.manual_seed(0)
    for name, parameter in SlicedForCausalLM(config).named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.abs().max() <= 1, name
        assert parameter.any() or name.endswith("bias")


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_experts_run_grouped_at_any_width(case):
    model = rotate_and_slice(random_model(case, dtype=torch.float32), windows(), [33, 23, 41])
    wanted = logits(model, windows())  # a loop over the experts
    model.set_experts_implementation("grouped_mm")
    assert relative_error(logits(model, windows()), wanted) < tolerance(case, torch.float32)


def test_slicing_a_sliced_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="can't slice 'sliced': it is sliced already"):
        rotate_and_slice(kept("llama"), windows(), WIDTHS)


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_one_rotation_is_loaded_as_it_was_and_generates_the_same_without_a_cache(case, tmp_path):
    dense = random_model(case, tied=tied(case), dtype=torch.float32)
    model = rotate_and_slice(dense, windows(), WIDTHS, rotations=1)
    if family_of(case).blocks[0].experts:
        model.set_experts_implementation("grouped_mm")
    model.save_pretrained(tmp_path)
    loaded = SlicedForCausalLM.from_pretrained(tmp_path)
    ids = windows(2)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    with_cache, without = (
        loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)
