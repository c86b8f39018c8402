"""Cost files at run time: used, refused with a warning, or caught on the rank that is alone with one."""

import contextlib
import json
import warnings
from dataclasses import replace

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.errors import ConfigError, MismatchError
from pipemoe.plan.cost.file import write_cost
from tests.models.tiny import tiny_config

pytestmark = pytest.mark.mpi
SMALL = {"moe_max_num_tokens": 20, "max_tokens_per_rank": 64, "num_slots": 2}


@pytest.fixture(scope="module")
def model(world):
    return load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=Config(**SMALL))


def test_a_file_of_this_machine_and_model_is_used(world, model, tmp_path):
    cost = replace(model.runtime.cost, finish_ns=12345)
    write_cost(tmp_path / "cost.json", model.runtime.cost_subject, cost)
    # each rank's own folder: the content counts
    tuned = model.with_config(Config(cost=tmp_path / "cost.json", **SMALL))
    assert tuned.runtime.cost == cost
    assert len(tuned.prefill([[1, 2, 3], [4]]).first_tokens) == 2


def warns_on_rank_0(world, match):
    """Equal files are refused in one voice."""
    return pytest.warns(UserWarning, match=match) if world.rank == 0 else contextlib.nullcontext()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_file_measured_on_fewer_moe_layers_is_used(world, family, recwarn, tmp_path):
    few, many = (
        load_model(tiny_config(family, num_layers=n), world, dtype=torch.float32, seed=3, config=Config(**SMALL))
        for n in (2, 4)
    )
    cost = replace(few.runtime.cost, finish_ns=12345)
    write_cost(tmp_path / "cost.json", few.runtime.cost_subject, cost)
    assert many.with_config(Config(cost=str(tmp_path / "cost.json"), **SMALL)).runtime.cost.finish_ns == 12345
    assert not [warning for warning in recwarn if "cost file refused" in str(warning.message)]


@pytest.mark.parametrize(
    "change", [{"device": "another"}, {"torch": "0.1"}, {"pipemoe": "0.0"}, {"model": [1]}, {"num_ranks": 99}]
)
def test_a_file_of_another_is_refused(world, model, tmp_path, change):
    write_cost(
        tmp_path / "cost.json", {**model.runtime.cost_subject, **change}, replace(model.runtime.cost, finish_ns=12345)
    )
    config = Config(cost=str(tmp_path / "cost.json"), **SMALL)
    with warns_on_rank_0(world, "refused.*" + next(iter(change))) as warned:
        other = model.with_config(config)
    assert other.runtime.cost == model.runtime.cost
    assert all(warning.filename == __file__ for warning in warned or [])  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.with_config(config)  # said once


def test_a_file_that_is_missing_on_one_rank_is_an_error_on_all(world, model, tmp_path):
    culprit = world.size - 1
    if world.rank != culprit:
        write_cost(tmp_path / "cost.json", model.runtime.cost_subject, model.runtime.cost)
    path = world.all_gather(str(tmp_path).encode())[culprit].decode()
    with pytest.raises(ConfigError, match=f"^rank {culprit}: cost file {path}/cost.json: No such file"):
        model.with_config(Config(cost=str(tmp_path / "cost.json"), **SMALL))


def test_a_damaged_file_is_refused(world, model, tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps([1]))
    with warns_on_rank_0(world, "refused"):
        assert model.with_config(Config(cost=str(tmp_path / "cost.json"), **SMALL)).runtime.cost == model.runtime.cost


def test_a_rank_alone_with_another_file_is_caught(world, model, tmp_path):
    if world.size == 1:
        pytest.skip("needs several ranks")
    cost = replace(model.runtime.cost, finish_ns=12345 + world.rank)
    write_cost(tmp_path / "cost.json", model.runtime.cost_subject, cost)
    with pytest.raises(MismatchError, match="cost of finish_ns"):
        model.with_config(Config(cost=str(tmp_path / "cost.json"), **SMALL))
