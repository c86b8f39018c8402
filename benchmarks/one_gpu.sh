#!/usr/bin/env bash
# Makes the results of benchmarks/results/h200_one_gpu anew: 4 ranks on one GPU over real NCCL.
#
#   benchmarks/one_gpu.sh [FOLDER]      (default: benchmarks/results/h200_one_gpu)
set -uo pipefail
cd "$(dirname "$0")/.." || exit
results=${1:-benchmarks/results/h200_one_gpu}
mkdir -p "$results"
status=0

launch/one_gpu.sh 4 -m pipemoe.cli tune --model qwen3-30b-a3b --out "$results/cost.json" || status=1
launch/one_gpu.sh 4 benchmarks/ttft.py --model qwen3-30b-a3b --layers 48 --rank-tokens 2048,2048,2048,2048 \
    --rank-tokens 4096,16,16,16 --rank-tokens 64,64,64,64 --rank-tokens 1,0,0,0 \
    --draws 12 --draw-rounds 3 --moe-max-num-tokens 4096 --rounds 9 --parity-layers 2 \
    --cost "$results/cost.json" --json "$results/ttft.json" || status=1
launch/one_gpu.sh 4 benchmarks/ttft.py --model qwen3-30b-a3b --layers 48 --rank-tokens 8192,1024,512,0 --modes broadcast,auto \
    --budgets 0,5,20 --moe-max-num-tokens 4096 --rounds 3 --parity-layers 1 \
    --cost "$results/cost.json" --json "$results/ttft_front.json" || status=1
launch/one_gpu.sh 4 benchmarks/memory.py --json "$results/memory.json" || status=1
launch/one_gpu.sh 4 benchmarks/overlap.py --json "$results/overlap.json" || status=1
launch/one_gpu.sh 4 benchmarks/comm.py --json "$results/comm.json" || status=1
exit $status
