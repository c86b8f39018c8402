"""The `pipemoe` command."""

from __future__ import annotations

import argparse
import errno
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any

from pipemoe import launch
from pipemoe.errors import FatalError, PipemoeError
from pipemoe.models_command import add_models_parser
from pipemoe.plan_command import add_plan_parser
from pipemoe.report.command import add_report_parser
from pipemoe.tune.command import add_tune_parser
from pipemoe.version import __version__
from pipemoe.world.uncaught import say_once

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


class _Parser(argparse.ArgumentParser):
    """Options are written out: an abbreviation would change its meaning with the next option that begins like it."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | more)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status of the process."""
    parser = _Parser(prog="pipemoe", description="Mixture-of-experts prefill without a barrier.")
    parser.add_argument("--version", action="version", version=f"pipemoe {__version__}")
    subcommands = parser.add_subparsers(dest="subcommand", required=True)

    doctor = subcommands.add_parser(
        "doctor",
        help="say what is wrong with this machine",
        description="Checks what pipemoe needs on this machine. Exit status 1 when something must be mended.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    doctor.add_argument("--slots", type=_positive, default=4, help="cohort slots that need room (default %(default)s)")
    doctor.add_argument(
        "--ranks-per-gpu", type=_positive, default=1, help="ranks that share a GPU (default %(default)s)"
    )

    doctor.set_defaults(run=_doctor)
    add_plan_parser(subcommands, _positive)
    add_tune_parser(subcommands, _positive)
    add_report_parser(subcommands)
    add_models_parser(subcommands)
    subcommands.add_parser("run", help="run a script or module on several ranks", add_help=False)

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:  # what follows is the launcher's, and the script's
        return launch.run(arguments[1:])
    options = parser.parse_args(_negative_values_joined(arguments))
    try:
        status = options.run(options)
        if sys.stdout:  # it may be closed
            sys.stdout.flush()
        return status
    except FatalError:
        raise
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        _drop_output()
        return 128 + signal.SIGPIPE  # as other commands that a pipe ends
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(
            f"pipemoe {options.subcommand}: {error.filename or 'output'}: {error.strerror}; what was printed is not "
            "complete",
            file=sys.stderr,
        )
        _drop_output()
        return 2
    except PipemoeError as error:
        say_once(error, f"pipemoe {options.subcommand}: {error}")
        return 2


def _negative_values_joined(arguments: Sequence[str]) -> list[str]:
    """ "--rank-tokens", "-5,3" as "--rank-tokens=-5,3": argparse takes the second for an option, and would say that a
    value is missing.
    """
    joined: list[str] = []
    for argument in arguments:
        if joined and re.match(r"-\d", argument) and re.fullmatch(r"--[\w-]+", joined[-1]):
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def _drop_output() -> None:
    """Nothing more can be written: also not what Python flushes when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_has_gone() -> bool:
    """Is nobody left who reads standard output, as in `pipemoe plan ... | head`?"""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _doctor(options: argparse.Namespace) -> int:
    from pipemoe.doctor import examine, report

    findings = examine(num_slots=options.slots, ranks_per_gpu=options.ranks_per_gpu)
    print(report(findings, as_json=options.json))
    return int(any(finding.status == "FAIL" for finding in findings))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
