"""What the ttft benchmark feeds to every mode: workloads, cut into steps that give every rank some prompts.

A workload is a trace's requests, dealt to the ranks in turn, or one prompt per rank of given lengths. Token ids are
random: a function of the seed and of the prompt's number, the same on every rank and for every mode.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipemoe.errors import InputError
from pipemoe.traffic.request_trace import (
    Request,
    cut,
    fit_lengths,
    parse_rank_tokens,
    rank_token_requests,
    read_trace,
    round_robin,
    scale_lengths,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request on the rank that serves it."""

    number: int  # in the workload
    rank: int
    arrival_s: float  # after the workload's first
    num_tokens: int

    def token_ids(self, vocab_size: int, seed: int) -> torch.Tensor:
        """[num_tokens] int64 on the host."""
        import torch

        generator = torch.Generator().manual_seed((seed << 24) + self.number)
        return torch.randint(vocab_size, (self.num_tokens,), generator=generator)


Step = tuple[tuple[Prompt, ...], ...]  # per rank


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts per rank, and the same cut into steps whose prompts arrive together."""

    rank_tokens: list[int] | str  # as in the results: tokens per rank, or the trace's name
    prompts: tuple[tuple[Prompt, ...], ...]  # per rank, in order of arrival
    steps: tuple[Step, ...]
    trace: str | None = None  # where the lengths were drawn from
    clipped: int = 0  # requests of the trace that were too long for the model, and were cut
    dropped: int = 0  # or left out
    # Requests come by the trace's clock, so many times as fast; None: those of a step come together.
    time_scale: float | None = None

    @property
    def name(self) -> str:
        """Fit for a file name."""
        return self.rank_tokens if isinstance(self.rank_tokens, str) else "_".join(map(str, self.rank_tokens))

    @property
    def max_tokens_per_rank(self) -> int:
        """Most tokens that a rank brings to one of the steps."""
        return max(sum(p.num_tokens for p in prompts) for step in self.steps for prompts in step)

    @property
    def longest(self) -> int:
        return max(p.num_tokens for prompts in self.prompts for p in prompts)


def trace_workload(
    path: str,
    num_ranks: int,
    *,
    first: int,
    num_requests: int,
    scale: float,
    prompts_per_step: int,
    unit: str | None = None,
    most: int | None = None,
    too_long: str = "error",
) -> Workload:
    """Requests number `first` to `first + num_requests` of the trace, their lengths times `scale`; a step gives every
    rank its next `prompts_per_step`.

    unit: of its times, see read_trace. most, too_long: tokens that a sequence may have, and what becomes of longer
    requests, see fit_lengths. Raises InputError for a bad trace.
    """
    requests, longer = scale_lengths(cut(read_trace(path, unit), num_requests, first), scale), 0
    if most is not None:
        try:
            requests, longer = fit_lengths(requests, most, too_long)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    workload = _workload(Path(path).stem, round_robin(requests, num_ranks), prompts_per_step)
    return replace(workload, clipped=longer * (too_long == "clip"), dropped=longer * (too_long == "drop"))


def drawn_workloads(
    path: str, num_ranks: int, count: int, *, scale: float, most: int, unit: str | None = None
) -> list[Workload]:
    """`count` workloads of one step, each with one request per rank, drawn from the trace's requests of at most `most`
    tokens. Which ones follows from the trace's name alone. Raises InputError for a bad trace, or one without such
    requests."""
    name = Path(path).stem
    lengths = [r.input_tokens for r in scale_lengths(read_trace(path, unit), scale) if r.input_tokens <= most]
    if count and not lengths:
        raise InputError(f"{path}: every request has more than {most} tokens")
    draw = random.Random(name)
    counts = [[draw.choice(lengths) for _ in range(num_ranks)] for _ in range(count)]
    return [replace(_workload(of_ranks, rank_token_requests(of_ranks), 1), trace=name) for of_ranks in counts]


def rank_tokens_workload(text: str, num_ranks: int) -> Workload:
    """One step with one prompt per rank, of the lengths in "4096,16,16,16"; InputError unless some are positive."""
    rank_tokens = parse_rank_tokens(text, num_ranks)
    if not any(rank_tokens):
        raise InputError(f"rank tokens {text!r}: no rank has any, so there is nothing to measure")
    return _workload(rank_tokens, rank_token_requests(rank_tokens), 1)


def _workload(rank_tokens: list[int] | str, dealt: Sequence[Sequence[Request]], prompts_per_step: int) -> Workload:
    num_ranks = len(dealt)
    begin = min(request.timestamp_ms for requests in dealt for request in requests)
    prompts = tuple(
        tuple(
            Prompt(i * num_ranks + rank, rank, (r.timestamp_ms - begin) / 1e3, r.input_tokens)
            for i, r in enumerate(requests)
        )
        for rank, requests in enumerate(dealt)
    )
    count = max(map(len, prompts))
    steps = tuple(
        tuple(of_rank[at : at + prompts_per_step] for of_rank in prompts) for at in range(0, count, prompts_per_step)
    )
    by_arrival = tuple(tuple(sorted(of_rank, key=lambda p: p.arrival_s)) for of_rank in prompts)
    return Workload(rank_tokens, by_arrival, steps)


def without_last_rank(step: Step) -> Step:
    """The step with nothing for the last rank: it still has experts to compute for the others."""
    return (*step[:-1], ())


def shortened(step: Step, most: int) -> Step:
    """The step with prompts of at most `most` tokens."""
    return tuple(tuple(replace(p, num_tokens=min(p.num_tokens, most)) for p in of_rank) for of_rank in step)
