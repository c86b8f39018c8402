#!/usr/bin/env bash
# Runs a Python script or module on N ranks, with Open MPI or MPICH, whichever mpi4py was built for.
#
#   launch/mpirun.sh -n N [--hostfile FILE] script.py [arguments]
#   launch/mpirun.sh -n N [--hostfile FILE] -m module [arguments]
#
#   PIPEMOE_PYTHON        the Python to run (else the checkout's .venv, else python3)
#   PIPEMOE_MPIRUN        the mpirun to use (else the one beside that Python, else the one on PATH)
#   PIPEMOE_MPIRUN_FLAGS  more flags for mpirun, split at blanks
#   PIPEMOE_END_SECONDS   how long mpirun may take to end once a rank has ended with status 70 (default 60)
#
# Ends with status 70 if any rank did (the ranks could no longer work together), else with mpirun's own status. That says
# no more than "not 0": MPICH's and Intel's is the bitwise OR of the ranks' (3 and 5 give 7), and a rank may be ended for
# another's fault. Ranks report through a folder in TMPDIR (default /tmp), those of other hosts too if they share it. What
# MPI leaves in /dev/shm of this host when a job ends badly is removed, but only this job's own.
#
# GPUs are not assigned here: all ranks see all GPUs of their host and pipemoe.init() takes the one of its local rank
# (local rank modulo number of GPUs). A CUDA_VISIBLE_DEVICES per rank would hide the peers' GPUs from one another.
set -euo pipefail
launch=$(cd "$(dirname "$(realpath "$0")")" && pwd)
# shellcheck source=pipemoe/launch/environment.sh
. "$launch/environment.sh"

usage() {
    echo "usage: ${PIPEMOE_LAUNCHER:-launch/mpirun.sh} -n N [--hostfile FILE] (script.py | -m module) [arguments]" >&2
    exit 2
}

export PIPEMOE_COMMAND=${PIPEMOE_COMMAND:-"${PIPEMOE_LAUNCHER:-launch/mpirun.sh}$(printf ' %q' "$@")"}

num_ranks=
hostfile=
while [ $# -gt 0 ]; do
    case $1 in
    -n) num_ranks=${2:-} ;;
    --hostfile) hostfile=${2:-} ;;
    *) break ;;
    esac
    [ $# -ge 2 ] || usage
    shift 2
done
[[ $num_ranks =~ ^[1-9][0-9]*$ ]] || usage
case ${1:-} in
-m) [ $# -ge 2 ] || usage ;;
-* | "") usage ;;
esac

mpirun=${PIPEMOE_MPIRUN:-}
if [ -z "$mpirun" ]; then
    beside=$(dirname "$(command -v "$python")")/mpiexec
    if [ -x "$beside" ]; then
        mpirun=$beside
    else
        mpirun=$(command -v mpirun || command -v mpiexec) || {
            echo "mpirun.sh: no mpirun on PATH; install an MPI, or the wheel: pip install mpi4py mpich" >&2
            exit 1
        }
    fi
fi

# A share of the cores per rank: otherwise numerical libraries start a thread per core in every rank.
# (nproc obeys OMP_NUM_THREADS, so it is called without it.)
num_cores=$(env -u OMP_NUM_THREADS nproc)
num_hosts=1
if [ -n "$hostfile" ]; then
    num_hosts=$(grep -cvE '^[[:space:]]*(#|$)' "$hostfile") || {
        echo "mpirun.sh: no hosts in $hostfile" >&2
        exit 1
    }
fi
ranks_per_host=$(((num_ranks + num_hosts - 1) / num_hosts))
num_threads=$((num_cores / ranks_per_host))
[ "$num_threads" -ge 1 ] || num_threads=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$num_threads}
export NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-$OMP_NUM_THREADS}

# One hardware queue per stream of every cohort slot.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
# A kernel that is loaded at its first launch may wait for all that runs, even for a collective that waits for it.
export CUDA_MODULE_LOADING=${CUDA_MODULE_LOADING:-EAGER}
# NCCL's implicit order over communicators would tie a short cohort to a long one.
export NCCL_LAUNCH_ORDER_IMPLICIT=${NCCL_LAUNCH_ORDER_IMPLICIT:-0}

PIPEMOE_JOB_NOTES=$(mktemp -d "${TMPDIR:-/tmp}/pipemoe_job.XXXXXX")
export PIPEMOE_JOB_NOTES

# in_use FILE: has a process that we can see mapped it?
in_use() {
    grep -qsF -- "$1" /proc/[0-9]*/maps
}

# shellcheck disable=SC2317 # called by a trap
clean_up() {
    trap '' HUP INT TERM
    local segment tenths
    { cat "$PIPEMOE_JOB_NOTES"/segments.* 2>/dev/null || true; } | sort -u | while read -r segment; do
        [[ $segment == /dev/shm/* ]] || continue
        # Ranks that were killed may take a moment to be gone.
        for ((tenths = 0; tenths < 20; tenths++)); do
            [ -O "$segment" ] || break
            in_use "$segment" || { rm -f "$segment"; break; }
            sleep 0.1
        done
    done
    rm -rf "$PIPEMOE_JOB_NOTES"
}
trap clean_up EXIT

flags=(-n "$num_ranks")
version=$("$mpirun" --version 2>&1 || true)
case $version in
*"Open MPI"* | *OpenRTE* | *PRRTE*)
    flags+=(--oversubscribe --bind-to none)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
    [ -z "$hostfile" ] || flags+=(--hostfile "$hostfile")
    # Ranks that share a core must yield it while they wait.
    [ "$ranks_per_host" -le "$num_cores" ] || export OMPI_MCA_mpi_yield_when_idle=1
    # Open MPI hands only its own variables to other hosts.
    while read -r name; do
        flags+=(-x "$name")
    done < <(compgen -e | grep -E '^(PIPEMOE_|NCCL_|CUDA_|OMP_|NUMBA_|PYTHONPATH$|PATH$|LD_LIBRARY_PATH$|LD_PRELOAD$)')
    ;;
*HYDRA* | *MPICH* | *"Intel(R) MPI"*)
    [ -z "$hostfile" ] || flags+=(-f "$hostfile")
    ;;
*)
    echo "mpirun.sh: $mpirun is neither Open MPI nor MPICH: $(head -n 1 <<<"$version")" >&2
    exit 1
    ;;
esac
read -ra more_flags <<<"${PIPEMOE_MPIRUN_FLAGS:-}"

# Ends mpirun and the ranks of this host, stopped ones too, if mpirun does not end in time after a rank has given up.
# Without `sleep`: a process of its own would outlive this one and hold its output open.
end_late() {
    local never left=$end_seconds rank
    exec {never}<> <(:)
    while kill -0 $$ 2>/dev/null && [ "$left" -gt 0 ]; do
        read -rt 1 -u "$never" || true
        ! compgen -G "$PIPEMOE_JOB_NOTES/exit70.*" >/dev/null || left=$((left - 1))
    done
    [ "$left" = 0 ] || return 0
    echo "mpirun.sh: a rank ended with status 70 $end_seconds s ago, but $mpirun still runs: killing it and all ranks" >&2
    for rank in "$PIPEMOE_JOB_NOTES"/segments.*; do
        rank=${rank##*.}
        ! grep -qsF "$PIPEMOE_JOB_NOTES" "/proc/$rank/environ" || kill -KILL "$rank" 2>/dev/null || true
    done
    kill -KILL "$mpirun_pid" 2>/dev/null || true
}
end_seconds=${PIPEMOE_END_SECONDS:-60}
[[ $end_seconds =~ ^[1-9][0-9]*$ ]] || {
    echo "mpirun.sh: PIPEMOE_END_SECONDS is '$end_seconds'; it must be a number of seconds, 1 or more" >&2
    exit 2
}

mpirun_pid=
stopped=
# shellcheck disable=SC2317 # called by a trap
stop() {
    stopped=yes
    [ -z "$mpirun_pid" ] || kill -TERM "$mpirun_pid" 2>/dev/null || true
}
trap stop HUP INT TERM

# In the background, because bash runs traps only between foreground commands. A background command loses its input and
# ignores an interrupt from the keyboard: both are given back. It also ends if this script is killed.
as_if_in_front=()
! env --default-signal=INT,QUIT true 2>/dev/null || as_if_in_front+=(env --default-signal=INT,QUIT)
! setpriv --pdeathsig KILL true 2>/dev/null || as_if_in_front+=(setpriv --pdeathsig KILL)

# With mpi4py's runner an exception on one rank ends all; otherwise the others would wait for ever.
command=("$mpirun" "${flags[@]}" ${more_flags[@]+"${more_flags[@]}"} bash "$launch/rank.sh" "$python" -m mpi4py "$@")
${as_if_in_front[@]+"${as_if_in_front[@]}"} "${command[@]}" <&0 &
mpirun_pid=$!
[ -z "$stopped" ] || kill -TERM "$mpirun_pid" 2>/dev/null || true
end_late <&- &
late=$!
wait "$mpirun_pid" && status=0 || status=$?
if [ -n "$stopped" ]; then
    for ((tenths = 0; tenths < 100; tenths++)); do
        kill -0 "$mpirun_pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$mpirun_pid" 2>/dev/null || true
    wait "$mpirun_pid" 2>/dev/null && status=0 || status=$?
fi
{ kill "$late" && wait "$late"; } 2>/dev/null || true
if compgen -G "$PIPEMOE_JOB_NOTES/exit70.*" >/dev/null; then
    status=70
fi
exit "$status"
