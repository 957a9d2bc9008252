#!/usr/bin/env bash
# Trains on two nodes of eight GPUs; one process for each GPU, as JAX expects under SLURM:
#
#   sbatch launch/jobs/slurm.sh out/large
#
# The folder must be on a disk that all nodes share. A job that was stopped resumes when it is submitted again.
#SBATCH --job-name=moe_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
out=${1:?"usage: sbatch launch/jobs/slurm.sh OUT"}
cd "${SLURM_SUBMIT_DIR:-.}"

srun python launch/train.py --config configs/train_demo.gin --coordinator=auto \
  --set mesh.data=2 --set mesh.expert=8 --set mesh.fsdp=2 --out "$out"
