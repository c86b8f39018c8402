#!/usr/bin/env bash
# N ranks on this host's GPUs: a GPU each if there are enough, else all on one.
#
#   launch/gpu_ranks.sh N (script.py | -m module) [arguments]
#
# It becomes launch/mpirun.sh or launch/one_gpu.sh: see there for the variables that they obey.
set -euo pipefail
launch=$(cd "$(dirname "$(realpath "$0")")" && pwd)
# shellcheck source=pipemoe/launch/environment.sh
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
