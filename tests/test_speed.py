"""What is timed of a model's speed, how turns are taken, and what becomes of the seconds. Figures are not judged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, random_model, windows
from transformers import PreTrainedModel

from slicing import InputError, rotate_and_slice
from slicing.speed import Turns, Work, compare_speeds, decoding, has_static_cache, median_speeds, prefill, take_turns

CPU = torch.device("cpu")
TURNS = Turns(windows=2, length=8, steps=3, cache_length=16, repeats=2)


def sliced(case: str) -> PreTrainedModel:
    return rotate_and_slice(random_model(case), windows(), [40, 32, 24][:LAYERS])


def inputs_of(model: PreTrainedModel, run: Callable[[], object]) -> list[torch.Tensor]:
    """The token ids of each forward of a model while something runs."""
    found: list[torch.Tensor] = []

    def note(_: torch.nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        found.append(arguments["input_ids"].clone())

    with model.register_forward_pre_hook(note, with_kwargs=True):
        run()
    return found


@pytest.mark.parametrize("make", [random_model, sliced])
@pytest.mark.parametrize("case", ["llama", "mistral", "gpt2", "mixtral"])
def test_a_turn_of_decoding_is_greedy_generation_from_the_first_token(case, make):
    model = make(case)
    first = windows(3, 1)
    wanted = model.generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=TURNS.steps + 2, do_sample=False, eos_token_id=None
    )
    work = decoding(model, first, steps=TURNS.steps + 2, cache_length=TURNS.cache_length)
    assert work.tokens == 3 * (TURNS.steps + 2)
    for _ in range(2):  # the second turn begins anew
        work.rewind()
        read = inputs_of(model, work.run)
        assert torch.equal(torch.cat(read, dim=1), wanted[:, :-1])


def test_prefill_is_one_forward_over_all_windows():
    model = random_model("llama")
    work = prefill(model, windows(2, 8))
    (read,) = inputs_of(model, work.run)
    assert torch.equal(read, windows(2, 8))
    assert work.tokens == 16


def test_turns_alternate_and_each_begins_with_a_rewind():
    done = []
    works = {
        name: Work(1, lambda name=name: done.append(f"run {name}"), lambda name=name: done.append(f"rewind {name}"))
        for name in ("dense", "sliced")
    }
    seconds = take_turns(CPU, works, repeats=2)
    assert done == ["rewind dense", "run dense", "rewind sliced", "run sliced"] * 2
    assert {name: len(turns) for name, turns in seconds.items()} == {"dense": 2, "sliced": 2}


def test_tokens_a_second_are_those_of_the_median_turn():
    works = {"dense": Work(10, lambda: None), "sliced": Work(10, lambda: None)}
    assert median_speeds(works, {"dense": [2.0, 1.0, 50.0], "sliced": [0.5, 9.0, 1.0]}) == {"dense": 5, "sliced": 10}


def test_models_are_compared_on_the_tokens_given_again_from_the_first_where_they_are_few():
    dense, narrow = random_model("llama"), sliced("llama")
    few = windows(1, 5)
    read = inputs_of(narrow, lambda: compare_speeds({"dense": dense, "sliced": narrow}, few, TURNS))
    tokens = few.flatten().repeat(4)[:16].reshape(2, 8)
    prefilled = [ids for ids in read if ids.shape[1] > 1]
    assert len(prefilled) > TURNS.repeats
    assert all(torch.equal(ids, tokens) for ids in prefilled)


def test_each_model_has_its_speeds_and_memory_only_where_a_gpu_counts_it():
    found = compare_speeds({"dense": random_model("llama"), "sliced": sliced("llama")}, windows(), TURNS)
    assert list(found) == ["dense", "sliced"]
    for speed in found.values():
        assert speed.prefill > 0
        assert speed.decode is not None
        assert speed.decode > 0
        assert speed.memory is None


@pytest.mark.parametrize("case", ["falcon-sequential", "mpt", "mamba"])
def test_a_family_without_a_static_cache_has_no_speed_of_decoding(case):
    model = random_model(case)
    assert not has_static_cache(model)
    found = compare_speeds({"dense": model}, windows(), TURNS)["dense"]
    assert found.prefill > 0
    assert found.decode is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_that_of_the_weights_and_more():
    models = {name: model.cuda() for name, model in (("dense", random_model("llama")), ("sliced", sliced("llama")))}
    found = compare_speeds(models, windows(), TURNS)
    weights = {name: sum(one.numel() * one.element_size() for one in models[name].parameters()) for name in models}
    assert all(found[name].memory > weights[name] for name in models)


def test_logits_that_are_not_finite_are_an_error():
    model = random_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"not finite in torch\.float64: use --dtype bfloat16"):
        decoding(model, windows(1, 1), steps=2, cache_length=8)


def test_a_plan_is_no_longer_than_the_positions_of_the_model():
    assert Turns.of(CPU) == Turns(windows=1, length=512, steps=8, cache_length=64, repeats=3)
    assert Turns.of(CPU, positions=5) == Turns(windows=1, length=5, steps=5, cache_length=5, repeats=3)
    gpu = Turns.of(torch.device("cuda"), positions=1024)
    assert (gpu.windows, gpu.length, gpu.cache_length) == (8, 1024, 512)
