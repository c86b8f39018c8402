#!/usr/bin/env bash
# All tests that need no GPU, those of one process and those of an MPI job on 1 to 4 ranks, and a check of format and
# types: parts in three rows on two cores, as those that kill and stop ranks mostly wait.
# Makes and fills .venv first where that is not done. Says which part failed, and exits nonzero then.
#
#   launch/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh
export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# In each process, pytest would look through all installed packages for plugins, for as long as torch takes to import.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=_hypothesis_pytestplugin

logs=$(mktemp -d "${TMPDIR:-/tmp}/pipemoe_test.XXXXXX")
rows=()

# shellcheck disable=SC2317 # called by a trap
stop() {
    [ ${#rows[@]} = 0 ] || kill -- "${rows[@]/#/-}" 2>/dev/null || true
    rm -rf "$logs"
}
trap stop EXIT
trap 'exit 130' HUP INT TERM
set -m # a row is a process group, which ends as one, and heeds an interrupt

# part NAME COMMAND...: runs it and shows what it printed, all at once, when it is done
part() {
    local name=$1 log=$logs/$1.log begin=$SECONDS verdict=passed
    shift
    "$@" >"$log.all" 2>&1 || verdict=FAILED
    [ "$verdict" = passed ] || echo "$name" >>"$logs/failed"
    { echo "== $name: $verdict, $((SECONDS - begin)) s"; cat "$log.all"; } >"$log"
    cat "$log"
}

# .venv has both checkers; a Python of the caller's own (PIPEMOE_PYTHON) need not have them.
format_and_types() {
    if ! "$python" -c 'import mypy, ruff' 2>/dev/null; then
        echo "skipped: $python lacks ruff or mypy; to run this part, install them as in constraints.txt"
        return
    fi
    "$python" -m ruff format --check . && "$python" -m ruff check . && "$python" -m mypy pipemoe
}

# The same random cases in every run: what fails here fails again. A test that hangs says where, and ends its part.
one_process() {
    "$python" -m pytest -q -m "not mpi and not gpu and not slow" -p no:cacheprovider --hypothesis-seed=0 \
        -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true "$@"
}

# All ranks must draw the same random cases, and must not share a cache folder. Files without tests of ranks are not even
# imported: on every rank, that takes as long as all else.
on_ranks() {
    local num_ranks=$1 rank_logs=$logs/ranks$1 files
    shift
    mkdir -p "$rank_logs"
    mapfile -t files < <(grep -rlE 'mark\.mpi\b' --include='test_*.py' "$@" | sort)
    PIPEMOE_RANK_LOGS=$rank_logs timeout --foreground --kill-after=20 600 launch/mpirun.sh -n "$num_ranks" \
        -m pytest -q -m "mpi and not gpu and not slow" -p no:cacheprovider --hypothesis-seed=0 "${files[@]}" && return
    tail -n 60 "$rank_logs"/rank*.log 2>/dev/null
    return 1
}

# What depends on how many ranks there are. Models and callers run on 1 and 3 ranks, benchmarks on 2; of them, the one
# with all modes on 1 as well.
by_ranks=(tests/comm tests/runtime tests/world tests/test_layer.py tests/test_layer_fp8.py)
mapfile -t without_benchmarks < <(find tests -mindepth 1 -maxdepth 1 ! -name benchmarks ! -name '__*' | sort)

echo "== running; the first part is done in a minute or two"
{
    part "plan" one_process tests/plan # first: what it compiles, half a minute, the others find in the cache
    part "one process" one_process --ignore=tests/kernels --ignore=tests/plan --ignore=tests/faults tests
} </dev/null &
rows+=($!)
{
    part "kernels" one_process tests/kernels
    part "3 ranks" on_ranks 3 "${without_benchmarks[@]}"
    # over MPI; the others share memory
    PIPEMOE_HOST_TRANSPORT=mpi part "2 ranks" on_ranks 2 "${by_ranks[@]}" tests/benchmarks
} </dev/null &
rows+=($!)
{
    part "format and types" format_and_types
    # first those that plan nothing: the planner is being compiled
    part "faults" one_process tests/faults/test_l*.py tests/faults/test_[!l]*.py
    part "4 ranks" on_ranks 4 "${by_ranks[@]}"
    part "1 rank" on_ranks 1 "${without_benchmarks[@]}" tests/benchmarks/ttft
    PIPEMOE_HOST_TRANSPORT=mpi part "4 ranks over MPI" on_ranks 4 tests/comm/test_transport.py tests/runtime/test_no_barrier.py
} </dev/null &
rows+=($!)
for row in "${rows[@]}"; do
    wait "$row" || echo "a row of parts: it broke off" >>"$logs/failed"
done
rows=()

if [ -e "$logs/failed" ]; then
    sed 's/^/FAILED: /' "$logs/failed"
    exit 1
fi
echo "all tests passed"
