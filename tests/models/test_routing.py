"""Routing against transformers' own routers, and its behaviour at ties and NaN."""

from __future__ import annotations

import pytest
import torch

from pipemoe.errors import ConfigError
from pipemoe.models import routing
from pipemoe.models.families import find_family
from pipemoe.models.routing import SIGMOID, SOFTMAX, RoutingSpec, route
from tests.models.tiny import tiny_config

CASES = [
    ("qwen3_moe", {}),
    ("qwen3_moe", dict(norm_topk_prob=False)),
    ("mixtral", {}),
    ("mixtral", dict(num_experts=1)),
    ("deepseek_v3", {}),
    ("deepseek_v3", dict(norm_topk_prob=False, routed_scaling_factor=1.0)),
    ("deepseek_v3", dict(num_experts=6)),
    ("deepseek_v3", dict(num_experts=16, n_group=2, topk_group=1)),
]


def transformers_router(family, config, dtype):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    made = {"qwen3_moe": Qwen3MoeTopKRouter, "mixtral": MixtralTopKRouter, "deepseek_v3": DeepseekV3TopkRouter}
    router = made[family](config).to(dtype)
    torch.nn.init.normal_(router.weight, std=0.2)
    if family == "deepseek_v3":
        router.e_score_correction_bias = torch.randn(config.n_routed_experts) * 0.1
    return router.requires_grad_(False)


def torch_route(logits, spec, bias):
    if spec.scoring == SOFTMAX:
        return routing._softmax_torch(logits, spec)
    return routing._sigmoid_torch(logits, spec, bias)


def by_expert(ids, weights, num_experts):
    """[T, E] weights, zero where an expert is not chosen: the order within the top k does not matter."""
    return torch.zeros(len(ids), num_experts).scatter_(1, ids.long(), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, changes", CASES)
@pytest.mark.parametrize("path", ["host", "torch"])
def test_agrees_with_transformers(family, changes, dtype, path, monkeypatch):
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    spec = find_family(family).routing(config)
    router = transformers_router(family, config, dtype)
    x = torch.randn(200, 64, dtype=dtype)
    logits, want_weights, want_ids = router(x)
    bias = getattr(router, "e_score_correction_bias", None)
    if path == "torch":  # what CUDA runs, on the host
        monkeypatch.setattr(routing, "_route_host", torch_route)
    ids, weights = route(logits, spec, bias)
    assert (
        ids.dtype == torch.int32 and weights.dtype == torch.float32 and ids.shape == weights.shape == (200, spec.top_k)
    )
    clear = torch.ones(200, dtype=torch.bool)
    if dtype == torch.bfloat16 and spec.num_experts > 1:  # equal logits occur; transformers leaves those to torch.topk
        clear = logits.sort(dim=-1).values.diff(dim=-1).min(dim=-1).values > 0
        assert clear.float().mean() > 0.3
    got = by_expert(ids, weights, spec.num_experts)
    want = by_expert(want_ids, want_weights.float(), spec.num_experts)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6  # one rounding step of bfloat16, where the family rounds
    torch.testing.assert_close(got[clear], want[clear], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("scoring", [SOFTMAX, SIGMOID])
def test_ties_go_to_the_lower_expert_on_the_host(scoring):
    spec = RoutingSpec(8, 3, scoring=scoring, num_groups=4, top_groups=2) if scoring == SIGMOID else RoutingSpec(8, 3)
    logits = torch.tensor([[0.0] * 8, [1, 0, 2, 2, 0, 2, 2, 1]])
    ids, weights = route(logits, spec)
    assert ids[0].tolist() == [0, 1, 2]
    assert ids[1].tolist() == [2, 3, 5] if scoring == SOFTMAX else ids[1].tolist() == [2, 3, 6]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("scoring", [SOFTMAX, SIGMOID])
@pytest.mark.parametrize("path", ["host", "torch"])
def test_nan_logits_give_valid_ids_and_nan_weights(scoring, path):
    groups = dict(num_groups=4, top_groups=2) if scoring == SIGMOID else {}
    spec = RoutingSpec(8, 3, scoring=scoring, renormalise=True, **groups)
    logits = torch.randn(4, 8)
    logits[0] = float("nan")
    logits[1, 5] = float("nan")
    logits[2, :7] = float("-inf")
    ids, weights = route(logits, spec) if path == "host" else torch_route(logits, spec, None)
    assert ids.min() >= 0 and ids.max() < 8
    assert all(len(set(row.tolist())) == 3 for row in ids)
    assert weights[0].isnan().all()
    assert weights[3].isfinite().all()


def test_a_nan_logit_is_not_hidden_by_softmax_on_the_host():
    logits = torch.randn(1, 8)
    logits[0, 2] = float("nan")
    ids, weights = route(logits, RoutingSpec(8, 3, renormalise=False))
    assert weights.isnan().all() and 2 not in ids


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(top_k=9), "top_k is 9"),
        (dict(top_k=0), "top_k is 0"),
        (dict(scoring="relu"), "'relu'"),
        (dict(num_groups=3), "must divide the 8"),
        (dict(num_groups=8, top_groups=8), "two experts"),
        (dict(num_groups=4, top_groups=5), r"\[1, 4\]"),
        (dict(num_groups=4, top_groups=1, top_k=3), "fewer than top_k"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RoutingSpec(**{"num_experts": 8, "top_k": 2} | settings)


def test_no_tokens():
    ids, weights = route(torch.empty(0, 8), RoutingSpec(8, 2))
    assert ids.shape == weights.shape == (0, 2)
