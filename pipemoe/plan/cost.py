"""What the operations of a plan cost, in whole numbers, so that every rank computes the same.

Each operation takes `alone` nanoseconds by itself, of which it is `busy` with what it shares (a GPU's SMs, the cores, a link);
the rest are gaps, launches and latencies, in which others may go on. The simulator runs operations side by side by that.
Defaults come from `pipemoe.plan.default_cost`, measured values from `pipemoe tune`.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache

from pipemoe.errors import ConfigError
from pipemoe.plan.compiled import compiled


class _Whole:
    """All fields are whole numbers of at least 0."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not int or not 0 <= value < 1 << 53:
                raise ConfigError(f"{type(self).__name__}.{f.name} is {value!r}; it must be a whole number from 0 to 2**53")


@dataclass(frozen=True, slots=True)
class AttendCost(_Whole):
    """Attention, router and what else a rank computes for its own tokens, per MoE layer: busy for the larger of `weights_ns`
    (reading them) and `row_ps` per token, and `pair_fs` per pair of a query and a key (causal, so a quadratic term)."""

    fixed_ns: int = 60_000
    weights_ns: int = 8_000
    row_ps: int = 80_000
    pair_fs: int = 35_000


@dataclass(frozen=True, slots=True)
class ExpertsCost(_Whole):
    """The fused experts of one wave on one rank: `expert_ns` per distinct expert hit (reading its weights), `pair_ps` per row
    and local expert, an expert's rows rounded up to whole tiles, and `row_ps` per row of the wave (sorting, gathering)."""

    fixed_ns: int = 60_000
    expert_ns: int = 2_300
    pair_ps: int = 14_000
    row_ps: int = 4_000
    tile_rows: int = 64


@dataclass(frozen=True, slots=True)
class ExchangeCost(_Whole):
    """One group of collectives: a latency, a part per segment (a broadcast or reduce each), and the ring's volume: every row
    once over each link, whoever owns it."""

    fixed_ns: int = 25_000
    segment_ns: int = 5_000
    row_ps: int = 14_000


@dataclass(frozen=True, slots=True)
class HostCost(_Whole):
    """Time that a rank's one engine thread takes to issue an operation; `idle_ns` where the rank has no part in it. On a GPU the
    attention of a model is many small launches, but for at most `graph_rows` tokens one of a graph, which takes `graph_ns`."""

    attend_ns: int = 1_000_000
    graph_rows: int = 1024
    graph_ns: int = 60_000
    pack_ns: int = 80_000
    dispatch_ns: int = 60_000
    experts_ns: int = 300_000
    combine_ns: int = 60_000
    finish_ns: int = 300_000
    idle_ns: int = 10_000


@dataclass(frozen=True, slots=True)
class SharingCost(_Whole):
    """How operations that run side by side share. capacity_permille: what computes at full speed, in thousandths of one rank's
    device (or of one core where ranks share them: across_ranks). slowdown_permille: what each further cohort computing on the same
    rank costs all of them. priority: an earlier cohort's work goes first (stream priorities), else equal shares.
    link_permille: transfers that run at full speed side by side. exchange_slowdown_permille: what each further transfer costs all of
    them beyond that (on a CPU they are moved along by threads that compete for the cores)."""

    capacity_permille: int = 1000
    slowdown_permille: int = 100
    priority: int = 1
    across_ranks: int = 0
    link_permille: int = 1000
    exchange_slowdown_permille: int = 0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Everything that the planner and the simulator know about speed. The defaults: one H200 per rank, Qwen3-30B-A3B, bfloat16."""

    attend: AttendCost = field(default_factory=AttendCost)
    experts: ExpertsCost = field(default_factory=ExpertsCost)
    dispatch: ExchangeCost = field(default_factory=ExchangeCost)
    combine: ExchangeCost = field(default_factory=ExchangeCost)
    host: HostCost = field(default_factory=HostCost)
    sharing: SharingCost = field(default_factory=SharingCost)
    finish_ns: int = 200_000


_PARTS = {f.name: f.default_factory for f in fields(CostModel) if f.name != "finish_ns"}
_NAMES = [f"{part}_{f.name}" for part, kind in _PARTS.items() for f in fields(kind)] + ["finish_ns"]
Rates = namedtuple("Rates", _NAMES)  # a cost model as compiled code takes it: attend_fixed_ns, ...


@lru_cache(maxsize=64)
def rates_of(cost: CostModel) -> Rates:
    """The cost model, flat."""
    return Rates(*(value for part in _PARTS for value in asdict(getattr(cost, part)).values()), cost.finish_ns)


def cost_from_dict(document: dict) -> CostModel:
    """The inverse of dataclasses.asdict. Raises ConfigError for missing, unknown or bad fields."""
    try:
        parts = {name: kind(**document[name]) for name, kind in _PARTS.items()}
        if set(document) != {*_PARTS, "finish_ns"} or type(document["finish_ns"]) is not int or document["finish_ns"] < 0:
            raise ConfigError(f"cost model: fields {', '.join(sorted(document))}; {', '.join((*_PARTS, 'finish_ns'))} are wanted")
        return CostModel(**parts, finish_ns=document["finish_ns"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"cost model: {error}") from None


@compiled
def attend_busy(rates, rows, pairs):
    """ns that attention of `rows` tokens with `pairs` pairs of query and key is busy."""
    return max(rates.attend_weights_ns, rows * rates.attend_row_ps // 1000) + pairs * rates.attend_pair_fs // 1_000_000


@compiled
def experts_busy(rates, rows, num_experts, top_k, num_ranks):
    """ns that a rank's experts are busy with a wave of `rows` rows, routed evenly over all experts."""
    local = -(-num_experts // num_ranks)
    hit = local * _share_hit(rows, num_experts, top_k) >> 10  # distinct experts x 2**20
    pairs = -(-rows * top_k * local // num_experts)
    padded = max(pairs + (hit * (rates.experts_tile_rows - 1) >> 21), hit * rates.experts_tile_rows >> 20)
    return (hit * rates.experts_expert_ns >> 20) + (padded * rates.experts_pair_ps + rows * rates.experts_row_ps) // 1000


@compiled
def _share_hit(rows, num_experts, top_k):
    """The probability that some of `rows` tokens choose a given expert, 1 - (1 - K/E)^rows, x 2**30."""
    missed, base = 1 << 30, ((num_experts - top_k) << 30) // num_experts
    while rows:
        if rows & 1:
            missed = missed * base >> 30
        base = base * base >> 30
        rows >>= 1
    return (1 << 30) - missed
