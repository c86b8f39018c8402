"""No barrier from step to step, proven without a clock: rank 0's attention to a long prompt is held; a hundred short
prompts that come afterwards, on all ranks, are answered before it is let go.

A short prompt that waited for the long one anywhere could never be answered, so completing is the proof.
"""

import threading

import pytest

from pipemoe.models.round_source import RoundSource
from tests.runtime.hold import Hold
from tests.serving.prompts import STEP_TOKENS, WAIT, prompt

pytestmark = pytest.mark.mpi
NUM_SHORT = 100  # over all ranks


def told_by(world, ranks, news):
    """Wait until all of these ranks have told `news` over the side channel; the world's exchanges are busy rolling."""
    if world.size == 1:
        return
    pause = threading.Event()
    while not all(world.conductor.side_channel.peers[rank].news.get(news) for rank in ranks if rank != world.rank):
        assert world.conductor.failure is None
        pause.wait(0.002)


def tell(world, news):
    if world.size > 1:
        world.conductor.side_channel.tell(**{news: True})


@pytest.mark.parametrize(("held_chunk", "beside_rows"), [(0, 0), (2, 0), (0, STEP_TOKENS), (2, STEP_TOKENS)])
def test_short_prompts_are_answered_while_a_long_one_is_held(
    world, model, open_engine, is_right, monkeypatch, held_chunk, beside_rows
):
    if world.num_slots < 2:
        pytest.skip("needs two slots")
    if not model.takes_chunks:
        pytest.skip("this model takes whole sequences only")
    hold, reached, source_type = Hold(world.device), threading.Event(), RoundSource
    long = prompt(4 * STEP_TOKENS + 3, 5)

    def attend(source, cohort, layer, rows=None):
        piece = source._pieces[0]
        if piece.length == len(long) and piece.start == held_chunk * STEP_TOKENS and layer == 1 and not hold.released:
            reached.set()
            hold.wait()
        return plain(source, cohort, layer, rows)

    plain = source_type.attend
    monkeypatch.setattr(source_type, "attend", attend)
    case = f"chunk {held_chunk}, {beside_rows}"
    with open_engine(beside_rows=beside_rows) as engine:
        if world.rank == 0:
            held = engine.submit(long)
            assert reached.wait(WAIT)
            tell(world, f"held at {case}")
        told_by(world, [0], f"held at {case}")
        count = NUM_SHORT // world.size
        short = [prompt(1 + i % STEP_TOKENS, 100 * world.rank + i) for i in range(count)]
        asked = [engine.submit(tokens) for tokens in short]
        answers = [future.result(WAIT) for future in asked]
        tell(world, f"answered beside {case}")
        if world.rank == 0:
            told_by(world, range(1, world.size), f"answered beside {case}")
            assert not held.done()
            hold.release()
            assert is_right(long, held.result(WAIT))
        assert all(is_right(tokens, first) for tokens, first in zip(short, answers))
