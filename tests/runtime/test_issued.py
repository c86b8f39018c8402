"""What issuing costs is counted, for every step."""

import pytest
import torch

from tests.moe_cases import make_layers
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi
NUM_LAYERS = 3


def test_layers_of_cohorts_and_seconds_are_counted(world):
    runtime = make_runtime(world, make_layers(NUM_LAYERS, world.device, torch.float32), mode="per_rank")
    assert runtime.issued == (0.0, 0)
    for num_tokens in (5, 40):
        before, source = runtime.issued, RowsSource(num_tokens, runtime)
        runtime.submit_step([num_tokens], source).result()
        world.all_gather(b"", "the end of the step on every rank")
        seconds, layers = (after - b for after, b in zip(runtime.issued, before, strict=True))
        assert layers == NUM_LAYERS * len(source.plan.cohorts)
        assert 0 < seconds < 60
