#!/bin/bash
# Checks and times the GPU kernels on this machine: `bash benchmarks/on_device.sh FOLDER`.
# Takes under five minutes on one H100. Each stage is a process with its own time limit:
# a stage that hangs or crashes does not stop the others.
# STAGES="ceilings decode" runs only those stages; SMALL=--small tries the script on a CPU.
set -u
out=${1:-${OUT:-out}/kernels}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
rm -f "$out"/kernels.{jsonl,log}
limit=${LIMIT:-290} # seconds for all stages together
scale=${SCALE:-1} # multiplies the time limits of single stages: use 5 on a slow machine
declare -A most=([check]=60 [ceilings]=30 [decode]=75 [layer]=90 [prefill]=60 [peers]=45 [ragged]=25 [attention]=60)
for stage in ${STAGES:-check ceilings decode layer prefill peers ragged attention}; do
  left=$((limit - SECONDS)) own_limit=$((${most[$stage]} * scale)) flags=${XLA_FLAGS:-}
  [ "$left" -lt 8 ] && { echo "$stage: no time left"; continue; }
  [ "$stage" = ragged ] && flags="$flags --xla_gpu_experimental_use_ragged_dot_fusion=true"
  XLA_FLAGS=$flags timeout -k 5 "$((own_limit < left ? own_limit : left))" \
    "$python" benchmarks/kernels.py --stage "$stage" --out "$out" ${SMALL:-} >>"$out/kernels.log" 2>&1
  echo "$stage: exit status $?, after $SECONDS s"
done
grep -hE "Error|error:|FAILED" "$out/kernels.log" | grep -v '^{' | sort | uniq -c | sort -rn | cut -c1-200 | head -8
"$python" benchmarks/kernel_table.py "$out"
