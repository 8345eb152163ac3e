"""Perplexity equals what the model's own forward gives; tasks equal lm-eval's own evaluation."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slicing import likelihood
from slicing.families import InputError
from slicing.likelihood import perplexity, window_nll
from slicing.tasks import evaluate_tasks, resolve_tasks

TASKS = Path(__file__).parent / "data" / "tiny_tasks"
VOCABULARY = 67
# What a family needs beside the common sizes, and settings of its head that must not get lost.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 0.3},
    "smollm3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "gpt2": {},
    "starcoder2": {},
    "stablelm": {},
    "olmo": {},
    "gpt_neox": {},
    "phi": {},
    "falcon": {},
    "gptj": {"rotary_dim": 4},
    "cohere": {"logit_scale": 3.0},
    "mixtral": {},
    "qwen3_moe": {},
}


def tiny_model(family: str = "llama", vocabulary: int = VOCABULARY, **settings: Any) -> Any:
    """Two layers of width 32 with random weights; logits of some size, so that a lost scale shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **FAMILIES[family],
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def random_windows(count: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def direct_nll(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean NLL of each window from the logits of one forward."""
    logits = model(windows).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_in_chunks_equals_the_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(family), random_windows()
    monkeypatch.setattr(likelihood, "HEAD_BYTES", 4 * VOCABULARY * 7)  # seven tokens a chunk: across window ends
    expected = direct_nll(model, windows)
    found = window_nll(model, windows, batch_size=2, progress=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float64
    assert expected.std() > 1e-3, "windows that all look alike would hide a mix-up"


_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_EXPERTS = {"num_local_experts": 4, "intermediate_size_mlp": 64}
_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OTHERS: dict[str, dict[str, Any]] = {
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "initializer_range": 0.3},
    "modernbert-decoder": _TINY | {"cls_token_id": 1, "sep_token_id": 2},  # its `decoder` is the head
    "llama4_text": _TINY | _EXPERTS,  # its `get_decoder` is the whole model
    "llama4": {"text_config": _TINY | _EXPERTS, "vision_config": _VISION | {"vision_output_dim": 32}},
}


@pytest.mark.parametrize("family", OTHERS)
def test_perplexity_of_families_whose_parts_are_elsewhere(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OTHERS[family])).eval()
    windows = random_windows()
    found = window_nll(model, windows, progress=False)
    torch.testing.assert_close(found, direct_nll(model, windows), rtol=1e-5, atol=1e-5)


def test_what_a_model_adds_behind_its_body_is_not_lost() -> None:
    model, windows = tiny_model(), random_windows()
    forward = model.forward

    def later(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = output.logits * (1 + torch.arange(output.logits.shape[1])[:, None] / 8)  # by position
        return output

    model.forward = later
    found = window_nll(model, windows, progress=False)
    with torch.no_grad():
        logits = later(input_ids=windows).logits[:, :-1].double()
    expected = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_scale_or_cap_of_the_head_matters_here(family: str) -> None:
    model, windows = tiny_model(family), random_windows()
    plain = {"gemma2": "final_logit_softcapping", "granite": "logits_scaling", "cohere": "logit_scale"}[family]
    before = window_nll(model, windows, progress=False)
    setattr(model.config, plain, None if family == "gemma2" else 1.0)
    if hasattr(model, plain):
        setattr(model, plain, 1.0)
    assert (window_nll(model, windows, progress=False) - before).abs().max() > 0.05


def test_perplexity_is_exp_of_the_mean_over_all_tokens() -> None:
    model, windows = tiny_model(), random_windows()
    expected = math.exp(direct_nll(model, windows).mean().item())
    assert perplexity(model, windows, progress=False) == pytest.approx(expected, rel=1e-6)


class WrappedConfig(PreTrainedConfig):
    model_type = "wrapped_for_test"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(self, text_config: Any = None, **kwargs: Any) -> None:
        self.text_config = text_config
        super().__init__(**kwargs)


class Wrapped(PreTrainedModel):
    """A model around a family's own, as the sliced one is."""

    config_class = WrappedConfig

    def __init__(self, inner: Any) -> None:
        attention = inner.config._attn_implementation
        super().__init__(WrappedConfig(text_config=inner.config))
        inner.config._attn_implementation = attention  # a new outer config resets it: there would be no causal mask
        self.model = inner

    def get_decoder(self) -> Any:
        return self.model.get_decoder()

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "opt", "granite"])
def test_model_inside_another_gives_the_same(family: str) -> None:
    model, windows = tiny_model(family), random_windows()
    wrapped = Wrapped(model)
    assert torch.equal(window_nll(wrapped, windows, progress=False), window_nll(model, windows, progress=False))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_model_with_the_hooks_of_accelerate_gives_the_same(where: str, tmp_path: Path) -> None:
    from accelerate import dispatch_model

    windows = random_windows()
    expected = window_nll(tiny_model(tie_word_embeddings=False), windows, progress=False)
    model = tiny_model(tie_word_embeddings=False)
    places = {"model.embed_tokens": where, "model.layers.0": where, "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": where}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    forwards = [vars(module).get("forward") for module in model.modules()]
    assert any(forwards)
    assert torch.equal(window_nll(model, windows, progress=False), expected)
    assert [vars(module).get("forward") for module in model.modules()] == forwards


def test_model_is_left_as_it_was() -> None:
    model, windows = tiny_model("gpt2").train(), random_windows()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    config = model.config.to_dict()
    first = window_nll(model, windows, progress=False)
    assert [module.training for module in model.modules()] == flags
    assert model.config.to_dict() == config
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(first, window_nll(model.eval(), windows, progress=False)), "dropout was on"


def test_forward_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    window_nll(model, random_windows(), progress=False)  # what it tries first passes

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("head")

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(KeyError, match="head"):
        window_nll(model, random_windows(), progress=False)
    assert "forward" not in vars(model.model)


def test_batch_is_halved_when_memory_runs_out_and_no_window_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(), random_windows(count=11)
    expected = window_nll(model, windows, batch_size=1, progress=False)
    forward, sizes = model.model.forward, []

    def limited(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        sizes.append(len(input_ids))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", limited)
    torch.testing.assert_close(window_nll(model, windows, progress=False), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 2, 2, 2, 1]
    with pytest.raises(InputError, match="out of memory with a batch of 5 windows of 24 tokens: use a smaller batch"):
        window_nll(model, windows, batch_size=5, progress=False)


def test_other_runtime_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    window_nll(model, random_windows(), progress=False)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        window_nll(model, random_windows(), progress=False)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.long), r"shape \(3, 1\)"),
        (torch.zeros(0, 8, dtype=torch.long), r"shape \(0, 8\)"),
        (torch.zeros(8, dtype=torch.long), r"shape \(8,\)"),
        (torch.full((2, 8), VOCABULARY), f"from {VOCABULARY} to {VOCABULARY}, the model's vocabulary from 0 to 66"),
        (torch.full((2, 8), -100), "from -100 to -100"),
    ],
)
def test_windows_that_can_not_be_scored_are_refused(windows: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        window_nll(tiny_model(), windows, progress=False)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="batch size is 0"):
        window_nll(tiny_model(), random_windows(), batch_size=0, progress=False)


def test_first_window_that_is_not_finite_is_named() -> None:
    model, windows = tiny_model(tie_word_embeddings=False), random_windows()
    windows[windows == 5] = 6
    windows[3, 2] = 5
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(InputError, match=r"window 3 .*nan.*1 of 5.*float32 or bfloat16"):
        window_nll(model, windows, progress=False)


def test_progress_goes_to_stderr_and_can_be_off(capfd: pytest.CaptureFixture[str]) -> None:
    model, windows = tiny_model(), random_windows()
    window_nll(model, windows)
    captured = capfd.readouterr()
    assert "perplexity" in captured.err
    assert captured.out == ""
    window_nll(model, windows, progress=False)
    assert capfd.readouterr() == ("", "")


# Tasks


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", bos_token="<end>")


@pytest.fixture(scope="module")
def reader() -> Any:
    return tiny_model(vocabulary=300, head_dim=8)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks whose documents are read."""
    from lm_eval.api.task import ConfigurableTask

    names: list[str] = []
    original = ConfigurableTask.download

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.config.task)
        original(self, *args, **kwargs)

    monkeypatch.setattr(ConfigurableTask, "download", counted)
    return names


def lm_eval_results(model: Any, tokenizer: Any, names: list[str], **kwargs: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    wrapper = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
    results: dict[str, Any] = simple_evaluate(wrapper, tasks=names, task_manager=manager, **kwargs)["results"]
    return results


@pytest.mark.parametrize(
    ("settings", "seeds"),
    [
        ({}, {}),
        ({"limit": 5}, {}),
        ({"num_fewshot": 3}, {}),
        (
            {"num_fewshot": 2, "seed": 7},
            {"random_seed": 7, "numpy_random_seed": 7, "torch_random_seed": 7, "fewshot_random_seed": 7},
        ),
    ],
)
def test_scores_equal_those_of_simple_evaluate(
    settings: dict[str, int], seeds: dict[str, int], reader: Any, tokenizer: Any
) -> None:
    names = ["tiny_endings", "tiny_colours"]
    theirs = {key: value for key, value in settings.items() if key != "seed"} | seeds
    expected = lm_eval_results(reader, tokenizer, names, **theirs)
    tasks = resolve_tasks(names, TASKS)
    evaluate_tasks(reader, tokenizer, tasks, num_fewshot=1, seed=3, progress=False)  # must leave no trace in the tasks
    scores = evaluate_tasks(reader, tokenizer, tasks, **settings, progress=False)
    assert list(scores) == names
    for name, score in scores.items():
        for metric, found in score.metrics.items():
            assert found.value == expected[name][f"{metric},none"]
            assert found.stderr == expected[name][f"{metric}_stderr,none"]
        assert score.documents == expected[name]["sample_len"]
    assert set(scores["tiny_endings"].metrics) == {"acc", "acc_norm"}
    assert scores["tiny_endings"].metric == "acc_norm"
    assert scores["tiny_endings"].value == scores["tiny_endings"].metrics["acc_norm"].value
    assert scores["tiny_colours"].metric == "acc"


def test_group_is_reported_as_its_aggregate(reader: Any, tokenizer: Any) -> None:
    expected = lm_eval_results(reader, tokenizer, ["tiny_group"])
    scores = evaluate_tasks(reader, tokenizer, resolve_tasks(["tiny_group"], TASKS), progress=False)
    assert list(scores) == ["tiny_group"]
    score = scores["tiny_group"]
    assert (score.metric, score.documents) == ("acc", 14)
    assert score.value == expected["tiny_group"]["acc,none"]
    assert score.stderr == expected["tiny_group"]["acc_stderr,none"]
    assert score.subtasks == {name: expected[name]["acc,none"] for name in ("tiny_endings", "tiny_colours")}


def test_documents_are_read_once_for_all_models(reader: Any, tokenizer: Any, downloads: list[str]) -> None:
    tasks = resolve_tasks(["tiny_endings", "tiny_colours"], TASKS)
    assert downloads == []
    first = evaluate_tasks(reader, tokenizer, tasks, progress=False)
    other = tiny_model(vocabulary=300, head_dim=16)
    second = evaluate_tasks(other, tokenizer, tasks, progress=False)
    again = evaluate_tasks(reader, tokenizer, tasks, progress=False)
    assert downloads == ["tiny_endings", "tiny_colours"]
    assert first == again
    assert first != second


def test_documents_are_processed_once_for_all_models(reader: Any, tokenizer: Any) -> None:
    tasks = resolve_tasks(["tiny_processed"], TASKS)
    expected = lm_eval_results(reader, tokenizer, ["tiny_processed"])["tiny_processed"]["acc,none"]
    process = tasks.loaded.tasks["tiny_processed"].get_config("process_docs")
    documents = tasks.loaded.tasks["tiny_processed"].eval_docs
    assert documents[0]["question"].startswith("Question: ")
    for _ in range(2):
        score = evaluate_tasks(reader, tokenizer, tasks, progress=False)["tiny_processed"]
        assert score.value == expected
    assert tasks.loaded.tasks["tiny_processed"].eval_docs is documents
    assert process.__wrapped__.__name__ == "process"


def test_limit_takes_the_first_documents(reader: Any, tokenizer: Any) -> None:
    tasks = resolve_tasks(["tiny_endings"], TASKS)
    score = evaluate_tasks(reader, tokenizer, tasks, limit=1, progress=False)["tiny_endings"]
    assert score.documents == 1
    assert score.stderr is None
    assert score.value in (0.0, 1.0)
    with pytest.raises(InputError, match="limit of documents is 0"):
        evaluate_tasks(reader, tokenizer, tasks, limit=0, progress=False)


def test_tokenizer_model_and_stdout_are_left_alone(
    reader: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    reader.train()
    evaluate_tasks(reader, tokenizer, resolve_tasks(["tiny_endings"], TASKS), limit=2, progress=False)
    assert tokenizer.pad_token is None
    assert reader.training
    reader.eval()
    assert capfd.readouterr() == ("", "")
    evaluate_tasks(reader, tokenizer, resolve_tasks(["tiny_endings"], TASKS), limit=2)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "loglikelihood" in captured.err


def test_task_batch_is_halved_when_memory_runs_out(
    reader: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = resolve_tasks(["tiny_endings"], TASKS)
    expected = evaluate_tasks(reader, tokenizer, tasks, num_fewshot=2, progress=False)
    forward = reader.model.forward

    def limited(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(reader.model, "forward", limited)
    assert evaluate_tasks(reader, tokenizer, tasks, num_fewshot=2, progress=False) == expected
    with pytest.raises(InputError, match="out of memory with a batch of 4 task requests"):
        evaluate_tasks(reader, tokenizer, tasks, batch_size=4, progress=False)


def test_own_index_of_lm_eval_is_built_only_where_the_folder_lacks_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    calls, original = [], lm_eval.tasks.TaskManager

    def counted(include_path: str, include_defaults: bool = True) -> Any:
        calls.append(include_defaults)
        return original(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", counted)
    assert resolve_tasks(["tiny_group", "tiny_group"], TASKS).names == ["tiny_group"]
    assert calls == [False]
    with pytest.raises(InputError, match="unknown"):
        resolve_tasks(["tiny_group", "hellaswag"], TASKS)
    assert calls == [False, False, True]


def test_missing_names_are_refused() -> None:
    with pytest.raises(InputError, match="no task was given"):
        resolve_tasks([], TASKS)
