"""Work that needs no other rank runs once per layer and cohort that holds tokens of this rank, and the sums stay
right.
"""

import pytest
import torch

from pipemoe.plan.config import MODES
from tests.moe_cases import make_layers, norm_ratio
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi
NUM_LAYERS, NUM_TOKENS = 3, 50  # more than a wave


class BusySource(RowsSource):
    has_side_work = True

    def __init__(self, num_tokens, runtime):
        super().__init__(num_tokens, runtime)
        self.done = []

    def side_work(self, cohort):
        self.done.append((cohort, self._layer[cohort]))


@pytest.mark.parametrize("mode", MODES)
def test_side_work_runs_once_per_layer(world, mode):
    layers = make_layers(NUM_LAYERS, world.device, torch.float32)
    runtime = make_runtime(world, layers, mode=mode)
    num_tokens = NUM_TOKENS if world.rank % 2 == 0 else 0
    source = BusySource(num_tokens, runtime)
    runtime.submit_step([num_tokens] if num_tokens else [], source).result()
    own = [c for c, cohort in enumerate(source.plan.cohorts) if cohort.tokens_of(world.rank)]
    assert sorted(source.done) == [(c, layer) for c in own for layer in range(NUM_LAYERS)]
    for layer in range(NUM_LAYERS if num_tokens else 0):
        assert norm_ratio(source.sums[layer], layers.oracle(layer, *source.inputs[layer])) < 1e-5
    world.all_gather(b"")
