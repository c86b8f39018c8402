"""What fails inside a step on one rank, in whatever the caller has given: named on every rank, never fatal, and the
step after works.
"""

import contextlib
import gc
import threading
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from pipemoe import Config, PipelinedMoE, load_model
from pipemoe.errors import InputError, ModelError, PeerLost
from pipemoe.plan.schedule import OpKind
from pipemoe.runtime.runtime import Runtime
from pipemoe.trace import Timeline
from pipemoe.tune.tuner import Tuner
from tests.hostile import Speechless
from tests.models.tiny import tiny_config
from tests.moe_cases import NUM_EXPERTS, TOP_K, make_layers, make_rows, norm_ratio
from tests.runtime.sources import RowsSource, make_runtime

SMALL = {"moe_max_num_tokens": 24, "max_tokens_per_rank": 40}
ERRORS = {
    "ZeroDivisionError": ZeroDivisionError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "SystemExit": SystemExit,
    "Speechless": Speechless,
}
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def layers(world):
    return make_layers(NUM_LAYERS, world.device, torch.float32)


@pytest.fixture(scope="module")
def moe(world, layers):
    return PipelinedMoE(
        world,
        layers.local(world.size, world.rank),
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        config=Config(**SMALL, mode="per_rank"),
    )


def rows_of(world, layer):
    return make_rows(3 + world.rank, 10 * layer + world.rank, world.device, torch.float32)


def run_step(world, layers, moe, meddle=lambda layer, step, rows: rows):
    rows = [rows_of(world, layer) for layer in range(NUM_LAYERS)]
    with moe.step(len(rows[0][0])) as step:
        for layer, of_layer in enumerate(rows):
            assert norm_ratio(step(layer, *meddle(layer, step, of_layer)), layers.oracle(layer, *of_layer)) < 1e-5


def named_everywhere_then_over(world, layers, moe, culprit, words):
    """The next step of any object says what happened on the culprit, on every rank; the one after works."""
    with pytest.raises(ModelError, match=f"^rank {culprit}: model code raised (?s:.*){words}"):
        run_step(world, layers, moe)
    run_step(world, layers, moe)


class NotContiguous(torch.Tensor):
    """Torch has no memory to make it contiguous."""

    def contiguous(self):
        raise torch.OutOfMemoryError("planted in contiguous")


_empty = torch.empty


def no_memory(*args, **named):
    """On the caller's thread."""
    if threading.current_thread() is threading.main_thread():
        raise torch.OutOfMemoryError("planted in empty")
    return _empty(*args, **named)


@pytest.mark.mpi
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("fault", ["contiguous", "empty"])
def test_a_call_that_fails_is_a_layer_not_done(world, layers, moe, fault, layer, monkeypatch):
    culprit = world.size - 1

    def meddle(at, step, rows):
        if world.rank == culprit and at == layer:
            if fault == "contiguous":
                return rows[0].as_subclass(NotContiguous), *rows[1:]
            monkeypatch.setattr(torch, "empty", no_memory)
        return rows

    with (
        pytest.raises(torch.OutOfMemoryError, match=f"planted in {fault}")
        if world.rank == culprit
        else contextlib.nullcontext()
    ):
        run_step(world, layers, moe, meddle)
    monkeypatch.undo()
    named_everywhere_then_over(world, layers, moe, culprit, f"OutOfMemoryError: planted in {fault}")


@pytest.mark.mpi
def test_a_call_that_failed_can_be_made_again(world, layers, moe):
    def meddle(layer, step, rows):
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            step(layer, rows[0].as_subclass(NotContiguous), *rows[1:])
        return rows

    run_step(world, layers, moe, meddle)
    run_step(world, layers, moe)


@pytest.mark.mpi
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("layer", [0, NUM_LAYERS])
def test_any_exception_in_the_body_of_a_step(world, layers, moe, layer, error):
    """layer: before which; NUM_LAYERS: after the last one."""
    culprit = world.size - 1

    def body():
        rows = [rows_of(world, i) for i in range(NUM_LAYERS)]
        with moe.step(len(rows[0][0])) as step:
            for i in range(NUM_LAYERS + 1):
                if i == layer and world.rank == culprit:
                    raise ERRORS[error]("planted")
                if i < NUM_LAYERS:
                    assert norm_ratio(step(i, *rows[i]), layers.oracle(i, *rows[i])) < 1e-5

    with pytest.raises(ERRORS[error]) if world.rank == culprit else contextlib.nullcontext():
        body()
    named_everywhere_then_over(world, layers, moe, culprit, error)


@pytest.mark.mpi
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_wait_that_is_interrupted(world, layers, moe, layer, monkeypatch):
    """As by Ctrl-C: the layer has been given, its results are not waited for, and it cannot be called again."""
    culprit = world.size - 1

    def interrupt(*args):
        raise KeyboardInterrupt

    def meddle(at, step, rows):
        if world.rank == culprit and at == layer:
            monkeypatch.setattr(step, "_wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                step(at, *rows)
            with pytest.raises(InputError, match=f"layer {layer} called again, but its first call was broken off"):
                step(at, *rows)
            raise KeyboardInterrupt
        return rows

    with pytest.raises(KeyboardInterrupt) if world.rank == culprit else contextlib.nullcontext():
        run_step(world, layers, moe, meddle)
    named_everywhere_then_over(world, layers, moe, culprit, "KeyboardInterrupt")


@pytest.mark.mpi
@pytest.mark.parametrize("error", ERRORS)
def test_any_exception_in_a_models_code(world, error, monkeypatch):
    model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=Config(**SMALL))
    wanted = model.prefill([[1, 2, 3]]).first_tokens
    culprit = world.size - 1
    for method in ("attend", "finish"):

        def broken(*args):
            raise ERRORS[error]("planted")

        if world.rank == culprit:
            monkeypatch.setattr(model.decoder, method, broken)
            with pytest.raises(ModelError, match=f"model code raised {error}"):
                model.prefill([[1, 2, 3]])
            monkeypatch.undo()
        else:
            assert model.prefill([[1, 2, 3]]).first_tokens == wanted
        with pytest.raises(ModelError, match=f"^rank {culprit}: model code raised {error}"):
            model.prefill([[1, 2, 3]])
        assert model.prefill([[1, 2, 3]]).first_tokens == wanted


class BrokenSource(RowsSource):
    """Raises in one of its methods."""

    def __init__(self, method, *args):
        super().__init__(*args)
        self._method = method

    def __getattribute__(self, name):
        if name != "_method" and name == getattr(self, "_method", None):
            raise ZeroDivisionError(f"planted in {name}")
        return super().__getattribute__(name)


@pytest.mark.mpi
@pytest.mark.parametrize("method", ["begin", "ready", "attend", "rows", "results", "combined", "finish", "finished"])
def test_a_source_that_raises(world, layers, method):
    culprit = world.size - 1
    runtime = make_runtime(world, layers, mode="per_rank")

    def run(make=RowsSource):
        source = make(5, runtime)
        runtime.submit_step([5], source).result()
        for layer, (x, ids, weights) in enumerate(source.inputs):
            assert norm_ratio(source.sums[layer], layers.oracle(layer, x, ids, weights)) < 1e-5

    if world.rank == culprit:
        with pytest.raises(ModelError, match=f"planted in {method}"):
            run(lambda *args: BrokenSource(method, *args))
    else:
        run()
    with pytest.raises(ModelError, match=f"^rank {culprit}: model code raised ZeroDivisionError: planted in {method}"):
        run()
    run()


class BrokenTimeline(Timeline):
    def take(self, *args):
        raise Speechless


@pytest.mark.mpi
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kind", [OpKind.ATTEND, OpKind.FINISH])
def test_on_done_that_raises(world, layers, kind, error):
    """Told by this step's future, or where that was resolved before it raised, by the next step; once."""
    culprit = world.size - 1
    runtime = make_runtime(world, layers, mode="per_rank")
    calls = []

    def on_done(op):
        if op.kind is kind:
            calls.append(op)
            raise ERRORS[error]("planted")

    def run(**named):
        runtime.submit_step([5], RowsSource(5, runtime), **named).result()

    if world.rank == culprit:
        with contextlib.suppress(ModelError):
            run(on_done=on_done)
    else:
        run()
    with pytest.raises(ModelError, match=f"^rank {culprit}: model code raised {error}"):
        run()
    run()
    assert len(calls) == (world.rank == culprit)


@pytest.mark.mpi
def test_a_timeline_that_raises(world, layers):
    culprit = world.size - 1
    runtime = make_runtime(world, layers, mode="per_rank")

    def run(**named):
        runtime.submit_step([5], RowsSource(5, runtime), **named).result()

    with (
        pytest.raises(ModelError, match="model code raised Speechless")
        if world.rank == culprit
        else contextlib.nullcontext()
    ):
        run(timeline=BrokenTimeline() if world.rank == culprit else Timeline())
    with pytest.raises(ModelError, match=f"^rank {culprit}: model code raised Speechless"):
        run()
    run()


@pytest.mark.mpi
def test_closing_the_world_inside_a_step_is_refused(world, layers, moe):
    def meddle(layer, step, rows):
        with pytest.raises(InputError, match=f"rank {world.rank}: a step is open"):
            world.close()
        return rows

    run_step(world, layers, moe, meddle)
    assert world.all_gather(b"x") == [b"x"] * world.size


@pytest.mark.mpi
def test_a_step_that_has_been_left_is_not_waited_for(world, layers, moe):
    rows = rows_of(world, 0)
    step = moe.step(len(rows[0]))
    with pytest.raises(InputError, match="step left after 1 of 2 layers"), step:
        step(0, *rows)
    with pytest.raises(InputError, match=f"rank {world.rank}: layer 1 called, but this step has been left"):
        step(1, *rows)
    with pytest.raises(ModelError, match="step left after"):  # who waits on another thread when it is left
        step._wait(threading.Event())
    step = moe.step(len(rows[0]))
    with step:
        for layer in range(NUM_LAYERS):
            step(layer, *rows)
    with pytest.raises(InputError, match=f"rank {world.rank}: the step has ended"):
        step._wait(threading.Event())
    run_step(world, layers, moe)


def test_who_waits_for_a_step_looks_after_the_conductor():
    """In a world of one rank nobody else would see that it is stuck."""
    future, seen = Future(), []

    def watch():
        seen.append(1)
        if len(seen) == 2:
            future.set_exception(PeerLost("stuck"))

    runtime = SimpleNamespace(world=SimpleNamespace(conductor=SimpleNamespace(watch=watch)))
    with pytest.raises(PeerLost, match="stuck"):
        Runtime.result_of(runtime, future)
    assert len(seen) == 2


@pytest.mark.mpi
def test_what_fails_in_the_model_while_tuning_is_named_on_every_rank(world, monkeypatch):
    config = Config(mode="broadcast", moe_max_num_tokens=64, max_tokens_per_rank=16)
    model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=config)
    culprit = world.size - 1

    def broken(*args):
        raise ZeroDivisionError("planted")

    if world.rank == culprit:
        monkeypatch.setattr(model.decoder, "attend", broken)
    with pytest.raises(ModelError, match=f"^rank {culprit}: model code raised ZeroDivisionError: planted"):
        Tuner(world, model, most=16, repeats=1).measure_operations()
    monkeypatch.undo()
    with pytest.raises(ModelError, match="planted"):  # the step after says so too
        model.prefill([[1]])
    assert len(model.prefill([[1]]).first_tokens) == 1


def when_gone(tensor):
    """Is set when nothing holds the tensor any more."""
    gone = threading.Event()
    weakref.finalize(tensor, gone.set)
    return gone


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["per_rank", "two_batch", "padded"])
def test_a_layers_tensors_are_let_go_when_it_is_done(world, mode):
    """While the step is open, without the cycle collector: all that was given to the conductor, once the caller has let
    go too.
    """
    num_layers = 4
    layers = make_layers(num_layers, world.device, torch.float32)
    config = Config(**SMALL, mode=mode, combine="gather")
    moe = PipelinedMoE(world, layers.local(world.size, world.rank), num_experts=NUM_EXPERTS, top_k=TOP_K, config=config)
    gc.collect()
    gc.disable()
    try:
        step, tensors = moe.step(30), []
        with step:
            give = step._source.give

            def note(layer, *given):
                tensors.extend(map(when_gone, given))
                give(layer, *given)

            step._source.give = note
            for layer in range(num_layers):
                x, ids, weights = make_rows(30, layer, world.device, torch.float32)
                x = x.t().contiguous().t()  # not contiguous, so it is copied
                y = step(layer, x, ids, weights)
                tensors += [when_gone(t) for t in (x, ids, weights, y)]
                assert not tensors[-1].is_set()  # y is the caller's
                del x, ids, weights, y
                assert all(gone.wait(20) for gone in tensors), layer  # the conductor may be about to let go
            assert len(tensors) == 8 * num_layers
            del step._source.give
    finally:
        gc.enable()
