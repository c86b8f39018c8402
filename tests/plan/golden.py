"""Recorded cases: what is planned for them, and what is predicted, as short digests. `python -m tests.plan.golden`
records them anew.

A change that is to leave plans as they are must leave these. One that changes plans on purpose records them anew and
says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import MODES, PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS, cpu
from pipemoe.plan.cost.file import cost_of_bytes, read_cost_bytes
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, Plan

RECORDED = Path(__file__).with_name("golden.json")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

# Sequence lengths per rank: the workloads of the results, steps of the trace, and counts that are at some edge.
FACTS = [
    ((4096,), (16,)),
    ((2048,), (2048,)),
    ((8192,), (8192,)),
    ((4096,), (16,), (16,), (16,)),
    ((2048,), (2048,), (2048,), (2048,)),
    ((8192,), (1024,), (512,), ()),
    ((64,), (64,), (64,), (64,)),
    ((1,), (), (), ()),
    ((512,), (16,), (16,), (16,)),
    ((374, 879), (396, 91), (91, 381), (1313, 388)),
    ((242, 209, 394), (1315, 2221), (389, 415, 120), (369, 206)),
    ((4096,), *((16,),) * 7),
    ((2048,),) * 8,
    ((16384,), (1,), (), (300, 200), (7,), (4096, 4096), (64,) * 16, (2048,)),
    ((12000, 30), (5, 5, 5), (8192,), (100,) * 4),
    ((1,), (1,), (1,)),
    ((3000, 3000),),
    (*((64,),) * 15, (16384,)),
]


def _costs() -> Iterator[tuple[str, str, CostModel | None]]:
    """Name, model, cost (None: derived for the ranks at hand from the device that the name begins with)."""
    for device in ("h200", "h100", "cpu"):
        for model in ("small", "qwen3-30b-a3b", "deepseek-v3", "mixtral-8x7b"):
            if (device == "cpu") == (model == "small"):
                yield device, model, None
    for path in sorted(RESULTS.glob("*/cost*.json")):
        yield (
            f"{path.parent.name}/{path.stem}",
            "deepseek-v3" if "deepseek" in path.stem else "qwen3-30b-a3b",
            cost_of_bytes(read_cost_bytes(path), path),
        )


def enumerate_cases() -> Iterator[tuple[str, Plan, CostModel]]:
    """A name, a plan, and the cost that it was made with."""
    for name, model, measured in _costs():
        dimensions = dimensions_of(MODEL_CONFIGS[model])
        shape = dimensions.shape
        device = cpu(2) if name == "cpu" else GPUS.get(name, GPUS["h100"])
        for number, lengths in enumerate(FACTS):
            cost = measured or default_cost(
                device, dimensions, len(lengths), value_bytes=2, sum_bytes=2, ctas=8 if device.num_sms else 0
            )
            for mode in MODES:
                config = PlanConfig(mode=mode, moe_max_num_tokens=4096, max_tokens_per_rank=16384, makespan_budget=0.1)
                yield f"{name} {model} {number} {mode}", plan(Facts(lengths), shape, config, cost), cost


def digest(made: Plan, cost: CostModel) -> str:
    """Of the plan's content, whatever its configuration is called, and of the predicted times."""
    said = [
        *(1, False),  # of forms that plans had when these were recorded, which 17 of them chose
        made.sms_left,
        [[c.slot, c.microbatches, c.waves] for c in made.cohorts],
    ]
    prediction = simulate(made, cost)
    said += [prediction.sequence_ttft, prediction.exposed]
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=6)
    digest.update(made.order.astype("<i4").tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    found = {name: digest(made, cost) for name, made, cost in enumerate_cases()}
    RECORDED.write_text("{\n" + ",\n".join(f'"{name}": "{value}"' for name, value in found.items()) + "\n}\n")
    print(f"{len(found)} cases")
