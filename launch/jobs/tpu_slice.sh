#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice on which this repository is installed, one process on each:
#
#   bash launch/jobs/tpu_slice.sh NAME ZONE OUT
#
# OUT is a folder that all hosts share, as a mounted bucket. The mesh below is that of 16 chips, as in a v5litepod-16.
set -euo pipefail
name=${1:?"usage: bash launch/jobs/tpu_slice.sh NAME ZONE OUT"}
zone=${2:?"expected the zone of the slice"}
out=${3:?"expected a folder that all hosts share"}

gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="cd moe_jax && \
  python launch/train.py --config configs/train_demo.gin --coordinator=auto \
  --set mesh.data=2 --set mesh.expert=8 --set mesh.fsdp=2 --out '$out'"
