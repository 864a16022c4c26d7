#!/usr/bin/env bash
# Several nodes by Slurm: sbatch --nodes 4 examples/megatron/slurm.sh --config examples/megatron/sizes/8b.yaml \
#     --data /shared/stdlib --out /shared/runs/8b
# The environment must be the same on every node, and --data and --out on a file system that they share. The run ends
# with a checkpoint ten minutes before the job's limit; submit it again and it goes on.
#SBATCH --job-name=mamba2-megatron
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=240
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --node-rank "$SLURM_NODEID" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$0:29500" \
    examples/megatron/pretrain.py --minutes 230 "$@"' "$head" "$@"
