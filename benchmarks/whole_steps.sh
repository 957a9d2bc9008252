#!/bin/bash
# Times whole decode steps and prefills of OLMoE-1B-7B's shape, random bfloat16 weights and recorded routing, on the
# GPU of this machine: `bash benchmarks/whole_steps.sh FOLDER`. First with 8, 6, 4 and 2 experts per token at loads of 1 to
# 512 rows, then beside other kernels with 8, and at batch 1 also with 4.
# Each run is a process; all share LIMIT seconds. FOLDER/whole_steps.jsonl has one line per run: name and result.json.
# OURS=native PEERS=blocked LAYERS=1 SMALL="--set decoder.d_model=128 --set moe.expert_hidden=64" runs on a CPU.
set -u
out=${1:-${OUT:-out}/whole_steps}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
scratch=$(mktemp -d)
export JAX_COMPILATION_CACHE_DIR=$scratch/programs # runs with 4 and 8 experts use the same programs
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
rm -f "$out"/whole_steps.{jsonl,log}
limit=${LIMIT:-240}
run() { # implementation, policy, further settings
  local name="$1 $2" left=$((limit - SECONDS)) status
  [ "$left" -lt 15 ] && { echo "$name: no time left"; return; }
  timeout -k 5 "$left" "$python" launch/benchmark.py --config configs/benchmark_olmoe.gin --out "$scratch/run" \
    --set model.dtype=bfloat16 --set "decoder.num_layers=${LAYERS:-16}" --set "kernels.grouped_matmul=$1" \
    --set "policy.spec=$2" --set benchmark.rounds=4 ${SMALL:-} "${@:3}" >"$scratch/log" 2>&1
  status=$?
  { echo "== $name"; cat "$scratch/log"; } | tee -a "$out/whole_steps.log" | grep -E "==|decode_|prefill_|rror" | cut -c1-200
  [ "$status" = 0 ] && "$python" -c 'import json, sys; print(json.dumps({"name": sys.argv[1]} | json.load(open(sys.argv[2]))))' \
    "$name" "$scratch/run/result.json" >>"$out/whole_steps.jsonl"
  echo "$name: exit status $status, after $SECONDS s"
}
loads=(--set "benchmark.decode_batches=${LOADS:-(1, 8, 64, 512)}" --set 'benchmark.prefill_lengths=()')
all=(--set 'benchmark.decode_batches=(1, 8, 64)' --set 'benchmark.prefill_lengths=(2048,)')
one=(--set 'benchmark.decode_batches=(1,)' --set 'benchmark.prefill_lengths=()')
read -ra peers <<<"${PEERS-ragged_dot padded}"
ours=${OURS:-pallas_gpu}
for policy in model topk:6 topk:4 topk:2; do run "$ours" "$policy" "${loads[@]}"; done
run "$ours" model "${all[@]}"
for peer in "${peers[@]}"; do run "$peer" model "${all[@]}"; done
for peer in "${peers[@]}"; do run "$peer" topk:4 "${one[@]}"; done
