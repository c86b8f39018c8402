"""The simulated engine: every request is served once, in time, and as the policy has it."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.known_models import model_config
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS
from pipemoe.plan.cost.model import CoresCost, CostModel
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape
from pipemoe.rolling.engine_settings import engine_settings
from pipemoe.rolling.offer import Chunk
from pipemoe.rolling.round_time import RoundTime
from pipemoe.traffic.arrival_times import Arrival
from pipemoe.traffic.campaign import Campaign, Settings
from pipemoe.traffic.policy import POLICIES, Policy
from pipemoe.traffic.request_trace import Request
from pipemoe.traffic.simulator import Machine, SimulatedPlayer, crowding

SHAPE = ModelShape(2048, 768, 128, 8, 48)
ON_CORES = CostModel(cores=CoresCost(permille=2000))


def player(num_ranks=4, num_slots=2, cost=CostModel(), delay_seconds=0.0, cuts=True):
    def settings_of(policy):
        make = partial(engine_settings, max_tokens_per_rank=16384, num_ranks=num_ranks, cuts=cuts)
        return make(policy.name, policy.step_tokens)

    return SimulatedPlayer(Machine(SHAPE, cost, num_ranks, num_slots, 4096, delay_seconds), settings_of)


def policies():
    return st.sampled_from(
        [Policy(n, None if n == "rolling" else 512, r) for n in POLICIES for r in ("round_robin", "least_tokens")]
    )


@settings(max_examples=60, deadline=None)
@given(
    policy=policies(),
    gaps=st.lists(st.tuples(st.sampled_from([0.0, 1e-4, 0.05, 2.0]), st.integers(1, 9000)), max_size=25),
    num_ranks=st.sampled_from([1, 2, 5]),
    num_slots=st.sampled_from([1, 2, 4]),
    cost=st.sampled_from([CostModel(), ON_CORES]),
    cuts=st.booleans(),
    delay=st.sampled_from([0.0, 0.02]),
)
def test_every_request_is_served_once_and_after_it_came(policy, gaps, num_ranks, num_slots, cost, cuts, delay):
    seconds, arrivals = 0.0, []
    for number, (gap, tokens) in enumerate(gaps):
        seconds += gap
        arrivals.append(Arrival(number, seconds, tokens))
    served = player(num_ranks, num_slots, cost, delay, cuts).play(policy, arrivals)
    assert [(s.number, s.num_tokens, s.arrival) for s in served] == [
        (a.number, a.num_tokens, a.seconds) for a in arrivals
    ]
    for s in served:
        assert s.arrival <= s.admitted < s.first_token and 0 <= s.rank < num_ranks
        if policy.routing == "round_robin":
            assert s.rank == s.number % num_ranks


def test_alone_a_request_takes_its_rounds_and_the_start():
    lengths = [1, 100, 2048, 5000]
    times = RoundTime(SHAPE, CostModel(), 4, 4096)
    for served, tokens in zip(player().alone(Policy("rolling"), lengths), lengths):
        chunks = [(start, min(start + 2048, tokens)) for start in range(0, tokens, 2048)]
        alone = sum(times.of([[Chunk(0, start, stop, tokens)], [], [], []]) for start, stop in chunks)
        assert served.ttft == pytest.approx(1e-9 * (alone + CostModel().start_ns)) and served.queueing == 0
        assert served.rank == served.number


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 5000), min_size=4, max_size=4), cost=st.sampled_from([CostModel(), ON_CORES]))
def test_a_round_computes_for_a_part_of_its_time(tokens, cost):
    times, admitted = RoundTime(SHAPE, cost, 4, 4096), [[Chunk(0, 0, n, n)] if n else [] for n in tokens]
    busy = times.busy(admitted)
    assert all(0 < of_rank <= times.of(admitted) for of_rank in busy) if any(tokens) else not any(busy)
    if not cost.cores.permille:
        assert sorted(range(4), key=tokens.__getitem__)[-1] in [rank for rank in range(4) if busy[rank] == max(busy)]


@pytest.mark.parametrize("cost", [CostModel(), ON_CORES])
def test_short_prompts_pass_a_long_one_when_rolling_and_wait_for_it_in_lockstep(cost):
    arrivals = [Arrival(0, 0.0, 8000), *(Arrival(n, 0.02, 50) for n in range(1, 4))]
    ttft = {
        policy.name: [s.ttft for s in player(cost=cost).play(policy, arrivals)]
        for policy in (Policy("rolling"), Policy("lockstep", 8192))
    }
    assert max(ttft["rolling"][1:]) < 0.5 * min(ttft["lockstep"][1:])


def test_delayed_ranks_wait_for_the_others_but_not_for_ever():
    arrivals = [Arrival(0, 0.0, 300), Arrival(1, 0.01, 300), Arrival(2, 1.0, 300)]
    delayed = player(num_ranks=2, delay_seconds=0.03).play(Policy("lockstep_delayed", 1024), arrivals)
    assert delayed[0].admitted == pytest.approx(0.01, abs=0.002) == delayed[1].admitted
    assert delayed[2].queueing == pytest.approx(0.03, abs=0.005)


@pytest.mark.parametrize("slowdown", [0, 800])
def test_rounds_beside_one_another_share_the_cores_and_slow_one_another(slowdown):
    """With both slots full all the time, the work of both takes as long as that of one after the other; and longer by
    what each slows the other.
    """
    on_cores = player(cost=CostModel(cores=CoresCost(2000, slowdown)))
    long, short = Arrival(0, 0.0, 6000), [Arrival(n, 0.0, 400) for n in range(1, 9)]
    (only,) = on_cores.play(Policy("rolling"), [long])
    shorts = max(s.first_token for s in on_cores.play(Policy("rolling"), short))
    both = [s.first_token for s in on_cores.play(Policy("rolling"), [long, *short])]
    in_turn = only.first_token + shorts
    assert only.first_token < both[0] and max(both) > max(only.first_token, shorts)
    assert (max(both) <= in_turn) if slowdown == 0 else (max(both) <= in_turn * (1 + slowdown / 1000))


@pytest.mark.parametrize("lengths", [(1024,) * 4, (2048,) * 4, (4096,) * 4, (1024, 0, 0, 0), (64, 0, 0, 0)])
@pytest.mark.parametrize(("sharing", "cap"), [(4, 4096), (4, 8192), (1, 8192)])
def test_two_rounds_side_by_side_take_about_what_the_clock_says(lengths, sharing, cap):
    """On quarters of an H200, where exchanges take longer than computations, and on H200s, where they are quick."""
    dimensions = dimensions_of(model_config("qwen3-30b-a3b"))
    cost = default_cost(GPUS["h200"], dimensions, 4, value_bytes=2, sum_bytes=2, ranks_per_device=sharing, ctas=1)
    config = PlanConfig(moe_max_num_tokens=cap, num_slots=2)
    cohorts = [[Microbatch(rank, k * n, (k + 1) * n) for rank, n in enumerate(lengths) if n] for k in range(2)]
    made = plan(Facts(tuple((n, n) if n else () for n in lengths)), SHAPE, config, cost, cohorts, slots_in_use=2)
    clock = (simulate(made, cost).makespan - cost.start_ns) * 1e-9
    times = RoundTime(SHAPE, cost, 4, cap)
    admitted = [[Chunk(0, 0, n, n)] if n else [] for n in lengths]
    slower = crowding(Machine(SHAPE, cost, 4, 2, cap))
    both = max(times.of(admitted), 2 * slower * max(times.busy(admitted))) * 1e-9
    assert both == pytest.approx(clock, rel=0.25)


def test_a_campaign_runs_on_it():
    lengths = [30 * (n % 40) + 20 for n in range(120)]
    campaign = Campaign(
        player(),
        [Policy("rolling"), Policy("lockstep", 2048)],
        lambda seed: [Request(40.0 * n, tokens, 1) for n, tokens in enumerate(lengths)],
        Settings(processes=("poisson",), seeds=(0,), rate_step=1.2),
    )
    rows = campaign.run()
    assert all(row["completed"] == 120 for row in rows if row["what"] != "alone")
    assert all(row["capacity_rps"] for row in rows if row["what"] == "load")
