"""Expert ranges, weight checks and the factory's refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.errors import ConfigError, InputError
from pipemoe.experts import check_finite, local_range, make_experts
from tests.experts.oracle import random_weights


@given(st.integers(0, 600), st.integers(1, 40))
def test_ranges_cover_all_experts_evenly(num_experts, num_ranks):
    ranges = [local_range(num_experts, num_ranks, rank) for rank in range(num_ranks)]
    assert [expert for r in ranges for expert in r] == list(range(num_experts))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("rank, num_ranks", [(-1, 2), (2, 2), (0, 0)])
def test_rank_out_of_range(rank, num_ranks):
    with pytest.raises(ConfigError, match=f"rank {rank}"):
        local_range(8, num_ranks, rank)


def test_a_rank_of_more_digits_than_python_prints():
    with pytest.raises(ConfigError, match="a rank must be in"):
        local_range(7, 3, 10**5000)


@pytest.mark.parametrize("name", ["gate_up", "down", "gate_up_bias", "down_bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_finite_names_layer_and_expert(name, value):
    layers = [random_weights(3, 16, 8, bias=True, first_expert=5) for _ in range(2)]
    check_finite(layers)
    getattr(layers[1], name)[2].view(-1)[3] = value
    with pytest.raises(InputError, match=f"layer 1, expert 7: {name}"):
        check_finite(layers)


def make(weights, **changes):
    settings = {"top_k": 2, "hidden": 16, "device": "cpu", "dtype": torch.float32} | changes
    return make_experts([weights], **settings)


def test_weights_that_do_not_fit_are_refused():
    good = random_weights(3, 16, 8, bias=True)
    bad = {
        "down has shape (3, 12, 8); (3, 16, 8) is wanted": replace(good, down=torch.zeros(3, 12, 8)),
        "gate_up_bias has shape": replace(good, gate_up_bias=torch.zeros(3, 8)),
        "down is torch.float64": replace(good, down=good.down.double()),
        "gate_up is not contiguous": replace(good, gate_up=torch.zeros(3, 16, 16).transpose(1, 2)),
        "gate_up has shape (3, 16, 16); (3, 8, 16) is wanted": replace(good, gated=False),
        "activation is 'tanh'; one of silu, gelu, relu": replace(good, activation="tanh"),
        "limit is nan; it must be a finite number above 0": replace(good, limit=float("nan")),
        "alpha is '1'; it must be a finite number above 0": replace(good, alpha="1"),
        "alpha is 1.702, but only silu has one": replace(good, alpha=1.702, activation="gelu"),
        "up_offset is inf": replace(good, up_offset=float("inf")),
        "2 and 3 dimensions": replace(good, gate_up=torch.zeros(16, 16)),
        "for hidden 12; 16 is wanted": random_weights(3, 12, 8),
        "torch.bfloat16; torch.float32 is wanted": random_weights(3, 16, 8, dtype=torch.bfloat16),
    }
    for message, weights in bad.items():
        with pytest.raises(InputError) as error:
            make(weights)
        assert message in str(error.value) and "layer 0" in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"implementation": "fast"}, "must be one of"),
        ({"implementation": "torch"}, "runs on cuda"),
        ({"device": "meta"}, "device is meta"),
        ({"top_k": 0}, "top_k is 0"),
        ({"dtype": torch.float64}, "torch.float64"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(random_weights(3, 16, 8), **changes)


def test_auto_takes_the_host_on_a_cpu():
    experts = make(random_weights(3, 16, 8))
    assert experts.implementation == "host"
    with pytest.raises(ConfigError, match="max_rows is -1"):
        experts.new_scratch(-1)


def test_scratch_grows_with_max_rows_alone():
    experts = make(random_weights(3, 16, 8))
    sizes = [experts.new_scratch(n).num_bytes for n in (0, 100, 200)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_num_bytes_counts_every_tensor():
    assert random_weights(3, 16, 8, bias=True).num_bytes == 4 * (3 * 16 * 16 + 3 * 16 * 8 + 3 * 16 + 3 * 16)
