"""Random weights by name: every rank and the reference model make the same ones without exchanging anything.

Parameter p has its own generator, seeded with hash(seed, name of p); expert e of MoE layer l has two, seeded with
hash(seed, l, e, projection). Values are drawn in float32 on the device and then rounded to the dtype, so that models of
different dtypes agree up to rounding. Devices of different types draw different values.

Scales follow the fan-in, so a wrong expert shows in a float32 parity check by orders of magnitude. Router and experts
also have gains. Rounding to bfloat16 flips near-ties of the router; with a decided router and quiet experts such a flip
stays small against the residual, as in trained models.

Two more choices make tokens of different ids take different experts, all experts about equally often, in every layer:

- Random attention averages over the tokens before, so its output is much alike for all tokens, and a router that sees
  mostly what is common sends all of them the same way. Attention of all layers together adds ATTENTION_GAIN of the
  embedding's norm. (Residual branches that get quieter with depth are GPT-2's initialisation.)
- All of a router's rows have the same length, so that no expert's logits spread wider than another's. Biases move an
  expert's share by only BIAS_SHARE, about.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import ConfigError
from pipemoe.experts.weights import ExpertWeights
from pipemoe.models.families import check_config
from pipemoe.models.routing import SIGMOID, RoutingSpec
from pipemoe.models.skeleton import materialise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


ROUTER_GAIN = 2.0  # standard deviation of a token's logits
EXPERT_GAIN = 0.1
ATTENTION_GAIN = 0.3
BIAS_SHARE = 0.03
MOST_SHARE = 0.4  # of the tokens, for one expert of a skewed router

_STANDARD = NormalDist()
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense")
_ROUTERS = ("gate", "router")


def _generator(device: torch.device, *key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def expert_shares(routing: RoutingSpec, skew: float, where: str = "") -> list[float]:
    """The share of the tokens for the experts of popularity rank 1, 2, ..., E; they sum to K.

    skew: the exponent of a Zipf law, rank ** -skew, in which no expert takes more than MOST_SHARE; 0: equal shares.
    Raises ConfigError, beginning with `where`, for what is not a finite number of at least 0, and for a skew where
    equal shares are MOST_SHARE already.
    """
    num_experts, top_k = routing.num_experts, routing.top_k
    if isinstance(skew, bool) or not isinstance(skew, (int, float)) or not 0 <= skew < float("inf"):
        raise ConfigError(f"{where}router_skew is {skew!r}; it must be a number of at least 0")
    if skew == 0:
        return [top_k / num_experts] * num_experts
    if top_k >= MOST_SHARE * num_experts:
        raise ConfigError(
            f"{where}router_skew is {skew}; it must be 0 where every token takes {top_k} of {num_experts} experts, as "
            f"the most popular one would take {MOST_SHARE:.0%} of the tokens"
        )
    popularity = [rank**-skew for rank in range(1, num_experts + 1)]
    for capped in range(num_experts):  # so many take all they may
        factor = (top_k - capped * MOST_SHARE) / sum(popularity[capped:])
        if factor * popularity[capped] <= MOST_SHARE:
            break
    return [MOST_SHARE] * capped + [factor * p for p in popularity[capped:]]


@dataclass(frozen=True, slots=True)
class Gains:
    """How loud one model's attention and routers are; all that its random parameters take from its configuration."""

    attention: float
    routing: RoutingSpec
    router_skew: float = 0.0

    @classmethod
    def of(cls, config: PreTrainedConfig, router_skew: float = 0.0) -> Gains:
        return cls(ATTENTION_GAIN * config.num_hidden_layers**-0.5, check_config(config).routing(config), router_skew)

    def router_rows(self, seed: int, name: str) -> torch.Tensor:
        """[E] float32 on the host: the length of each expert's row in the router `name`.

        A token's logits are normal, and whoever exceeds about the same threshold is chosen: the longer a row, the
        oftener. The length gives the share in `expert_shares`; which expert is popular follows from seed and name.
        """
        num_experts, cpu = self.routing.num_experts, torch.device("cpu")
        if self.router_skew == 0:
            return torch.full((num_experts,), ROUTER_GAIN, device=cpu)
        threshold = -_STANDARD.inv_cdf(self.routing.top_k / num_experts)
        shares = expert_shares(self.routing, self.router_skew)
        lengths = [ROUTER_GAIN * threshold / -_STANDARD.inv_cdf(max(share, 1e-12)) for share in shares]
        order = torch.randperm(num_experts, generator=_generator(cpu, seed, name, "popularity"), device=cpu)
        return torch.tensor(lengths, dtype=torch.float32, device=cpu)[order]

    @property
    def router_bias(self) -> float:
        """Standard deviation of biases that move an expert's share of the tokens by BIAS_SHARE of it, about."""
        share = min(self.routing.top_k / self.routing.num_experts, 0.5)
        threshold = -_STANDARD.inv_cdf(share)
        shift = ROUTER_GAIN * BIAS_SHARE * share / _STANDARD.pdf(threshold)  # of the logits
        if self.routing.scoring != SIGMOID:
            return shift
        score = 1 / (1 + math.exp(-ROUTER_GAIN * threshold))
        return shift * score * (1 - score)


def random_parameter(
    name: str, shape: torch.Size, *, seed: int, device: torch.device, dtype: torch.dtype, gains: Gains
) -> torch.Tensor:
    """One parameter or buffer outside the routed experts: a function of (seed, name, shape, gains, device type)."""
    if not dtype.is_floating_point:  # tables of expert ids, by token: any valid ones
        return torch.zeros(shape, dtype=dtype, device=device)
    values = torch.empty(shape, dtype=torch.float32, device=device)
    values.normal_(generator=_generator(device, seed, name))
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    is_router = last in _ROUTERS and shape[0] == gains.routing.num_experts
    if name.endswith("norm.weight"):
        values.mul_(0.1).add_(1.0)
    elif "embed_tokens" in name:
        pass
    elif is_router and len(shape) == 2:
        lengths = gains.router_rows(seed, name).to(device).double() / values.double().norm(dim=-1)
        values.mul_(lengths.float()[:, None])
    elif is_router or kind == "e_score_correction_bias":
        values.mul_(gains.router_bias)
    elif last in _ATTENTION_OUTPUTS:
        values.mul_(gains.attention * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1))
    elif len(shape) == 2:
        values.mul_(shape[-1] ** -0.5)
    else:  # biases of projections
        values.mul_(0.1)
    return values.to(dtype)


def fill_random_expert(gate_up: torch.Tensor, down: torch.Tensor, layer: int, expert: int, seed: int) -> None:
    """Fill one expert's gate_up [2I, H] and down [H, I]: functions of (seed, layer, expert, shape, device type)."""
    for projection, target, gain in (("gate_up", gate_up, 1.0), ("down", down, EXPERT_GAIN)):
        values = torch.empty(target.shape, dtype=torch.float32, device=target.device)
        generator = _generator(target.device, seed, layer, expert, projection)
        values.normal_(0.0, gain * target.shape[-1] ** -0.5, generator=generator)
        target.copy_(values)


def random_experts(
    layer: int,
    experts: range,
    *,
    hidden: int,
    intermediate: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> ExpertWeights:
    """The weights of MoE layer `layer` for the global ids `experts`."""
    gate_up = torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype, device=device)
    down = torch.empty(len(experts), hidden, intermediate, dtype=dtype, device=device)
    for local, expert in enumerate(experts):
        fill_random_expert(gate_up[local], down[local], layer, expert, seed)
    return ExpertWeights(gate_up, down, first_expert=experts.start)


def fill_random(
    model: PreTrainedModel, *, seed: int, device: torch.device, dtype: torch.dtype, router_skew: float = 0.0
) -> None:
    """Give every parameter and buffer that is still on the meta device its random value."""
    gains = Gains.of(model.config, router_skew)

    def value(name: str, shape: torch.Size, wanted: torch.dtype) -> torch.Tensor:
        return random_parameter(name, shape, seed=seed, device=device, dtype=wanted, gains=gains)

    materialise(model, value, device=device, dtype=dtype)
