#!/usr/bin/env bash
# All tests that need a GPU: those of one process, beside them those of faults, which run jobs of their own, and then those of an MPI
# job (a GPU per rank, or its ranks on one GPU).
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

# Tests of one process side by side, where pytest-xdist is installed: most of their time goes to compiling and to the oracles.
workers=()
if "$python" -c "import xdist" 2>/dev/null; then
    cores=$(nproc)
    workers=(-n "$((cores < 16 ? (cores + 1) / 2 : 12))")
fi

logs=$(mktemp -d "${TMPDIR:-/tmp}/pipemoe_test.XXXXXX")
faults=$(mktemp "${TMPDIR:-/tmp}/pipemoe_faults.XXXXXX")
trap 'rm -rf "$logs" "$faults"' EXIT
failed=()

"$python" -m pytest -q tests/faults >"$faults" 2>&1 &
faults_pid=$!

echo "== one process"
"$python" -m pytest -q -m "gpu and not mpi" "${workers[@]}" || failed+=("one process")

echo "== faults"
wait "$faults_pid" || failed+=("faults")
cat "$faults"

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
