"""Plans and predictions stay what they were: recorded ones of random steps, in recorded_steps.json.

A change that is meant to change plans records them anew: python -m tests.plan.test_recorded_steps
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipemoe.plan import planner
from pipemoe.plan.auto.choice import auto_candidates
from pipemoe.plan.clock.order import merge_orders
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import CoresCost, CostModel, ExpertsCost, HostCost, rates_of
from pipemoe.plan.planner import compile_planner, plan
from pipemoe.plan.schedule import Facts, ModelShape

FILE = Path(__file__).with_name("recorded_steps.json")


def found(case: dict) -> dict:
    """What the case gives now."""
    facts = Facts(tuple(map(tuple, case["lengths"])))
    shape, config = ModelShape(**case["shape"]), PlanConfig(**case["config"])
    cost = cost_of(case)
    made = plan(facts, shape, config, cost)
    digest = hashlib.sha256(repr((made.cohorts, made.sms_left)).encode())
    digest.update(np.ascontiguousarray(made.order, "<i4").tobytes())
    prediction = simulate(made, cost)
    result = {"plan": digest.hexdigest()[:32], "ttft": list(prediction.ttft), "exposed": list(prediction.exposed)}
    if config.mode == "auto":
        candidates = auto_candidates(facts, shape, config, cost)
        result["candidates"] = [[c.index, c.sms_left, c.mean, c.slowest, c.p50, c.chosen] for c in candidates]
    return result


def cost_of(case: dict) -> CostModel:
    return CostModel(
        experts=ExpertsCost(**case["experts"]), cores=CoresCost(**case["cores"]), host=HostCost(**case["host"])
    )


def cases() -> list[dict]:
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("number", range(len(cases())))
def test_plans_stay_the_same(number):
    case = cases()[number]
    assert found(case) == case["found"]


def test_one_cohort_is_planned_as_compiled_code_would():
    """_tables_of_one is _tables for one cohort, without the costs."""
    compared = 0
    for case in cases():
        config, cost = PlanConfig(**case["config"]), cost_of(case)
        facts, shape = Facts(tuple(map(tuple, case["lengths"]))), ModelShape(**case["shape"])
        table = np.array(
            [(0, rank, 0, tokens) for rank, tokens in enumerate(facts.tokens) if tokens], np.int64
        ).reshape(-1, 4)
        for padded_rows in (0, max(facts.tokens)) if len(table) else ():
            rows = facts.num_ranks * padded_rows or config.max_wave_rows(facts.num_ranks)
            limits = (
                rows,
                config.num_slots,
                shape.num_layers,
                padded_rows,
                -1,
            )
            one = planner._tables_of_one(table, facts.num_ranks, rates_of(cost), limits)
            *of_all, wrong = planner._tables(
                table, *facts.flat_boundaries, rates_of(cost), shape.num_experts, shape.top_k, limits, False, 0
            )
            assert wrong == (-1, -1)
            of_all[3] = merge_orders(of_all[3], of_all[2], shape.num_layers)
            for mine, theirs in zip(one, of_all, strict=True):
                assert np.array_equal(mine, theirs)
            assert one[3].dtype == np.int32 and type(one[4]) is int
            compared += 1
    assert compared > 30


@pytest.mark.parametrize(
    ("mode", "num_ranks", "most_tokens", "needed"),
    [
        ("auto", 1, 4, {"search", "_tables"}),
        ("auto", 3, 1, {"search", "_tables"}),
        ("auto", 1, 1, {"search"}),
        ("two_batch", 1, 4, {"_tables"}),
        ("per_rank", 2, 1, {"_tables"}),
        ("pipelined", 2, 4, {"_tables"}),
        ("pipelined", 1, 4, set()),
        ("chunked", 2, 4, set()),
    ],
)
def test_what_steps_may_need_is_compiled_before_them(mode, num_ranks, most_tokens, needed, monkeypatch):
    called = set()
    from pipemoe.plan.auto import choice as auto

    for module, name in ((planner, "_tables"), (auto, "search")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments, f=function, n=name: (called.add(n), f(*arguments))[1])
    shape = ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=2, num_layers=2)
    compile_planner(num_ranks, shape, PlanConfig(mode=mode, max_tokens_per_rank=most_tokens), CostModel())
    assert called == needed


if __name__ == "__main__":
    recorded = [{**case, "found": found(case)} for case in cases()]
    FILE.write_text("[\n" + ",\n".join(json.dumps(case) for case in recorded) + "\n]\n")
