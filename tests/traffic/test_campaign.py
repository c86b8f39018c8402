"""A campaign on a server whose answers are known."""

import random

import pytest

from pipemoe.errors import InputError
from pipemoe.traffic.campaign import Campaign, Settings, leaders, spread_lengths
from pipemoe.traffic.policy import Policy
from pipemoe.traffic.request_trace import Request
from pipemoe.traffic.served import LengthClasses, length_classes
from tests.traffic.single_server import SingleServer

ROLLING, SMALL, LARGE = Policy("rolling"), Policy("lockstep", 64), Policy("lockstep", 128)


def requests_of(seed):
    draw = random.Random(seed)
    lengths = [draw.choice([10, 11, 12, 13, 14]) for _ in range(198)] + [15, 16]
    return [Request(100.0 * n, tokens, 1) for n, tokens in enumerate(lengths)]


def slowness(policy):
    return {ROLLING: 0.8, SMALL: 2.0, LARGE: 1.0}[policy]


@pytest.fixture(scope="module")
def campaign():
    settings = Settings(processes=("poisson",), loads=(0.5, 0.8), seeds=(3, 4), rate_step=1.1)
    found = Campaign(SingleServer(1e-3, slowness), [ROLLING, SMALL, LARGE], requests_of, settings)
    found.run()
    return found


def test_limits_are_five_times_the_best_unloaded_time(campaign):
    assert {name: s for name, s in campaign.limits.seconds.items()} == pytest.approx(
        {name: 0.8 * 5e-3 * tokens for name, tokens in {"short": 11, "medium": 13.5, "long": 15.5}.items()}, rel=0.05
    )
    alone = [row for row in campaign.rows if row["what"] == "alone"]
    assert [row["label"] for row in alone] == ["rolling", "lockstep 64"]


def test_limits_may_be_given():
    """Capacity is then the largest rate within these, whatever the unloaded times are."""
    settings = Settings(processes=("poisson",), loads=(0.5,), seeds=(3,), limits_ms=(20.0, 30.0, 40.0))
    found = Campaign(SingleServer(1e-3, slowness), [ROLLING, LARGE], requests_of, settings)
    rows = found.run()
    assert dict(found.limits.seconds) == pytest.approx({"short": 0.02, "medium": 0.03, "long": 0.04})
    assert all(row["limits_ms"] == pytest.approx({"short": 20, "medium": 30, "long": 40}) for row in rows[2:])
    usual = Campaign(SingleServer(1e-3, slowness), [ROLLING, LARGE], requests_of, settings._replace(limits_ms=None))
    capacity, longer = (
        {row["label"]: row["capacity_rps"] for row in of if row["what"] == "load"} for of in (rows, usual.run())
    )
    assert all(capacity[label] < longer[label] for label in longer)  # five times these would be 44, 54 and 62 ms


@pytest.mark.parametrize("limits", [(20.0, 30.0), (20.0, 30.0, 0.0), (20.0, float("nan"), 30.0)])
def test_limits_that_are_none(limits):
    with pytest.raises(InputError, match="one over 0 is wanted for short, medium, long each"):
        Campaign(SingleServer(1e-3, slowness), [ROLLING], requests_of, Settings(limits_ms=limits))


def test_loads_are_shares_of_the_best_lockstep_policys_throughput(campaign):
    """In tokens: a seed with longer prompts comes at a lower rate."""
    full_rates = {seed: 200 / (sum(r.input_tokens for r in requests_of(seed)) * 1e-3) for seed in (3, 4)}
    assert full_rates[3] != full_rates[4]
    assert {seed: campaign.full_rate(seed) for seed in (3, 4)} == pytest.approx(full_rates)
    saturation = {row["label"]: row["load"] for row in campaign.rows if row["what"] == "saturation"}
    assert saturation == pytest.approx({"rolling": 1.25, "lockstep 64": 0.5, "lockstep 128": 1.0})
    for row in campaign.rows:
        if row["what"] == "load":
            assert row["rate_rps"] == pytest.approx(row["load"] * full_rates[row["seed"]]) and row["completed"] == 200


def test_every_policy_gets_the_same_arrivals_and_lockstep_that_never_leads_goes_no_further(campaign):
    of_load = [(row["label"], row["seed"], row["load"]) for row in campaign.rows if row["what"] == "load"]
    assert of_load == [
        *((label, 3, load) for load in (0.5, 0.8) for label in ("rolling", "lockstep 64", "lockstep 128")),
        *((label, 4, load) for load in (0.5, 0.8) for label in ("rolling", "lockstep 128")),
    ]
    streams = {}
    for policy, arrivals, _ in campaign._player.plays:
        streams.setdefault(policy, set()).add(arrivals)
    assert len(streams[ROLLING] & streams[LARGE]) >= 5  # all at once, and two loads of two seeds


def test_capacity_is_the_largest_rate_that_meets_the_limits(campaign):
    found = {}
    for row in campaign.rows:
        if row["what"] == "load" and row["label"] != "lockstep 64":
            tried = dict(map(tuple, row["capacity_tried"]))
            assert row["capacity_rps"] == max((rate for rate, met in tried.items() if met), default=None)
            assert row["load"] == 0.5 or row["rate_rps"] in tried  # where the search began
            found[row["label"], row["seed"]] = row["capacity_rps"] or 0
    assert found["rolling", 3] > found["lockstep 128", 3] and found["rolling", 4] > found["lockstep 128", 4]
    assert all(row["capacity_rps"] is None for row in campaign.rows if row["label"] == "lockstep 64")


def test_what_is_measured_is_not_measured_again(campaign):
    plays = [play[:2] for play in campaign._player.plays]
    assert len(set(plays)) == len(plays)


def test_nothing_served_alone_is_an_error_and_equal_lengths_are_one_class():
    class Deaf(SingleServer):
        def alone(self, policy, lengths):
            return [s._replace(first_token=None) for s in super().alone(policy, lengths)]

    def same(seed):
        return [Request(0.0, 9, 1)] * 4

    with pytest.raises(InputError, match="no request of length class short was served"):
        Campaign(Deaf(1.0), [ROLLING], same, Settings()).run()
    campaign = Campaign(SingleServer(1.0, slowness), [ROLLING], same, Settings(find_capacity=False))
    assert campaign.run() and set(campaign.limits.seconds) == {"short"}


def test_lengths_spread_over_each_class():
    lengths = [*range(1, 11), *range(100, 110)]
    requests = [Request(0.0, n, 1) for n in reversed(lengths)]
    assert spread_lengths(requests, LengthClasses(50, 105), 2) == [3, 8, 101, 104, 107, 109]
    assert len(spread_lengths(requests, length_classes(lengths), 99)) == 20


def test_leaders_are_best_in_something():
    def row(label, p50, p95, short, load=0.7):
        figures = {"ttft_ms_p50": p50, "ttft_ms_p95": p95, "ttft_ms_p95_short": short}
        return {"what": "load", "policy": label.split()[0], "label": label, "load": load} | figures

    rows = [row("rolling", 1, 1, 1), row("lockstep 1", 5, 9, None), row("lockstep 2", 6, 8, 7)]
    rows += [row("lockstep 3", 9, 9, 9), row("lockstep 3", 1, 1, 1, load=0.3)]
    assert leaders(rows) == {"lockstep 1", "lockstep 2"} and leaders([]) == set()


def test_what_is_found_is_kept_at_once():
    """A campaign may be ended by a time limit: each row, and each policy's capacity, is there before the next play."""
    kept = []

    def keep(rows):
        kept.append((len(rows), sum(row["capacity_rps"] is not None for row in rows)))

    settings = Settings(processes=("poisson",), loads=(0.5,), seeds=(3,), rate_step=1.1)
    found = Campaign(SingleServer(1e-3, slowness), [ROLLING, LARGE], requests_of, settings, keep=keep)
    rows = found.run()
    num_rows = [n for n, _ in kept]
    assert num_rows[: len(rows)] == list(range(1, len(rows) + 1)) and set(num_rows[len(rows) :]) == {len(rows)}
    assert [n for _, n in kept[len(rows) - 1 :]] == [0, 1, 2]
