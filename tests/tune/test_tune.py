"""What `pipemoe tune` measures of experts that leave multiprocessors to transfers, on any device; what it refuses, and
says.
"""

import argparse
import errno
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import pipemoe
from pipemoe import Config, load_model
from pipemoe.cli import main
from pipemoe.contention import BESIDE_TRANSFERS
from pipemoe.errors import InputError
from pipemoe.model_facts.facts import cut_config, read_facts
from pipemoe.model_facts.known_models import model_config
from pipemoe.plan.cost.model import ContentionCost, CostModel, SmsCost
from pipemoe.tune import command
from pipemoe.tune.command import accuracy
from pipemoe.tune.fit import fit_sms
from pipemoe.tune.tuner import Tuner, sequences_text
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
    steps = [
        (config.in_world(world.num_slots), ((tokens,),) * world.size, [tokens * 1e6] * world.size) for tokens in (3, 16)
    ]
    head, columns, *lines = Tuner(world, model, most=16, repeats=1).compared(model.runtime.cost, steps)
    assert "predicted (measured)" in head and columns.split()[0] == "mode"
    assert len({len(line) for line in (columns, *lines)}) == 1
    assert [re.search(r"\( *([\d.]+)\)", line).group(1) for line in lines] == ["3.0", "16.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "15"], "at least 16"),
        (["--layers", "1"], "at least 2"),
        (["--model", "missing.json"], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(capsys, tmp_path, arguments, message):
    assert main(["tune", "--model", "small", "--out", str(tmp_path / "cost.json"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("pipemoe tune: ") and error.count("\n") == 1


@pytest.fixture
def quick_tune(world, monkeypatch):
    """command.run(...) in this world, on every rank, that measures nothing: quick_tune(path)."""

    class NoTuner:
        def __init__(self, *_):
            pass

        def __getattr__(self, name):
            return lambda *_: 0.1 if name == "log_error" else []

    def run(path):
        for name, stand_in in (
            ("Tuner", NoTuner),
            ("fit_cost", lambda *_: CostModel()),
            ("calibrate", lambda cost, _: cost),
            ("fit_contention", lambda _: ContentionCost()),
            ("fit_sms", lambda sms, *_: sms),
        ):
            monkeypatch.setattr(command, name, stand_in)
        monkeypatch.setattr(pipemoe, "init", lambda *_, **__: nullcontext(world))
        parser = argparse.ArgumentParser()
        command.add_tune_parser(parser.add_subparsers(), int)
        arguments = [
            "tune",
            "--model",
            "small",
            "--layers",
            "2",
            "--max-tokens",
            "16",
            "--dtype",
            "float32",
            "--out",
            str(path),
        ]
        return command.run(parser.parse_args(arguments))

    return run


@pytest.mark.mpi
def test_the_file_is_written_by_rank_0(world, quick_tune, tmp_path_factory):
    path = tmp_path_factory.mktemp(f"costs{world.rank}") / "cost.json"
    assert quick_tune(path) == 0
    assert path.exists() == (world.rank == 0)


@pytest.mark.mpi
def test_a_model_plans_by_the_file(world, quick_tune, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp(f"costs{world.rank}"))
    path = Path(world.all_gather(folder.encode(), "where the file is")[0].decode(), "cost.json")
    assert quick_tune(path) == 0  # writes CostModel()
    small = model_config("small")
    cut = cut_config(small, read_facts(small).layers_for(3))  # another number of layers: their costs are the same
    settings = {"moe_max_num_tokens": 64, "max_tokens_per_rank": 32}
    costs = {
        cost: load_model(
            cut, world, random_weights=True, config=Config(cost=cost, **settings), dtype=torch.float32
        ).runtime.cost
        for cost in (path, None)
    }
    assert costs[path].attend == CostModel().attend != costs[None].attend


@pytest.mark.mpi
def test_a_full_disk_is_an_error_on_every_rank(world, quick_tune, monkeypatch, tmp_path_factory):
    """Minutes of measuring are lost, but no rank waits for one that has ended, and half a file is not left."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path_factory.mktemp(f"costs{world.rank}")
    monkeypatch.setattr("pipemoe.output_path.os.fsync", full)
    with pytest.raises(InputError, match="rank 0: .*cost.json: No space left on device; it was not written"):
        quick_tune(folder / "cost.json")
    assert list(folder.iterdir()) == []
    world.all_gather(b"", "still here")


def test_sequences_are_named_where_a_rank_has_several():
    assert sequences_text(((64,), ())) == "64, 0"
    assert sequences_text(((4,) * 16, (3,))) == "16 x 4, 3"


def test_a_poor_fit_is_said():
    (good,) = accuracy(math.log(1.32), math.log(1.2))
    assert "off by 32 % on average" in good and good.endswith("measured times, 20 %")
    _, poor = accuracy(math.log(1.4), math.log(1.3))
    assert "poor" in poor and "busy" in poor
