#!/bin/bash
# Checks and times the GPU kernels on the machine at hand: `bash benchmarks/on_device.sh FOLDER`. Under four minutes on one
# H100. Each stage is a process with a limit of its own, so that one that hangs or crashes does not end the others.
# SMALL=--small rehearses it on a CPU.
set -u
out=${1:-${OUT:-out}/kernels}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
rm -f "$out"/kernels.{jsonl,log}
limit=${LIMIT:-235} # seconds for all stages; what is left bounds each
run() { # limit in seconds, stage
  local left=$((limit - SECONDS))
  [ "$left" -lt 8 ] && { echo "$2: no time left"; return; }
  timeout -k 5 "$(($1 < left ? $1 : left))" "$python" benchmarks/kernels.py --stage "$2" --out "$out" ${SMALL:-} \
    >>"$out/kernels.log" 2>&1
  echo "$2: exit status $?, after $SECONDS s"
}
scale=${SCALE:-1} # of the limits: 5 for a rehearsal on a slow machine
run $((60 * scale)) check
run $((30 * scale)) ceilings
run $((90 * scale)) decode
run $((60 * scale)) prefill
run $((20 * scale)) trace
run $((45 * scale)) peers
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_experimental_use_ragged_dot_fusion=true" run $((25 * scale)) ragged
grep -hE "Error|error:|FAILED" "$out/kernels.log" | grep -v '^{' | sort | uniq -c | sort -rn | cut -c1-200 | head -8
"$python" benchmarks/kernels.py --stage table --out "$out"
