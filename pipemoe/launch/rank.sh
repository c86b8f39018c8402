#!/usr/bin/env bash
# Runs once per rank, between mpirun (or srun) and the command, and sets what only the rank itself can set.
#   PIPEMOE_NCCL_HOSTIDS  not empty: each rank tells NCCL that it is a host of its own (several ranks on one GPU, with an
#                         older NCCL)
#   PIPEMOE_RANK_LOGS     a folder, made if need be: ranks other than 0 write their output to rank<r>.log there
set -euo pipefail

rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-${SLURM_PROCID:-0}}}}
if [ -n "${PIPEMOE_NCCL_HOSTIDS:-}" ]; then
    export NCCL_HOSTID="pipemoe-rank-$rank"
fi
if [ -n "${PIPEMOE_RANK_LOGS:-}" ] && [ "$rank" != 0 ]; then
    mkdir -p "$PIPEMOE_RANK_LOGS"
    exec >"$PIPEMOE_RANK_LOGS/rank$rank.log" 2>&1
fi
exec "$@"
