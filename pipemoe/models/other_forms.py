"""Experts that do not keep the usual form (experts_form.py), by the class that transformers has for them.

Each entry makes the site of one module. Its `forward` replaces the module's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipemoe.errors import InputError
from pipemoe.models.experts_form import ExpertsSite, Matrix, Run, gating_of, run_rows, top_k_of
from pipemoe_kernels.gating import Gating


def _longcat_flash(name: str, module: Any, config: Any) -> ExpertsSite:
    """gate_up_proj has rows for the identity experts too, which nothing reads."""
    return ExpertsSite(
        name,
        module,
        (Matrix("gate_up_proj"),),
        Matrix("down_proj"),
        None,
        None,
        num_experts=module.num_routed_experts,
        top_k=top_k_of(config, name),
        hidden=module.hidden_size,
        intermediate=module.intermediate_size,
        gating=gating_of(name, module),
        gated=True,
        num_identities=module.zero_expert_num,
    )


def _llama4(name: str, module: Any, config: Any) -> ExpertsSite:
    """The router scales the experts' input: a token is a row of its expert with weight 1."""
    if module.top_k != 1:
        raise InputError(f"{name}: {module.top_k} experts a token whose inputs are scaled apart; only 1 is done")
    experts = module.experts

    def forward(site: ExpertsSite, run: Run, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = module.router(rows)
        weights, ids = scores.max(dim=1, keepdim=True)
        y = run_rows(site, run, rows * weights, ids, torch.ones_like(weights))
        return module.shared_expert(rows) + y, logits

    return ExpertsSite(
        name,
        module,
        (Matrix("experts.gate_up_proj", transposed=True),),
        Matrix("experts.down_proj", transposed=True),
        None,
        None,
        num_experts=experts.num_experts,
        top_k=1,
        hidden=experts.hidden_size,
        intermediate=experts.expert_dim,
        gating=gating_of(name, experts),
        gated=True,
        forward=forward,
    )


def _dbrx(name: str, module: Any, config: Any) -> ExpertsSite:
    gating = gating_of(name, _WithAct(module.mlp.activation_fn))
    return ExpertsSite(
        name,
        module,
        (Matrix("mlp.w1", flat=module.ffn_hidden_size), Matrix("mlp.v1", flat=module.ffn_hidden_size)),
        Matrix("mlp.w2", transposed=True, flat=module.ffn_hidden_size),
        None,
        None,
        num_experts=module.num_experts,
        top_k=top_k_of(getattr(config, "ffn_config", config), name),
        hidden=module.hidden_size,
        intermediate=module.ffn_hidden_size,
        gating=gating,
        gated=True,
    )


def _aria(name: str, module: Any, config: Any) -> ExpertsSite:
    def forward(site: ExpertsSite, run: Run, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        ids, weights = module.route_tokens_to_experts(router_logits)
        return run_rows(site, run, hidden_states, ids, weights)

    return ExpertsSite(
        name,
        module,
        (Matrix("fc1.weight", transposed=True),),
        Matrix("fc2.weight", transposed=True),
        None,
        None,
        num_experts=module.fc1.groups,
        top_k=top_k_of(config, name),
        hidden=module.fc1.in_features,
        intermediate=module.fc2.in_features,
        gating=Gating(),
        gated=True,
        forward=forward,
    )


def _jetmoe(name: str, module: Any, config: Any) -> ExpertsSite:
    """The experts of the MLP. Those of attention stay local: they are projections of queries and outputs."""

    def forward(site: ExpertsSite, run: Run, layer_input: torch.Tensor) -> torch.Tensor:
        rows = layer_input.reshape(-1, layer_input.shape[-1])
        logits = module.router.layer(rows).float()
        top, ids = logits.topk(module.router.top_k, dim=1)
        weights = torch.softmax(top, dim=1).type_as(rows)
        return run_rows(site, run, rows, ids, weights).view(layer_input.shape) + module.bias

    return ExpertsSite(
        name,
        module,
        (Matrix("input_linear.weight"),),
        Matrix("output_linear.weight"),
        None,
        None,
        num_experts=module.input_linear.num_experts,
        top_k=module.router.top_k,
        hidden=module.input_size,
        intermediate=module.hidden_size,
        gating=gating_of(name, _WithAct(module.activation)),
        gated=True,
        forward=forward,
    )


class _WithAct:
    """A gating of a mere activation."""

    def __init__(self, act_fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.act_fn = act_fn


OTHER_FORMS: dict[str, Callable[[str, Any, Any], ExpertsSite]] = {
    "LongcatFlashExperts": _longcat_flash,
    "Llama4TextMoe": _llama4,
    "DbrxExperts": _dbrx,
    "AriaExperts": _aria,
    "JetMoeMoE": _jetmoe,
}
