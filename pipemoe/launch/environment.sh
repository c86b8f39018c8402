# shellcheck shell=bash disable=SC2034
# Sourced by the launchers: where the package is, in a checkout or installed, and which Python runs it.
#   PIPEMOE_PYTHON  a Python to use as it is, instead of the checkout's .venv

root=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../.." && pwd)

if [ -n "${PIPEMOE_PYTHON:-}" ]; then
    python=$PIPEMOE_PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=python3
fi

# mpirun may start the ranks with another PATH.
python=$(command -v "$python") || {
    echo "no Python: $python" >&2
    exit 1
}

# A checkout runs without being installed.
if [ -d "$root/kernels/pipemoe_kernels" ]; then
    export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
fi

# num_gpus: how many NVIDIA GPUs this machine has (0 without a working driver).
num_gpus() {
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
}

# gpu_name: the first GPU's short name as results are filed under, such as h100.
gpu_name() {
    nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr '[:upper:]' '[:lower:]' | grep -oE '[a-z]+[0-9]+[a-z]*' | head -n 1
}

# gpu_gib: the first GPU's memory, in whole GiB.
gpu_gib() {
    echo $(($(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1) / 1024))
}
