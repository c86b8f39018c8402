"""Waves that are computed as they arrive, over the ranks of a world: a rank's own rows while the others' come."""

import pytest
import torch

from pipemoe import Config, PipelinedMoE, load_model
from pipemoe.plan.config import MODES
from pipemoe.runtime.run import Only
from tests.models.tiny import VOCAB, tiny_config
from tests.moe_cases import NUM_EXPERTS, TOKEN_COUNTS, TOP_K, make_layers, make_rows, norm_ratio
from tests.runtime.hold import HOLD_SECONDS
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi
NUM_LAYERS = 3


def dtype_of(world):
    return torch.bfloat16 if world.device.type == "cuda" else torch.float32


def bound_of(world):
    return 1e-2 if world.device.type == "cuda" else 1e-5


def sums(world, layers, counts, **options):
    """What PipelinedMoE gives this rank of each layer."""
    config = Config(**{"moe_max_num_tokens": 24, "max_tokens_per_rank": 160, "debug": True, **options})
    moe = PipelinedMoE(world, layers.local(world.size, world.rank), num_experts=NUM_EXPERTS, top_k=TOP_K, config=config)
    found = []
    for case, of_ranks in enumerate(counts):
        tokens = of_ranks[world.rank % len(of_ranks)]
        with moe.step(tokens) as step:
            for layer in range(NUM_LAYERS):
                rows = make_rows(tokens, 100 * case + 10 * layer + world.rank, world.device, dtype_of(world))
                found.append((rows, step(layer, *rows)))
    return found


@pytest.mark.parametrize(
    ("mode", "combine", "blocks"),
    [*((mode, "reduce", 1) for mode in MODES), *((mode, "gather", 2) for mode in ("padded", "chunked", "auto"))],
)
def test_the_sums_are_right(world, mode, combine, blocks):
    """Every distribution of tokens, zero-token ranks included; ranks' logs are compared with the plan (debug)."""
    layers = make_layers(NUM_LAYERS, world.device, dtype_of(world))
    found = sums(world, layers, TOKEN_COUNTS, mode=mode, combine=combine, combine_blocks=blocks, arrivals=True)
    for number, (rows, of_rows) in enumerate(found):
        assert norm_ratio(of_rows, layers.oracle(number % NUM_LAYERS, *rows)) < bound_of(world)


@pytest.mark.parametrize("mode", ["broadcast", "chunked", "auto"])
def test_deterministic_sums_are_the_same_bits_as_without(world, mode):
    layers = make_layers(NUM_LAYERS, world.device, dtype_of(world))
    on, off = (
        sums(world, layers, TOKEN_COUNTS, mode=mode, deterministic=True, arrivals=arrivals)
        for arrivals in (True, False)
    )
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(on, off, strict=True))


@pytest.mark.parametrize("mode", ["chunked", "broadcast", "auto"])
def test_a_model_gives_the_same_first_tokens(world, mode):
    def prefill(arrivals):
        config = Config(mode=mode, moe_max_num_tokens=40, max_tokens_per_rank=128, debug=True, arrivals=arrivals)
        model = load_model(tiny_config("qwen3_moe"), world, dtype=dtype_of(world), seed=3, config=config)
        g = torch.Generator().manual_seed(world.rank)
        steps = [[30, 1, 8], [], [60, 20], [5]]
        return [
            model.prefill(
                [
                    torch.randint(0, VOCAB, (n,), generator=g).tolist()
                    for n in (lengths if (number + world.rank) % 3 else [])
                ]
            )
            for number, lengths in enumerate(steps)
        ]

    assert [step.first_tokens for step in prefill(True)] == [step.first_tokens for step in prefill(False)]


class OneResult(RowsSource):
    """Sums go to one place in all layers: nothing attends where only the exchange runs."""

    def results(self, cohort, start, stop):
        return self.sums[0][start:stop]


@pytest.mark.parametrize(
    "only", [Only(computation=False), Only(communication=False)], ids=["exchange alone", "experts alone"]
)
def test_one_side_alone(world, only):
    layers = make_layers(NUM_LAYERS, world.device, dtype_of(world))
    runtime = make_runtime(world, layers, mode="chunked", arrivals=True)
    runtime.submit_step([50], OneResult(50, runtime), only=only).result()
    source = RowsSource(50, runtime)  # and then all of it, in the same buffers
    runtime.submit_step([50], source).result()
    assert source.plan.arrivals == (world.shared is None) and len(source.plan.cohorts[0].waves) > 1
    for layer, (inputs, found) in enumerate(zip(source.inputs, source.sums)):
        assert norm_ratio(found, layers.oracle(layer, *inputs)) < bound_of(world)
    world.all_gather(b"")


def test_model_code_that_fails_leaves_the_others_their_sums(world):
    def before_attend(cohort, layer):
        if world.rank == 0 and layer == 1:
            raise ValueError("planted")

    layers = make_layers(NUM_LAYERS, world.device, dtype_of(world))
    runtime = make_runtime(world, layers, mode="broadcast", arrivals=True)
    source = RowsSource(5 + world.rank, runtime, before_attend)
    future = runtime.submit_step([5 + world.rank], source)
    if world.rank == 0:
        with pytest.raises(Exception, match="planted"):
            future.result()
    else:
        future.result()
        assert norm_ratio(source.sums[2], layers.oracle(2, *source.inputs[2])) < bound_of(world)
    with pytest.raises(Exception, match="planted"):
        runtime.submit_step([3], RowsSource(3, runtime)).result()
    runtime.submit_step([3], RowsSource(3, runtime)).result()


def test_own_rows_are_computed_before_the_dispatch_is_complete(world, monkeypatch):
    """Proven without a clock: no dispatch is complete on a rank before its experts have had their own rows. Experts
    that waited for the dispatch could never begin."""
    if world.device.type == "cuda" or world.size < 2 or world.shared is not None:
        pytest.skip("of several ranks on the host that send rows (PIPEMOE_HOST_TRANSPORT=mpi)")
    layers = make_layers(NUM_LAYERS, world.device, torch.float32)
    runtime = make_runtime(world, layers, mode="broadcast", arrivals=True)
    computed, sent, dispatch = [], [0], world.transport.dispatch
    num_tokens = 10 + world.rank

    def noting(experts):
        def call(layer, rows, *rest):
            experts(layer, rows, *rest)
            computed.append((layer, len(rows)))

        return call

    def held(slot, buffer, wave, exchange, rows):
        test = dispatch(slot, buffer, wave, exchange, rows)
        layer, sent[0] = sent[0], sent[0] + 1
        return lambda: test() and (layer, num_tokens) in computed

    monkeypatch.setattr(world.transport, "dispatch", held)
    runtime.experts_with_free_sms = {left: noting(e) for left, e in runtime.experts_with_free_sms.items()}
    source = RowsSource(num_tokens, runtime)
    runtime.submit_step([num_tokens], source).result(HOLD_SECONDS)
    world.all_gather(b"")
    others = sum(10 + rank for rank in range(world.size)) - num_tokens
    assert computed == [(layer, rows) for layer in range(NUM_LAYERS) for rows in (num_tokens, others)]
    for layer, (inputs, found) in enumerate(zip(source.inputs, source.sums)):
        assert norm_ratio(found, layers.oracle(layer, *inputs)) < 1e-5
