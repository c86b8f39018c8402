#!/usr/bin/env bash
# All tests that need a GPU: those of one process, then those of an MPI job (a GPU per rank, or all ranks on one GPU), and
# beside them those of faults, which run jobs of their own.
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

# Side by side, where pytest-xdist is installed: most of their time goes to compiling, to the oracles, and to starting.
cores=$(nproc)
many=() threads=$cores
if "$python" -c "import xdist" 2>/dev/null; then
    many=(-n "$((cores < 16 ? (cores + 1) / 2 : 12))")
    threads=1 # of each: more than there are cores only hold one another up
fi

logs=$(mktemp -d "${TMPDIR:-/tmp}/pipemoe_test.XXXXXX")
faults=$(mktemp "${TMPDIR:-/tmp}/pipemoe_faults.XXXXXX")
faults_pid=
# shellcheck disable=SC2317 # called by a trap
clean_up() {
    [ -z "$faults_pid" ] || kill -TERM -- "-$faults_pid" 2>/dev/null || true
    rm -rf "$logs" "$faults"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM
failed=()

echo "== one process"
OMP_NUM_THREADS=$threads "$python" -m pytest -q -m "gpu and not mpi" "${many[@]}" || failed+=("one process")

# One job of faults at a time: on one GPU the hardware queues are enough for two jobs of four ranks (see one_gpu.sh), and
# a third one's ranks fail in their first CUDA call, with "out of memory".
set -m # a process group of its own, which can be ended, and does not ignore the interrupt as background jobs else do
"$python" -m pytest -q tests/faults >"$faults" 2>&1 </dev/null &
faults_pid=$!
set +m

for num_ranks in "$@"; do
    echo "== MPI on $num_ranks ranks"
    rm -f "$logs"/*
    if ! PIPEMOE_RANK_LOGS=$logs timeout --kill-after=60 540 launch/gpu_ranks.sh "$num_ranks" \
        -m pytest -q -m "mpi and not slow" -p no:cacheprovider --hypothesis-seed=0 tests; then
        failed+=("MPI on $num_ranks ranks")
        tail -n 60 "$logs"/rank*.log 2>/dev/null || true
    fi
done

echo "== faults"
wait "$faults_pid" || failed+=("faults")
faults_pid=
cat "$faults"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all GPU tests passed"
