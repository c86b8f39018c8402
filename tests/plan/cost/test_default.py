"""Costs derived from peak rates, beside what steps took."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "h200" / "forward.json"
ROWS = [row for row in json.loads(RESULTS.read_text())["rows"] if row["impl"] == "pipemoe"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['tokens']}-{row['phase']}")
def test_one_ranks_steps_are_predicted(row):
    """They were fitted to these; whoever makes steps faster fits them again."""
    dimensions = dimensions_of(MODEL_CONFIGS[row["model"]])
    cost = default_cost(GPUS["h200"], dimensions, 1, value_bytes=2, sum_bytes=2)
    cost = replace(cost, host=replace(cost.host, graph_rows=4096))
    config = PlanConfig(mode="broadcast", max_tokens_per_rank=8192, moe_max_num_tokens=8192)
    (ttft,) = simulate(plan(Facts(((row["tokens"],),)), dimensions.shape, config, cost), cost).ttft
    assert ttft / 1e6 == pytest.approx(row["ttft_ms"], rel=0.1)
