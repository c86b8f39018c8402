"""Waves that are computed as they arrive, over the ranks of a world: on the host by experts that wait in their thread,
on GPUs by the kernels that do (skipped where these cannot be, as with several ranks on one GPU)."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe import Config, PipelinedMoE, load_model
from pipemoe.errors import ConfigError
from pipemoe.plan.config import MODES
from pipemoe.runtime import arriving
from pipemoe.runtime.run import Only
from tests.models.tiny import VOCAB, tiny_config
from tests.moe_cases import NUM_EXPERTS, TOKEN_COUNTS, TOP_K, make_layers, make_rows, norm_ratio
from tests.runtime.sources import RowsSource, make_runtime
from tests.runtime.waiting_experts import WaitingExperts

pytestmark = pytest.mark.mpi
NUM_LAYERS = 3


@pytest.fixture
def waiting(world, monkeypatch):
    """Experts that wait on the host; `began` gets layer and parts of each call. On a GPU: the real ones, or a skip."""
    found = SimpleNamespace(began=lambda layer, parts: None, made=[])
    if world.device.type == "cuda":
        skip_without_arrivals(world)
        return found
    if world.shared is not None:
        pytest.skip("experts on shared memory take waves whole; PIPEMOE_HOST_TRANSPORT=mpi has arrivals")

    def waiting_experts(world, experts):
        found.made.append(WaitingExperts(experts, lambda layer, parts: found.began(layer, parts)))
        return found.made[-1]

    monkeypatch.setattr(arriving, "refusal", lambda world, experts, config: None)
    monkeypatch.setattr(arriving, "speed_permille", lambda world, experts: 900)
    monkeypatch.setattr("pipemoe.runtime.set_up.arriving_experts", waiting_experts)
    return found


def skip_without_arrivals(world):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if world.block_room is not None and world.block_room.ranks_on_device > 1:
        pytest.skip("needs a GPU for each rank")


def dtype_of(world):
    return torch.bfloat16 if world.device.type == "cuda" else torch.float32


def sums(world, layers, counts, **options):
    """What PipelinedMoE gives this rank of each layer, and the oracle's; and the plan."""
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
def test_the_same_bits_with_arrivals_and_without(world, waiting, mode, combine, blocks):
    """Every distribution of tokens, zero-token ranks included; ranks' logs are compared with the plan (debug)."""
    layers = make_layers(NUM_LAYERS, world.device, dtype_of(world))
    on, off = (
        sums(world, layers, TOKEN_COUNTS, mode=mode, combine=combine, combine_blocks=blocks, arrivals=arrivals)
        for arrivals in (True, False)
    )
    bound = 1e-2 if world.device.type == "cuda" else 1e-5
    for number, ((rows, with_arrivals), (_, without)) in enumerate(zip(on, off, strict=True)):
        assert torch.equal(with_arrivals, without)
        if number < NUM_LAYERS:
            assert norm_ratio(with_arrivals, layers.oracle(number % NUM_LAYERS, *rows)) < bound


@pytest.mark.parametrize("mode", ["broadcast", "chunked", "auto"])
def test_deterministic_sums_are_the_same_bits_too(world, waiting, mode):
    layers = make_layers(NUM_LAYERS, world.device, dtype_of(world))
    on, off = (
        sums(world, layers, TOKEN_COUNTS, mode=mode, deterministic=True, arrivals=arrivals)
        for arrivals in (True, False)
    )
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(on, off, strict=True))


@pytest.mark.parametrize("mode", ["padded", "chunked", "broadcast", "auto"])
def test_a_model_gives_the_same_first_tokens(world, waiting, mode):
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
def test_one_side_alone(world, waiting, only):
    layers = make_layers(NUM_LAYERS, world.device, dtype_of(world))
    runtime = make_runtime(world, layers, mode="chunked", arrivals=True)
    runtime.submit_step([50], OneResult(50, runtime), only=only).result()
    source = RowsSource(50, runtime)  # and then all of it, in the same buffers
    runtime.submit_step([50], source).result()
    assert source.plan.arrivals and len(source.plan.cohorts[0].waves) > 1
    for layer, (inputs, found) in enumerate(zip(source.inputs, source.sums)):
        assert norm_ratio(found, layers.oracle(layer, *inputs)) < (1e-2 if world.device.type == "cuda" else 1e-5)
    world.all_gather(b"")


def test_model_code_that_fails_leaves_the_others_their_sums(world, waiting):
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
        assert norm_ratio(source.sums[2], layers.oracle(2, *source.inputs[2])) < (
            1e-2 if world.device.type == "cuda" else 1e-5
        )
    with pytest.raises(Exception, match="planted"):
        runtime.submit_step([3], RowsSource(3, runtime)).result()
    runtime.submit_step([3], RowsSource(3, runtime)).result()


def test_memory_is_counted_and_only_taken_where_plans_may_arrive(world, waiting):
    layers = make_layers(1, world.device, dtype_of(world))
    off, on = (make_runtime(world, layers, mode="chunked", arrivals=arrivals) for arrivals in (None, True))
    more = sum(arrivals.num_bytes for slot in on._workspace.slots for arrivals in slot.arrivals if arrivals is not None)
    assert (
        on.workspace_bytes - off.workspace_bytes == more > 0
        and off._arriving is None
        and off.cost.experts.arrivals_permille == 0
    )
    auto = make_runtime(world, layers, mode="auto")
    assert (auto._arriving is None) == (world.size == 1) == (auto.cost.experts.arrivals_permille == 0)
    assert make_runtime(world, layers, mode="auto", arrivals=False)._arriving is None


def test_experts_begin_before_the_dispatch_is_complete(world, waiting, monkeypatch):
    """Proven without a clock: the last group of each dispatch is not complete on a rank before its experts have begun,
    with their own rows. Experts that waited for the dispatch could never begin."""
    if world.device.type == "cuda" or world.size < 2:
        pytest.skip("of several ranks on the host; the kernels are tested by themselves")
    layers = make_layers(NUM_LAYERS, world.device, torch.float32)
    runtime = make_runtime(world, layers, mode="broadcast", arrivals=True)
    begun, dispatch = [], world.transport.dispatch
    waiting.began = lambda layer, parts: begun.append((layer, parts))
    sent = [0]

    def held(slot, buffer, group, exchange, rows):
        test = dispatch(slot, buffer, group, exchange, rows)
        sent[0] += 1
        needed = sent[0] // num_groups
        return lambda: test() and len(begun) >= needed

    num_tokens = 10 + world.rank
    num_groups = max(1, world.size // 2)
    monkeypatch.setattr(world.transport, "dispatch", held)
    source = RowsSource(num_tokens, runtime)
    runtime.submit_step([num_tokens], source).result()
    world.all_gather(b"")
    assert sent[0] == num_groups * NUM_LAYERS and [layer for layer, _ in begun] == list(range(NUM_LAYERS))
    for _, parts in begun:  # the own rows among them, not all
        assert parts and len(parts) < num_groups + 2
    for layer, (inputs, found) in enumerate(zip(source.inputs, source.sums)):
        assert norm_ratio(found, layers.oracle(layer, *inputs)) < 1e-5


def test_experts_that_cannot_are_refused_on_all_ranks(world):
    """float32 on any device: no kernels that wait."""
    layers = make_layers(1, world.device, torch.float32)
    with pytest.raises(ConfigError, match="rank 0: no arrivals: .* experts take whole waves only"):
        make_runtime(world, layers, mode="chunked", arrivals=True)
    runtime = make_runtime(world, layers)
    assert runtime.cost.experts.arrivals_permille == 0 and runtime._arriving is None


def test_one_rank_that_cannot_decides_for_all(world, waiting, monkeypatch):
    if world.size > 1:
        reason = "no arrivals: planted" if world.rank == world.size - 1 else None
        monkeypatch.setattr(arriving, "refusal", lambda world, experts, config: reason)
        layers = make_layers(1, world.device, dtype_of(world))
        assert make_runtime(world, layers, mode="auto")._arriving is None
        with pytest.raises(ConfigError, match=f"rank {world.size - 1}: no arrivals: planted"):
            make_runtime(world, layers, mode="auto", arrivals=True)
