"""What `pipemoe tune` measures of experts that leave multiprocessors to transfers, on any device; what it refuses, and says."""

import math
import re

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.cli import main
from pipemoe.contention import BESIDE_TRANSFERS
from pipemoe.plan.cost import SmsCost
from pipemoe.plan.fit import fit_sms
from pipemoe.tune import Tuner, accuracy, sequences_text
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


@pytest.mark.mpi
def test_predictions_beside_measured_steps_are_a_table(world):
    config = Config(mode="broadcast", moe_max_num_tokens=64, max_tokens_per_rank=16)
    model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=config)
    steps = [(config.in_world(world.num_slots), ((tokens,),) * world.size, [tokens * 1e6] * world.size) for tokens in (3, 16)]
    head, columns, *lines = Tuner(world, model, most=16, repeats=1).compared(model.runtime.cost, steps)
    assert "predicted (measured)" in head and columns.split()[0] == "mode"
    assert len({len(line) for line in (columns, *lines)}) == 1
    assert [re.search(r"\( *([\d.]+)\)", line).group(1) for line in lines] == ["3.0", "16.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--max-tokens", "15"], "at least 16"), (["--layers", "1"], "at least 2"), (["--model", "missing.json"], "No such file")],
)
def test_what_cannot_be_measured_is_refused_at_once(capsys, tmp_path, arguments, message):
    assert main(["tune", "--model", "small", "--out", str(tmp_path / "cost.json"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("pipemoe tune: ") and error.count("\n") == 1


def test_sequences_are_named_where_a_rank_has_several():
    assert sequences_text(((64,), ())) == "64, 0"
    assert sequences_text(((4,) * 16, (3,))) == "16 x 4, 3"


def test_a_poor_fit_is_said():
    (good,) = accuracy(math.log(1.32), math.log(1.2))
    assert "off by 32 % on average" in good and good.endswith("measured times, 20 %")
    _, poor = accuracy(math.log(1.4), math.log(1.3))
    assert "poor" in poor and "busy" in poor
