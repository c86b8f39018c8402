#!/usr/bin/env bash
# N ranks on this host's GPUs: a GPU each where there are as many, all on one otherwise.
#
#   launch/gpu_ranks.sh N (script.py | -m module) [arguments]
#
# See launch/mpirun.sh and launch/one_gpu.sh, one of which it becomes, for the variables that they obey.
set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/environment.sh
. "$launch/environment.sh"

num_ranks=${1:-}
if ! [[ $num_ranks =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
    echo "usage: launch/gpu_ranks.sh N (script.py | -m module) [arguments]" >&2
    exit 2
fi
shift
if [ "$(num_gpus)" -ge "$num_ranks" ]; then
    exec "$launch/mpirun.sh" -n "$num_ranks" "$@"
fi
exec "$launch/one_gpu.sh" "$num_ranks" "$@"
