"""The combine of a block of columns goes ahead while the next block is computed, proven without a clock: rank 0's
experts are held after their first block until that block has been combined on rank 0. A combine that waited for the
whole output could never end.
"""

import pytest
import torch

from tests.moe_cases import make_layers, norm_ratio
from tests.runtime.hold import Hold
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi


class HeldExperts:
    """Experts that wait after the first block of layer 1."""

    def __init__(self, inner, hold):
        self._inner, self._hold = inner, hold

    def __call__(self, layer, rows, out, scratch, events=()):
        self._inner(
            layer, rows, out, scratch, [_HeldAfter(events[0], self._hold), *events[1:]] if layer == 1 else events
        )


class _HeldAfter:
    def __init__(self, event, hold):
        self._event, self._hold = event, hold

    def record(self):
        self._event.record()
        self._hold.wait()


@pytest.mark.parametrize("mode", ["broadcast", "padded"])
def test_a_block_is_combined_before_the_next_one_is_computed(world, mode, monkeypatch):
    if world.shared is not None:
        pytest.skip("on shared memory all blocks are complete together")
    layers = make_layers(3, world.device, torch.float32)
    runtime = make_runtime(world, layers, mode=mode, combine_blocks=3)
    hold, combined = Hold(world.device), []
    if world.rank == 0:
        for sms_left, experts in runtime.experts_with_free_sms.items():
            monkeypatch.setitem(runtime.experts_with_free_sms, sms_left, HeldExperts(experts, hold))
    combine = world.transport.combine

    def watched(*arguments):
        test = combine(*arguments)
        combined.append(hold.released)
        if len(combined) != 3 + 1:  # the first block of layer 1
            return test
        if test is None:
            hold.release_behind()
            return None

        def done():
            if test():
                hold.release()
            return hold.released

        return done

    monkeypatch.setattr(world.transport, "combine", watched)
    num_tokens = 0 if world.rank == 1 else 20 + world.rank
    source = RowsSource(num_tokens, runtime)
    runtime.submit_step([num_tokens] if num_tokens else [], source).result()
    world.all_gather(b"")  # the conductor is done with the whole plan
    assert len(combined) == 9 and combined[:3] == [False] * 3
    for layer, (inputs, sums) in enumerate(zip(source.inputs, source.sums)):
        assert norm_ratio(sums, layers.oracle(layer, *inputs)) < 1e-5
