"""How many multiprocessors the experts' persistent kernels leave to collectives beside them.

A kernel with a block for every multiprocessor has a block wait for its place while a collective holds that, and all
others wait for the block. A plan chooses from few numbers, so that experts are made ready for each at set-up: none,
room for the collectives of the slots that it uses, twice as much.
"""

from __future__ import annotations

from pipemoe.errors import ConfigError
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import CROWDED, ROOMY, USUAL, SmsCost


@compiled_part
def room_for_collectives(num_sms, ctas, num_slots):
    """Multiprocessors for all thread blocks of the collectives of so many slots, but a tenth of `num_sms` at most
    (measured on quarters of an H200, NCCL_MAX_CTAS=1: 3 of 32 cost the kernels 1 to 7 %, and save them 25 % beside a
    transfer)."""
    return min(2 * num_slots * ctas, num_sms // 10)


@compiled_part
def usual_sms_left(rates, num_waves, num_blocks, num_slots, arrivals):
    """Room for the collectives of the slots that cohorts of `num_waves` [C] waves use; none where no
    collective can be under way beside experts: with one wave in one block, taken whole, everything waits for
    everything."""
    if num_blocks == 1 and num_waves.sum() <= 1 and not arrivals:
        return 0
    return room_for_collectives(rates.sms_num_sms, rates.sms_ctas, min(len(num_waves), num_slots))


@compiled_part
def speeds_where_left(rates, speeds, sms_left, num_slots):
    """The table of `speeds` (see speeds_of) that holds for a plan that uses so many slots."""
    room = room_for_collectives(rates.sms_num_sms, rates.sms_ctas, num_slots)
    return speeds[CROWDED if sms_left < room else ROOMY if 0 < 2 * room <= sms_left else USUAL]


def forced_sms_left(config: PlanConfig, sms: SmsCost) -> int | None:
    """What `config.num_sms` has every plan leave; None if it is for the planner to choose. Raises ConfigError if there
    are not so many.
    """
    if config.num_sms is None:
        return None
    if config.num_sms > sms.num_sms:
        there_are = f"{sms.num_sms} multiprocessors here (0: they are not persistent)"
        raise ConfigError(f"num_sms is {config.num_sms}, but the experts' kernels can fill {there_are}")
    return sms.num_sms - config.num_sms


def possible_sms_left(config: PlanConfig, sms: SmsCost) -> tuple[int, ...]:
    """All that plans may leave, in ascending order."""
    forced = forced_sms_left(config, sms)
    if forced is not None:
        return (forced,)
    rooms = [room_for_collectives(sms.num_sms, sms.ctas, slots) for slots in range(1, config.max_slots + 1)]
    return tuple(sorted({0, *rooms, *(2 * room for room in rooms if config.mode == "auto")}))
