"""Generated cases for the plan tests: token counts, sequences, cohort assignments."""

from __future__ import annotations

from hypothesis import strategies as st

from pipemoe.plan.config import COMBINES, MODES, PlanConfig
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape

SHAPE = ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=2, num_layers=3)
MOST_TOKENS = 100_000


@st.composite
def all_facts(draw, max_ranks: int = 16) -> Facts:
    """1 to `max_ranks` ranks with 0 to 10^5 tokens each, in sequences of any length."""
    ranks = []
    for _ in range(draw(st.integers(1, max_ranks))):
        total = draw(st.one_of(st.just(0), st.integers(0, 40), st.integers(0, MOST_TOKENS)))
        lengths = []
        while total and len(lengths) < 4:
            lengths.append(draw(st.integers(1, total)))
            total -= lengths[-1]
        ranks.append(tuple(lengths + ([total] if total else [])))
    return Facts(tuple(ranks))


@st.composite
def configs(draw, facts: Facts, modes: tuple[str, ...] = MODES, most_waves: int = 60) -> PlanConfig:
    """A configuration under which all tokens are in about `most_waves` waves or fewer, if in one cohort."""
    smallest = max(1, sum(facts.tokens) // most_waves)
    exact = st.integers(1, most_waves).map(lambda waves: max(1, -(-sum(facts.tokens) // waves)))
    return PlanConfig(
        mode=draw(st.sampled_from(modes)),
        moe_max_num_tokens=draw(st.one_of(exact, st.integers(smallest, max(smallest, 2 * MOST_TOKENS)))),
        max_tokens_per_rank=MOST_TOKENS * 5,
        num_slots=draw(st.integers(1, 8)),
        combine=draw(st.sampled_from(COMBINES)),
        num_sms=draw(st.sampled_from((None, None, 1, 100, 132))),
    )


@st.composite
def assignments(draw, facts: Facts) -> list[list[Microbatch]]:
    """Any cohorts: every rank's tokens cut anywhere, a later cut never in an earlier cohort than the one before it."""
    num_cohorts = draw(st.integers(1, 6))
    cohorts: list[list[Microbatch]] = [[] for _ in range(num_cohorts)]
    for rank, tokens in enumerate(facts.tokens):
        at, cohort = 0, 0
        while at < tokens:
            stop = draw(st.integers(at + 1, tokens)) if cohort < num_cohorts - 1 else tokens
            cohort = draw(st.integers(cohort, num_cohorts - 1))
            cohorts[cohort].append(Microbatch(rank, at, stop))
            at = stop
    return [c for c in cohorts if c]
