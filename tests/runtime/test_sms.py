"""Multiprocessors that plans leave to collectives: what a step computes with follows its plan; the result does not
depend on it.
"""

import copy
from dataclasses import replace

import pytest
import torch

from pipemoe.errors import ConfigError
from pipemoe.experts.host import HostExperts
from pipemoe.plan.clock.sms import possible_sms_left, room_for_collectives
from pipemoe.plan.config import MODES
from pipemoe.runtime import plans
from tests.moe_cases import make_layers, norm_ratio
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi
NUM_SMS, CTAS = 132, 1


@pytest.fixture
def left_by_calls(monkeypatch, world):
    """Host experts that pass for persistent kernels; for each call, the multiprocessors that it left."""
    calls = []

    def with_free_sms(self, num_sms):
        other = copy.copy(self)
        other.left = num_sms
        return other

    def call(self, *arguments):
        calls.append(getattr(self, "left", 0))
        return compute(self, *arguments)

    compute = HostExperts.__call__
    monkeypatch.setattr(HostExperts, "num_sms", NUM_SMS)
    monkeypatch.setattr(HostExperts, "with_free_sms", with_free_sms)
    monkeypatch.setattr(HostExperts, "__call__", call)
    monkeypatch.setattr(type(world), "ctas", CTAS)
    return calls


def step(world, runtime):
    """One step of a few tokens on every rank; they come in several cohorts where the mode makes such."""
    num_tokens = 20 + world.rank
    source = RowsSource(num_tokens, runtime)
    runtime.submit_step([num_tokens], source).result()
    world.all_gather(b"")  # the conductor is done with the whole plan
    return source


@pytest.mark.parametrize("mode", MODES)
def test_experts_leave_what_the_plan_says(world, left_by_calls, mode):
    if world.device.type == "cuda":
        pytest.skip("of host experts")
    runtime = make_runtime(world, make_layers(2, world.device, torch.float32), mode=mode, moe_max_num_tokens=24)
    left_by_calls.clear()  # what set-up called
    source = step(world, runtime)
    assert left_by_calls and set(left_by_calls) == {source.plan.sms_left}
    if mode == "chunked" and world.size > 1:
        assert source.plan.sms_left == room_for_collectives(NUM_SMS, CTAS, 1) == 2
    assert tuple(runtime.experts_with_free_sms) == possible_sms_left(runtime.config, runtime.cost.sms)


def test_what_a_user_demands_is_what_experts_fill(world, left_by_calls):
    if world.device.type == "cuda":
        pytest.skip("of host experts")
    runtime = make_runtime(world, make_layers(2, world.device, torch.float32), mode="per_rank", num_sms=100)
    left_by_calls.clear()
    step(world, runtime)
    assert set(left_by_calls) == {32} and tuple(runtime.experts_with_free_sms) == (32,)


def test_more_multiprocessors_than_there_are_is_an_error_on_all_ranks(world):
    with pytest.raises(ConfigError, match="num_sms is 100000, but the experts' kernels can fill"):
        make_runtime(world, make_layers(1, world.device, torch.float32), num_sms=100000)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["broadcast", "two_batch", "per_rank"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bits_whatever_multiprocessors_are_left(world, monkeypatch, mode, deterministic):
    """On GPUs: none, room, twice as much, and nearly all, with the same cohorts."""
    layers, make_plan, found = make_layers(2, world.device, torch.bfloat16), plans.make_plan, []
    for chosen in ("none", "room", "twice", "nearly all"):
        runtime = make_runtime(world, layers, mode=mode, deterministic=deterministic, moe_max_num_tokens=64)
        total = runtime.cost.sms.num_sms
        if not total:
            pytest.skip("these experts have no persistent kernels")
        room = room_for_collectives(total, max(1, world.ctas), 2)
        left = {"none": 0, "room": room, "twice": 2 * room, "nearly all": total - 1}[chosen]
        runtime.experts_with_free_sms[left] = runtime.experts_with_free_sms[0].with_free_sms(left)
        monkeypatch.setattr(
            plans, "make_plan", lambda *arguments, left=left: replace(make_plan(*arguments), sms_left=left)
        )
        source = step(world, runtime)
        monkeypatch.undo()
        assert source.plan.sms_left == left
        for layer, (inputs, sums) in enumerate(zip(source.inputs, source.sums)):
            assert norm_ratio(sums, layers.oracle(layer, *inputs)) < 1e-2
        found.append(source.sums)
    for sums in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(sums, found[0], strict=True))
