"""How many multiprocessors the experts' persistent kernels leave to collectives beside them.

If a kernel has a block for every multiprocessor and a collective holds one of them, one block waits for a place, and
all others wait for that block. So plans leave room for the collectives of the slots that they use.
"""

from __future__ import annotations

from pipemoe.errors import ConfigError
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import CROWDED, ROOMY, USUAL, SmsCost
from pipemoe.plan.cost.tuned import MOST_SMS_LEFT


@compiled_part
def room_for_collectives(num_sms, ctas, num_slots):
    """Multiprocessors for all thread blocks of `num_slots` slots' collectives, but at most one in MOST_SMS_LEFT."""
    return min(2 * num_slots * ctas, num_sms // MOST_SMS_LEFT)


@compiled_part
def usual_sms_left(rates, num_waves, num_slots):
    """Room for the collectives of the slots that cohorts of `num_waves` [C] waves use. None if no collective can run
    beside experts: with one wave everything waits for everything.
    """
    if num_waves.sum() <= 1:
        return 0
    return room_for_collectives(rates.sms_num_sms, rates.sms_ctas, min(len(num_waves), num_slots))


@compiled_part
def speeds_where_left(rates, speeds, sms_left, num_slots):
    """The table of `speeds` (see speeds_of) for a plan that uses `num_slots` slots."""
    room = room_for_collectives(rates.sms_num_sms, rates.sms_ctas, num_slots)
    return speeds[CROWDED if sms_left < room else ROOMY if 0 < 2 * room <= sms_left else USUAL]


def forced_sms_left(config: PlanConfig, sms: SmsCost) -> int | None:
    """What every plan leaves by `config.num_sms`; None if the planner chooses. Raises ConfigError if there are fewer
    multiprocessors.
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
    return tuple(sorted({0, *rooms}))
