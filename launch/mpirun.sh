#!/usr/bin/env bash
# Runs a Python script or module on N ranks, with Open MPI or MPICH, whichever mpi4py was built for.
#
#   launch/mpirun.sh -n N [--hostfile FILE] script.py [arguments]
#   launch/mpirun.sh -n N [--hostfile FILE] -m module [arguments]
#
#   PIPEMOE_PYTHON        the Python to run (else the checkout's .venv, else python3)
#   PIPEMOE_MPIRUN        the mpirun to use (else the one beside that Python, else the one on PATH)
#   PIPEMOE_MPIRUN_FLAGS  more flags for mpirun, split at blanks
#
# GPUs are not assigned here: all ranks see all GPUs of their host and pipemoe.init() takes the one of its local rank
# (local rank modulo number of GPUs). A CUDA_VISIBLE_DEVICES per rank would hide the peers' GPUs from one another.
set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/environment.sh
. "$launch/environment.sh"

usage() {
    echo "usage: launch/mpirun.sh -n N [--hostfile FILE] (script.py | -m module) [arguments]" >&2
    exit 2
}

export PIPEMOE_COMMAND=${PIPEMOE_COMMAND:-"launch/mpirun.sh$(printf ' %q' "$@")"}

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

# A share of the cores per rank: numerical libraries would otherwise start a thread per core in every rank.
# (nproc obeys OMP_NUM_THREADS, so it is asked without.)
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
# A kernel loaded at its first launch may wait for all that runs, also for a collective that waits for it.
export CUDA_MODULE_LOADING=${CUDA_MODULE_LOADING:-EAGER}
# NCCL's implicit order over communicators would tie a short cohort to a long one.
export NCCL_LAUNCH_ORDER_IMPLICIT=${NCCL_LAUNCH_ORDER_IMPLICIT:-0}

flags=(-n "$num_ranks")
version=$("$mpirun" --version 2>&1 || true)
case $version in
*"Open MPI"* | *OpenRTE* | *PRRTE*)
    flags+=(--oversubscribe --bind-to none)
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
    [ -z "$hostfile" ] || flags+=(--hostfile "$hostfile")
    # Ranks that share a core must give it away while they wait.
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

# mpi4py's runner turns an exception on one rank into the end of all; without it the others would wait for ever.
exec "$mpirun" "${flags[@]}" ${more_flags[@]+"${more_flags[@]}"} "$launch/rank.sh" "$python" -m mpi4py "$@"
