"""What survivors do when a rank is killed or stopped in the middle of a step, and the launcher does not clean up.

    python benchmarks/faults.py 8 --json results.json

Ranks run tests/faults/ranks.py, on a GPU each if there are enough, else together on one, or on the CPU. Per fault:
seconds from the signal until every survivor's process has ended (the row has the watchdog's time), and what they said.
The last line of stdout is the results as one JSON document (results_schema.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.bench_main import positive  # noqa: E402
from benchmarks.results_schema import print_results, results_document, write_results  # noqa: E402
from tests.faults.job import FaultJob  # noqa: E402
from tests.faults.ranks import SIGNALS, WATCHDOG_SECONDS  # noqa: E402


def measure(fault: str, num_ranks: int) -> dict[str, Any]:
    """One job, one fault: a row."""
    with TemporaryDirectory(prefix="pipemoe_fault_") as folder:
        job = FaultJob(fault, num_ranks, Path(folder))
        seconds = job.seconds_to_end()
        job.wait()
        left, reasons = len(job.left_behind()), job.reasons()
    row = {
        "fault": fault,
        "num_ranks": num_ranks,
        "watchdog_s": WATCHDOG_SECONDS,
        "last_survivor_ended_s": round(max(seconds), 3),
    }
    return row | {"left_behind": left, "message": reasons[0] if reasons else None, "survivors_ended_s": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="How survivors end when a rank is lost.")
    parser.add_argument("num_ranks", type=positive(int), help="2 or more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    options = parser.parse_args(arguments)
    if options.num_ranks < 2:
        parser.error("with one rank nobody survives")
    rows = []
    for fault in SIGNALS:
        rows.append(measure(fault, options.num_ranks))
        print(
            f"{fault}: survivors ended after {rows[-1]['last_survivor_ended_s']} s: {rows[-1]['message']}", flush=True
        )
    document = results_document("faults", rows)
    if options.json:
        write_results(document, options.json)
    print_results(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
