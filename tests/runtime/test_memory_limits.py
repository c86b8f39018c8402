"""A rank that lacks shared memory for a model: MPI moves the model's rows on all ranks, beside models that share it."""

import re
import resource
from pathlib import Path

import pytest
import torch

from pipemoe.comm.mpi import MpiTransport
from pipemoe.comm.shared.waves import SharedWaves
from pipemoe.errors import ConfigError
from tests.moe_cases import TOKEN_COUNTS, make_layers
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def needs_shared_memory(world):
    if world.shared is None:
        pytest.skip("of ranks that share memory")


def steps(runtime, layers):
    """This rank's sums."""
    found, world = [], runtime.world
    for counts in TOKEN_COUNTS:
        num_tokens = counts[world.rank % len(counts)]
        source = RowsSource(num_tokens, runtime)
        runtime.submit_step([num_tokens] if num_tokens else [], source).result()
        found += source.sums
    return found


def limited(world, monkeypatch, name, most):
    """On the last rank, the memory of waves is asked for under a limit of the system."""
    new_waves, kind = world.new_waves, getattr(resource, name)

    def under_limit(layout):
        before = resource.getrlimit(kind)
        resource.setrlimit(kind, (most(), before[1]))
        try:
            return new_waves(layout)
        finally:
            resource.setrlimit(kind, before)

    if world.rank == world.size - 1:
        monkeypatch.setattr(world, "new_waves", under_limit)


def mapped_now():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.parametrize(
    ("name", "most", "text"),
    [
        ("RLIMIT_FSIZE", lambda: 1 << 12, "cannot be had: .*File too large"),
        ("RLIMIT_AS", mapped_now, "Cannot allocate"),
    ],
)
@pytest.mark.parametrize("mode", ["chunked", "per_rank"])
def test_all_ranks_agree_on_mpi(world, monkeypatch, capfd, name, most, text, mode):
    layers = make_layers(2, world.device, torch.float32)
    sharing = make_runtime(world, layers, mode=mode, debug=True)
    wanted = steps(sharing, layers)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        limited(world, patch, name, most)
        runtime = make_runtime(world, layers, mode=mode, debug=True)
    said = capfd.readouterr().err
    assert isinstance(sharing.transport, SharedWaves) and isinstance(runtime.transport, MpiTransport)
    assert ("no shared memory for this model, so MPI moves its rows: rank" in said) == (world.rank == 0)
    for found in (steps(runtime, layers), steps(sharing, layers), steps(runtime, layers)):
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if world.rank == 0:
        assert re.search(f"rank {world.size - 1}: .*{text}", said), said


def test_who_wants_shared_memory_alone_gets_an_error(world, monkeypatch):
    monkeypatch.setattr(world.shared, "is_wanted", True)
    layers = make_layers(1, world.device, torch.float32)
    with monkeypatch.context() as patch:
        limited(world, patch, "RLIMIT_FSIZE", lambda: 1 << 12)
        with pytest.raises(ConfigError, match=f"rank {world.size - 1}: .*File too large.*lower moe_max_num_tokens"):
            make_runtime(world, layers)
    steps(make_runtime(world, layers), layers)
