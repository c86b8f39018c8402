"""Room: thread blocks that may be spinning at once on a GPU, against the SMs they need."""

from __future__ import annotations

from dataclasses import dataclass

from pipemoe.errors import ConfigError
from pipemoe.plan.arrivals import INDEX_SMS


@dataclass(frozen=True, slots=True)
class Room:
    """Thread blocks that may be spinning at once, against the SMs they need.

    num_sms: how many this rank may use. ctas: NCCL_MAX_CTAS. ranks_on_device: how many ranks share this GPU. Their
    blocks may all lie on this rank's SMs: a share under MPS says how many SMs, not which. arrival_blocks: grid of the
    experts that wait for rows, in plans with arrivals. cluster_blocks: NCCL_CGA_CLUSTER_SIZE.

    A spinning collective of 640 threads takes nearly all registers of its SM. What it waits for is computed by kernels
    that need whole SMs, some of them two neighbouring ones (thread-block clusters). So spinning blocks may fill only
    half of the SMs. On a GPU that a rank has for itself it is one block fewer, as experts may run in pairs of blocks
    there: wherever the spinning blocks lie, two neighbouring SMs are free.

    Experts that wait for rows may fill all other SMs. Nothing that produces their rows needs this rank's SMs: in a plan
    of one slot, a rank has attended to and packed all that it sends before it waits. Only what brings the rows needs
    room: one slot's collectives, and the kernel that indexes arrived rows. Each of their blocks takes a whole SM,
    wherever one is free; a cluster of blocks could not.
    """

    num_sms: int
    ctas: int
    ranks_on_device: int = 1
    arrival_blocks: int = 0
    cluster_blocks: int = 0

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

    @property
    def kept_from_arrivals(self) -> int:
        """SMs that waiting experts leave to the collectives of one slot. They leave INDEX_SMS besides."""
        return 2 * self.ctas

    def check_arrivals(self) -> None:
        """Raise ConfigError unless experts may wait for rows on `arrival_blocks` SMs."""
        if self.ranks_on_device > 1:
            raise ConfigError(
                f"no arrivals: {self.ranks_on_device} ranks share this GPU, and experts that wait on one could take "
                "the SMs of the others"
            )
        if self.cluster_blocks > 1:
            raise ConfigError(
                f"no arrivals: NCCL_CGA_CLUSTER_SIZE is {self.cluster_blocks}, but so many neighbouring SMs may "
                "never be free; set it to 0"
            )
        needed = self.arrival_blocks + self.kept_from_arrivals + INDEX_SMS
        if needed > self.num_sms:
            raise ConfigError(
                f"no arrivals: {self.arrival_blocks} blocks that wait for rows, 2 x NCCL_MAX_CTAS={self.ctas} of "
                f"collectives and {INDEX_SMS}"
                f" for the index need {needed} SMs, of which there are {self.num_sms}; lower NCCL_MAX_CTAS"
            )
