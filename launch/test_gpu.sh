#!/usr/bin/env bash
# All tests that need a GPU: those of one process, those of faults, which run jobs of their own, and those of an MPI job (a GPU per
# rank, or its ranks on one GPU).
#
#   launch/test_gpu.sh [ranks ...]      (default: 4, or as many as there are GPUs if several)
#
#   PIPEMOE_PYTHON  a Python with everything installed, instead of the checkout's .venv
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

gpus=$(num_gpus)
if [ "$gpus" = 0 ]; then
    echo "test_gpu.sh: no GPU (nvidia-smi -L lists none)" >&2
    exit 1
fi
[ $# -gt 0 ] || set -- "$((gpus > 1 ? gpus : 4))"

logs=$(mktemp -d "${TMPDIR:-/tmp}/pipemoe_test.XXXXXX")
trap 'rm -rf "$logs"' EXIT
failed=()

# part NAME WORKERS ARGUMENTS...: pytest, side by side where pytest-xdist is installed
part() {
    local name=$1 workers=$2
    shift 2
    "$python" -c "import xdist" 2>/dev/null || workers=0
    echo "== $name"
    if [ "$workers" -gt 0 ]; then set -- -n "$workers" "$@"; fi
    "$python" -m pytest -q "$@" || failed+=("$name")
}

# Most of their time goes to compiling and to the oracles.
cores=$(nproc)
part "one process" "$((cores < 16 ? (cores + 1) / 2 : 12))" -m "gpu and not mpi"
# Jobs of 2 and 3 ranks, whose watchdogs must not bite because they are too many: not beside other tests either.
part "faults" "$((cores / 4))" tests/faults

for num_ranks in "$@"; do
    echo "== MPI on $num_ranks ranks"
    rm -f "$logs"/*
    if ! PIPEMOE_RANK_LOGS=$logs timeout --kill-after=60 540 launch/gpu_ranks.sh "$num_ranks" \
        -m pytest -q -m mpi -p no:cacheprovider --hypothesis-seed=0 tests; then
        failed+=("MPI on $num_ranks ranks")
        tail -n 60 "$logs"/rank*.log 2>/dev/null || true
    fi
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all GPU tests passed"
