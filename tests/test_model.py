"""Whole models over the ranks of a world: parity with the plain Hugging Face forward, and bad checkpoints and
inputs.
"""

import shutil
import warnings
from contextlib import nullcontext
from functools import cache
from operator import itemgetter

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.errors import CheckpointError, InputError, MismatchError, ModelError
from pipemoe.models.random_weights import reference_model
from pipemoe.plan.config import MODES
from pipemoe.runtime.run import Only
from tests.models.tiny import FAMILIES, VOCAB, tiny_config
from tests.moe_cases import norm_ratio

pytestmark = pytest.mark.mpi
SMALL = {"moe_max_num_tokens": 20, "max_tokens_per_rank": 128, "debug": True}

# Sequence lengths per rank; rank r uses entry r modulo their number.
LENGTHS = (((30, 1, 8), (), (5,), (60, 20)), ((), (3, 3), (), (1,)), ((50,), (50,), (50,), (50,)))


@pytest.fixture(scope="module")
def models(world):
    """By (family, dtype): the plain model, and pipemoe's with the same weights."""
    made = {}

    def get(family, dtype):
        if (family, dtype) not in made:
            config = tiny_config(family, num_layers=4, num_experts=7 if family == "qwen3_moe" else 8)
            reference = reference_model(config, device=world.device, dtype=dtype, seed=3)
            made[family, dtype] = reference, load_model(config, world, dtype=dtype, seed=3, config=Config(**SMALL))
        return made[family, dtype]

    return get


def sequences(case, rank):
    g = torch.Generator().manual_seed(100 * case + rank)
    return [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in LENGTHS[case][rank % len(LENGTHS[case])]]


def plain_logits(reference, sequences, device):
    with torch.no_grad():
        return [reference(torch.tensor([s], device=device)).logits[0, -1].float() for s in sequences]


@pytest.fixture(scope="module")
def plain(world, models):
    """plain(family, dtype): (this rank's prompts, the plain model's logits) for each of LENGTHS."""

    @cache
    def plain(family, dtype):
        prompts_of = [sequences(case, world.rank) for case in range(len(LENGTHS))]
        return [(prompts, plain_logits(models(family, dtype)[0], prompts, world.device)) for prompts in prompts_of]

    return plain


# How sums come together is nothing to a family: the second way, with one of them.
@pytest.mark.parametrize(
    ("family", "combine"), [*((family, "reduce") for family in FAMILIES), ("deepseek_v3", "gather")]
)
@pytest.mark.parametrize("mode", MODES)
def test_same_first_tokens_in_float32(world, models, plain, mode, family, combine):
    model = models(family, torch.float32)[1].with_config(Config(mode=mode, combine=combine, **SMALL))
    for prompts, wanted in plain(family, torch.float32):
        found = model.prefill(prompts, keep_logits=True)
        assert found.first_tokens == [int(w.argmax()) for w in wanted]
        assert all(type(s) is float and 0 < s < 60 for s in found.ttft_seconds)
        for f, w in zip(found.logits if prompts else [], wanted):
            assert norm_ratio(f, w) < 1e-4


@pytest.fixture(scope="module")
def roundings(models, plain):
    """roundings(family): for each prompt of plain(family, bfloat16), logits [V] that are as right in bfloat16: the
    plain model's, and those with its embeddings off by about one rounding, several times. They differ where a router is
    near a tie."""

    @cache
    def roundings(family):
        reference = models(family, torch.bfloat16)[0]
        right = [[[w] for w in wanted] for _, wanted in plain(family, torch.bfloat16)]
        for seed in range(6):
            noise = torch.Generator().manual_seed(seed)

            def shake(module, inputs, rows, noise=noise):
                return rows * (1 + 2**-8 * torch.randn(rows.shape, generator=noise).to(rows))

            handle = reference.model.embed_tokens.register_forward_hook(shake)
            for of_case, (prompts, _) in zip(right, plain(family, torch.bfloat16)):
                for of_prompt, prompt in zip(of_case, prompts):
                    of_prompt += plain_logits(reference, [prompt], reference.device)
            handle.remove()
        return right

    return roundings


# Every mode on the ranks' unlike prompts, three on the others. Deterministic sums have the same bits in all modes
# (test_layer.py).
@pytest.mark.parametrize(
    ("deterministic", "modes"), [(False, MODES), (True, ("per_rank",))], ids=["any sums", "deterministic"]
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["auto", "transformers"] if torch.cuda.is_available() else ["auto"])
def test_bfloat16_stays_close(world, models, plain, roundings, family, deterministic, modes, attention):
    """Logits within 2e-2 by norm ratio of the nearest of `roundings`, and its token wherever its margin exceeds twice
    the largest error.

    Left out are prompts on which the plain model's own bfloat16 forward is that far from its float32 forward.
    """
    exact = plain(family, torch.float32)
    sure = [
        [norm_ratio(r[0], v) < 2e-2 for r, v in zip(right, wide)] for right, (_, wide) in zip(roundings(family), exact)
    ]
    wrong = []
    for mode in modes:
        model = models(family, torch.bfloat16)[1].with_config(
            Config(mode=mode, deterministic=deterministic, attention=attention, **SMALL)
        )
        for case, (prompts, _) in enumerate(exact):
            if case and mode not in ("padded", "per_rank", "auto"):
                continue
            found = model.prefill(prompts, keep_logits=True)
            for i in (i for i, ok in enumerate(sure[case]) if ok):
                off, wanted = min(
                    ((norm_ratio(found.logits[i], right), right) for right in roundings(family)[case][i]),
                    key=itemgetter(0),
                )
                error, top = (found.logits[i] - wanted).abs().max(), wanted.topk(2)
                same = top.values[0] - top.values[1] <= 2 * error or found.first_tokens[i] == top.indices[0]
                if off >= 2e-2 or not same:
                    wrong.append((mode, case, i, off, same))
    # Only now: every rank takes part in every prefill.
    assert not wrong
    assert sum(map(sum, sure)) >= sum(map(len, sure)) / 2


def test_checkpoint_on_disk_gives_the_plain_models_tokens(world, tmp_path_factory):
    config = tiny_config("deepseek_v3", num_layers=3)
    reference = reference_model(config, device=world.device, dtype=torch.float32, seed=5)
    folder = tmp_path_factory.mktemp(f"checkpoint{world.rank}")  # every rank its own copy, as on nodes with local disks
    reference.save_pretrained(folder, max_shard_size="100KB")
    model = load_model(folder, world, dtype=torch.float32, config=Config(**SMALL))
    prompts = sequences(0, world.rank)
    assert model.prefill(prompts).first_tokens == [
        int(w.argmax()) for w in plain_logits(reference, prompts, world.device)
    ]


def test_a_bad_checkpoint_on_one_rank_is_the_same_error_on_all(world, tmp_path_factory):
    config = tiny_config("qwen3_moe", num_layers=2)
    folder = tmp_path_factory.mktemp(f"checkpoint{world.rank}")
    reference_model(config, device=world.device, dtype=torch.float32, seed=5).save_pretrained(
        folder, max_shard_size="100KB"
    )
    culprit = world.size - 1
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    for damage, message in (
        ("missing", "does not exist|missing"),
        ("truncated", "truncated|damaged|incomplete"),
        ("other", ""),
    ):
        if world.rank == culprit and damage == "missing":
            shards[1].unlink()
        elif world.rank == culprit and damage == "truncated":
            shards[1].write_bytes(whole[: len(whole) // 2])
        elif damage == "other":
            if world.rank == culprit:
                shutil.rmtree(folder)
                reference_model(config, device=world.device, dtype=torch.float32, seed=6).save_pretrained(folder)
            if world.size > 1:
                with pytest.raises(MismatchError, match=f"rank {culprit}: the model's checkpoint is"):
                    load_model(folder, world, dtype=torch.float32, config=Config(**SMALL))
            return
        with pytest.raises(CheckpointError, match=f"rank {culprit}: .*({message})"):
            load_model(folder, world, dtype=torch.float32, config=Config(**SMALL))


def test_nan_weights_are_refused_at_load(world, tmp_path_factory):
    config = tiny_config("mixtral", num_layers=2)
    folder = tmp_path_factory.mktemp(f"checkpoint{world.rank}")
    reference = reference_model(config, device=world.device, dtype=torch.float32, seed=5)
    with torch.no_grad():
        reference.model.layers[1].mlp.experts.down_proj[7, 3, 3] = torch.nan  # expert 7 is the last rank's
    reference.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=f"rank {world.size - 1}: .*layer 1.*expert 7"):
        load_model(folder, world, dtype=torch.float32, config=Config(**SMALL))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1, 2], []], "sequence 1 is empty"),
        ([[True]], "holds True or False"),
        ([[2, True]], "holds True or False"),
        ([[1] * 513], "sequence 0 has 513 tokens, but the model has positions for 512"),
        ([[1, VOCAB]], f"sequence 0 holds token id {VOCAB}"),
        ([[-1]], "holds token id -1"),
        ([[1.5]], "dtype float64"),
        ([[1, None]], "sequence 0 is not a list of token ids"),
    ],
)
def test_bad_token_ids_on_one_rank_are_the_same_error_on_all(world, models, bad, message):
    _, model = models("mixtral", torch.float32)
    culprit = world.size - 1
    with pytest.raises(InputError, match=f"rank {culprit}: .*{message}"):
        model.prefill(bad if world.rank == culprit else [[1, 2, 3]])


def test_an_exception_in_one_ranks_model_code_does_not_end_the_others(world, models, monkeypatch):
    reference, model = models("qwen3_moe", torch.float32)
    model = model.with_config(Config(**{**SMALL, "debug": False}))
    culprit = world.size - 1
    prompts = sequences(2, world.rank)
    attend = model.decoder.attend

    def broken(state, layer, y):
        if layer == 2:
            raise ZeroDivisionError("attention went wrong")
        return attend(state, layer, y)

    with monkeypatch.context() as patch:
        if world.rank == culprit:
            patch.setattr(model.runtime, "plays_records", False)  # which would not call it in layer 2
            patch.setattr(model.decoder, "attend", broken)
            with pytest.raises(ModelError, match="model code raised ZeroDivisionError"):
                model.prefill(prompts)
        else:
            model.prefill(prompts)
    with pytest.raises(ModelError, match=f"rank {culprit}: model code raised ZeroDivisionError: attention went wrong"):
        model.prefill(prompts)
    assert model.prefill(prompts).first_tokens == [
        int(w.argmax()) for w in plain_logits(reference, prompts, world.device)
    ]


def test_prefill_without_computation_is_an_error_on_every_rank(world, models):
    _, model = models("mixtral", torch.float32)
    with pytest.raises(InputError, match="rank 0: prefill without computation"):
        model.prefill([[1, 2]], only=Only(computation=world.rank != 0))
    assert len(model.prefill([[1, 2]]).first_tokens) == 1


@pytest.mark.parametrize("mode", ["two_batch", "auto"])
def test_dense_layers_after_the_last_moe_layer(world, mode):
    """They attend to what earlier chunks have left, also when these are in another cohort."""
    config = tiny_config("qwen3_moe", num_layers=5, mlp_only_layers=[2, 3, 4])
    reference = reference_model(config, device=world.device, dtype=torch.float32, seed=3)
    model = load_model(config, world, dtype=torch.float32, seed=3, config=Config(mode=mode, **SMALL))
    for _ in range(10):
        prompts = sequences(2, world.rank)
        wanted = plain_logits(reference, prompts, world.device)
        assert model.prefill(prompts).first_tokens == [int(w.argmax()) for w in wanted]


def test_an_odd_config_on_one_rank_is_the_same_error_on_all(world):
    config = tiny_config("qwen3_moe").to_dict()
    culprit = world.size - 1
    if world.rank == culprit:
        config["num_key_value_heads"] = 0
    with pytest.raises(CheckpointError, match=f"rank {culprit}: the config given: num_key_value_heads is 0"):
        load_model(config, world, random_weights=True)


def test_a_config_without_weights_on_one_rank_is_the_same_error_on_all(world, tmp_path_factory):
    """Random weights are made where they are asked for by name, or for a config object."""
    config, culprit = tiny_config("qwen3_moe", num_layers=2), world.size - 1
    folder = tmp_path_factory.mktemp(f"config{world.rank}")
    config.save_pretrained(folder)
    with pytest.raises(
        CheckpointError, match=f"rank {culprit}: .*config.json is a file, which has no weights: .*random_weights=True"
    ):
        load_model(folder / "config.json", world, random_weights=world.rank != culprit)
    model = load_model(folder, world, random_weights=True, dtype=torch.float32, seed=3, config=Config(**SMALL))
    same = load_model(config, world, dtype=torch.float32, seed=3, config=Config(**SMALL))
    prompts = sequences(0, world.rank)
    assert (
        model.decoder.fingerprint == same.decoder.fingerprint
        and model.prefill(prompts).first_tokens == same.prefill(prompts).first_tokens
    )


def test_another_model_on_one_rank_is_an_error_on_all_that_names_the_field(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    culprit = world.size - 1
    config = tiny_config(
        "qwen3_moe", rope_parameters={"rope_type": "default", "rope_theta": 1e6 if world.rank == culprit else 1e4}
    )
    with pytest.raises(
        MismatchError, match=f"rank {culprit}: the model's rope_parameters is .*1000000.0.*, but rank 0 has .*10000.0"
    ):
        load_model(config, world, config=Config(**SMALL))


@pytest.mark.parametrize("bad", [None, 7, [torch.ones(2, dtype=torch.complex64)]])
def test_what_is_no_list_of_sequences_on_one_rank_is_the_same_error_on_all(world, models, bad):
    _, model = models("mixtral", torch.float32)
    culprit = world.size - 1
    with pytest.raises(InputError, match=f"rank {culprit}: sequence"):
        model.prefill(bad if world.rank == culprit else [[1, 2]])
    assert len(model.prefill([[1, 2]]).first_tokens) == 1


def test_logits_that_are_not_finite_are_said_per_sequence_and_warned_of_once(world, models, monkeypatch):
    """On the rank whose sequences they are; NaN, and infinity of either sign."""
    _, model = models("mixtral", torch.float32)
    culprit, finish = world.size - 1, model.decoder.finish
    prompts = [[1, 2, 3], [4], [5, 6], [7]]
    assert model.prefill(prompts).finite == [True] * 4

    def broken(*args):
        logits = finish(*args)
        for i, value in enumerate((torch.nan, -torch.inf, torch.inf)[: len(logits)]):
            logits[i, 7 + i] = value
        return logits

    if world.rank == culprit:
        monkeypatch.setattr(model.decoder, "finish", broken)
        monkeypatch.setattr(world, "_warned", set())
    one = model.with_config(Config(mode="broadcast", **SMALL))  # one microbatch
    with (
        pytest.warns(UserWarning, match=f"rank {culprit}: logits of sequence 0 hold NaN or infinity")
        if world.rank == culprit
        else nullcontext() as warned
    ):
        found = one.prefill(prompts)
    assert found.finite == ([False, False, False, True] if world.rank == culprit else [True] * 4)
    assert all(warning.filename == __file__ for warning in warned or [])  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one.prefill(prompts).finite == found.finite  # said once
    assert one.prefill([]).finite == []


def test_an_overflow_of_float16_is_said(world):
    model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float16, seed=3, config=Config(**SMALL))
    assert model.prefill([[1, 2]]).finite == [True]
    model.decoder._lm_head.weight.mul_(60000)  # itself in range still
    world._warned.discard("logits")
    with pytest.warns(UserWarning, match="perhaps torch.float16 is too narrow"):
        found = model.prefill([[1, 2]], keep_logits=True)
    assert torch.isfinite(model.decoder._lm_head.weight).all()
    assert found.finite == [False] and not torch.isfinite(found.logits).all()
