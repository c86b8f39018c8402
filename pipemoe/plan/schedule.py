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

from pipemoe.arguments import shown
from pipemoe.errors import ConfigError, InputError
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.waits import LAYER_BEFORE, LAYER_OF, attention_waits

MAX_GROUPS = 4  # groups of collectives of one cohort's dispatches under way at once, on a rank


class OpKind(IntEnum):
    """attend: attention and router of a cohort's microbatches. finish: the last layer's result and the first tokens."""

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
    """A microbatch's part in one wave: tokens [start, stop) of `rank`, at rows [row, row + stop - start) of the
    wave.
    """

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
        """Does every rank have one segment, all of the same size, in rank order?"""
        return is_even([s.rank for s in self.segments], [s.num_rows for s in self.segments], num_ranks)


@compiled_part
def is_even(ranks, rows, num_ranks):
    """Do segments of these ranks and sizes include one of every rank, all of the same size, in rank order?"""
    if len(ranks) != num_ranks:
        return False
    for r in range(num_ranks):
        if ranks[r] != r or rows[r] != rows[0]:
            return False
    return True


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
    """What every rank brings to a step. After the exchange it is the same on all ranks. lengths[r]: rank r's sequence
    lengths.
    """

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
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or int(value) <= 0:
                raise ConfigError(f"ModelShape.{name} is {shown(value)}; it must be a whole number of at least 1")
            if int(value) >= 1 << 31:
                raise ConfigError(f"ModelShape.{name} is {shown(value)}; it must be below 2**31")
        if self.top_k > self.num_experts:
            raise ConfigError(f"ModelShape.top_k is {self.top_k}, more than num_experts {self.num_experts}")


@dataclass(frozen=True)
class Plan:
    """All operations of one forward pass, for all ranks, in one total order."""

    facts: Facts
    shape: ModelShape
    config: PlanConfig
    cohorts: tuple[Cohort, ...]
    order: np.ndarray  # int32 [num_ops, 4]: kind, cohort, layer, wave
    sms_left: int = 0  # multiprocessors that the experts' persistent kernels leave to collectives

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The total order, as operations."""
        kinds = tuple(OpKind)
        return tuple(Op(kinds[kind], cohort, layer, wave) for kind, cohort, layer, wave in self.order.tolist())

    def exchange(self, wave: Wave) -> str:
        """ "padded" (all-gather and reduce-scatter) or "broadcast" (one broadcast and one reduce per segment).

        Mode auto gathers a wave that needs no padding: one collective of equal parts is quicker than one per rank.
        """
        may = self.config.mode == "auto" and self.facts.num_ranks > 1
        even = may and wave.is_even(self.facts.num_ranks)
        return "padded" if even else self.config.exchange

    @cached_property
    def num_slots_used(self) -> int:
        return len({cohort.slot for cohort in self.cohorts})

    def buffer(self, cohort: int, layer: int, wave: int) -> int:
        """Which of the slot's double buffers a wave uses."""
        return (layer * len(self.cohorts[cohort].waves) + wave) % self.config.num_buffers

    @cached_property
    def waits(self) -> np.ndarray:
        """int64 [C, C], see attention_waits."""
        table = [(c, *m) for c, cohort in enumerate(self.cohorts) for m in cohort.microbatches]
        microbatches = np.array(table, dtype=np.int64).reshape(-1, 4)
        return attention_waits(microbatches, len(self.cohorts), *self.facts.flat_boundaries, self.config.num_slots)

    @cached_property
    def causal_predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Per cohort: the cohorts whose keys and values its attention reads (earlier chunks of its sequences)."""
        return tuple(tuple(np.flatnonzero(of_cohort == LAYER_OF).tolist()) for of_cohort in self.waits)

    @cached_property
    def pacemakers(self) -> tuple[tuple[int, ...], ...]:
        """Per cohort: those that continue its sequences in the same turn. Its attention of a layer waits for theirs of
        the layer before.
        """
        return tuple(tuple(np.flatnonzero(of_cohort == LAYER_BEFORE).tolist()) for of_cohort in self.waits)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that are equal on two ranks exactly when their plans are."""
        h = hashlib.blake2b(digest_size=16)
        h.update(repr((self.facts.lengths, self.shape, self.config, self.sms_left)).encode())
        for cohort in self.cohorts:
            flat = [cohort.slot, *(v for m in cohort.microbatches for v in m)]
            flat += [v for w in cohort.waves for v in (w.num_rows, *(x for s in w.segments for x in s))]
            h.update(struct.pack(f"<{len(flat)}q", *flat))
        h.update(np.ascontiguousarray(self.order, dtype="<i4").tobytes())
        return h.digest()
