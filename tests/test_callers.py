"""What one rank's caller hands in, whatever it is or raises, is one error on every rank in the same step, and the next
step works.
"""

import itertools

import numpy as np
import pytest
import torch

from pipemoe import Config, ExpertWeights, PipelinedMoE, load_model
from pipemoe.errors import CheckpointError, ConfigError, InputError, MismatchError
from pipemoe.model import token_ids
from pipemoe.runtime.run import Only
from pipemoe.world import world as world_module
from tests.hostile import Hostile, broken_off
from tests.models.tiny import VOCAB, tiny_config
from tests.moe_cases import NUM_EXPERTS, TOP_K, make_layers, make_rows, norm_ratio
from tests.runtime.sources import RowsSource, make_runtime

SMALL = {"moe_max_num_tokens": 24, "max_tokens_per_rank": 40}
PROMPT = [[1, 2, 3]]


@pytest.fixture(scope="module")
def model(world):
    return load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=Config(**SMALL))


@pytest.fixture(scope="module")
def layers(world):
    return make_layers(2, world.device, torch.float32)


@pytest.fixture(scope="module")
def moes(world, layers):
    """Of one layer and of two."""
    config = Config(**SMALL)
    return [
        PipelinedMoE(
            world, layers.local(world.size, world.rank)[:n], num_experts=NUM_EXPERTS, top_k=TOP_K, config=config
        )
        for n in (1, 2)
    ]


def raised_everywhere(world, error, culprit, call, message=""):
    """Every rank's `call` raises `error` with the same words, which name the rank; `call` knows who the culprit is."""
    with pytest.raises(error, match=f"^rank {culprit}: (?s:.*){message}") as raised:
        call()
    texts = world.all_gather(f"{type(raised.value).__name__}: {raised.value}".encode())
    assert len(set(texts)) == 1, texts


SEQUENCES = {
    "hostile": Hostile,
    "hostile to the interpreter": lambda: Hostile(GeneratorExit),
    "a hostile sequence": lambda: [Hostile()],
    "a sequence that ends the process": lambda: [Hostile(SystemExit)],
    "a generator that raises": lambda: broken_off(),
    "a generator that raises later": lambda: itertools.chain([[1]], broken_off()),
    "a number": lambda: 5,
    "None": lambda: None,
    "None inside": lambda: [None],
    "text": lambda: "ab",
    "bytes": lambda: [b"ab"],
    "a huge id": lambda: [[2**70]],
    "a large unsigned id": lambda: [np.array([2**63 + 1], np.uint64)],
    "floats": lambda: [np.array([1.0])],
    "a number as sequence": lambda: [3],
    "no dimension": lambda: [np.array(3)],
    "two dimensions": lambda: [[[1, 2]]],
    "ragged": lambda: [[1, [2, 3]]],
    "empty": lambda: [[]],
    "an empty array": lambda: [np.array([], np.uint16)],
    "booleans": lambda: [np.array([True])],
    "objects": lambda: [np.array([object()])],
    "dates": lambda: [np.array(["2020-01-01"], "datetime64[D]")],
    "complex": lambda: [torch.ones(2, dtype=torch.complex64)],
    "meta": lambda: [torch.ones(2, dtype=torch.int64, device="meta")],
    "sparse": lambda: [torch.ones(2, dtype=torch.int64).to_sparse()],
    "quantised": lambda: [torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)],
    "with gradient": lambda: [torch.ones(2, requires_grad=True)],
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "without end": lambda: itertools.repeat([1]),
    "too many tokens": lambda: [[1] * 30, [1] * 11],
    "negative": lambda: [np.array([-1], np.int8)],
    "beyond the vocabulary": lambda: [np.array([VOCAB], np.uint16)],
}


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_odd_sequences_of_one_rank(world, model):
    culprit = world.size - 1
    wanted = model.prefill(PROMPT).first_tokens
    for make in SEQUENCES.values():
        raised_everywhere(
            world, InputError, culprit, lambda: model.prefill(make() if world.rank == culprit else PROMPT)
        )
        assert model.prefill(PROMPT).first_tokens == wanted


@pytest.mark.mpi
@pytest.mark.parametrize(
    "named",
    [
        {"keep_logits": 1},
        {"keep_logits": Hostile()},
        {"only": None},
        {"only": Only(computation=Hostile())},
        {"only": Only(communication=1)},
        {"only": Hostile(GeneratorExit)},
        {"timeline": []},
        {"timeline": Hostile()},
        {"on_done": 3},
        {"on_done": None},
    ],
    ids=lambda named: next(iter(named)),
)
def test_odd_options_of_one_rank(world, model, named):
    raised_everywhere(world, InputError, 0, lambda: model.prefill(PROMPT, **(named if world.rank == 0 else {})))
    assert len(model.prefill(PROMPT).first_tokens) == 1


@pytest.mark.mpi
def test_leaving_out_communication_on_one_rank_is_an_error_on_all(world, model):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(
        MismatchError, match=r"rank 1: what a step leaves out \(only\) is communication, but rank 0 has nothing"
    ):
        model.prefill(PROMPT, only=Only(communication=world.rank != 1))
    assert len(model.prefill(PROMPT).first_tokens) == 1


@pytest.mark.mpi
@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, ">u2", ">i4"], ids=str
)
def test_ids_of_any_integer_type_are_taken(world, model, dtype, tmp_path):
    wanted = model.prefill([[5, 77, 3], [9]]).first_tokens
    np.array([5, 77, 3, 9], dtype).tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", dtype, mode="r")  # what may not be written to
    assert model.prefill([tokens[:3], tokens[3:]]).first_tokens == wanted
    assert model.prefill(iter([list(tokens[:3]), tuple(tokens[3:])])).first_tokens == wanted


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        np.array([5, 0, 6])[::2],
        torch.tensor([5, 6], dtype=torch.uint16),
        torch.tensor([[5], [6]])[:, 0],
        [torch.tensor(5), np.uint8(6)],
    ],
    ids=repr,
)
def test_a_list_of_ids_in_many_forms(ids):
    found = token_ids("here", ids)
    assert found.tolist() == [5, 6] and found.dtype == torch.int64 and found.is_contiguous()


def test_ids_are_a_copy():
    for ids in (np.array([5, 6]), torch.tensor([5, 6])):
        found = token_ids("here", ids)
        ids[0] = 0
        assert found.tolist() == [5, 6]


def test_a_large_unsigned_id_is_said_as_it_is():
    array = np.array([2**63 + 1], np.uint64)
    for large in (array, torch.from_numpy(array)):
        with pytest.raises(InputError, match=f"^here holds token id {2**63 + 1}; "):
            token_ids("here", large)


def test_masked_ids_are_refused():
    """numpy would give the id below the mask."""
    with pytest.raises(InputError, match="^here has masked token ids"):
        token_ids("here", np.ma.array([1, 2, 3], mask=[0, 1, 0]))
    assert token_ids("here", np.ma.array([1, 2, 3])).tolist() == [1, 2, 3]


STEPS = {
    "hostile tokens": (Hostile, lambda: None),
    "floats": (lambda: 3.0, lambda: None),
    "negative": (lambda: -1, lambda: None),
    "None": (lambda: None, lambda: None),
    "True": (lambda: True, lambda: None),
    "huge": (lambda: 10**30, lambda: None),
    "too many": (lambda: 41, lambda: None),
    "hostile lengths": (lambda: 3, lambda: Hostile(KeyboardInterrupt)),
    "a generator that raises": (lambda: 3, broken_off),
    "another sum": (lambda: 3, lambda: [1, 1]),
    "float lengths": (lambda: 3, lambda: [1.0, 2.0]),
    "boolean lengths": (lambda: 2, lambda: [True, True]),
    "a zero": (lambda: 3, lambda: [0, 3]),
    "a number": (lambda: 3, lambda: 3),
    "none": (lambda: 3, lambda: [None]),
    "without end": (lambda: 3, lambda: itertools.repeat(1)),
    "two dimensions": (lambda: 3, lambda: np.ones((1, 3), int)),
}


@pytest.mark.mpi
def test_odd_steps_of_one_rank(world, layers, moes):
    rows = make_rows(3, world.rank, world.device, torch.float32)
    for tokens, lengths in STEPS.values():

        def enter(tokens=tokens, lengths=lengths):
            with moes[0].step(*((tokens(), lengths()) if world.rank == 0 else (3, [1, 2]))):
                pytest.fail("entered")

        raised_everywhere(world, InputError, 0, enter)
        with moes[0].step(np.uint8(3), np.array([1, 2], np.uint16)) as step:
            assert norm_ratio(step(0, *rows), layers.oracle(0, *rows)) < 1e-5


def odd_rows(world):
    x, ids, weights = make_rows(3, 0, world.device, torch.float32)
    sparse, meta = x.to_sparse(), x.to("meta")
    return {
        "hostile x": (Hostile(), ids, weights),
        "hostile ids": (x, Hostile(GeneratorExit), weights),
        "hostile weights": (x, ids, Hostile()),
        "arrays": (x.cpu().numpy(), ids, weights),
        "None": (x, None, weights),
        "sparse": (sparse, ids, weights),
        "meta": (meta, ids, weights),
        "a number": (x[0, 0], ids, weights),
        "unsigned": (x, ids.to(torch.uint8), weights),
        "quantised": (torch.quantize_per_tensor(x.cpu(), 1.0, 0, torch.qint8), ids, weights),
        "too many": make_rows(41, 0, world.device, torch.float32),
        "wide weights": (x, ids, weights.double()),
        "sparse weights": (x, ids, weights.to_sparse()),
    }


@pytest.mark.mpi
def test_odd_rows_of_one_rank(world, layers, moes):
    culprit = world.size - 1
    right = make_rows(3, world.rank, world.device, torch.float32)
    for wrong in odd_rows(world).values():
        raised_everywhere(world, InputError, culprit, lambda: moes[0](*(wrong if world.rank == culprit else right)))
        assert norm_ratio(moes[0](*right), layers.oracle(0, *right)) < 1e-5


@pytest.mark.mpi
def test_odd_rows_inside_a_step_are_an_input_error_and_the_layer_can_be_called_again(world, layers, moes):
    right = make_rows(3, world.rank, world.device, torch.float32)
    with moes[1].step(3) as step:
        for layer in range(2):
            for wrong in odd_rows(world).values():
                with pytest.raises(InputError, match=f"^rank {world.rank}: "):
                    step(layer, *wrong)
            for odd in (Hostile(), Hostile(GeneratorExit), "0", None, 0.0, True, np.ones(2), 1 - layer):
                with pytest.raises(InputError, match=f"^rank {world.rank}: layer"):
                    step(odd, *right)
            assert norm_ratio(step(layer, *right), layers.oracle(layer, *right)) < 1e-5


@pytest.mark.mpi
def test_a_call_of_several_layers_on_one_rank_is_an_error_on_all(world, moes):
    right = make_rows(3, world.rank, world.device, torch.float32)
    raised_everywhere(
        world, ConfigError, 0, lambda: moes[1](*right), "a call is for one MoE layer, but this PipelinedMoE has 2"
    )


WEIGHTS = {  # what becomes of the weights, the other arguments, and the error
    "hostile": (lambda w: Hostile(), {}, InputError),
    "ends the process": (lambda w: Hostile(SystemExit), {}, InputError),
    "a generator that raises": (lambda w: broken_off(), {}, InputError),
    "hostile inside": (lambda w: [Hostile()], {}, InputError),
    "None": (lambda w: None, {}, InputError),
    "no weights": (lambda w: iter(()), {}, ConfigError),
    "tensors": (lambda w: [w[0].gate_up], {}, InputError),
    "hostile tensors": (lambda w: [ExpertWeights(Hostile(), Hostile())], {}, InputError),
    "text": (lambda w: [ExpertWeights("gate", "up")], {}, InputError),
    "meta": (
        lambda w: [ExpertWeights(w[0].gate_up.to("meta"), w[0].down.to("meta"), first_expert=w[0].first_expert)],
        {},
        InputError,
    ),
    "sparse": (
        lambda w: [ExpertWeights(w[0].gate_up.to_sparse(), w[0].down.to_sparse(), first_expert=w[0].first_expert)],
        {},
        InputError,
    ),
    "float64": (
        lambda w: [ExpertWeights(w[0].gate_up.double(), w[0].down.double(), first_expert=w[0].first_expert)],
        {},
        ConfigError,
    ),
    "whole numbers": (
        lambda w: [ExpertWeights(w[0].gate_up.int(), w[0].down.int(), first_expert=w[0].first_expert)],
        {},
        ConfigError,
    ),
    "first expert": (lambda w: [ExpertWeights(w[0].gate_up, w[0].down, first_expert=Hostile())], {}, InputError),
    "a float": (lambda w: [ExpertWeights(w[0].gate_up, w[0].down, first_expert=0.5)], {}, InputError),
    "activation": (
        lambda w: [ExpertWeights(w[0].gate_up, w[0].down, first_expert=w[0].first_expert, activation=Hostile())],
        {},
        InputError,
    ),
    "gated": (
        lambda w: [ExpertWeights(w[0].gate_up, w[0].down, first_expert=w[0].first_expert, gated=Hostile())],
        {},
        InputError,
    ),
    "num_experts": (lambda w: w, {"num_experts": Hostile()}, (ConfigError, InputError)),
    "half an expert": (lambda w: w, {"num_experts": 6.5}, ConfigError),
    "no top_k": (lambda w: w, {"top_k": None}, ConfigError),
    "a dict": (lambda w: w, {"config": {"mode": "padded"}}, ConfigError),
    "no config": (lambda w: w, {"config": None}, ConfigError),
    "hostile config": (lambda w: w, {"config": Hostile()}, ConfigError),
    "unknown experts": (lambda w: w, {"config": Config(experts="abacus")}, ConfigError),
    "experts of another device": (lambda w: w, {"config": Config(experts="hopper_fp8")}, ConfigError),
    "a width of 96": (lambda w: w, {"config": Config(dispatch_dtype="float8_e4m3fn")}, ConfigError),
    "a file that cannot be": (lambda w: w, {"config": Config(cost="\0")}, ConfigError),
}


@pytest.mark.mpi
@pytest.mark.parametrize("case", WEIGHTS)
def test_odd_arguments_of_pipelined_moe_on_one_rank(world, layers, moes, case):
    change, named, error = WEIGHTS[case]
    culprit = world.size - 1

    def make():
        weights = layers.local(world.size, world.rank)[:1]
        arguments = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "config": Config(**SMALL)}
        if world.rank == culprit:
            weights, arguments = change(weights), arguments | named
        PipelinedMoE(world, weights, **arguments)

    raised_everywhere(world, error, culprit, make)
    right = make_rows(3, world.rank, world.device, torch.float32)
    assert norm_ratio(moes[0](*right), layers.oracle(0, *right)) < 1e-5


@pytest.mark.mpi
def test_other_numbers_on_one_rank_are_an_error_on_all(world, layers):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    for named in ({"num_experts": NUM_EXPERTS + 1}, {"num_experts": 10**9}, {"top_k": 2}):
        arguments = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "config": Config(**SMALL)} | (
            named if world.rank == 1 else {}
        )
        with pytest.raises(MismatchError, match=f"rank 1: {next(iter(named))} is "):
            PipelinedMoE(world, layers.local(world.size, world.rank), **arguments)


@pytest.mark.mpi
def test_more_experts_than_can_be_counted(world, layers):
    with pytest.raises(ConfigError, match="num_experts is 100000000000000000000; it must be below"):
        PipelinedMoE(
            world, layers.local(world.size, world.rank), num_experts=10**20, top_k=TOP_K, config=Config(**SMALL)
        )


@pytest.mark.mpi
def test_weights_from_a_generator(world, layers):
    weights = (of_layer for of_layer in layers.local(world.size, world.rank)[:1])
    rows = make_rows(3, world.rank, world.device, torch.float32)
    moe = PipelinedMoE(world, weights, num_experts=np.int64(NUM_EXPERTS), top_k=np.uint8(TOP_K), config=Config(**SMALL))
    assert norm_ratio(moe(*rows), layers.oracle(0, *rows)) < 1e-5


@pytest.mark.mpi
@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        Hostile(),
        Hostile(GeneratorExit),
        Config,
        Config(num_slots=99),
        Config(combine_dtype="bfloat16"),
        Config(experts="hopper"),
        Config(cost="/nowhere/cost.json"),
        Config(cost=Hostile()),
    ],
    ids=lambda c: type(c).__name__,
)
def test_odd_configs_of_one_rank(world, model, config):
    if (
        world.device.type == "cuda"
        and isinstance(config, Config)
        and (config.combine_dtype or config.experts == "hopper")
    ):
        pytest.skip("these are right on some GPU")
    raised_everywhere(world, ConfigError, 0, lambda: model.with_config(config if world.rank == 0 else Config(**SMALL)))
    assert len(model.prefill(PROMPT).first_tokens) == 1


LOADS = {
    "hostile": (Hostile, {}, CheckpointError),
    "ends the process": (lambda: Hostile(SystemExit), {}, CheckpointError),
    "None": (lambda: None, {}, CheckpointError),
    "a number": (lambda: 5, {}, CheckpointError),
    "a path that cannot be": (lambda: "\0", {}, CheckpointError),
    "odd values": (lambda: {**tiny_config("qwen3_moe").to_dict(), "hidden_size": Hostile()}, {}, CheckpointError),
    "hostile config": (lambda: tiny_config("qwen3_moe"), {"config": Hostile()}, ConfigError),
    "a dict as config": (lambda: tiny_config("qwen3_moe"), {"config": {}}, ConfigError),
    "dtype by name": (lambda: tiny_config("qwen3_moe"), {"dtype": "float32"}, ConfigError),
    "hostile dtype": (lambda: tiny_config("qwen3_moe"), {"dtype": Hostile()}, ConfigError),
    "wide dtype": (lambda: tiny_config("qwen3_moe"), {"dtype": torch.float64}, ConfigError),
    "hostile seed": (lambda: tiny_config("qwen3_moe"), {"seed": Hostile()}, ConfigError),
    "float seed": (lambda: tiny_config("qwen3_moe"), {"seed": 0.5}, ConfigError),
}


@pytest.mark.mpi
@pytest.mark.parametrize("case", LOADS)
def test_odd_arguments_of_load_model_on_one_rank(world, model, case):
    source, named, error = LOADS[case]

    def load():
        is_odd = world.rank == 0
        load_model(
            source() if is_odd else tiny_config("qwen3_moe"),
            world,
            **{"config": Config(**SMALL), "dtype": torch.float32, **(named if is_odd else {})},
        )

    raised_everywhere(world, error, 0, load)
    assert len(model.prefill(PROMPT).first_tokens) == 1


@pytest.mark.mpi
@pytest.mark.parametrize("odd", [None, Hostile(), "world"], ids=lambda odd: type(odd).__name__)
def test_what_is_no_world_on_one_rank_is_an_error_on_all(world, layers, odd):
    given = odd if world.rank == 0 else world
    raised_everywhere(
        world, InputError, 0, lambda: load_model(tiny_config("qwen3_moe"), given, config=Config(**SMALL)), "world is a "
    )
    weights = layers.local(world.size, world.rank)
    raised_everywhere(
        world, InputError, 0, lambda: PipelinedMoE(given, weights, num_experts=NUM_EXPERTS, top_k=TOP_K), "world is a "
    )


def test_what_is_no_world_where_there_is_none(monkeypatch):
    monkeypatch.setattr(world_module, "_open_world", None)
    with pytest.raises(InputError, match="world is a NoneType; it must be what pipemoe.init"):
        load_model(tiny_config("qwen3_moe"), None)


@pytest.mark.mpi
@pytest.mark.parametrize("payload", [None, "text", 5, Hostile(), [1]], ids=lambda p: type(p).__name__)
def test_odd_payloads_of_one_rank(world, payload):
    raised_everywhere(world, InputError, 0, lambda: world.all_gather(payload if world.rank == 0 else b"x"))
    assert world.all_gather(bytearray(b"y")) == [b"y"] * world.size


@pytest.mark.mpi
@pytest.mark.parametrize("lengths", [None, 5, [0], [1.5], [True], Hostile(), "12"], ids=lambda v: type(v).__name__)
def test_odd_lengths_of_one_rank_for_a_source(world, lengths):
    runtime = make_runtime(world, make_layers(1, world.device, torch.float32))
    raised_everywhere(
        world,
        InputError,
        0,
        lambda: runtime.submit_step(lengths if world.rank == 0 else [3], RowsSource(3, runtime)).result(),
    )
    runtime.submit_step([3], RowsSource(3, runtime)).result()


@pytest.mark.parametrize(
    "named",
    [
        {"mode": Hostile()},
        {"mode": np.ones(2)},
        {"combine": []},
        {"experts": ["host"]},
        {"cost": 5},
        {"graph_tokens": True},
        {"makespan_budget": float("nan")},
        {"makespan_budget": Hostile()},
        {"num_slots": 10**30},
        {"max_tokens_per_rank": 2**31},
        {"pipelined_ratio": 10**20},
        {"moe_max_num_tokens": 1.0},
        {"dispatch_dtype": Hostile()},
        {"objective": Hostile()},
        {"deterministic": Hostile()},
    ],
    ids=lambda named: next(iter(named)),
)
def test_odd_settings(named):
    for slots in ({}, {"num_slots": 2}):
        with pytest.raises(ConfigError):
            Config(**{**slots, **named})
