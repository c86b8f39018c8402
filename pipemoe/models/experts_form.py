"""Routed experts inside a transformers model, found by their form, whatever the family.

The usual form, of nearly all families, is a module with

    gate_up_proj [E, 2I, H] (or without a gate up_proj [E, I, H]), down_proj [E, H, I], forward(hidden, ids, weights)

marked by transformers' use_experts_implementation, which also says whether matrices are transposed, gate and up
interleaved, and biases there. What stands between the two GEMMs is found by trial: the module's own gating is asked for
values, and the one of ours that gives the same is taken. A few families keep another form (other_forms.py). An experts
module that follows none of them is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pipemoe.errors import InputError
from pipemoe.experts.weights import ExpertWeights
from pipemoe_kernels.gating import ACTIVATIONS, Gating

IMPLEMENTATION = "pipemoe"  # by this name transformers knows our experts implementation
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, ids, weights -> y, all of [T, ...]
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")


@dataclass(frozen=True)
class Matrix:
    """Where the experts' matrices of one kind are, and how they lie there.

    parameter: its name in the site's module. Stored as [E, rows, columns], or [E, columns, rows] if transposed. flat:
    the dimension after E, if it is one with E in the module.
    """

    parameter: str
    transposed: bool = False
    interleaved: bool = False  # rows are gate 0, up 0, gate 1, up 1, ...; ours are all gates, then all ups
    flat: int = 0

    def of_experts(self, stored: torch.Tensor, experts: range) -> torch.Tensor:
        """A slice of the module's parameter as [experts, rows, columns] (a bias: [experts, rows]), in our order."""
        stored = stored[experts.start * (self.flat or 1) : experts.stop * (self.flat or 1)]
        if self.flat:
            stored = stored.view(len(experts), self.flat, stored.shape[-1])
        return self.of_plain(stored.transpose(1, 2) if self.transposed else stored, range(len(experts)))

    def of_plain(self, stored: torch.Tensor, experts: range) -> torch.Tensor:
        """[experts, rows, columns], in the module's order of rows, as ours."""
        if self.interleaved:
            stored = torch.cat((stored[:, ::2], stored[:, 1::2]), dim=1)
        return stored


@dataclass(frozen=True)
class ExpertsSite:
    """The routed experts of one MoE layer of a model: whose forward to replace, and what is known of them."""

    name: str  # of the module in the model
    module: Any
    gate_up: tuple[Matrix, ...]  # one, or gate and up by themselves
    down: Matrix
    gate_up_bias: Matrix | None
    down_bias: Matrix | None
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    gating: Gating
    gated: bool
    # Ids from num_experts on: experts that return their input (LongCat-Flash).
    num_identities: int = 0
    # Calls the experts as the module's forward would: (site, run, *arguments of forward) -> what forward returns.
    forward: Callable[..., Any] | None = None

    def matrices(self) -> Iterator[Matrix]:
        """All that the module keeps per expert."""
        yield from (m for m in (*self.gate_up, self.down, self.gate_up_bias, self.down_bias) if m is not None)

    def full_name(self, matrix: Matrix) -> str:
        """A matrix's parameter in the model."""
        return f"{self.name}.{matrix.parameter}"

    def make(self, read: Callable[[Matrix], torch.Tensor], first_expert: int) -> ExpertWeights:
        """Weights of some experts. read: gives what Matrix.of_experts gives, for these experts."""
        parts = [read(matrix) for matrix in self.gate_up]
        gate_up_bias, down_bias = (None if m is None else read(m) for m in (self.gate_up_bias, self.down_bias))
        return ExpertWeights(
            (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).contiguous(),
            read(self.down).contiguous(),
            None if gate_up_bias is None else gate_up_bias.contiguous(),
            None if down_bias is None else down_bias.contiguous(),
            gated=self.gated,
            first_expert=first_expert,
            **self.gating._asdict(),
        )

    def take_weights(self, experts: range) -> ExpertWeights:
        """Copies of these experts' weights. The module's own are freed, all of them."""

        def read(matrix: Matrix) -> torch.Tensor:
            own = matrix.of_experts(self.module.get_parameter(matrix.parameter).detach(), experts)
            return own.clone(memory_format=torch.contiguous_format)  # or the rest would stay

        weights = self.make(read, experts.start)
        self.drop_weights()
        return weights

    def drop_weights(self) -> None:
        """Free the module's own weights of experts."""
        for matrix in self.matrices():
            owner, _, name = matrix.parameter.rpartition(".")
            module = self.module.get_submodule(owner)
            old = module._parameters[name]
            empty = torch.empty(0, dtype=old.dtype, device=old.device)
            module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)

    def replace_forward(self, run: Run) -> None:
        """Let the module send its rows through `run`."""
        call = self.forward or usual_forward
        self.module.forward = lambda *args, **kwargs: call(self, run, *args, **kwargs)
        if self.forward is None and hasattr(self.module, "is_transposed"):  # transformers may look at it
            self.module.config._experts_implementation = IMPLEMENTATION


def usual_forward(site: ExpertsSite, run: Run, *args: Any, **kwargs: Any) -> torch.Tensor:
    """hidden [..., H], ids [..., K], weights [..., K], however they are named."""
    hidden, ids, weights = (*args, *kwargs.values())
    x, top_k = hidden.reshape(-1, hidden.shape[-1]), ids.shape[-1]
    return run_rows(site, run, x, ids.reshape(-1, top_k), weights.reshape(-1, top_k)).view(hidden.shape)


def run_rows(site: ExpertsSite, run: Run, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [T, H], ids [T, K], weights [T, K] -> y [T, H] in x's dtype. An id that is no expert's counts as none."""
    if missing := max(0, site.top_k - ids.shape[1]):  # a router may choose fewer than its config says (Phi-MoE: 2)
        ids, weights = F.pad(ids, (0, missing), value=-1), F.pad(weights, (0, missing))
    beyond = ids >= site.num_experts
    y = run(x, ids.masked_fill(beyond, -1), weights)
    if site.num_identities:
        y = y + x * (weights * beyond).sum(dim=-1, keepdim=True).to(x.dtype)
    return y


def is_usual(module: torch.nn.Module) -> bool:
    """Does the module keep its experts in the usual form?"""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    matrices = (getattr(module, first, None), getattr(module, "down_proj", None))
    return hasattr(module, "is_transposed") and all(isinstance(m, torch.Tensor) and m.dim() == 3 for m in matrices)


def usual_site(name: str, module: Any, config: Any) -> ExpertsSite:
    transposed, gated = module.is_transposed, module.has_gate
    interleaved = gated and not module.is_concatenated
    first = "gate_up_proj" if gated else "up_proj"
    down = module.down_proj
    has_bias = module.has_bias
    return ExpertsSite(
        name,
        module,
        gate_up=(Matrix(first, transposed, interleaved),),
        down=Matrix("down_proj", transposed),
        gate_up_bias=Matrix(f"{first}_bias", interleaved=interleaved) if has_bias else None,
        down_bias=Matrix("down_proj_bias") if has_bias else None,
        num_experts=down.shape[0],
        top_k=top_k_of(config, name),
        hidden=down.shape[2 if transposed else 1],
        intermediate=down.shape[1 if transposed else 2],
        gating=gating_of(name, module, gated, interleaved),
        gated=gated,
    )


def gating_of(name: str, module: Any, gated: bool = True, interleaved: bool = False) -> Gating:
    """The gating that gives what the module's own gives. Raises InputError if none does."""
    limits, alphas = (
        {float(getattr(module, name)) for name in names if getattr(module, name, None) is not None}
        for names in (("limit", "swiglu_limit"), ("alpha", "swiglu_alpha"))
    )
    candidates = [Gating(activation) for activation in ACTIVATIONS]
    for limit in limits:
        candidates += [Gating(activation, limit) for activation in ACTIVATIONS]
        candidates += [Gating("silu", limit, alpha, 1.0) for alpha in alphas]
    with torch.device("cpu"), torch.no_grad():
        span = 2 * max(limits, default=4.0)
        gate = torch.linspace(-span, span, 97, dtype=torch.float64)
        up = 0.9 * gate.roll(31)
        if not gated:
            found = module.act_fn(gate)
        else:
            pair = torch.stack((gate, up), dim=-1).flatten() if interleaved else torch.cat((gate, up))
            found = module._apply_gate(pair[None])[0] if hasattr(module, "_apply_gate") else module.act_fn(gate) * up
        for candidate in candidates:
            if torch.allclose(found, apply_gating(candidate, gate, up if gated else None), rtol=1e-6, atol=1e-6):
                return candidate
    raise InputError(
        f"{name}: the gating of {type(module).__name__} is none that experts here have: "
        f"{', '.join(ACTIVATIONS)}, clamped or not"
    )


def apply_gating(gating: Gating, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """Gating in torch, in the dtype of its arguments."""
    if gating.limit is not None:
        gate = gate.clamp(max=gating.limit)
        up = None if up is None else up.clamp(-gating.limit, gating.limit)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": lambda x: x * torch.sigmoid(gating.alpha * x),
        "gelu": F.gelu,
        "relu": F.relu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x) ** 2,
    }
    value = functions[gating.activation](gate)
    return value if up is None else value * (up + gating.up_offset)


def config_of(model: Any, module: Any) -> Any:
    """The config that says how many experts a token has: the module's own, or the model's."""
    config = getattr(module, "config", None) or model.config
    return config if _top_k(config) else getattr(model.config, "text_config", None) or model.config


def top_k_of(config: Any, name: str) -> int:
    found = _top_k(config)
    if found is None:
        raise InputError(f"{name}: its config says by none of {', '.join(_TOP_K)} how many experts a token has")
    return found


def _top_k(config: Any) -> int | None:
    for name in _TOP_K:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        if type(value) is int:
            return value
    return None
