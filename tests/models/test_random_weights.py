"""Random weights: functions of names alone, that route as trained ones do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError, MismatchError
from pipemoe.model import load_model
from pipemoe.models.loading import load_decoder
from pipemoe.models.packing import Piece
from pipemoe.models.random_parameters import (
    MOST_SHARE,
    ROUTER_GAIN,
    Gains,
    expert_shares,
    random_experts,
    random_parameter,
)
from pipemoe.models.random_weights import reference_model
from pipemoe.models.routing import SIGMOID, RoutingSpec, route
from tests.models.tiny import FAMILIES, tiny_config

CPU = torch.device("cpu")
SHAPE = dict(hidden=16, intermediate=8, device=CPU, dtype=torch.float32)
GAINS = Gains(0.1, RoutingSpec(num_experts=8, top_k=2))
VOCAB = 10_000  # of the models here: the more ids, the less embeddings have in common

# All routing kinds, at shares of the tokens like those of real models.
MANY_EXPERTS = {
    "qwen3_moe": dict(num_experts=128, num_experts_per_tok=8),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "deepseek_v3": dict(n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, n_shared_experts=1),
}
LAYERS = 48  # as the real models: what layers add up shows in the last ones


def test_an_expert_is_the_same_on_whatever_rank():
    everything = random_experts(2, range(10), seed=5, **SHAPE)
    part = random_experts(2, range(3, 6), seed=5, **SHAPE)
    assert part.first_expert == 3
    assert torch.equal(part.gate_up, everything.gate_up[3:6]) and torch.equal(part.down, everything.down[3:6])


def test_seed_layer_and_expert_all_matter():
    made = [
        random_experts(layer, range(expert, expert + 1), seed=seed, **SHAPE).gate_up
        for layer, expert, seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


def test_dtypes_agree_up_to_rounding():
    shape = torch.Size([7, 5])
    fine = random_parameter("a.weight", shape, seed=1, device=CPU, dtype=torch.float32, gains=GAINS)
    coarse = random_parameter("a.weight", shape, seed=1, device=CPU, dtype=torch.bfloat16, gains=GAINS)
    assert torch.equal(fine.to(torch.bfloat16), coarse)


def test_reference_and_ranks_hold_the_same_numbers():
    config = tiny_config("deepseek_v3", num_experts=6)
    reference = reference_model(config, "cpu", torch.float32, seed=4)
    for rank in range(4):
        decoder, weights = load_decoder(config, rank=rank, num_ranks=4, device="cpu", dtype=torch.float32, seed=4)
        mine, theirs = decoder._model.state_dict(), reference.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert {name for name in theirs if name not in mine} == {
            f"layers.{layer}.mlp.experts.{part}" for layer in (1, 2) for part in ("gate_up_proj", "down_proj")
        }
        for layer, layer_weights in enumerate(weights):
            first, last = layer_weights.first_expert, layer_weights.first_expert + layer_weights.num_local_experts
            experts = reference.model.layers[layer + 1].mlp.experts
            assert torch.equal(layer_weights.gate_up, experts.gate_up_proj[first:last])
            assert torch.equal(layer_weights.down, experts.down_proj[first:last])


def many_experts(family: str, num_layers: int):
    return tiny_config(family, num_layers, vocab_size=VOCAB, hidden_size=128, **MANY_EXPERTS[family])


def routed_sum(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer_weights) -> torch.Tensor:
    """As tests.models.tiny.naive_experts, expert by expert."""
    out = torch.zeros(x.shape)
    for expert in ids.unique().tolist():
        tokens, k = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens] @ layer_weights.gate_up[expert].T).chunk(2, dim=-1)
        out.index_add_(0, tokens, weights[tokens, k, None] * ((F.silu(gate) * up) @ layer_weights.down[expert].T))
    return out


def loads(model, num_tokens: int, prompts: int = 1) -> torch.Tensor:
    """Tokens per expert [prompts, L, E], of random prompts through all layers."""
    (decoder, weights), found = model, []
    generator = torch.Generator().manual_seed(num_tokens)
    for _ in range(prompts):
        tokens = torch.randint(0, VOCAB, (num_tokens,), generator=generator)
        state, y = decoder.start(decoder.new_step(), tokens, [Piece(0, 0, num_tokens, num_tokens)]), None
        for layer in range(decoder.shape.num_layers):
            x, ids, scales = decoder.attend(state, layer, y)
            found.append(torch.bincount(ids.flatten().long(), minlength=decoder.shape.num_experts))
            y = routed_sum(x, ids, scales, weights[layer])
    return torch.stack(found).view(prompts, -1, decoder.shape.num_experts)


@pytest.fixture(scope="module")
def deep_models():
    """deep_models(family): decoder and weights with many experts and layers."""
    made = {}

    def get(family):
        if family not in made:
            config = many_experts(family, LAYERS)
            made[family] = load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.float32, seed=1)
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_spread_over_the_experts_of_every_layer(deep_models, family):
    """As many active experts as with uniform choice, mean over layers and in the last ones; and no expert takes much
    more than uniform choice gives the busiest."""
    model = deep_models(family)
    num_experts, top_k = model[0].shape.num_experts, model[0].shape.top_k
    for num_tokens, prompts in ((1, 1), (16, 3), (64, 1), (512, 1)):
        found = loads(model, num_tokens, prompts)
        active = (found > 0).sum(-1).float().mean(0)  # [L]
        expected = num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)
        assert active.mean() == pytest.approx(expected, rel=0.05)
        assert active[-LAYERS // 4 :].mean() == pytest.approx(expected, rel=0.05)
        uniform = torch.rand(50, num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
        chosen = F.one_hot(uniform.topk(top_k).indices, num_experts).sum((1, 2))  # [50, E]
        assert found.amax(-1).float().mean() < 1.35 * chosen.amax(-1).float().mean()


def test_tokens_of_different_ids_choose_differently(deep_models):
    """Two tokens share no more experts than two independent choices would; in every layer, at any positions."""
    decoder, weights = deep_models("qwen3_moe")
    tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(0))
    state, y, common = decoder.start(decoder.new_step(), tokens, [Piece(0, 0, 64, 64)]), None, []
    for layer in range(LAYERS):
        x, ids, scales = decoder.attend(state, layer, y)
        taken = F.one_hot(ids.long(), 128).sum(1).float()  # [T, E]
        common.append((taken @ taken.T).triu(1).sum() / (64 * 63 / 2))
        y = routed_sum(x, ids, scales, weights[layer])
    assert max(common) < 1.5 * 8 * 8 / 128


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_skew_gives_every_layer_popular_experts_of_its_own(family):
    skew, config = 0.3, many_experts(family, 5)
    model = load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.float32, seed=1, router_skew=skew)
    found = loads(model, 1024).squeeze(0).float()
    shares = torch.tensor(expert_shares(model[0].routing, skew))
    for of_layer in found:
        sorted_shares = of_layer.sort(descending=True).values / 1024
        assert torch.corrcoef(torch.stack((sorted_shares, shares)))[0, 1] > 0.95
        assert sorted_shares[0] == pytest.approx(float(shares[0]), rel=0.35)
    assert len(set(found.argmax(-1).tolist())) > 1


@given(num_experts=st.integers(1, 300), top_k=st.integers(1, 20), skew=st.floats(0, 50))
def test_shares_are_a_zipf_law_up_to_the_most_that_one_takes(num_experts, top_k, skew):
    top_k = min(top_k, num_experts)
    spec = RoutingSpec(num_experts, top_k)
    if skew and top_k >= MOST_SHARE * num_experts:
        with pytest.raises(ConfigError, match="must be 0 where every token takes"):
            expert_shares(spec, skew)
        return
    shares = expert_shares(spec, skew)
    assert len(shares) == num_experts and math.isclose(sum(shares), top_k)
    assert shares == sorted(shares, reverse=True) and 0 <= shares[-1] and (not skew or shares[0] <= MOST_SHARE + 1e-9)
    if not skew:
        assert set(shares) == {top_k / num_experts}
        return
    below = [(rank, share) for rank, share in enumerate(shares, 1) if share < MOST_SHARE and share > 1e-300]
    for (rank, share), (next_rank, next_share) in zip(below, below[1:]):
        assert math.isclose(next_share / share, (next_rank / rank) ** -skew, rel_tol=1e-6)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "1", None, True])
def test_a_bad_skew_is_refused(bad):
    with pytest.raises(ConfigError, match="^rank 0: router_skew is .*must be a number of at least 0"):
        load_decoder(tiny_config("mixtral"), rank=0, num_ranks=1, device="cpu", dtype=torch.float32, router_skew=bad)


def test_a_checkpoints_router_has_its_own_skew(tmp_path):
    reference_model(tiny_config("mixtral"), "cpu", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="router_skew is 0.5, but is of random weights alone"):
        load_decoder(tmp_path, rank=0, num_ranks=1, device="cpu", dtype=torch.float32, router_skew=0.5)


@pytest.mark.mpi
def test_another_skew_on_one_rank_is_an_error_on_all(world):
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    with pytest.raises(MismatchError, match=rf"rank {world.size - 1}: the model's checkpoint is .*router skew 0.5"):
        load_model(tiny_config("mixtral"), world, router_skew=0.5 * (world.rank == world.size - 1))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**40), hidden=st.sampled_from([16, 33, 64]), skew=st.sampled_from([0, 0.5, 2.0]))
def test_a_routers_rows_have_the_lengths_that_its_skew_asks_for(seed, hidden, skew):
    gains = Gains(0.1, RoutingSpec(num_experts=20, top_k=3), skew)
    name, shape = "model.layers.3.mlp.gate.weight", torch.Size([20, hidden])
    made = random_parameter(name, shape, seed=seed, device=CPU, dtype=torch.float32, gains=gains)
    lengths = gains.router_rows(seed, name)
    torch.testing.assert_close(made.norm(dim=-1), lengths)
    if skew == 0:
        assert set(lengths.tolist()) == {ROUTER_GAIN}
    else:
        assert lengths.max() > ROUTER_GAIN > lengths.min() > 0
        other = gains.router_rows(seed, "model.layers.4.mlp.gate.weight")
        assert torch.equal(other.sort().values, lengths.sort().values) and not torch.equal(other, lengths)


@pytest.mark.parametrize("groups", [1, 8])
def test_biases_matter_but_leave_the_load_even(groups):
    """A wrong bias must show in parity checks; yet it is small, so that no expert is everybody's."""
    spec = RoutingSpec(256, 8, SIGMOID, num_groups=groups, top_groups=(groups + 1) // 2)
    generator = torch.Generator().manual_seed(0)
    logits = ROUTER_GAIN * torch.randn(20_000, 256, generator=generator)
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    gains = Gains(0.1, spec)
    bias = random_parameter(name, torch.Size([256]), seed=0, device=CPU, dtype=torch.float32, gains=gains)
    with_bias, without = (route(logits, spec, b)[0].sort(-1).values for b in (bias, None))
    assert (with_bias != without).any(-1).float().mean() > 0.05  # of the tokens choose otherwise
    load = torch.bincount(with_bias.flatten().long(), minlength=256).float()
    assert load.std() / load.mean() < 0.08


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_attention_gets_quieter_with_depth(kind):
    shape = torch.Size([64, 64] if kind == "weight" else [64])
    quiet, loud = (
        random_parameter(
            f"model.layers.0.self_attn.o_proj.{kind}",
            shape,
            seed=0,
            device=CPU,
            dtype=torch.float32,
            gains=Gains.of(tiny_config("qwen3_moe", num_layers)),
        )
        for num_layers in (16, 4)
    )
    torch.testing.assert_close(loud, 2 * quiet)
