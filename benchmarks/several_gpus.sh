#!/usr/bin/env bash
# Makes the results of benchmarks/results/h200_x<N>: N ranks, a GPU each, on one host.
#
#   benchmarks/several_gpus.sh N [FOLDER]      (default: benchmarks/results/h200_x<N>)
#
# Tests first: launch/test_gpu.sh N.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
num_ranks=${1:-}
if ! [[ $num_ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: benchmarks/several_gpus.sh N [FOLDER]" >&2
    exit 2
fi
results=${2:-benchmarks/results/h200_x$num_ranks}
mkdir -p "$results"
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # NVLink multicast stays off
status=0

# counts LONG SHORT: LONG tokens on rank 0, SHORT on each other.
counts() {
    local tokens=$1
    for ((rank = 1; rank < num_ranks; rank++)); do tokens+=,$2; done
    echo "$tokens"
}

run() {
    launch/gpu_ranks.sh "$num_ranks" "$@" || status=1
}

# ttft MODEL LAYERS: what tune measured, then every mode on the same inputs.
ttft() {
    run -m pipemoe.cli tune --model "$1" --out "$results/cost_$1.json"
    run benchmarks/ttft.py --model "$1" --layers "$2" --moe-max-num-tokens 8192 --rounds 9 --cost "$results/cost_$1.json" \
        --rank-tokens "$(counts 4096 16)" --rank-tokens "$(counts 2048 2048)" --rank-tokens "$(counts 8192 8192)" \
        --trace benchmarks/traces/azure2023_conv.csv --num-requests $((4 * num_ranks)) --json "$results/ttft_$1.json"
}

run benchmarks/comm.py --json "$results/comm.json"
ttft qwen3-30b-a3b 48
ttft deepseek-v3 $((3 + 5 * num_ranks / 2)) # three dense layers, and MoE layers of about 23 / N GB each in half the memory
run benchmarks/memory.py --json "$results/memory.json"
run benchmarks/overlap.py --json "$results/overlap.json"
exit $status
