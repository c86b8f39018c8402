"""What one rank issues for a plan: in which order and behind what."""

import pytest

from pipemoe.plan.schedule import MAX_GROUPS
from tests.runtime.noted_run import noted_run


def make_run(rank, hold=frozenset(), num_layers=1, **options):
    """The run, its plan, its log, and the rows of each call of the experts."""
    made = noted_run(rank, hold, num_layers, **options)
    return made.run, made.plan, made.log, made.calls


def test_experts_wait_for_the_dispatch():
    run, _, log, calls = make_run(1)
    run.advance()
    assert log == [
        ("compute 0", ["attend"], []),
        ("compute 1", ["pack 20"], []),
        ("dispatch 2", ["send [2, 0, 1, 3, 4]"], ["compute 1"]),
        ("compute 3", ["experts"], ["dispatch 2"]),
        ("combine 4", ["combine"], ["compute 3"]),
        ("compute 5", ["finish"], ["combine 4"]),
    ]
    assert calls == [105]


def test_a_buffer_is_filled_again_when_it_has_been_read_and_sent():
    """Waves of 35 rows in two buffers, of which the second has this rank's: the third one's are packed behind the
    experts of the first."""
    run, p, log, _ = make_run(4, hold={"compute"}, moe_max_num_tokens=35)
    run.advance()
    assert len(p.cohorts[0].waves) == 3
    sends = [entry for entry in log if entry[0].startswith("dispatch")]
    experts = [entry for entry in log if "experts" in entry[1]]
    pack = next(entry for entry in log if entry[0] == sends[2][2][0])
    assert pack[2] == [experts[0][0]] and pack[1][0].startswith("pack")


@pytest.mark.parametrize("rows", [200, 60, 30])
def test_so_many_groups_are_under_way_at_once(rows):
    hold = {"compute", "dispatch", "combine"}
    run, _, log, calls = make_run(1, hold=hold, num_layers=4, moe_max_num_tokens=rows)
    run.advance()
    assert sum(entry[0].startswith("dispatch") for entry in log) == MAX_GROUPS
    assert calls  # what has been sent is computed
