"""What one rank issues for a plan whose waves are computed as they arrive, in which order and behind what."""

import pytest

from pipemoe.plan.arrivals import groups_of
from pipemoe.plan.schedule import MAX_GROUPS
from tests.runtime.noted_run import noted_run


def make_run(rank, hold=frozenset(), num_layers=1, **options):
    """The run, its plan, and its log."""
    made = noted_run(rank, hold, num_layers, **{"arrivals": True, **options})
    return made.run, made.plan, made.log


def test_own_rows_first_and_the_word_behind_each_group():
    run, _, log = make_run(1)
    run.advance()
    assert log == [
        ("compute 0", ["attend"], []),
        ("expect", [15, 20, 30, 40]),
        ("compute 2", ["pack 20", "arrived 1"], []),
        ("dispatch 3", ["send [2, 0, 1, 3]", "arrived 0", "arrived 2", "send [4]", "arrived 3"], ["compute 2"]),
        ("compute 4", ["experts"], []),  # not behind the dispatch
        ("combine 5", ["combine"], ["compute 4"]),
        ("compute 6", ["finish"], ["combine 5"]),
    ]


def test_a_buffer_is_filled_again_when_it_has_been_read_and_sent():
    """Waves of 35 rows in two buffers: the third one's rows are packed behind the first one's experts, and behind its
    dispatch, which experts with all rows of their own do not wait for."""
    run, p, log = make_run(4, hold={"compute"}, moe_max_num_tokens=35)
    run.advance()
    assert len(p.cohorts[0].waves) == 3
    work = [entry for entry in log if entry[0] != "expect"]
    sends = [entry for entry in work if entry[0].startswith("dispatch")]
    experts = [entry for entry in work if entry[1] == ["experts"]]
    pack = next(entry for entry in work if entry[0] == sends[2][2][0])
    assert pack[2] == sorted([experts[0][0], sends[0][0]]) and pack[1][0].startswith("pack")
    assert all(sends[0][0] not in waits for _, _, waits in experts)


def test_without_arrivals_experts_wait_for_the_dispatch():
    run, p, log = make_run(1, hold={"compute"}, arrivals=None)
    run.advance()
    assert not p.arrivals and log[1:4] == [
        ("compute 1", ["pack 20"], []),
        ("dispatch 2", ["send [2, 0, 1, 3, 4]"], ["compute 1"]),
        ("compute 3", ["experts"], ["dispatch 2"]),
    ]


@pytest.mark.parametrize("rows", [200, 60, 30])
def test_so_many_groups_are_under_way_at_once(rows):
    hold = {"compute", "dispatch", "combine"}
    run, p, log = make_run(1, hold=hold, num_layers=4, moe_max_num_tokens=rows)
    run.advance()
    sent = [word for entry in log if entry[0].startswith("dispatch") for word in entry[1] if word.startswith("send")]
    most = max(len(groups_of(p, 0, w)) for w in range(len(p.cohorts[0].waves)))
    assert len(sent) <= MAX_GROUPS and sum(entry[0].startswith("dispatch") for entry in log) == MAX_GROUPS // most
    assert [entry for entry in log if entry[1] == ["experts"]]  # what has been sent is computed
