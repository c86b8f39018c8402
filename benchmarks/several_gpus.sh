#!/usr/bin/env bash
# Makes the results of N ranks, a GPU each, on one host.
#
#   benchmarks/several_gpus.sh N [FOLDER]      (default: benchmarks/results/<GPU>_x<N>)
#
#   PIPEMOE_BENCH_PARTS   which of these, in this order (default: all): qwen3-30b-a3b faults comm deepseek-v3 overlap memory
#   PIPEMOE_BENCH_ROUNDS  timed passes per mode (default: 9)
#
# Tests first: launch/test_gpu.sh N.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/environment.sh
. launch/environment.sh
num_ranks=${1:-}
if ! [[ $num_ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: benchmarks/several_gpus.sh N [FOLDER]" >&2
    exit 2
fi
results=${2:-benchmarks/results/$(gpu_name)_x$num_ranks}
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

# ttft MODEL LAYERS TUNED_LAYERS: what tune measured, then every mode on the same inputs.
ttft() {
    run -m pipemoe.cli tune --model "$1" --layers "$3" --max-tokens 8192 --out "$results/cost_$1.json"
    run benchmarks/ttft --model "$1" --layers "$2" --moe-max-num-tokens 8192 --rounds "${PIPEMOE_BENCH_ROUNDS:-9}" --parity-layers 4 --cost "$results/cost_$1.json" \
        --rank-tokens "$(counts 4096 16)" --rank-tokens "$(counts 2048 2048)" --rank-tokens "$(counts 8192 8192)" \
        --trace benchmarks/traces/azure2023_conv.csv --num-requests $((4 * num_ranks)) --json "$results/ttft_$1.json"
}

for part in ${PIPEMOE_BENCH_PARTS:-qwen3-30b-a3b faults comm deepseek-v3 overlap memory}; do
    case $part in
    overlap | memory) run "benchmarks/$part.py" --json "$results/$part.json" ;;
    comm) run benchmarks/comm --json "$results/comm.json" ;;
    qwen3-30b-a3b) ttft "$part" 48 16 ;;
    # Three dense layers, and MoE layers of about 23 / N GiB each in a third of the memory; the rest is for the workspaces
    # of all modes.
    deepseek-v3)
        moe_layers=$((num_ranks * $(gpu_gib) / 3 / 23))
        ttft "$part" $((3 + moe_layers)) $((moe_layers < 4 ? moe_layers : 4))
        ;;
    faults) "$python" benchmarks/faults.py "$num_ranks" --json "$results/faults.json" || status=1 ;;
    *)
        echo "several_gpus.sh: no part $part" >&2
        status=2
        ;;
    esac
done
exit $status
