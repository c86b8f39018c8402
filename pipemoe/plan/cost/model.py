"""What the operations of a plan cost, in whole numbers, so that every rank computes the same.

By itself an operation takes `alone` nanoseconds. For part of that it is `busy` with something shared: a GPU's SMs, the
cores, a link. The rest are gaps, launches and latencies, and others may go on meanwhile. ContentionCost says how
operations side by side slow one another; CoresCost, how they share cores. Defaults come from
`pipemoe.plan.cost.default`, measured values from `pipemoe tune`.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, get_type_hints

import numpy as np

from pipemoe.errors import ConfigError
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.products import scaled

# Rows that attention is captured for as CUDA graphs; a graph always computes all of its rows.
GRAPH_ROWS = (16, 64, *range(128, 1025, 128), *range(1280, 4097, 256), *range(4608, 8193, 512))
KINDS = ("attend", "experts", "dispatch", "combine")  # rows and columns of the table of contention
_MOST_OF_A_KIND, _MOST_SPEED = 1 << 20, 10_000  # more is a mistake, and the planner's products would not fit int64
# tables of speeds: the experts leave too little room for the plan's collectives, just enough, or twice as much
CROWDED, USUAL, ROOMY = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Whole:
    """All fields are whole numbers of at least 0."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not int or not 0 <= value < 1 << 53:
                raise ConfigError(
                    f"{type(self).__name__}.{f.name} is {value!r}; it must be a whole number from 0 to 2**53"
                )


@dataclass(frozen=True, slots=True)
class AttendCost(_Whole):
    """Attention, router and whatever else a rank computes for its own tokens, per MoE layer.

    It is busy for the larger of `weights_ns` (reading the weights) and `row_ps` per token, and for `pair_fs` per pair
    of a query and a key it may see. crowd_permille: how much longer that takes if every other rank of the same GPU
    attends to as much. first_weights_ns, first_row_ps, first_pair_fs: extra cost before the first MoE layer (embedding,
    dense layers).
    """

    fixed_ns: int = 60_000
    weights_ns: int = 8_000
    row_ps: int = 80_000
    pair_fs: int = 35_000
    crowd_permille: int = 0
    first_weights_ns: int = 0
    first_row_ps: int = 0
    first_pair_fs: int = 0


@dataclass(frozen=True, slots=True)
class ExpertsCost(_Whole):
    """The fused experts of one wave on one rank.

    They take `expert_ns` per distinct expert hit (reading its weights), `pair_ps` per row and local expert, with each
    expert's rows rounded up to whole tiles, and `row_ps` per row of the wave (sorting, gathering).
    """

    fixed_ns: int = 60_000
    expert_ns: int = 2_300
    pair_ps: int = 14_000
    row_ps: int = 4_000
    tile_rows: int = 64

    def __post_init__(self) -> None:
        _Whole.__post_init__(self)
        if self.tile_rows > _MOST_OF_A_KIND:
            raise ConfigError(f"ExpertsCost.tile_rows is {self.tile_rows}; it must be at most {_MOST_OF_A_KIND}")


@dataclass(frozen=True, slots=True)
class ExchangeCost(_Whole):
    """One group of collectives: a latency, a time per segment (one broadcast or reduce each), and `row_ps` per row that
    the busiest link of the ring carries. In a combine it carries all rows; in a dispatch, all but the rows of the rank
    that it leads to.
    """

    fixed_ns: int = 25_000
    segment_ns: int = 5_000
    row_ps: int = 14_000


@dataclass(frozen=True, slots=True)
class HostCost(_Whole):
    """How long a rank's one conductor thread takes to issue an operation; `idle_ns` if the rank has no part in it.

    On a GPU a model's attention is many small launches (`attend_ns`). Up to `graph_rows` tokens it is one launch of a
    graph (`graph_ns`), which computes a whole number of GRAPH_ROWS. graph_cuts: 1 if graphs also serve sequences that
    are cut, 0 if only whole ones.
    """

    attend_ns: int = 1_300_000
    graph_rows: int = 4096
    graph_ns: int = 45_000
    pack_ns: int = 100_000
    dispatch_ns: int = 75_000
    experts_ns: int = 230_000
    combine_ns: int = 85_000
    finish_ns: int = 400_000
    idle_ns: int = 30_000
    graph_cuts: int = 1


@dataclass(frozen=True, slots=True)
class CoresCost(_Whole):
    """Ranks that compute on the same cores. permille: how many cores run at full speed, in thousandths; 0: every rank
    has a device, or its share of one. slowdown_permille: what each further cohort computing on a rank costs all of
    that rank's.
    """

    permille: int = 0
    slowdown_permille: int = 200


@dataclass(frozen=True, slots=True)
class ContentionCost(_Whole):
    """How fast an operation runs beside another one of the same rank, in thousandths of its speed alone:
    `attend_beside_dispatch` is the attention's speed beside a dispatch. Of two computations, the earlier slot's runs on
    the stream with the higher priority, and the other is `under` it. A speed holds while the other operation is busy.
    """

    attend_beside_attend: int = 840
    attend_beside_experts: int = 510
    attend_beside_dispatch: int = 840
    attend_beside_combine: int = 820
    attend_under_attend: int = 520
    attend_under_experts: int = 370
    experts_beside_attend: int = 900
    experts_beside_experts: int = 780
    experts_beside_dispatch: int = 730
    experts_beside_combine: int = 740
    experts_under_attend: int = 750
    experts_under_experts: int = 390
    dispatch_beside_attend: int = 900
    dispatch_beside_experts: int = 710
    dispatch_beside_dispatch: int = 500
    dispatch_beside_combine: int = 550
    combine_beside_attend: int = 810
    combine_beside_experts: int = 600
    combine_beside_dispatch: int = 550
    combine_beside_combine: int = 500

    def __post_init__(self) -> None:
        _Whole.__post_init__(self)
        for f in fields(self):
            if getattr(self, f.name) == 0:
                raise ConfigError(f"ContentionCost.{f.name} is 0; nothing would ever end")
            if getattr(self, f.name) > _MOST_SPEED:
                raise ConfigError(
                    f"ContentionCost.{f.name} is {getattr(self, f.name)} thousandths; it must be at most {_MOST_SPEED}"
                )


@dataclass(frozen=True, slots=True)
class SmsCost(_Whole):
    """A rank's multiprocessors, and what it does if the experts' persistent kernels leave some to collectives.

    num_sms: how many the experts' kernels can fill; 0: they are not persistent, and leave none. ctas: thread blocks of
    a collective. If experts leave some, their arithmetic takes longer in proportion; reading weights does not.
    ContentionCost holds if they leave room for the collectives of all slots in use. crowded: the speeds of experts
    beside a transfer and of a transfer beside experts, in thousandths of those, if less is left; roomy: if twice as
    much is left. Defaults: leaving 3 of 32 saved experts beside a transfer 25 % (quarters of an H200,
    NCCL_MAX_CTAS=1); the other three are not measured.
    """

    num_sms: int = 132
    ctas: int = 8
    crowded_experts_permille: int = 750
    crowded_transfers_permille: int = 1000
    roomy_experts_permille: int = 1000
    roomy_transfers_permille: int = 1000

    def __post_init__(self) -> None:
        _Whole.__post_init__(self)
        for name in ("num_sms", "ctas"):
            if getattr(self, name) > _MOST_OF_A_KIND:
                raise ConfigError(f"SmsCost.{name} is {getattr(self, name)}; it must be at most {_MOST_OF_A_KIND}")


@dataclass(frozen=True)
class CostModel:
    """All that the planner and the clock know about speed. Defaults: one H200 per rank, Qwen3-30B-A3B, bfloat16."""

    attend: AttendCost = field(default_factory=AttendCost)
    experts: ExpertsCost = field(default_factory=ExpertsCost)
    dispatch: ExchangeCost = field(default_factory=ExchangeCost)
    combine: ExchangeCost = field(default_factory=ExchangeCost)
    host: HostCost = field(default_factory=HostCost)
    cores: CoresCost = field(default_factory=CoresCost)
    contention: ContentionCost = field(default_factory=ContentionCost)
    sms: SmsCost = field(default_factory=SmsCost)
    # how much of its launches and latencies an operation contends with others, as if it were busy
    gap_permille: int = 750
    start_ns: int = 1_300_000  # from the call to the first operation: exchange of counts, planning, embedding
    finish_ns: int = 200_000

    def __post_init__(self) -> None:
        for name, most in (("gap_permille", 1000), ("start_ns", 1 << 53), ("finish_ns", 1 << 53)):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) <= most:
                raise ConfigError(
                    f"CostModel.{name} is {getattr(self, name)!r}; it must be a whole number from 0 to {most}"
                )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # of some sixty numbers, which every planning would go through
        return hash(tuple(getattr(self, f.name) for f in fields(self)))


_SINGLE = ("gap_permille", "start_ns", "finish_ns")
_PARTS: dict[str, Any] = {name: kind for name, kind in get_type_hints(CostModel).items() if name not in _SINGLE}
_FLAT = [part for part in _PARTS if part != "contention"]
_NAMES = [f"{part}_{f.name}" for part in _FLAT for f in fields(_PARTS[part])] + list(_SINGLE)
Rates = namedtuple("Rates", _NAMES)  # type: ignore[misc]  # a cost model as compiled code takes it: attend_fixed_ns, ...


@lru_cache(maxsize=64)
def rates_of(cost: CostModel) -> Rates:
    """The cost model as one flat tuple, without contention."""
    return Rates(
        *(value for part in _FLAT for value in asdict(getattr(cost, part)).values()),
        *(getattr(cost, name) for name in _SINGLE),
    )


@lru_cache(maxsize=64)
def speeds_of(cost: CostModel) -> np.ndarray:
    """int64 [3, 2, 4, 4]: speeds in thousandths. By CROWDED, USUAL or ROOMY; beside (0) or under (1) another operation;
    the operation, and the other one, as in KINDS.
    """
    contention, sms = cost.contention, cost.sms
    speeds = np.empty((3, 2, len(KINDS), len(KINDS)), np.int64)
    for i, one in enumerate(KINDS):
        for j, other in enumerate(KINDS):
            beside = getattr(contention, f"{one}_beside_{other}")
            speeds[:, 0, i, j], speeds[:, 1, i, j] = beside, getattr(contention, f"{one}_under_{other}", beside)
    experts, transfers = KINDS.index("experts"), slice(KINDS.index("dispatch"), None)
    for table, of_experts, of_transfers in (
        (CROWDED, sms.crowded_experts_permille, sms.crowded_transfers_permille),
        (ROOMY, sms.roomy_experts_permille, sms.roomy_transfers_permille),
    ):
        for row, column, permille in ((experts, transfers, of_experts), (transfers, experts, of_transfers)):
            speeds[table, :, row, column] = np.clip(speeds[USUAL, :, row, column] * permille // 1000, 1, 1000)
    speeds.flags.writeable = False
    return speeds


def cost_from_dict(document: dict) -> CostModel:
    """The inverse of dataclasses.asdict. Raises ConfigError for missing, unknown or bad fields."""
    try:
        for name, kind in _PARTS.items():
            if missing := {f.name for f in fields(kind)} - set(document[name]):
                raise ConfigError(f"cost model: {name} lacks {', '.join(sorted(missing))}")
        parts = {name: kind(**document[name]) for name, kind in _PARTS.items()}
        single = {name: document[name] for name in _SINGLE}
        if set(document) != {*_PARTS, *_SINGLE} or any(
            type(value) is not int or value < 0 for value in single.values()
        ):
            raise ConfigError(
                f"cost model: fields {', '.join(sorted(document))}; {', '.join((*_PARTS, *_SINGLE))} are wanted, "
                "the last three whole numbers"
            )
        return CostModel(**parts, **single)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"cost model: {error}") from None


@compiled_part
def graph_rows(rates, rows):
    """Rows that a graph computes for `rows` tokens; 0: there is none."""
    if rows > rates.host_graph_rows:
        return 0
    for bucket in GRAPH_ROWS:
        if bucket >= rows:
            return bucket
    return 0


@compiled_part
def attend_busy(rates, rows, pairs):
    """ns that attention of `rows` tokens with `pairs` pairs of query and key is busy."""
    return max(rates.attend_weights_ns, scaled(rows, rates.attend_row_ps, 1000)) + scaled(
        pairs, rates.attend_pair_fs, 1_000_000
    )


@compiled_part
def first_busy(rates, rows, pairs):
    """ns that attention is busy before the first MoE layer, in addition."""
    return max(rates.attend_first_weights_ns, scaled(rows, rates.attend_first_row_ps, 1000)) + scaled(
        pairs, rates.attend_first_pair_fs, 1_000_000
    )


@compiled_part
def experts_busy(rates, rows, num_experts, top_k, num_ranks, sms_left=0):
    """ns that a rank's experts are busy with a wave of `rows` rows, routed evenly over all experts. sms_left: see
    SmsCost.
    """
    local = -(-num_experts // num_ranks)
    hit = local * _share_hit(rows, num_experts, top_k) >> 10  # distinct experts x 2**20
    pairs = -(-rows * top_k * local // num_experts)
    padded = max(
        pairs + scaled(hit, rates.experts_tile_rows - 1, 1 << 21), scaled(hit, rates.experts_tile_rows, 1 << 20)
    )
    pairs_ps = padded * rates.experts_pair_ps
    if sms_left:
        pairs_ps = scaled(pairs_ps, rates.sms_num_sms, rates.sms_num_sms - sms_left)
    return scaled(hit, rates.experts_expert_ns, 1 << 20) + (pairs_ps + rows * rates.experts_row_ps) // 1000


@compiled_part
def _share_hit(rows, num_experts, top_k):
    """The probability that some of `rows` tokens choose a given expert, 1 - (1 - K/E)^rows, x 2**30."""
    missed, base = 1 << 30, ((num_experts - top_k) << 30) // num_experts
    while rows:
        if rows & 1:
            missed = missed * base >> 30
        base = base * base >> 30
        rows >>= 1
    return (1 << 30) - missed
