"""What `pipemoe tune` measures of experts that leave multiprocessors to transfers, on any device."""

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.contention import BESIDE_TRANSFERS
from pipemoe.plan.cost import SmsCost
from pipemoe.plan.fit import fit_sms
from pipemoe.tune import Tuner
from tests.models.tiny import tiny_config


@pytest.mark.mpi
def test_experts_beside_transfers_are_measured_with_any_number_left(world):
    if min(world.size, world.num_slots) < 2:
        pytest.skip("needs several ranks and slots")
    config = Config(mode="broadcast", moe_max_num_tokens=64, max_tokens_per_rank=16)
    model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=config)
    tuner = Tuner(world, model, most=16, repeats=1)
    usual, none = (tuner.measure_pairs(BESIDE_TRANSFERS, left) for left in (3, 0))
    assert set(usual) == set(none) == {("experts", "dispatch"), ("experts", "combine")}
    assert fit_sms(SmsCost(), usual, usual, usual) == SmsCost(crowded_experts_permille=1000)
    assert fit_sms(SmsCost(), usual, none, none).crowded_experts_permille > 0
