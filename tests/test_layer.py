"""PipelinedMoE over the ranks of a world: the right sums, the same bits, the same errors everywhere."""

import contextlib
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import cache

import pytest
import torch

from pipemoe import Config, PipelinedMoE
from pipemoe.errors import ConfigError, InputError, MismatchError, ModelError, PipemoeError, PlanError
from pipemoe.experts import make_experts
from pipemoe.plan.config import MODES
from pipemoe.wire import WireFormat
from tests.moe_cases import HIDDEN, NUM_EXPERTS, TOKEN_COUNTS, TOP_K, make_layers, make_rows, norm_ratio

pytestmark = pytest.mark.mpi
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SMALL = {"moe_max_num_tokens": 24, "max_tokens_per_rank": 160}


def make_moe(world, layers, **options):
    config = Config(**{**SMALL, "debug": True, **options})
    return PipelinedMoE(
        world, layers.local(world.size, world.rank), num_experts=NUM_EXPERTS, top_k=TOP_K, config=config
    )


@pytest.fixture(scope="module")
def cases(world):
    """cases(num_layers, dtype): the layers, and for each of TOKEN_COUNTS this rank's (rows, the oracle's sums) of every
    layer; made once, because the naive oracle takes longer than what it judges."""

    @cache
    def cases(num_layers, dtype):
        layers, made = make_layers(num_layers, world.device, dtype), []
        for case, counts in enumerate(TOKEN_COUNTS):
            tokens, seeds = (
                counts[world.rank % len(counts)],
                [100 * case + 10 * layer + world.rank for layer in range(num_layers)],
            )
            rows_of = [make_rows(tokens, seed, world.device, dtype) for seed in seeds]
            made.append([(rows, layers.oracle(layer, *rows)) for layer, rows in enumerate(rows_of)])
        return layers, made

    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", ["reduce", "gather"])
@pytest.mark.parametrize("mode", MODES)
def test_sums_are_the_oracles(world, cases, mode, combine, dtype):
    layers, made = cases(1, dtype)
    moe = make_moe(world, layers, mode=mode, combine=combine)
    for ((rows, wanted),) in made:
        y = moe(*rows)
        assert y.shape == rows[0].shape and y.dtype == dtype
        assert norm_ratio(y, wanted) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_rows_are_the_same_bits_everywhere(world, dtype):
    """Across modes, wave sizes and slots, and equal to one process that holds all experts: so across rank counts
    too.
    """
    layers = make_layers(1, world.device, dtype)
    counts = TOKEN_COUNTS[0]
    x, ids, weights = make_rows(counts[world.rank % len(counts)], world.rank, world.device, dtype)
    wanted = alone(layers, x, ids, weights)
    for mode in MODES:
        for cap, slots in ((7, world.num_slots), (24, 1), (1000, min(2, world.num_slots))):
            moe = make_moe(
                world,
                layers,
                mode=mode,
                moe_max_num_tokens=cap,
                num_slots=slots,
                deterministic=True,
            )
            assert torch.equal(moe(x, ids, weights), wanted), (mode, cap, slots)
    # Equal rows in, other neighbours: every row twice, in reverse.
    flip = torch.arange(len(x) - 1, -1, -1, device=x.device).repeat(2)
    moe = make_moe(world, layers, mode="pipelined", max_tokens_per_rank=400, deterministic=True)
    assert torch.equal(moe(x[flip], ids[flip], weights[flip]), wanted[flip])


def alone(layers, x, ids, weights):
    """The rows' sums from one process with all experts, no transport."""
    experts = make_experts(
        layers.local(1, 0),
        top_k=TOP_K,
        hidden=HIDDEN,
        device=x.device,
        dtype=x.dtype,
        implementation="auto",
        deterministic=True,
    )
    wire = WireFormat(HIDDEN, TOP_K, x.dtype)
    buffer = torch.zeros(len(x), wire.row_bytes, dtype=torch.uint8, device=x.device)
    rows = wire.rows(buffer)
    rows.write(x, ids.int(), weights)
    out = torch.full(x.shape, torch.nan, dtype=torch.float64, device=x.device)
    scratch = experts.new_scratch(len(x))
    experts.warm_up(scratch)
    experts(0, rows, out, scratch)
    return out.float().to(x.dtype)


@pytest.mark.parametrize("mode", MODES)
def test_step_runs_through_the_layers(world, cases, mode):
    layers, made = cases(3, torch.float32)
    moe = make_moe(world, layers, mode=mode)
    for of_layer in made:
        tokens = len(of_layer[0][1])
        with moe.step(tokens, [tokens - tokens // 3, tokens // 3] if tokens > 2 else None) as step:
            for layer, (rows, wanted) in enumerate(of_layer):
                assert norm_ratio(step(layer, *rows), wanted) < 1e-5


def test_tokens_change_from_step_to_step(world):
    """Buffers are reused: nothing of an earlier, larger step may leak into a later one."""
    layers = make_layers(1, world.device, torch.float32)
    moe = make_moe(world, layers, mode="per_rank")
    for step in range(8):
        tokens = (step * 37 + world.rank * 11) % 97
        x, ids, weights = make_rows(tokens, step, world.device, torch.float32)
        assert norm_ratio(moe(x, ids, weights), layers.oracle(0, x, ids, weights)) < 1e-5


def test_minus_one_is_no_expert(world):
    layers = make_layers(1, world.device, torch.float32)
    for mode in ("padded", "per_rank", "auto"):
        x, ids, weights = make_rows(40, world.rank, world.device, torch.float32)
        ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(world.rank)) < 0.3] = -1
        ids[7] = -1
        y = make_moe(world, layers, mode=mode)(x, ids, weights)
        assert norm_ratio(y, layers.oracle(0, x, ids, weights)) < 1e-5 and not y[7].any()


def wrong_arguments(world):
    x, ids, weights = make_rows(4, 0, world.device, torch.float32)
    bad_id, low_id, nan = ids.clone(), ids.clone(), weights.clone()
    bad_id[1, 0], low_id[1, 0], nan[3, 2] = NUM_EXPERTS, -2, torch.nan
    return {
        "x has shape": (x[:, :-1], ids, weights),
        rf"x has shape \(1, 4, {HIDDEN}\); it must have 2 dimensions": (x[None], ids, weights),
        "x is torch.float64": (x.double(), ids, weights),
        "x is a list": (x.tolist(), ids, weights),
        "topk_ids has shape": (x, ids[:3], weights),
        "topk_ids is torch.float32": (x, ids.float(), weights),
        "topk_ids holds 7": (x, bad_id, weights),
        "topk_ids holds -2": (x, low_id, weights),
        "topk_weights has shape": (x, ids, weights[:, :2]),
        "topk_weights holds NaN": (x, ids, nan),
    }


def test_a_wrong_argument_on_one_rank_is_the_same_error_on_all(world):
    layers = make_layers(1, world.device, torch.float32)
    moe = make_moe(world, layers)
    right = make_rows(4, 0, world.device, torch.float32)
    culprit = world.size - 1
    for message, wrong in wrong_arguments(world).items():
        with pytest.raises(InputError, match=f"rank {culprit}: {message}"):
            moe(*(wrong if world.rank == culprit else right))
        assert norm_ratio(moe(*right), layers.oracle(0, *right)) < 1e-5  # and the next step works


def test_too_many_tokens_on_one_rank_is_the_same_error_on_all(world):
    layers = make_layers(1, world.device, torch.float32)
    moe = make_moe(world, layers)
    culprit = world.size - 1
    with pytest.raises(InputError, match=f"rank {culprit}: 161 tokens in one step, more than max_tokens_per_rank=160"):
        moe(*make_rows(161 if world.rank == culprit else 3, 0, world.device, torch.float32))


def test_another_config_on_one_rank_is_the_same_error_on_all(world):
    layers = make_layers(1, world.device, torch.float32)
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(MismatchError, match=f"rank {world.size - 1}: moe_max_num_tokens is 32, but rank 0 has 24"):
        make_moe(world, layers, moe_max_num_tokens=32 if world.rank == world.size - 1 else 24)


def test_using_different_models_on_different_ranks_is_caught(world):
    layers = make_layers(1, world.device, torch.float32)
    a, b = make_moe(world, layers, mode="broadcast"), make_moe(world, layers, mode="per_rank")
    rows = make_rows(4, 0, world.device, torch.float32)
    if world.size > 1:
        with pytest.raises(MismatchError, match="ranks differ in configuration, model or checkpoint"):
            (a if world.rank == 0 else b)(*rows)
    assert norm_ratio(b(*rows), layers.oracle(0, *rows)) < 1e-5


def test_experts_that_are_no_partition_are_refused(world):
    layers = make_layers(1, world.device, torch.float32)
    for num_experts, message in (
        (NUM_EXPERTS + 1, "experts 0 to 7, each once"),
        (NUM_EXPERTS - 1, "experts 0 to 5, each once"),
    ):
        with pytest.raises(InputError, match=f"layer 0: the ranks must hold {message}, but rank 0 holds"):
            PipelinedMoE(
                world,
                layers.local(world.size, world.rank),
                num_experts=num_experts,
                top_k=TOP_K,
                config=Config(**SMALL, num_slots=1),
            )
    if world.size > 1:  # everybody holds rank 0's
        with pytest.raises(InputError, match="layer 0: the ranks must hold"):
            PipelinedMoE(
                world,
                layers.local(world.size, 0),
                num_experts=NUM_EXPERTS,
                top_k=TOP_K,
                config=Config(**SMALL, num_slots=1),
            )


def test_no_weights_on_one_rank_is_the_same_error_on_all(world):
    weights = make_layers(1, world.device, torch.float32).local(world.size, world.rank)
    culprit = world.size - 1
    with pytest.raises(ConfigError, match=f"rank {culprit}: no weights"):
        PipelinedMoE(world, [] if world.rank == culprit else weights, num_experts=NUM_EXPERTS, top_k=TOP_K)


def test_more_slots_than_the_world_has_is_refused(world):
    with pytest.raises(ConfigError, match=f"num_slots is 9, but the world was started with {world.num_slots}"):
        make_moe(world, make_layers(1, world.device, torch.float32), num_slots=9)


def test_an_exception_in_the_callers_model_code_is_raised_on_every_rank_at_the_next_exchange(world):
    layers = make_layers(3, world.device, torch.float32)
    moe = make_moe(world, layers, mode="pipelined", debug=False)
    tokens = 40 if world.rank == 0 else 3
    culprit = world.size - 1

    def forward(fail):
        with moe.step(tokens) as step:
            for layer in range(3):
                if fail and layer == 1 and world.rank == culprit:
                    raise ZeroDivisionError("attention went wrong")
                rows = make_rows(tokens, layer, world.device, torch.float32)
                assert norm_ratio(step(layer, *rows), layers.oracle(layer, *rows)) < 1e-5

    if world.rank == culprit:
        with pytest.raises(ZeroDivisionError):
            forward(fail=True)
    else:
        forward(fail=True)
    with pytest.raises(ModelError, match=f"rank {culprit}: model code raised ZeroDivisionError: attention went wrong"):
        forward(fail=False)
    forward(fail=False)


def test_leaving_a_step_early_is_an_error_here_and_does_not_hang_the_others(world):
    if world.size == 1:
        pytest.skip("needs another rank")
    moe = make_moe(world, make_layers(2, world.device, torch.float32), debug=False)
    rows = make_rows(3, 0, world.device, torch.float32)

    def forward(first, second):
        with moe.step(3) as step:
            for layer in (first, second) if world.rank == 0 else (0, 1):
                if layer is not None:
                    step(layer, *rows)

    for wrong, message in (((0, None), "step left after 1 of 2 layers"), ((1, 0), "layer 1 called; next is 0 of 2")):
        with pytest.raises(InputError, match=message) if world.rank == 0 else contextlib.nullcontext():
            forward(*wrong)
        with pytest.raises(ModelError, match=f"rank 0: model code raised InputError: .*{message}"):
            forward(0, 1)
        forward(0, 1)
    with moe.step(0):
        pass
    assert world.all_gather(b"still here") == [b"still here"] * world.size


@pytest.mark.parametrize(
    ("called", "message"),
    [
        ((0,), "step left after 1 of 2 layers"),
        ((1, 0), "layer 1 called; next is 0 of 2"),
        ((0, 1, 2), "layer 2 called, but all 2 layers of this step are done"),
    ],
)
def test_misuse_that_raised_on_every_rank_is_over_with_that(world, called, message):
    layers = make_layers(2, world.device, torch.float32)
    moe = make_moe(world, layers, debug=False)
    rows = make_rows(3 + world.rank, world.rank, world.device, torch.float32)

    def forward(called):
        with moe.step(len(rows[0])) as step:
            return [step(layer, *rows) for layer in called]

    with pytest.raises(InputError, match=f"rank {world.rank}: {message}"):
        forward(called)
    for layer, y in enumerate(forward((0, 1))):
        assert norm_ratio(y, layers.oracle(layer, *rows)) < 1e-5
    # Where some rank has something to say besides, all of them hear of both.
    with pytest.raises(InputError, match=message):
        forward(called)
    with pytest.raises(ModelError, match=f"rank 0: model code raised InputError: rank 0: {message}"):
        with moe.step(3, [2] if world.rank == world.size - 1 else None):
            pass
    forward((0, 1))


def one_layer(world):
    """Its weights, an object of them, and three rows of this rank."""
    layers = make_layers(1, world.device, torch.float32)
    return layers, make_moe(world, layers, debug=False), make_rows(3, world.rank, world.device, torch.float32)


def test_a_step_inside_a_step_is_refused_at_once(world):
    layers, moe, rows = one_layer(world)
    other = make_moe(world, layers, debug=False)

    def nested():
        with other.step(3) as step:
            return step(0, *rows)

    for tokens in (3, 0):
        for inner in (nested, lambda: moe(*rows)):
            with pytest.raises(InputError, match=f"rank {world.rank}: a step is open"):
                with moe.step(tokens):
                    inner()
            assert norm_ratio(other(*rows), layers.oracle(0, *rows)) < 1e-5
    with moe.step(3) as step:  # the outer step goes on where the caller catches the error
        for inside in (nested, lambda: world.all_gather(b"")):
            with pytest.raises(InputError, match="a step is open"):
                inside()
        with pytest.raises(InputError, match="has been entered before"):
            step.__enter__()
        assert norm_ratio(step(0, *rows), layers.oracle(0, *rows)) < 1e-5
    assert norm_ratio(moe(*rows), layers.oracle(0, *rows)) < 1e-5


def test_a_step_serves_once_and_only_inside_its_with_block(world):
    layers, moe, rows = one_layer(world)
    step = moe.step(3)
    with pytest.raises(InputError, match=f"rank {world.rank}: layer 0 called outside of the step"):
        step(0, *rows)
    with step:
        step(0, *rows)
    with pytest.raises(InputError, match=f"rank {world.rank}: this step has been entered before"), step:
        pass
    assert norm_ratio(moe(*rows), layers.oracle(0, *rows)) < 1e-5


def test_a_step_may_be_left_on_another_thread(world):
    layers, moe, rows = one_layer(world)
    step = moe.step(3)
    step.__enter__()
    step(0, *rows)
    leaver = threading.Thread(target=step.__exit__, args=(None, None, None))
    leaver.start()
    leaver.join()
    assert norm_ratio(moe(*rows), layers.oracle(0, *rows)) < 1e-5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("planted"),
        MemoryError("planted"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: planted"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory_on_one_rank_is_an_error_on_every_rank(world, monkeypatch, error):
    layers = make_layers(1, world.device, torch.float32)
    culprit = world.size - 1

    def refuse(*args):
        raise error

    if world.rank == culprit:
        monkeypatch.setattr("pipemoe.runtime.set_up.Workspace", refuse)
    with pytest.raises(ConfigError, match=rf"rank {culprit}: out of memory at set-up \(.*planted\)"):
        make_moe(world, layers)
    monkeypatch.undo()
    x, ids, weights = make_rows(3, world.rank, world.device, torch.float32)
    assert norm_ratio(make_moe(world, layers)(x, ids, weights), layers.oracle(0, x, ids, weights)) < 1e-5


def test_an_exception_on_a_rank_without_tokens_is_raised_on_every_rank_at_the_next_step_of_any_object(world):
    layers = make_layers(1, world.device, torch.float32)
    faulty, other = make_moe(world, layers, debug=False), make_moe(world, layers, debug=False)
    rows = make_rows(3, world.rank, world.device, torch.float32)

    def forward():
        if world.rank:
            faulty(*rows)
            return
        with faulty.step(0):
            raise ZeroDivisionError("nothing to do")

    with pytest.raises(ZeroDivisionError) if world.rank == 0 else contextlib.nullcontext():
        forward()
    with pytest.raises(ModelError, match="rank 0: model code raised ZeroDivisionError: nothing to do"):
        other(*rows)
    for moe in (faulty, other):
        assert norm_ratio(moe(*rows), layers.oracle(0, *rows)) < 1e-5


def test_ranks_that_call_different_objects_are_told(world):
    layers = make_layers(1, world.device, torch.float32)
    objects = make_moe(world, layers), make_moe(world, layers)
    rows = make_rows(3, world.rank, world.device, torch.float32)
    if world.size > 1:
        with pytest.raises(MismatchError, match="the ranks differ in"):
            objects[world.rank % 2](*rows)
    assert norm_ratio(objects[0](*rows), layers.oracle(0, *rows)) < 1e-5


def test_nan_weights_on_one_rank_are_the_same_error_on_all(world):
    layers = make_layers(1, world.device, torch.float32)
    culprit = world.size - 1
    if world.rank == culprit:
        layers.down[0, NUM_EXPERTS - 1, 5, 2] = torch.nan
    with pytest.raises(InputError, match=f"rank {culprit}: .*expert {NUM_EXPERTS - 1}"):
        make_moe(world, layers)


@pytest.mark.parametrize("top_k", [0, 2.0])
def test_a_shape_that_cannot_be_on_one_rank_is_the_same_error_on_all(world, top_k):
    layers, culprit = make_layers(1, world.device, torch.float32), world.size - 1
    weights = layers.local(world.size, world.rank)
    with pytest.raises(ConfigError, match=f"rank {culprit}: ModelShape.top_k is {top_k}"):
        PipelinedMoE(world, weights, num_experts=NUM_EXPERTS, top_k=top_k if world.rank == culprit else TOP_K)


def test_sums_that_mpi_cannot_reduce_are_refused(world):
    layers = make_layers(1, world.device, torch.float32)
    rows = make_rows(3, world.rank, world.device, torch.float32)
    if world.device.type == "cpu":
        with pytest.raises(ConfigError, match="combine_dtype is bfloat16, which MPI cannot reduce"):
            make_moe(world, layers, combine_dtype="bfloat16")
    assert (
        norm_ratio(make_moe(world, layers, combine_dtype="bfloat16", combine="gather")(*rows), layers.oracle(0, *rows))
        < 2e-2
    )


@pytest.mark.parametrize("most", [1, 2])
def test_a_maximum_of_very_few_tokens(world, most):
    layers = make_layers(1, world.device, torch.float32)
    rows = make_rows(most, world.rank, world.device, torch.float32)
    assert norm_ratio(make_moe(world, layers, max_tokens_per_rank=most)(*rows), layers.oracle(0, *rows)) < 1e-5


def test_rows_in_the_order_of_columns_are_the_same_rows(world, cases):
    """MPI takes memory as it lies: a transposed x must not arrive as another matrix."""
    layers, made = cases(1, torch.float32)
    moe = make_moe(world, layers, mode="per_rank")
    for ((x, ids, weights), wanted), *_ in made:
        by_columns = [t.t().contiguous().t() for t in (x, ids, weights)]
        assert not len(x) > 1 or not by_columns[0].is_contiguous()
        assert torch.equal(moe(*by_columns), moe(x, ids, weights))
        assert norm_ratio(moe(*by_columns), wanted) < 1e-5


def test_an_error_of_all_ranks_says_so(world, monkeypatch):
    """Else each of them prints it (see world.uncaught)."""
    layers = make_layers(1, world.device, torch.float32)
    moe = make_moe(world, layers)
    rows = make_rows(3, world.rank, world.device, torch.float32)
    own = layers.local(world.size, world.rank)
    away = [replace(w, first_expert=w.first_expert + 1) for w in own]
    costly = replace(moe.runtime.cost, attend=replace(moe.runtime.cost.attend, row_ps=10**15))

    def too_costly():
        with monkeypatch.context() as patch:
            patch.setattr(moe.runtime.plans, "cost", costly)
            patch.setattr(moe.runtime.plans, "_of_steps", OrderedDict())
            moe(*rows)

    def issued_otherwise():
        def verify(plan, *, issues=None, **_):
            if issues is not None:
                raise PlanError("planted in the logs")

        with monkeypatch.context() as patch:
            patch.setattr("pipemoe.runtime.step.verify", verify)
            moe(*rows)

    endless = [replace(w, first_expert=10**5000) for w in own] if world.rank == 0 else own  # has no words in Python
    cases = {
        "first_expert is a int; it must be below": lambda: PipelinedMoE(
            world, endless, num_experts=NUM_EXPERTS, top_k=TOP_K
        ),
        "num_experts is a int; it must be below": lambda: PipelinedMoE(
            world, own, num_experts=10**5000 if world.rank == 0 else NUM_EXPERTS, top_k=TOP_K
        ),
        "each once": lambda: PipelinedMoE(world, away, num_experts=NUM_EXPERTS, top_k=TOP_K),
        "rank 0: x is a": lambda: moe(None if world.rank == 0 else rows[0], *rows[1:]),
        "may take .* Bring fewer tokens": too_costly,
    }
    if world.size > 1:
        own_config = Config(**SMALL, mode="per_rank" if world.rank else "padded")
        cases |= {
            "MoE layers, but rank 0 has 1": lambda: PipelinedMoE(
                world, own * (1 + (world.rank > 0)), num_experts=NUM_EXPERTS, top_k=TOP_K
            ),
            "mode is ": lambda: PipelinedMoE(world, own, num_experts=NUM_EXPERTS, top_k=TOP_K, config=own_config),
            "here they meet": lambda: world.all_gather(b"", f"something else {world.rank}"),
            "rank 1: payload of": lambda: world.all_gather(7 if world.rank == 1 else b""),
            "planted in the logs": issued_otherwise,
        }
    for words, call in cases.items():
        with pytest.raises(PipemoeError, match=words) as caught:
            call()
        said = f"{type(caught.value).__name__}: {caught.value}"
        assert caught.value.is_shared and len(set(world.all_gather(said.encode()))) == 1, said
    assert norm_ratio(moe(*rows), layers.oracle(0, *rows)) < 1e-5
