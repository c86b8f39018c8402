#!/usr/bin/env bash
# From nothing to a table of times to first token: installs what this machine needs into .venv and runs the main job,
# on 4 ranks on the CPU, on all GPUs where there are several, or on 4 ranks of one GPU.
#
#   launch/quickstart.sh [arguments of benchmarks/ttft]
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

num_gpus=$(num_gpus)
if [ "$num_gpus" -gt 1 ]; then
    exec launch/mpirun.sh -n "$num_gpus" benchmarks/ttft "$@"
elif [ "$num_gpus" = 1 ] && command -v nvidia-cuda-mps-control >/dev/null; then
    exec launch/one_gpu.sh 4 benchmarks/ttft "$@"
elif [ "$num_gpus" = 1 ]; then
    echo "quickstart.sh: no nvidia-cuda-mps-control, so only one rank on the one GPU" >&2
    exec launch/mpirun.sh -n 1 benchmarks/ttft "$@"
else
    exec launch/mpirun.sh -n 4 benchmarks/ttft "$@"
fi
