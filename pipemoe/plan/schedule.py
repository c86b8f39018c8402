"""The schedule types: what a plan is made of. Data, not code; no torch, no MPI.

    Plan
      facts     tokens and sequence lengths of every rank, as exchanged
      cohorts   microbatches that travel together; each cut into waves, each wave into segments
      order     every operation of every rank, in one total order: int32 [num_ops, 4] = kind, cohort, layer, wave
"""

from __future__ import annotations

import hashlib
import numbers
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from pipemoe.errors import ConfigError, InputError
from pipemoe.plan.columns import MANY_COLUMNS, column_ranges

MODES = ("padded", "chunked", "broadcast", "two_batch", "per_rank", "pipelined", "auto")
UNCAPPED_MODES = ("padded", "broadcast")  # the baselines: one wave however many tokens there are
MAX_GROUPS = 4  # groups of collectives of one cohort's dispatches under way at once, on a rank
COMBINES = ("reduce", "gather")
BLOCK_CHOICES = (1, 2, 4)  # of columns, that mode auto chooses from
MOST_BLOCKS = 16  # groups of collectives of one combine: a lane's queue is finite
OBJECTIVES = ("mean", "slowest", "p50", "weighted")  # of the sequences' times to first token


class OpKind(IntEnum):
    """attend: router and attention of a cohort's microbatches. finish: its last layer's result, first tokens."""

    ATTEND = 0
    DISPATCH = 1
    EXPERTS = 2
    COMBINE = 3
    FINISH = 4


class Op(NamedTuple):
    kind: OpKind
    cohort: int
    layer: int
    wave: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()}(cohort {self.cohort}, layer {self.layer}, wave {self.wave})"


class Microbatch(NamedTuple):
    """One chunk of one rank: its tokens [start, stop)."""

    rank: int
    start: int
    stop: int


class Segment(NamedTuple):
    """A microbatch's part in one wave: tokens [start, stop) of `rank`, at rows [row, row + stop - start) of the wave."""

    rank: int
    start: int
    stop: int
    row: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class Wave(NamedTuple):
    """At most `moe_max_num_tokens` rows that are exchanged and computed at once (padding rows included)."""

    segments: tuple[Segment, ...]
    num_rows: int

    def ranks(self) -> set[int]:
        return {segment.rank for segment in self.segments}

    def is_even(self, num_ranks: int) -> bool:
        """Has every rank one segment, all of a size, in order?"""
        size, left = divmod(self.num_rows, num_ranks)
        return not left and all(s[0] == rank and s[2] - s[1] == size for rank, s in enumerate(self.segments)) and len(self.segments) == num_ranks


@dataclass(frozen=True, slots=True)
class Cohort:
    """Microbatches that travel through all layers together, on the communicators and buffers of one slot."""

    slot: int
    microbatches: tuple[Microbatch, ...]
    waves: tuple[Wave, ...]

    def tokens_of(self, rank: int) -> int:
        return sum(m.stop - m.start for m in self.microbatches if m.rank == rank)


@dataclass(frozen=True)
class Facts:
    """What every rank brings to a step, equal on all ranks after the exchange: `lengths[r]` are the sequence lengths."""

    lengths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.lengths:
            raise InputError("facts of no rank: lengths must hold one tuple per rank")
        for rank, lengths in enumerate(self.lengths):
            if any(n <= 0 for n in lengths):
                raise InputError(f"rank {rank}: sequence lengths {lengths} must all be positive")

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return tuple(sum(lengths) for lengths in self.lengths)

    @property
    def num_ranks(self) -> int:
        return len(self.lengths)

    @cached_property
    def boundaries(self) -> tuple[tuple[int, ...], ...]:
        """Per rank: the token at which each sequence starts, and the end."""
        return tuple((0, *accumulate(lengths)) for lengths in self.lengths)

    @cached_property
    def flat_boundaries(self) -> tuple[np.ndarray, np.ndarray]:
        """All ranks' sequence boundaries in one array, and where each rank's begin; int64."""
        first = np.array([0, *accumulate(map(len, self.boundaries))], dtype=np.int64)
        return np.array([b for of_rank in self.boundaries for b in of_rank], dtype=np.int64), first


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions a plan depends on; `num_layers` counts the MoE layers."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    num_layers: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not isinstance(getattr(self, name), numbers.Integral) or getattr(self, name) <= 0:
                raise ConfigError(f"ModelShape.{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(f"ModelShape.top_k is {self.top_k}, more than num_experts {self.num_experts}")


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """How to plan; equal on every rank (the exchange compares it).

    moe_max_num_tokens: rows that enter the fused MoE at once. max_tokens_per_rank: tokens a rank may bring to one step;
    it sizes the workspace of the uncapped baselines. num_slots: cohorts that may be under way at once.
    combine: "reduce" (padded mode: reduce-scatter), or "gather" to the owner, which sums in rank order. pipelined_ratio: ranks
    whose token counts differ by no more than this factor share a cohort. Mode "auto" takes the cohorts with the lowest predicted
    `objective` of the sequences' times to first token ("mean", "slowest", "p50", or "weighted": the three together, by
    `objective_weights` in this order) among those whose slowest is at most `makespan_budget` (a fraction) above the lowest possible.
    combine_blocks: blocks of columns in which a wave's sums are computed and combined, each combined while the next is computed; None:
    one, or what mode "auto" chooses.
    arrivals: whether experts take a wave's rows as they arrive, in one launch (see plan.arrivals), in every plan whose cohorts run in one
    slot; None: not, or what mode "auto" chooses. num_sms: multiprocessors that the experts' persistent kernels fill, in every plan; None: all
    but those that the plan leaves to collectives beside them, where there are such; mode "auto" chooses how many. Experts that take rows as
    they arrive leave what Room.kept_from_arrivals says, whatever num_sms is.
    """

    mode: str = "auto"
    moe_max_num_tokens: int = 8192
    max_tokens_per_rank: int = 16384
    num_slots: int = 4
    combine: str = "reduce"
    pipelined_ratio: int = 4
    objective: str = "mean"
    objective_weights: tuple[int, int, int] = (1, 1, 0)
    makespan_budget: float = 0.10
    combine_blocks: int | None = None
    arrivals: bool | None = None
    num_sms: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.combine not in COMBINES:
            raise ConfigError(f"combine is {self.combine!r}; it must be one of {', '.join(COMBINES)}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        weights = self.objective_weights
        if not (isinstance(weights, tuple) and len(weights) == 3 and all(type(w) is int and 0 <= w <= 100 for w in weights) and any(weights)):
            raise ConfigError(f"objective_weights is {weights!r}; it must be three whole numbers from 0 to 100, for mean, slowest and p50")
        if not isinstance(self.makespan_budget, (int, float)) or not 0 <= self.makespan_budget <= 100:
            raise ConfigError(f"makespan_budget is {self.makespan_budget!r}; it must be a fraction from 0 (0.1 is 10 %) to 100")
        for name in ("moe_max_num_tokens", "max_tokens_per_rank", "num_slots", "pipelined_ratio"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")
        if self.combine_blocks is not None and (type(self.combine_blocks) is not int or not 1 <= self.combine_blocks <= MOST_BLOCKS):
            raise ConfigError(f"combine_blocks is {self.combine_blocks!r}; it must be a whole number from 1 to {MOST_BLOCKS}, or None")
        if self.arrivals is not None and type(self.arrivals) is not bool:
            raise ConfigError(f"arrivals is {self.arrivals!r}; it must be True, False, or None")
        if self.num_sms is not None and (type(self.num_sms) is not int or self.num_sms < 1):
            raise ConfigError(f"num_sms is {self.num_sms!r}; it must be a whole number of at least 1, or None")

    @property
    def exchange(self) -> str:
        """Of any wave (but see Plan.exchange)."""
        return "padded" if self.mode == "padded" else "broadcast"

    @property
    def gathered_waves(self) -> int:
        """Which waves are exchanged by all-gather and reduce-scatter: 0 none, 1 all, 2 those of equal segments."""
        return 1 if self.exchange == "padded" else 2 if self.mode == "auto" else 0

    @property
    def num_buffers(self) -> int:
        """Receive and partial-sum buffers per slot: waves alternate between two, an uncapped mode has one wave."""
        return 1 if self.mode in UNCAPPED_MODES else 2

    @property
    def max_slots(self) -> int:
        """Slots that a plan of this mode can use."""
        return 1 if self.mode in (*UNCAPPED_MODES, "chunked") else min(2, self.num_slots) if self.mode == "two_batch" else self.num_slots

    def block_choices(self, hidden: int) -> tuple[int, ...]:
        """Numbers of blocks of columns that a plan may have, the usual one first."""
        if self.combine_blocks is not None or self.mode != "auto" or self.combine == "gather":
            return (self.combine_blocks or 1,)
        return tuple(n for n in BLOCK_CHOICES if n == 1 or hidden >= n * MANY_COLUMNS)

    @property
    def may_arrive(self) -> bool:
        """May a plan have arrivals, where the experts can?"""
        return self.mode == "auto" if self.arrivals is None else self.arrivals

    @property
    def cuts_sequences(self) -> bool:
        """May a plan put parts of one sequence into several cohorts?"""
        return self.mode in ("two_batch", "auto")

    def max_wave_rows(self, num_ranks: int) -> int:
        """Rows that a wave's buffers must hold; depends on the configuration alone."""
        if self.mode in UNCAPPED_MODES:
            return num_ranks * self.max_tokens_per_rank
        return min(self.moe_max_num_tokens, num_ranks * self.max_tokens_per_rank)


@dataclass(frozen=True)
class Plan:
    """All operations of one forward pass, for all ranks, in one total order."""

    facts: Facts
    shape: ModelShape
    config: PlanConfig
    cohorts: tuple[Cohort, ...]
    order: np.ndarray  # int32 [num_ops, 4]: kind, cohort, layer, wave
    num_column_blocks: int = 1  # in which a wave's sums are computed and combined
    arrivals: bool = False  # whether experts take a wave's rows as they arrive
    sms_left: int = 0  # multiprocessors that the experts' persistent kernels leave to collectives

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The total order, as operations."""
        kinds = tuple(OpKind)
        return tuple(Op(kinds[kind], cohort, layer, wave) for kind, cohort, layer, wave in self.order.tolist())

    def exchange(self, wave: Wave) -> str:
        """"padded" (all-gather and reduce-scatter), or "broadcast" (one broadcast and one reduce per segment). Mode auto gathers what
        needs no padding: one collective of equal parts is quicker than as many as there are ranks."""
        even = self.config.mode == "auto" and self.facts.num_ranks > 1 and wave.is_even(self.facts.num_ranks)
        return "padded" if even else self.config.exchange

    @cached_property
    def num_slots_used(self) -> int:
        return len({cohort.slot for cohort in self.cohorts})

    @cached_property
    def columns(self) -> tuple[range, ...]:
        """The columns of each block, in the order in which they are computed and combined."""
        return tuple(column_ranges(self.shape.hidden, self.num_column_blocks))

    def buffer(self, cohort: int, layer: int, wave: int) -> int:
        """Which of the slot's double buffers a wave uses."""
        return (layer * len(self.cohorts[cohort].waves) + wave) % self.config.num_buffers

    @cached_property
    def causal_predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Per cohort: the cohorts whose keys and values its attention reads (earlier chunks of its sequences)."""
        return tuple(tuple(sorted(p)) for p in causal_links(self.facts, [c.microbatches for c in self.cohorts]))

    @cached_property
    def pacemakers(self) -> tuple[tuple[int, ...], ...]:
        """Per cohort: those that continue its sequences and take the slots in the same turn. Its attention of a layer waits for theirs
        of the layer before: further ahead it would gain nothing, and leave the rest of its sequences to end alone."""
        paces: list[list[int]] = [[] for _ in self.cohorts]
        for later, predecessors in enumerate(self.causal_predecessors):
            for earlier in predecessors:
                if earlier // self.config.num_slots == later // self.config.num_slots:
                    paces[earlier].append(later)
        return tuple(map(tuple, paces))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that are equal on two ranks exactly when their plans are."""
        h = hashlib.blake2b(digest_size=16)
        h.update(repr((self.facts.lengths, self.shape, self.config, self.num_column_blocks, self.arrivals, self.sms_left)).encode())
        for cohort in self.cohorts:
            flat = [cohort.slot, *(v for m in cohort.microbatches for v in m)]
            flat += [v for w in cohort.waves for v in (w.num_rows, *(x for s in w.segments for x in s))]
            h.update(struct.pack(f"<{len(flat)}q", *flat))
        h.update(np.ascontiguousarray(self.order, dtype="<i4").tobytes())
        return h.digest()


def causal_links(facts: Facts, microbatches_of: list[tuple[Microbatch, ...]]) -> list[set[int]]:
    """For each cohort, the other cohorts that hold an earlier chunk of a sequence it continues."""
    links: list[set[int]] = [set() for _ in microbatches_of]
    chunks: dict[int, list[tuple[int, int, int]]] = {}
    for cohort, microbatches in enumerate(microbatches_of):
        for m in microbatches:
            chunks.setdefault(m.rank, []).append((m.start, m.stop, cohort))
    for rank, of_rank in chunks.items():
        of_rank.sort()
        starts = facts.boundaries[rank]
        at = 0
        for i, (start, _, cohort) in enumerate(of_rank):
            while starts[at + 1] <= start:
                at += 1
            for _, stop, earlier in reversed(of_rank[:i]):
                if stop <= starts[at]:
                    break
                if earlier != cohort:
                    links[cohort].add(earlier)
    return links
