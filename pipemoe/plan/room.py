"""Room: thread blocks that may be spinning at once on a GPU, against the SMs they need."""

from __future__ import annotations

from dataclasses import dataclass

from pipemoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Room:
    """Thread blocks that may be spinning at once, against the SMs they need.

    num_sms: how many this rank may use. ctas: NCCL_MAX_CTAS. ranks_on_device: how many ranks share this GPU. Their
    blocks may all lie on this rank's SMs: a share under MPS says how many SMs, not which.

    A spinning collective of 640 threads takes nearly all registers of its SM. What it waits for is computed by kernels
    that need whole SMs, some of them two neighbouring ones (thread-block clusters). So spinning blocks may fill only
    half of the SMs. On a GPU that a rank has for itself it is one block fewer, as experts may run in pairs of blocks
    there: wherever the spinning blocks lie, two neighbouring SMs are free.
    """

    num_sms: int
    ctas: int
    ranks_on_device: int = 1

    @property
    def spinning_blocks(self) -> int:
        """The most that may spin at once."""
        return (self.num_sms - (self.ranks_on_device == 1)) // 2

    def check(self, num_slots: int) -> None:
        """Raise ConfigError unless all communicators of `num_slots` slots fit beside one another and leave half the SMs
        free.
        """
        needed = self.ranks_on_device * 2 * num_slots * self.ctas
        if needed > self.spinning_blocks:
            raise ConfigError(
                f"no room for thread blocks: {self.ranks_on_device} ranks on this GPU x 2 x {num_slots} slots x "
                f"NCCL_MAX_CTAS={self.ctas}"
                f" = {needed} blocks, more than {self.spinning_blocks} of {self.num_sms} SMs;"
                " lower NCCL_MAX_CTAS (an environment variable, the same on all ranks) or num_slots"
            )
