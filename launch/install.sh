#!/usr/bin/env bash
# Makes the checkout's .venv and installs pipemoe with what this machine needs, unless that is done already.
#
#   launch/install.sh
#
#   PIPEMOE_PYTHON       a Python to use as it is: nothing is installed
#   PIPEMOE_TORCH_INDEX  a package index to take torch from (PyTorch's CPU index spares a machine without GPU the
#                        CUDA libraries; a machine whose driver is older than 580 needs the index of a CUDA 12 build)
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${PIPEMOE_PYTHON:-}" ]; then
    exit 0
fi

# cuda_extra: the extra that this machine's driver can run; nothing without a GPU.
cuda_extra() {
    local driver
    driver=$({ nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || true; } | head -n 1)
    driver=${driver%%.*}
    [[ $driver =~ ^[0-9]+$ ]] || return 0
    if [ "$driver" -ge 580 ]; then
        echo cuda13
    elif [ "$driver" -ge 525 ]; then
        echo cuda12
    else
        echo "install.sh: the NVIDIA driver is version $driver; CUDA 12 needs 525 or newer: installing for the host only" >&2
    fi
}

cuda=$(cuda_extra)
extras="models,bench,test,docs,${cuda:-compiler}"

# An installed MPI is used by mpi4py (it knows the cluster's network); the wheel is for machines without one.
if command -v mpirun >/dev/null && [ "$(command -v mpirun)" != "$PWD/.venv/bin/mpirun" ]; then
    system_mpi=yes
else
    system_mpi=no
    extras="$extras,mpi"
fi

stamp=.venv/pipemoe_installed
# The path belongs to the stamp: a .venv does not survive being moved.
wanted=$({ cat setup.cfg pyproject.toml constraints.txt launch/install.sh; echo "$extras $PWD"; } | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

if [ ! -x .venv/bin/python ]; then
    base=
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "install.sh: no Python 3.11 or newer on PATH" >&2
        exit 1
    fi
    echo "install.sh: making .venv with $("$base" --version)"
    if ! "$base" -m venv .venv; then
        rm -rf .venv
        echo "install.sh: $base cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)" >&2
        exit 1
    fi
fi

install() {
    .venv/bin/python -m pip install -qq --disable-pip-version-check --progress-bar off -c constraints.txt "$@"
}

echo "install.sh: installing torch"
install ${PIPEMOE_TORCH_INDEX:+--index-url "$PIPEMOE_TORCH_INDEX"} torch
echo "install.sh: installing pipemoe[$extras]"
install -e ".[$extras]"

if [ "$system_mpi" = yes ]; then
    install mpi4py
    if ! .venv/bin/python -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI' 2>/dev/null; then
        echo "install.sh: mpi4py cannot load the MPI of $(command -v mpirun): installing the mpich wheel"
        install mpich
    fi
fi

echo "$wanted" >"$stamp"
