#!/usr/bin/env bash
# Makes the results of 4 ranks on one GPU over real NCCL.
#
#   benchmarks/one_gpu.sh [FOLDER]      (default: benchmarks/results/<GPU>_one_gpu)
#
#   PIPEMOE_BENCH_PARTS   which of these, in this order (default: all): tune ttft lockstep front memory overlap comm forward
#                         attention arrivals families serve; and before, if PIPEMOE_BENCH_BEFORE is set
#   PIPEMOE_BENCH_BEFORE  the source tree of an older pipemoe, as `git archive` makes it, to compare with
#   PIPEMOE_BENCH_ROUNDS  timed passes per mode of ttft (default: 9)
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/environment.sh
. launch/environment.sh
results=${1:-benchmarks/results/$(gpu_name)_one_gpu}
mkdir -p "$results"
status=0
model=qwen3-30b-a3b
layers=$(($(gpu_gib) >= 120 ? 48 : 22)) # all, or what fits beside the workspaces of all modes

run() {
    launch/one_gpu.sh 4 "$@" || status=1
}

# ttft FILE ARGUMENTS: the model's modes on the same inputs, by the costs that the part `tune` has measured.
ttft() {
    local file=$1
    shift
    run benchmarks/ttft --model $model --layers $layers --moe-max-num-tokens 4096 --cost "$results/cost.json" --json "$results/$file" "$@"
}

parts="tune ttft lockstep front memory overlap comm forward attention arrivals families serve${PIPEMOE_BENCH_BEFORE:+ before}"
for part in ${PIPEMOE_BENCH_PARTS:-$parts}; do
    case $part in
    tune) run -m pipemoe.cli tune --model $model --layers 16 --max-tokens 8192 --out "$results/cost.json" ;;
    ttft)
        ttft ttft.json --rank-tokens 2048,2048,2048,2048 --rank-tokens 4096,16,16,16 --rank-tokens 8192,1024,512,0 --rank-tokens 64,64,64,64 \
            --rank-tokens 1,0,0,0 --trace benchmarks/traces/azure2023_conv.csv --num-requests 16 --draws 12 --rounds "${PIPEMOE_BENCH_ROUNDS:-9}" --parity-layers 4
        ;;
    lockstep)
        # The same lockstep, but the slot that it does not need goes to larger collectives.
        PIPEMOE_NUM_SLOTS=1 ttft ttft_lockstep.json --rank-tokens 2048,2048,2048,2048 --rank-tokens 4096,16,16,16 --rank-tokens 8192,1024,512,0 \
            --modes padded,chunked,broadcast --rounds 5 --parity-layers 1
        ;;
    front) ttft ttft_front.json --rank-tokens 8192,1024,512,0 --modes broadcast,auto --budgets 0,5,20 --rounds 5 --parity-layers 1 ;;
    memory | overlap) run "benchmarks/$part.py" --json "$results/$part.json" ;;
    comm) run benchmarks/comm --json "$results/comm.json" ;;
    serve) # policies over time; minutes for each seed
        run benchmarks/serve --model $model --layers $layers --moe-max-num-tokens 8192 --most-tokens 16384 --too-long clip --num-requests 500 \
            --cost "$results/cost.json" --json "$results/serve.json"
        ;;
    attention) "$python" benchmarks/attention.py --json "$results/attention.json" || status=1 ;; # one kernel alone
    forward) "$python" benchmarks/forward.py --device cuda --model $model --layers $layers --vllm --json "$results/forward.json" || status=1 ;; # one rank, vLLM if it is there
    arrivals) "$python" benchmarks/arrivals.py --json "$results/arrivals.json" || status=1 ;;
    before) # both builds in memory: as many layers as fit twice
        older=(--before "${PIPEMOE_BENCH_BEFORE:?}" --device cuda --at-once 2)
        "$python" benchmarks/forward.py "${older[@]}" --model $model --layers $((layers * 2 / 3)) --num-ranks 4 --launcher "launch/one_gpu.sh 4" \
            --moe-max-num-tokens 8192 --rank-tokens 16,16,16,16 --rank-tokens 4096,16,16,16 --rank-tokens 2048,2048,2048,2048 \
            --rank-tokens 8192,8192,8192,8192 --json "$results/forward_before.json" || status=1
        "$python" benchmarks/forward.py "${older[@]}" --model deepseek-v3 --layers 5 --tokens 64,2048,8192 \
            --json "$results/forward_before_deepseek-v3.json" || status=1
        ;;
    families)
        # Of which no file states what they are made of; as many layers as fit beside the workspaces of all modes.
        for family in gpt-oss-20b glm-4.5-air qwen3-next-80b-a3b; do
            run benchmarks/ttft --model benchmarks/models/$family.json --layers 8 --moe-max-num-tokens 4096 --json "$results/ttft_$family.json" \
                --rank-tokens 512,512,512,512 --rank-tokens 2048,16,16,16 --rounds 5 --parity-layers 4
        done
        ;;
    *)
        echo "one_gpu.sh: no part $part" >&2
        status=2
        ;;
    esac
done
exit $status
