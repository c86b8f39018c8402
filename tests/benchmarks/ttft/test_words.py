"""Sentences about a table: the figures are those of its rows, also where auto loses."""

from __future__ import annotations

from benchmarks.ttft.words import in_words


def row(mode, rank_tokens, lengths, milliseconds):
    ttfts = [m / 1e3 for m in milliseconds]
    mean = sum(milliseconds) / len(milliseconds)
    return {"mode": mode, "rank_tokens": rank_tokens, "input_lens": lengths, "ttfts": ttfts, "mean_ttft_ms": mean}


SKEWED = [4096, 16, 16, 0]


def skewed(mode, long, *short):
    return row(mode, SKEWED, [4096, 16, 16], [long, *short])


def test_short_and_long_prompts_are_told_apart():
    rows = [skewed("padded", 90, 90, 90), skewed("broadcast", 80, 80, 80), skewed("auto", 84, 16, 24)]
    assert in_words(rows) == (
        "4096, 16 x 2, 0: prompts of under 2048 tokens had their first token after 20 ms, 4.0 times sooner than in "
        "lockstep (broadcast); the long one after 84 ms, 5% later than there."
    )


def test_where_auto_does_not_gain_it_says_so():
    assert in_words([skewed("padded", 50, 50, 50), skewed("auto", 50.5, 60, 60)]).endswith(
        "after 60 ms, 20% later than in lockstep (padded); the long one after 50.5 ms, as soon as there."
    )
    equal = [row("two_batch", [8, 8], [8, 8], [10, 10]), row("auto", [8, 8], [8, 8], [9, 9])]
    assert in_words(equal) == "8 x 2: first tokens after 9 ms on average, 10% sooner than in lockstep (two_batch)."
    equal[1] = row("auto", [8, 8], [8, 8], [12, 12])
    assert in_words(equal) == "8 x 2: first tokens after 12 ms on average, 20% later than in lockstep (two_batch)."


def test_a_trace_is_told_by_its_mean():
    rows = [row("chunked", "a_trace", [900, 3], [3000, 3000]), row("auto", "a_trace", [900, 3], [1500, 500])]
    assert (
        in_words(rows) == "a_trace: first tokens after 1000 ms on average, 3.0 times sooner than in lockstep (chunked)."
    )


def test_a_trace_by_its_clock_is_told_so():
    rows = [row("chunked", "a_trace", [9, 3], [30, 30]), row("auto", "a_trace", [9, 3], [30, 30])]
    assert in_words([r | {"time_scale": 12.0} for r in rows]).startswith(
        "a_trace by its own clock, 12 times as fast, waiting included: first tokens after 30 ms on average, as soon"
    )


def test_nothing_to_compare_gives_no_words():
    assert in_words([]) == in_words([skewed("auto", 1, 1, 1)]) == in_words([skewed("padded", 1, 1, 1)]) == ""
    both = [skewed("auto", 1, 1, 1), row("auto", [8], [8], [9]), row("padded", [8], [8], [9])]
    assert in_words(both).startswith("8: ")
