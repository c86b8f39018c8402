"""Attention that is measured at set-up: all ranks plan by rank 0's figures, whatever they measure themselves."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.models import attention_choice
from pipemoe.models.lone_sequence import attend_alone
from pipemoe.models.measured_attention import COUNTS, MeasuredAttention
from pipemoe.plan.cost.file import write_cost
from pipemoe.plan.cost.model import AttendCost, CostModel
from pipemoe.plan.schedule import Facts
from tests.models.tiny import tiny_config
from tests.models.tiny_families import tiny_family_config

pytestmark = pytest.mark.mpi
SMALL = {"moe_max_num_tokens": 20, "max_tokens_per_rank": 40, "num_slots": 2}
ALONE, SHARED = CostModel(attend=AttendCost(weights_ns=0)), CostModel(attend=AttendCost(0, 0, crowd_permille=150))


class Stub:
    """Timings of a decoder that is slower on a rank with a higher number, and longer still once all ranks attend."""

    def __init__(self, rank, fails=(), later=1):
        self.rank, self.fails, self.later, self.counts = rank, fails, later, []

    def __call__(self, count):
        self.counts.append(count)
        if self.rank in self.fails:
            raise ValueError("bad model code")
        crowd = self.later * (1 + self.rank) if len(self.counts) > 3 * len(COUNTS) or self.rank else 1
        layer = crowd * (10_000 + 300 * count + count * count)
        return [layer * 0.5, layer * 1.5], [5_000.0 + self.rank] * 2  # issued sooner than the device is done


def costs_of_all(world, stub, start, most=10_000):
    found = MeasuredAttention(stub).cost(world, start, most, lambda work: work())
    return found, [json.loads(p) for p in world.all_gather(json.dumps(asdict(found)).encode())]


def test_all_ranks_plan_by_rank_0s_figures(world):
    stub = Stub(world.rank)
    found, everywhere = costs_of_all(world, stub, ALONE)
    assert all(cost == everywhere[0] for cost in everywhere)
    assert (found.attend.fixed_ns, found.attend.crowd_permille) == (pytest.approx(10_000, rel=0.01), 0)
    assert found.attend.row_ps == pytest.approx(299_000, rel=0.01)
    assert found.attend.pair_fs == pytest.approx(2_000_000, rel=0.01)
    assert replace(found, attend=ALONE.attend, host=ALONE.host) == ALONE
    assert found.host.attend_ns == (5_000 if world.device.type == "cuda" else ALONE.host.attend_ns)
    assert stub.counts == ([count for count in COUNTS for _ in range(3)] if world.rank == 0 else [])


def test_ranks_that_share_a_gpu_wait_for_the_slowest(world):
    found, everywhere = costs_of_all(world, Stub(world.rank), SHARED)
    assert all(cost == everywhere[0] for cost in everywhere)
    assert found.attend.crowd_permille == pytest.approx(1000 * (world.size - 1), abs=5)


@pytest.mark.parametrize("start", [ALONE, SHARED])
def test_if_rank_0_cannot_measure_nothing_changes(world, start):
    found, _ = costs_of_all(world, Stub(world.rank, fails=[0]), start)
    assert found == start


def test_if_another_rank_cannot_attend_crowding_is_unknown(world):
    if world.size == 1:
        pytest.skip("needs several ranks")
    found, everywhere = costs_of_all(world, Stub(world.rank, fails=[world.size - 1]), SHARED)
    assert all(cost == everywhere[0] for cost in everywhere)
    assert found.attend.crowd_permille == 0 and found.attend.row_ps == pytest.approx(299_000, rel=0.01)


@pytest.mark.parametrize(("most", "wanted"), [(1, {1}), (16, {16}), (100, {16, 100}), (1 << 20, set(COUNTS))])
def test_no_more_tokens_than_a_step_has(world, most, wanted):
    stub = Stub(0 if world.rank == 0 else 1)
    costs_of_all(world, stub, ALONE, most)
    assert set(stub.counts) == (wanted if world.rank == 0 else set())


def test_what_would_take_long_is_not_tried(world):
    counts = []

    def slow(count):
        counts.append(count)
        return [6e7], [1.0]

    found, _ = costs_of_all(world, slow, ALONE)  # 512 tokens might take four times as long as 128
    assert counts == ([COUNTS[0]] * 2 + [COUNTS[1]] * 2 if world.rank == 0 else [])
    assert found.attend.fixed_ns == pytest.approx(6e7, rel=1e-6) and found.attend.row_ps == 0


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_a_family_by_modules_plans_by_what_was_measured(world, family, tmp_path):
    model = load_model(
        tiny_family_config(family), world, random_weights=True, config=Config(**SMALL), dtype=torch.float32
    )
    costs = [json.loads(p) for p in world.all_gather(json.dumps(asdict(model.runtime.cost)).encode())]
    assert all(cost == costs[0] for cost in costs)
    assert (model.runtime.cost.attend.fixed_ns, model.runtime.cost.attend.row_ps) != (0, 0)
    # with any configuration the same figures, and a file goes before them
    padded = model.with_config(Config(mode="padded", **SMALL))
    assert padded.runtime.cost.attend == model.runtime.cost.attend
    tuned = replace(model.runtime.cost, attend=AttendCost(fixed_ns=12345))
    write_cost(tmp_path / "cost.json", model.runtime.cost_subject, tuned)
    assert model.with_config(Config(cost=tmp_path / "cost.json", **SMALL)).runtime.cost == tuned
    assert len(model.prefill([[1, 2, 3], [4]]).first_tokens) == 2


def test_attention_of_known_cost_is_not_measured(world):
    model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, config=Config(**SMALL))
    if model.decoder.cost_is_unknown:
        pytest.skip("on a GPU attention in float32 is transformers'")
    by_modules = model.with_config(Config(attention="transformers", **SMALL))
    assert by_modules.runtime.cost.attend != model.runtime.cost.attend
    again = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, config=Config(**SMALL))
    assert again.runtime.cost == model.runtime.cost  # nothing in it was timed


@pytest.mark.parametrize(("asked", "wanted"), [(1, 1), (2, 1), (3, 2), (9, 2)])
def test_the_first_layer_is_left_out(world, asked, wanted):
    model = load_model(
        tiny_family_config("gpt_oss"), world, random_weights=True, config=Config(**SMALL), dtype=torch.float32
    )
    took, issued = attend_alone(model.decoder, 7, asked)
    assert len(took) == len(issued) == wanted and min(took) > 0


def test_plans_are_chosen_by_what_was_measured(world, monkeypatch):
    if world.size == 1 or world.device.type != "cpu":
        pytest.skip("needs several ranks, and a host's costs")
    alone = {
        "quick": lambda *_: ([1000.0], [1000.0]),
        "slow by pairs": lambda _, count, __: ([1e5 + 1e4 * count**2], [1000.0]),
    }
    cohorts = {}
    for name, timed in alone.items():
        monkeypatch.setattr(attention_choice, "attend_alone", timed)
        config = Config(mode="auto", moe_max_num_tokens=64, max_tokens_per_rank=512, num_slots=2, makespan_budget=0.1)
        model = load_model(
            tiny_family_config("gpt_oss"), world, random_weights=True, config=config, dtype=torch.float32
        )
        plan = model.runtime.plans.of_step(Facts(((512,), *((4,),) * (world.size - 1))))
        cohorts[name] = len(plan.cohorts)
    assert cohorts == {"quick": 1, "slow by pairs": 2}


def test_if_attention_raises_the_step_tells(world, monkeypatch):
    """Loading goes on, and costs stay what dimensions say."""

    def bad(*_):
        raise ValueError("bad model code")

    config = Config(mode="auto", **SMALL)
    monkeypatch.setattr(attention_choice, "attend_alone", bad)
    model = load_model(tiny_family_config("gpt_oss"), world, random_weights=True, config=config, dtype=torch.float32)
    assert model.runtime.cost.attend.crowd_permille == (150 if world.device.type == "cuda" and world.size > 1 else 0)
    assert model.runtime.plans.cost is model.runtime.cost
    assert len(model.prefill([[1, 2, 3], [4]]).first_tokens) == 2
