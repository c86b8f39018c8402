#!/usr/bin/env bash
# N ranks on one GPU, over real NCCL: a whole node in one GPU, for development and tests.
#
#   launch/one_gpu.sh N (script.py | -m module) [arguments]
#
# Starts a private MPS, so that the ranks' kernels run beside one another, and always ends it. Exits with the command's
# status.
#   PIPEMOE_NUM_SLOTS                    cohort slots (default 2; with more than 8 ranks 1)
#   NCCL_MAX_CTAS                        thread blocks of a collective (default: what fits, at most 4)
#   CUDA_MPS_ACTIVE_THREAD_PERCENTAGE    share of the GPU of each rank (default 100 / N; with more than 4 ranks 100)
#   CUDA_DEVICE_MAX_CONNECTIONS          hardware queues of each rank (default: 5 for each slot, and 2)
#   CUDA_VISIBLE_DEVICES                 which GPU (default: the first)
#   LD_PRELOAD                           another libnccl.so.2
set -euo pipefail
launch=$(cd "$(dirname "$(realpath "$0")")" && pwd)
# shellcheck source=pipemoe/launch/environment.sh
. "$launch/environment.sh"

num_ranks=${1:-}
if ! [[ $num_ranks =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
    echo "usage: ${PIPEMOE_LAUNCHER:-launch/one_gpu.sh} N (script.py | -m module) [arguments]" >&2
    exit 2
fi
export PIPEMOE_COMMAND=${PIPEMOE_COMMAND:-"${PIPEMOE_LAUNCHER:-launch/one_gpu.sh}$(printf ' %q' "$@")"}
shift

fail() {
    echo "one_gpu.sh: $*" >&2
    exit 1
}

[ "$(num_gpus)" -ge 1 ] || fail "no GPU (nvidia-smi -L lists none)"
command -v nvidia-cuda-mps-control >/dev/null || fail "no nvidia-cuda-mps-control on PATH (it comes with the driver)"

# A GPU's UUID means the same to MPS and to its clients; an index does not.
if [ "$(num_gpus)" -gt 1 ]; then
    first=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=$(nvidia-smi -i "${first%%,*}" --query-gpu=uuid --format=csv,noheader)
    export CUDA_VISIBLE_DEVICES
fi

# The NCCL that pipemoe will use: torch comes first and may bring its own.
facts=$("$python" -c '
import torch
from cupy.cuda import nccl
print(nccl.get_version(), torch.cuda.get_device_properties(0).multi_processor_count)
') || fail "$python cannot load torch and NCCL through cupy (see: pipemoe doctor)"
read -r nccl_version num_sms <<<"$facts"

# MPS limits the hardware queues of all ranks together: 96 work; with 128 a rank's first CUDA call fails. A slot needs
# five: three lanes, and a stream of NCCL's own for each of its two communicators.
export PIPEMOE_NUM_SLOTS=${PIPEMOE_NUM_SLOTS:-$((num_ranks <= 8 ? 2 : 1))}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-$((5 * PIPEMOE_NUM_SLOTS + 2))}

# With 8 ranks of 12 % each there is no room for even one block per collective; with the whole GPU for each there is.
export CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=${CUDA_MPS_ACTIVE_THREAD_PERCENTAGE:-$((num_ranks <= 4 ? 100 / num_ranks : 100))}

# Room for thread blocks: dispatch and combine of every slot of every rank may spin at once. A share says on how many SMs
# a rank may run, not on which, so all may spin on this rank's; they must leave it half.
share=$((num_sms * CUDA_MPS_ACTIVE_THREAD_PERCENTAGE / 100 - 1)) # MPS rounds down
fits=$((share / 2 / (2 * PIPEMOE_NUM_SLOTS * num_ranks)))
needed="$num_ranks ranks x 2 x $PIPEMOE_NUM_SLOTS slots"
[ "$fits" -ge 1 ] || fail "$needed need more thread blocks than half of a rank's $share SMs: fewer ranks, a larger share, or fewer slots"
max_ctas=${NCCL_MAX_CTAS:-$((fits < 4 ? fits : 4))}
[ "$max_ctas" -le "$fits" ] || fail "$needed x NCCL_MAX_CTAS=$max_ctas exceeds half of a rank's $share SMs: at most $fits"
export NCCL_MAX_CTAS=$max_ctas
queues=$((num_ranks * CUDA_DEVICE_MAX_CONNECTIONS))
[ "$queues" -lt 128 ] || fail "$num_ranks ranks x CUDA_DEVICE_MAX_CONNECTIONS=$CUDA_DEVICE_MAX_CONNECTIONS are" \
    "$queues hardware queues, but all ranks together may have 96: fewer ranks, or unset it"

if [ "$nccl_version" -ge 23003 ]; then
    # NCCL 2.30.3 and newer let ranks share a GPU: copies stay on it, as fast as NVLink between GPUs.
    export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0
    recipe="ranks share the GPU"
else
    # Older ones must take each rank for a host of its own, and go over loopback sockets.
    export PIPEMOE_NCCL_HOSTIDS=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1
    recipe="loopback sockets"
fi
echo "one_gpu.sh: $num_ranks ranks, $CUDA_MPS_ACTIVE_THREAD_PERCENTAGE % of the SMs each;" \
    "NCCL $nccl_version ($recipe), NCCL_MAX_CTAS $NCCL_MAX_CTAS" >&2

mps=$(mktemp -d "${TMPDIR:-/tmp}/pipemoe_mps.XXXXXX")
export CUDA_MPS_PIPE_DIRECTORY=$mps/pipe CUDA_MPS_LOG_DIRECTORY=$mps/log
mkdir "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"

# shellcheck disable=SC2317 # called by a trap
stop_mps() {
    trap '' HUP INT TERM
    # A stuck client must not keep MPS alive, nor MPS this script.
    echo "quit -t 5" | timeout 30 nvidia-cuda-mps-control >/dev/null 2>&1 || true
    local pid=
    if [ -f "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid" ]; then
        pid=$(cat "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid")
    fi
    if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        kill -KILL "$pid" 2>/dev/null || true
    fi
    # Nor may the server, a child of the daemon's, stay behind with a client that hangs.
    local entry name
    for entry in /proc/[0-9]*; do
        { read -r name <"$entry/comm"; } 2>/dev/null || continue
        if [[ $name == nvidia-cuda-mps* ]] && # the name as far as it is kept
            grep -qzxF "CUDA_MPS_PIPE_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY" "$entry/environ" 2>/dev/null; then
            kill -KILL "${entry#/proc/}" 2>/dev/null || true
        fi
    done
    rm -rf "$mps"
}

command_pid=
stopped=
# shellcheck disable=SC2317 # called by a trap
stop_command() {
    stopped=yes
    [ -z "$command_pid" ] || kill -TERM "$command_pid" 2>/dev/null || true
}
trap stop_mps EXIT
trap stop_command HUP INT TERM

# Its output goes to a file, because a daemon keeps open what it is given.
env -u LD_PRELOAD nvidia-cuda-mps-control -d >"$mps/start.log" 2>&1 </dev/null || fail "MPS does not start: $(cat "$mps/start.log")"
[ -z "$stopped" ] || exit 143

# In the background, because bash runs traps only between foreground commands; such a command loses its input, unless it
# is given back.
bash "$launch/mpirun.sh" -n "$num_ranks" "$@" <&0 &
command_pid=$!
wait "$command_pid" && status=0 || status=$?
if [ -n "$stopped" ]; then
    for ((tenths = 0; tenths < 200; tenths++)); do
        kill -0 "$command_pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$command_pid" 2>/dev/null || true
    wait "$command_pid" 2>/dev/null && status=0 || status=$?
fi
exit "$status"
