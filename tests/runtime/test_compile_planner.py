"""Who compiles the planner at set-up: one rank of a host where the others then find it on disk, else all at once."""

import pytest

from pipemoe.config import Config
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan.schedule import ModelShape
from pipemoe.runtime import plans

pytestmark = pytest.mark.mpi


def compile_on(world) -> None:
    shape = ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=2, num_layers=2)
    plans.compile_on_hosts(world, shape, Config(), CostModel())


def test_the_others_wait_for_the_first_rank_of_their_host(world, monkeypatch, tmp_path):
    marker = tmp_path / "compiled"
    marker = type(marker)(world.all_gather(str(marker).encode())[0].decode())
    found = []

    def compile_planner(num_ranks, *_):
        assert num_ranks == world.size
        found.append(marker.exists())
        marker.touch()

    monkeypatch.setattr(plans, "compile_planner", compile_planner)
    monkeypatch.setattr(plans, "planner_is_kept", lambda: True)
    compile_on(world)
    assert found == [world.rank > 0]


def test_all_compile_at_once_where_nothing_can_be_kept(world, monkeypatch):
    met = []
    # Ranks that took turns would never meet in here: the first would wait for the others, which wait for it.
    monkeypatch.setattr(plans, "compile_planner", lambda *_: met.append(world.all_gather(b"here", "compiling")))
    monkeypatch.setattr(plans, "planner_is_kept", lambda: False)
    compile_on(world)
    assert met == [[b"here"] * world.size]
