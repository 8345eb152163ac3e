"""Which rank a process is and what it takes, by the launcher's environment."""

import pytest
import torch

from slicing.experiment.ranks import Ranks, _lost_rank, _slurm_step, join_ranks
from slicing.families import InputError

STEP = {
    "SLURM_JOB_ID": "31007",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def test_every_item_is_one_ranks():
    items = list(range(17))
    shares = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks().share(items) == items


def test_a_process_of_its_own_is_the_first_rank_and_waits_for_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", *STEP):
        monkeypatch.delenv(name, raising=False)
    ranks = join_ranks()
    assert (ranks.first, ranks.count, ranks.from_first("value")) == (True, 1, "value")
    ranks.wait()
    ranks.leave()


@pytest.mark.parametrize(
    ("nodes", "master"), [("gpu[07-08]", "gpu07"), ("a1,a2", "a1"), ("n[3,5-9],m2", "n3"), ("host-4", "host-4")]
)
def test_a_task_of_srun_finds_its_rank_and_the_first_ranks_node(nodes, master):
    found = _slurm_step(STEP | {"SLURM_STEP_NODELIST": nodes})
    assert found["MASTER_ADDR"] == master
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("9", "1", "16")
    assert found["MASTER_PORT"] == _slurm_step(STEP | {"SLURM_PROCID": "3"})["MASTER_PORT"]
    assert _slurm_step(STEP | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "localhost"
    assert _slurm_step(STEP | {"MASTER_ADDR": "10.0.0.7"})["MASTER_ADDR"] == "10.0.0.7"


def test_the_batch_script_itself_is_no_task_of_srun():
    assert _slurm_step({"SLURM_JOB_ID": "31007", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == {}


def test_each_rank_has_a_card_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [Ranks(rank, 8, rank % 4).own_device("auto") for rank in (0, 3, 6)] == ["cuda:0", "cuda:3", "cuda:2"]
    assert Ranks(5, 8, 1).own_device("cuda") == "cuda:1"
    assert Ranks(5, 8, 1).own_device("cpu") == "cpu"
    assert Ranks(5, 8, 1).own_device("cuda:3") == "cuda:3"
    assert Ranks().own_device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # Slurm shows each task its card alone
    assert Ranks(5, 8, 1).own_device("auto") == "cuda:0"


def test_a_lost_rank_is_an_error_that_points_to_it():
    with pytest.raises(InputError, match="its own error says why"), _lost_rank():
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "x"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "["}],
    ids=["no number", "no master", "no nodes"],
)
def test_variables_that_make_no_sense_are_an_error(variables, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *STEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"the ranks of the launcher can't meet .*: start with torchrun or srun"):
        join_ranks()
