#!/usr/bin/env bash
#SBATCH --job-name=vlm_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#
#   sbatch --nodes=4 launch/slurm.sh configs/lvm_1b.py /shared/runs/lvm_1b [--config.a.b=v ...]
#
# One process a node drives all its GPUs; the processes find each other through SLURM. Two minutes
# before the time limit SIGTERM makes the run save and exit, and the job is queued again.
set -euo pipefail
config=${1:?recipe} workdir=${2:?work directory that all nodes see}
shift 2
. launch/gpu.env

srun python -m vlm_jax.main --config="$config" --workdir="$workdir" "$@" &
child=$!
trap 'kill -TERM $child; wait $child; scontrol requeue "$SLURM_JOB_ID"' TERM
wait $child
