"""No barrier, proven without a clock: rank 0's first attention is held until another cohort has finished its last
layer.

A cohort that waited for rank 0 anywhere could never finish, so completing is the proof. (That lockstep modes cannot
pass is shown in tests/faults: there the watchdog must end the ranks.)
"""

import pytest
import torch

from pipemoe.plan.schedule import OpKind
from tests.moe_cases import make_layers, norm_ratio
from tests.runtime.hold import Hold
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi
NUM_LAYERS = 12  # more than the groups that may be under way at once


@pytest.mark.parametrize("mode", ["per_rank", "pipelined"])
def test_a_cohort_finishes_all_layers_while_another_has_not_begun(world, mode):
    if world.size < 2 or world.num_slots < 2:
        pytest.skip("needs two ranks, and two cohorts under way at once")
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    layers = make_layers(NUM_LAYERS, world.device, dtype)
    runtime = make_runtime(world, layers, mode=mode)
    tokens = 100 if world.rank == 0 else 4 + world.rank
    hold = Hold(world.device)
    events = []

    def before_attend(cohort, layer):
        if world.rank == 0 and layer == 0:
            hold.wait()

    def on_done(op):
        events.append(op)
        others = source.plan.cohorts[op.cohort].tokens_of(0) == 0
        if world.rank == 0 and op.kind is OpKind.FINISH and others and not hold.released:
            assert not any(o.kind is OpKind.ATTEND and source.plan.cohorts[o.cohort].tokens_of(0) for o in events)
            hold.release()

    source = RowsSource(tokens, runtime, before_attend)
    runtime.submit_step([tokens], source, on_done=on_done).result()
    world.all_gather(b"")  # the conductor is done with the whole plan
    if world.rank == 0:
        assert hold.released
    for layer, (inputs, sums) in enumerate(zip(source.inputs, source.sums)):
        assert norm_ratio(sums, layers.oracle(layer, *inputs)) < (1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_two_slots_come_in_opposite_order_on_two_ranks(world):
    """In every layer a rank lets its second cohort attend first, or its first one, in turn with its neighbour. If one
    slot's waves had to wait for the other's anywhere, two ranks would wait for each other.
    """
    if world.size != 2 or world.num_slots < 2:
        pytest.skip("needs two ranks (with more, no cohort has tokens of all), and two cohorts under way at once")
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    layers = make_layers(NUM_LAYERS, world.device, dtype)
    runtime = make_runtime(world, layers, mode="two_batch", whole_sequences=True)
    first = world.rank % 2
    holds = [Hold(world.device) for _ in range(NUM_LAYERS)]
    begun = []

    def before_attend(cohort, layer):
        if cohort == first:
            holds[layer].release_behind()
        else:
            holds[layer].wait()
        begun.append((cohort, layer))

    lengths = [7 + world.rank, 9]
    source = RowsSource(sum(lengths), runtime, before_attend)
    runtime.submit_step(lengths, source).result()
    world.all_gather(b"")
    assert [cohort.slot for cohort in source.plan.cohorts] == [0, 1]
    assert all(cohort.tokens_of(rank) for cohort in source.plan.cohorts for rank in range(world.size))
    if world.device.type == "cpu":  # on a GPU work is enqueued in the plan's order
        assert all(begun.index((first, layer)) < begun.index((1 - first, layer)) for layer in range(NUM_LAYERS))
    for layer, (inputs, sums) in enumerate(zip(source.inputs, source.sums)):
        assert norm_ratio(sums, layers.oracle(layer, *inputs)) < (1e-2 if dtype is torch.bfloat16 else 1e-5)
