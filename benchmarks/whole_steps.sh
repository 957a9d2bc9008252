#!/bin/bash
# Times whole decode steps on the GPU of this machine at loads of 1 to 512 rows, with 8, 6, 4 and 2 experts per token and
# under policies that look at all rows: `bash benchmarks/whole_steps.sh FOLDER`. Models: OLMoE-1B-7B and Qwen3-30B-A3B at
# full size, random bfloat16 weights, replayed routing. FOLDER/MODEL gets loads.jsonl, line by line, and throughput.png.
# MODELS="olmoe" times one model (Qwen3 needs 76 GB); KERNELS="pallas_gpu padded" also times other kernels, in
# FOLDER/MODEL_KERNELS; SETTINGS has further --set; LIMIT is the time of a run, in seconds, SCALE multiplies it.
# PYTHON is the interpreter. MODELS=olmoe KERNELS=native SETTINGS="--set decoder.d_model=128 --set moe.expert_hidden=64
# --set decoder.num_layers=2" tries the script on a CPU.
set -u
out=${1:-${OUT:-out}/whole_steps}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
# the weights of Qwen3 need more than the three quarters of the memory that JAX takes by itself
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.94
limit=$((${LIMIT:-110} * ${SCALE:-1})) failed=0
for model in ${MODELS:-olmoe qwen3}; do
  for kernels in ${KERNELS:-pallas_gpu}; do
    folder=$out/$model began=$SECONDS
    [ "$kernels" = pallas_gpu ] || folder=${folder}_$kernels
    mkdir -p "$folder"
    # shellcheck disable=SC2086
    timeout -k 5 "$limit" "$python" benchmarks/loads.py --config "configs/loads_$model.gin" --out "$folder" \
      --set "kernels.grouped_matmul=$kernels" ${SETTINGS:-} >"$folder/log" 2>&1
    status=$?
    grep -E " rows .* tokens/s|rror" "$folder/log" | cut -c1-200
    [ -s "$folder/loads.jsonl" ] && "$python" benchmarks/loads_chart.py "$folder"
    echo "$model $kernels: exit status $status, after $((SECONDS - began)) s"
    [ "$status" = 0 ] || failed=$status
  done
done
exit "$failed"
