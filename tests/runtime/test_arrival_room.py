"""Whether a machine's experts may wait for rows, by what its world and its experts say; no GPU needed."""

import importlib.util
from types import SimpleNamespace

import pytest

from pipemoe import Config
from pipemoe.plan.room import Room
from pipemoe.runtime.arriving import GATHERING_PERMILLE, arrival_room, refusal, speed_permille

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)


def experts(num_sms=132, **changes):
    made = SimpleNamespace(
        **{
            "supports_arrivals": True,
            "implementation": "hopper",
            "num_sms": num_sms,
            "top_k": 8,
            "hidden": 7168,
            "max_intermediate": 2048,
            **changes,
        }
    )
    made.with_free_sms = lambda left: experts(num_sms - left)
    return made


def world(**changes):
    room = Room(**{"num_sms": 132, "ctas": 8, **changes})
    return SimpleNamespace(size=2, block_room=room)


def test_the_grid_leaves_one_slots_collectives_and_the_index():
    assert (
        arrival_room(world(), experts()).arrival_blocks == 132 - 16 - 1
        and refusal(world(), experts(), Config(num_slots=4)) is None
    )
    assert speed_permille(world(), experts()) == GATHERING_PERMILLE * 115 // 132
    alone = SimpleNamespace(size=1, block_room=None)
    assert arrival_room(alone, experts()) is None and refusal(alone, experts(), Config(num_slots=4)) is None
    assert speed_permille(alone, experts()) == GATHERING_PERMILLE * 131 // 132


@pytest.mark.parametrize(
    ("changes", "of_experts", "options", "reason"),
    [
        ({"ranks_on_device": 2, "ctas": 1}, {}, {}, "2 ranks share this GPU"),
        ({"cluster_blocks": 4}, {}, {}, "NCCL_CGA_CLUSTER_SIZE is 4"),
        ({"num_sms": 100}, {}, {}, "need 132 SMs, of which there are 100"),
        ({}, {"supports_arrivals": False, "implementation": "torch"}, {}, "torch experts take whole waves only"),
        ({}, {}, {"moe_max_num_tokens": 1 << 20, "max_tokens_per_rank": 1 << 20}, "less than 4 GiB"),
    ],
)
def test_what_cannot_be_is_said(changes, of_experts, options, reason):
    assert reason in refusal(world(**changes), experts(**of_experts), Config(num_slots=4, **options))
