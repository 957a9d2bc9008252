#!/bin/bash
# Checks and times everything that runs on a GPU, on this machine: `bash benchmarks/on_device.sh FOLDER`.
# Takes under nine minutes on one H100. Each stage is a process with its own time limit, and writes its results as they
# come: a stage that hangs or crashes does not stop the others. The stages:
#   tests      pytest -m gpu
#   ceilings check decode layer peers ragged prefill attention    of benchmarks/kernels.py
#   olmoe qwen3                                                   of benchmarks/whole_steps.sh
# STAGES="ceilings decode" runs only those; SMALL=--small tries the script on a CPU, except for the tests.
set -u
out=${1:-${OUT:-out}/on_device}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHON="$python"
mkdir -p "$out"
rm -f "$out"/kernels.{jsonl,log}
limit=${LIMIT:-530} # seconds for all stages together
scale=${SCALE:-1} # multiplies the limits of single stages: use 5 on a slow machine
declare -A most=([tests]=47 [ceilings]=18 [check]=33 [layer]=50 [decode]=41 [olmoe]=88 [qwen3]=112 [peers]=40 [ragged]=18
  [prefill]=40 [attention]=43) # 530 together
tiny="--set benchmark.decode_batches=(1,4) --set decoder.d_model=128 --set moe.expert_hidden=64"
tiny="$tiny --set decoder.num_layers=2 --set decoder.vocab_size=1000"

run_stage() { # stage, seconds
  case $1 in
    tests)
      # each process takes memory as it needs it
      XLA_PYTHON_CLIENT_PREALLOCATE=false timeout -k 5 "$2" \
        "$python" -m pytest -m gpu -n 6 tests/kernels >"$out/tests.log" 2>&1
      ;;
    olmoe | qwen3)
      MODELS=$1 KERNELS=${SMALL:+native} SETTINGS=${SMALL:+$tiny} LIMIT=$2 SCALE=1 bash benchmarks/whole_steps.sh "$out"
      ;;
    *)
      local flags=${XLA_FLAGS:-}
      [ "$1" = ragged ] && flags="$flags --xla_gpu_experimental_use_ragged_dot_fusion=true"
      XLA_FLAGS=$flags timeout -k 5 "$2" \
        "$python" benchmarks/kernels.py --stage "$1" --out "$out" ${SMALL:+"$SMALL"} >>"$out/kernels.log" 2>&1
      ;;
  esac
}

for stage in ${STAGES:-tests ceilings check layer decode olmoe qwen3 peers ragged prefill attention}; do
  left=$((limit * scale - SECONDS)) own_limit=$((${most[$stage]} * scale))
  [ "$left" -lt 8 ] && { echo "$stage: no time left"; continue; }
  run_stage "$stage" "$((own_limit < left ? own_limit : left))"
  echo "$stage: exit status $?, after $SECONDS s"
done
tail -n 1 "$out/tests.log" 2>/dev/null
grep -hE "Error|error:|FAILED" "$out/kernels.log" | grep -v '^{' | sort | uniq -c | sort -rn | cut -c1-200 | head -8
"$python" benchmarks/kernel_table.py "$out"
