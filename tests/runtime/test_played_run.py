"""Steps of ranks that share memory, by compiled code: the same bits as operation by operation, what is left to Python,
and what happens when that fails.
"""

import random

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.errors import ModelError
from pipemoe.plan.config import MODES
from pipemoe.plan.schedule import OpKind
from pipemoe.runtime.played_run import PlayedRun
from pipemoe.trace import Timeline
from tests.models.tiny import VOCAB, tiny_config

pytestmark = pytest.mark.mpi
SMALL = {"moe_max_num_tokens": 20, "max_tokens_per_rank": 64}


@pytest.fixture(scope="module")
def model(world):
    """Of three MoE layers."""
    return load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=Config(**SMALL))


@pytest.fixture
def noted(monkeypatch):
    """The operations of played runs that were left to Python."""
    found, do = [], PlayedRun._do

    def note(run, op, *arguments):
        found.append(op)
        do(run, op, *arguments)

    monkeypatch.setattr(PlayedRun, "_do", note)
    return found


def is_played(model, world):
    return world.shared is not None and world.host_links() is None


def drawn_lengths(seed, rank, most=64):
    """Of a rank's sequences; some ranks have none."""
    draw = random.Random(f"{seed} {rank}")
    lengths = [draw.choice((1, 2, 5, 19, 20, 21, 40)) for _ in range(draw.choice((0, 1, 1, 3)))]
    return lengths if sum(lengths) <= most else lengths[:1]


def prompts_of(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in lengths]


def by_python(model, prompts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model.runtime, "plays_records", False)
        return model.prefill(prompts, keep_logits=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_as_operation_by_operation(world, model, monkeypatch, noted, mode, deterministic):
    """With debug: also the log of what was exchanged is right. The same plan comes twice, with other tokens."""
    model = model.with_config(Config(mode=mode, deterministic=deterministic, debug=True, **SMALL))
    for seed in range(4):
        lengths = drawn_lengths(seed, world.rank)
        for tokens in range(2):
            prompts = prompts_of(lengths, tokens)
            wanted = by_python(model, prompts, monkeypatch)
            noted.clear()
            found = model.prefill(prompts, keep_logits=True)
            assert bool(noted) == (is_played(model, world) and bool(lengths))
            assert found.first_tokens == wanted.first_tokens
            if not lengths:
                continue
            if deterministic:
                assert torch.equal(found.logits, wanted.logits)
            else:
                assert torch.allclose(found.logits, wanted.logits, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_that_travel_in_fewer_bits_are_left_to_python(world, model, monkeypatch, noted, dtype):
    model = model.with_config(Config(mode="per_rank", combine="gather", combine_dtype=dtype, **SMALL))
    prompts = prompts_of([9, 3], world.rank)
    wanted = by_python(model, prompts, monkeypatch).logits
    noted.clear()
    assert torch.allclose(model.prefill(prompts, keep_logits=True).logits, wanted, atol=1e-4)
    if noted:
        assert OpKind.COMBINE in {op.kind for op in noted}


def test_only_the_first_attention_and_the_end_are_left_to_python(world, model, noted):
    model = model.with_config(Config(mode="broadcast", **SMALL))
    model.prefill(prompts_of([9, 3]))
    if is_played(model, world):
        assert [(op.kind, op.layer) for op in noted[:-1]] == [(OpKind.ATTEND, 0)]
        assert noted[-1].kind is OpKind.FINISH


def test_layers_that_are_not_compiled_are_left_to_python(world, noted):
    """A dense layer in between, whose rows Python hands over; experts and sums are compiled all the same."""
    config = tiny_config("qwen3_moe", num_layers=4, mlp_only_layers=[1])
    model = load_model(config, world, dtype=torch.float32, seed=3, config=Config(mode="broadcast", **SMALL))
    model.prefill(prompts_of([9]))
    if is_played(model, world):
        assert {op.kind for op in noted} == {OpKind.ATTEND, OpKind.DISPATCH, OpKind.FINISH}


@pytest.mark.parametrize("mode", ["broadcast", "per_rank"])
@pytest.mark.parametrize("where", ["start", "finish", "attend"])
def test_model_code_that_raises(world, model, monkeypatch, mode, where):
    """The others' steps go on, and every rank hears of it at the next one."""
    model, culprit = model.with_config(Config(mode=mode, **SMALL)), world.size - 1
    prompts = prompts_of([7, 2], world.rank)
    wanted = model.prefill(prompts).first_tokens

    def broken(*_):
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patch:
        if world.rank == culprit:
            patch.setattr(model.decoder, where, broken)
            with pytest.raises(ModelError, match="planted"):
                model.prefill(prompts)
        else:
            assert model.prefill(prompts).first_tokens == wanted
    with pytest.raises(ModelError, match=f"rank {culprit}: model code raised ZeroDivisionError: planted"):
        model.prefill(prompts)
    assert model.prefill(prompts).first_tokens == wanted


@pytest.mark.parametrize("mode", ["broadcast", "per_rank", "chunked"])
def test_times_of_all_operations(world, model, mode):
    model = model.with_config(Config(mode=mode, **SMALL))
    timeline, done = Timeline(), []
    model.prefill(prompts_of([12, 20], world.rank), timeline=timeline, on_done=done.append)
    ends = {span.op: span.end for span in timeline.spans}
    assert sorted(done) == sorted(ends) and len(ends) == len(timeline.spans)
    assert all(span.begin <= span.end for span in timeline.spans)
    for op, end in ends.items():
        if op.kind is OpKind.COMBINE:
            assert ends[op._replace(kind=OpKind.EXPERTS)] <= end
        if op.kind is OpKind.EXPERTS:
            assert ends[op._replace(kind=OpKind.DISPATCH)] <= end
