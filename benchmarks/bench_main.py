"""How a benchmark starts and ends on all ranks: options, world, errors, exit status. Only rank 0 speaks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipemoe.errors import FatalError, PipemoeError
from pipemoe.output_path import check_output_file, check_output_folder

if TYPE_CHECKING:
    from pipemoe.world.world import World

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")  # as launch/rank.sh
BACKENDS = {"auto": "auto", "mpi": "cpu", "nccl": "cuda"}  # a device has one transport


def launched_rank() -> int:
    """This process's rank as its launcher says, before there is a world; 0 without a launcher."""
    return int(next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), 0))


class RankParser(argparse.ArgumentParser):
    """All ranks read the same bad options; only one complains. Options are written out, as for `pipemoe`."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | more)

    def _print_message(self, message: str, file: Any = None) -> None:
        if launched_rank() == 0:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # A launcher that sees one rank fail may end the others before rank 0 has spoken.
        super().exit(status if launched_rank() == 0 else 0, message)

    def add_device(self) -> None:
        """--device and --backend, two names for one choice, and --num-slots."""
        self.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
        )
        self.add_argument(
            "--backend",
            choices=tuple(BACKENDS),
            default="auto",
            help="the device's transport: mpi on cpu, nccl on cuda",
        )
        self.add_argument(
            "--num-slots", type=positive(int), help="cohorts under way at once (default: PIPEMOE_NUM_SLOTS, else 4)"
        )

    def add_output(self, name: str) -> None:
        """--out, a folder of this benchmark's name, and --json."""
        output = self.add_argument_group("output")
        output.add_argument(
            "--out",
            type=Path,
            default=Path("out") / name,
            metavar="DIR",
            help="for results, pictures and timelines (default: %(default)s)",
        )
        output.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")

    def device_of(self, options: argparse.Namespace) -> str:
        """The device for pipemoe.init."""
        named = {options.device, BACKENDS[options.backend]} - {"auto"}
        if len(named) > 1:
            self.error(
                f"--backend {options.backend} is the transport of {BACKENDS[options.backend]}, not of --device "
                f"{options.device}"
            )
        return named.pop() if named else "auto"


def check_output(options: argparse.Namespace) -> None:
    """Can the results be written where `add_output`'s options say? For the rank that writes. Raises InputError."""
    check_output_folder("--out", options.out)
    if options.json:
        check_output_file("--json", options.json, may_make_folder=True)


def positive(kind: type) -> Callable[[str], Any]:
    """The type of an option that takes a positive number."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # what argparse calls it
    return parse


def run_on_ranks(name: str, run: Callable[[World], int], *, device: str, num_slots: int | None) -> int:
    """Start the world, run, and let all ranks leave together. Returns the exit status.

    Errors of pipemoe that end no rank are raised on all of them; rank 0 then prints one line, and the status is 2.
    """
    import pipemoe

    try:
        world = pipemoe.init(device, num_slots=num_slots)
    except PipemoeError as error:
        return _complain(name, error, launched_rank())
    with world:
        try:
            status = run(world)
        except FatalError:
            raise
        except PipemoeError as error:
            status = _complain(name, error, world.rank)
        world.all_gather(b"", "end of the benchmark")  # rank 0 has written everything before any rank ends
    return status


def _complain(name: str, error: PipemoeError, rank: int) -> int:
    if rank == 0:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    return 2


class Progress:
    """Lines on rank 0's standard error about what is being done, and how far a long loop has come."""

    def __init__(self, rank: int, interval_s: float = 5.0) -> None:
        self._speaks, self._interval_s = rank == 0, interval_s
        self._begin = self._last = time.monotonic()

    def say(self, text: str) -> None:
        self._last = time.monotonic()
        if self._speaks:
            print(f"[{self._last - self._begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    def count(self, done: int, total: int, doing: str) -> None:
        """At most one line per interval."""
        if time.monotonic() - self._last >= self._interval_s:
            self.say(f"{doing}: {done} of {total} ({100 * done // total} %)")
