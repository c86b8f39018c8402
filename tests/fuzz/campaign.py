"""Many cases: jobs one after another, a new one behind each case that the ranks could not go on after.

python -m tests.fuzz.campaign --ranks 2 --cases 5000 --seed 1     # prints each failure as it comes, then the counts
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 300  # ranks start, import, and on a new machine compile
_LAST_LINES = 12


@dataclass
class Tally:
    """What became of the cases."""

    num_cases: int = 0
    became: Counter = field(default_factory=Counter)  # (api, "success" or "error") -> number
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        apis = sorted({api for api, _ in self.became})
        rows = [f"{'call':<40} {'success':>8} {'error':>8}"]
        rows += [f"{api:<40} {self.became[api, 'success']:>8} {self.became[api, 'error']:>8}" for api in apis]
        return "\n".join([*rows, f"{self.num_cases} cases, {len(self.failures)} failures"])


def run(
    num_ranks: int,
    num_cases: int,
    *,
    seed: int,
    section: str = "api",
    seconds: float = 120.0,
    most_failures: int = 10**9,
    say: bool = False,
) -> Tally:
    """Runs cases 0 to `num_cases` - 1 of `seed`, until so many have failed."""
    tally, first = Tally(), 0
    while first < num_cases and len(tally.failures) < most_failures:
        before = len(tally.failures)
        first = _one_job(tally, num_ranks, first, num_cases - first, seed, section, seconds)
        if say:
            print(*tally.failures[before:], sep="\n", flush=True)
    return tally


def _one_job(tally: Tally, num_ranks: int, first: int, num_cases: int, seed: int, section: str, seconds: float) -> int:
    """Runs one job as far as it goes; returns the number of the case after its last."""
    folder = Path(tempfile.mkdtemp(prefix="pipemoe_fuzz."))
    arguments = [
        "tests/fuzz/job.py",
        "--seed",
        seed,
        "--first",
        first,
        "--cases",
        num_cases,
        "--section",
        section,
        "--seconds",
        seconds,
        "--folder",
        folder,
    ]
    launcher = [sys.executable] if num_ranks == 1 else ["launch/mpirun.sh", "-n", num_ranks]
    environment = {**os.environ, "PIPEMOE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, [*launcher, *arguments])),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        # Hangs are the ranks' own affair: they end by their clocks. This is for the case that those fail too.
        output, _ = process.communicate(timeout=_START_SECONDS + 5 * seconds + 2 * num_cases)
        how = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, how = process.communicate()[0], "had to be killed"
    records = [list(map(json.loads, path.read_text().splitlines())) for path in sorted(folder.glob("rank*.jsonl"))]
    shutil.rmtree(folder)
    done = {r["case"]: r for r in (records[0] if records else []) if "done" in r}
    tally.num_cases += len(done)
    tally.became.update((r["api"], r["became"]) for r in done.values())
    tally.failures += [line for line in output.splitlines() if line.startswith("FAILED ")]
    begun = max((r["case"] for of_rank in records for r in of_rank), default=first)
    again = f"{' '.join(map(str, launcher))} tests/fuzz/job.py"
    last = " / ".join(output.splitlines()[-_LAST_LINES:])
    if begun not in done:  # the process ended inside it
        text = next(
            (r["text"] for of_rank in records for r in of_rank if r["case"] == begun and "text" in r), "before the call"
        )
        tally.num_cases += 1
        tally.failures.append(
            f"FAILED {again} --seed {seed} --case {begun} --section {section} | {text} | {how}: {last}"
        )
    elif begun == first + num_cases - 1 and process.returncode not in (0, 1, 3):
        tally.failures.append(
            f"FAILED {again} --seed {seed} --first {first} --cases {num_cases} --section {section} | {how}: {last}"
        )
    return begun + 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--section", choices=("api", "init"), default="api")
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    tally = run(
        options.ranks, options.cases, seed=options.seed, section=options.section, seconds=options.seconds, say=True
    )
    print(tally.table())
    sys.exit(min(len(tally.failures), 1))
