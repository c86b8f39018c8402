"""Rolling steps in a simulated world: whatever comes when, every sequence is admitted once, in order, in time, and all
ranks end.
"""

from __future__ import annotations

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipemoe.rolling.admission import POLICIES, RollingSettings
from pipemoe.rolling.verify import verify_rolling
from tests.rolling.simulated_world import Request, SimulatedWorld

SMALL = RollingSettings(max_tokens_per_round=16, max_round_rows=24, chunk_tokens=8, most_rounds_waited=4)


@st.composite
def rolling_settings(draw) -> RollingSettings:
    tokens = draw(st.integers(1, 40))
    return RollingSettings(
        tokens,
        draw(st.integers(tokens, 4 * tokens)),
        draw(st.integers(1, tokens)),
        draw(st.integers(1, 8)),
        draw(st.sampled_from(POLICIES)),
        draw(st.booleans()),
        fixed_rows=draw(st.sampled_from((0, 3, 50))),
        shares_cores=draw(st.booleans()),
        pairs_per_row=draw(st.sampled_from((0, 1, 50))),
        beside_rows=draw(st.sampled_from((0, 1, 9, 10**9))),
    )


@st.composite
def worlds(draw) -> SimulatedWorld:
    chosen = draw(rolling_settings())
    num_ranks, num_slots = draw(st.integers(1, 16)), chosen.num_slots(draw(st.integers(1, 3)))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    world = SimulatedWorld(
        num_ranks,
        num_slots,
        chosen,
        draw(st.lists(st.integers(0, 60), min_size=1, max_size=12)),
        draw(st.lists(st.integers(0, 2), min_size=1, max_size=12)),
        draw(st.integers(1, 20)),
        lambda slot, number: lengths[(slot + number) % len(lengths)],
        draw(st.integers(0, 50)),
    )
    for _ in range(draw(st.integers(0, 30))):
        most = min(100, 10 * chosen.chunk_tokens) if chosen.cuts else chosen.max_tokens_per_round
        world.submit(
            Request(
                draw(st.integers(0, 300)),
                draw(st.integers(0, num_ranks - 1)),
                draw(st.integers(1, most)),
                draw(st.sampled_from((0, 0, 0, -1, 5))),
                draw(st.one_of(st.none(), st.integers(0, 60))),
            )
        )
    for rank in range(num_ranks):
        world.close(rank, draw(st.integers(0, 600)))
    return world


@settings(deadline=None, max_examples=60, phases=[Phase.generate])  # shrinking takes minutes
@given(worlds())
def test_every_sequence_is_admitted_once_in_order_and_all_ranks_end(world):
    world.run()
    verify_rolling(world.history, world.settings, world.num_slots, is_complete=True, cancelled=world.cancelled)
    submitted = {(rank, sequence) for rank, n in enumerate(world._next_sequence) for sequence in range(n)}
    assert sorted(world.given_back) == sorted(submitted)  # each once
    assert set(world.done) >= submitted - world.cancelled
