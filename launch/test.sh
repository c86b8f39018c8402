#!/usr/bin/env bash
# All tests that need no GPU: first those of one process, then those of an MPI job, on 1 to 4 ranks.
# Makes and fills .venv first where that is not done. Exits nonzero when anything fails.
#
#   launch/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

logs=$(mktemp -d "${TMPDIR:-/tmp}/pipemoe_test.XXXXXX")
trap 'rm -rf "$logs"' EXIT
failed=()

echo "== one process"
"$python" -m pytest -q -m "not mpi and not gpu" || failed+=("one process")

for num_ranks in 1 2 3 4; do
    echo "== MPI, ranks: $num_ranks"
    rm -f "$logs"/*
    # All ranks must draw the same random cases, and must not share a cache folder.
    if ! PIPEMOE_RANK_LOGS=$logs timeout --kill-after=20 400 launch/mpirun.sh -n "$num_ranks" \
        -m pytest -q -m "mpi and not gpu" -p no:cacheprovider --hypothesis-seed=0 tests; then
        failed+=("MPI on $num_ranks ranks")
        tail -n 60 "$logs"/rank*.log 2>/dev/null || true
    fi
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all tests passed"
