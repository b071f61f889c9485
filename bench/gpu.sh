#!/usr/bin/env bash
# Tests and measurements on a GPU machine where nothing of this package is installed.
#
#   bench/gpu.sh [--quick] [STAGE...]
#
# Stages that run if none is named: nvidia-smi, csrc (builds the CUDA extension in place), tests (the suite on the GPU),
# sanitizer (compute-sanitizer's memcheck over small shapes), addmm_beta, kernels (bench/kernel_passes.py), nf4 (bench/nf4_gpu.py)
# and bench (`python -m lora_kernels bench --suite llama`). Each has a time limit, together 16 minutes, with --quick 5. Stages
# that run only if named: tune (`lora-kernels tune`, which writes lora_kernels/backends/triton/tuned/<device>.json), decoder (a
# decoder layer's linears), small (few tokens, as CUDA graphs), peers (every peer at Llama's shapes), model (a step of the model
# in $MODEL) and memory (over the sequence length). A stage that fails does not stop those after it; the exit code is 1 if any
# did. Results are written to bench/results/<device>/<date>-<commit>.json, and copied to $OUT if that is set; bench/report.py
# makes tables of them.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

known="nvidia-smi csrc tests sanitizer addmm_beta kernels nf4 bench tune decoder small peers model memory"
quick=
wanted=()
for argument in "$@"; do
    if [ "$argument" = --quick ]; then
        quick=1
    elif [[ " $known " == *" $argument "* ]]; then
        wanted+=("$argument")
    else
        echo "bench/gpu.sh: got '$argument', expected --quick or stages among: $known" >&2
        exit 2
    fi
done
[ "${#wanted[@]}" -gt 0 ] || wanted=(nvidia-smi csrc tests sanitizer addmm_beta kernels nf4 bench)

# shellcheck source=bench/stages.sh
source bench/stages.sh

if [ -n "$quick" ]; then
    tests=(tests/test_dropout.py tests/test_linear.py tests/test_triton_linear.py tests/test_triton_gpu.py
        tests/test_csrc_kernels.py tests/test_csrc_backend.py tests/test_csrc_gpu.py tests/test_triton_nf4.py)
    options=(--quick --repeats 10)
    bench_options=(--tokens 8192 --dropout 0.1 --shape 4096x4096 --shape 4096x14336 --repeats 10)
    limits=(90 40 20 40 40 60)
else
    tests=(tests --ignore tests/test_triton_offline.py)
    options=()
    bench_options=()
    limits=(260 100 70 180 150 180)
fi

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n 4) # they share one GPU: more only queue on it
fi

stage nvidia-smi 10 nvidia-smi
stage csrc 180 env LORA_KERNELS_BUILD_CUDA=1 "$python" setup.py build_ext --inplace
stage tests "${limits[0]}" env LORA_KERNELS_TEST_DEVICE=cuda \
    "$python" -m pytest "${tests[@]}" -q --maxfail=30 -p no:cacheprovider "${workers[@]}"
stage sanitizer "${limits[1]}" env LORA_KERNELS_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool memcheck --error-exitcode 1 --target-processes all \
    "$python" -m pytest tests/test_linear.py tests/test_triton_lowrank_product.py tests/test_triton_nf4.py \
    tests/test_csrc_kernels.py -q -x -p no:cacheprovider -k "(features and not torch-) or ragged or address or tokens"
stage addmm_beta "${limits[2]}" "$python" bench/addmm_beta.py --json "$work/addmm_beta.json" "${options[@]}"
stage kernels "${limits[3]}" "$python" bench/kernel_passes.py --json "$work/kernels.json" "${options[@]}"
stage nf4 "${limits[5]}" "$python" bench/nf4_gpu.py --json "$work/nf4.json" "${options[@]}"
stage bench "${limits[4]}" "$python" -m lora_kernels bench --suite llama --json "$work/bench.json" "${bench_options[@]}"
stage tune 540 "$python" -m lora_kernels tune --folder lora_kernels/backends/triton/tuned --json "$work/tune.json"
gpu_bench() { echo "$python -m lora_kernels bench --device cuda --json $work/$1.json"; }
stage decoder 240 $(gpu_bench decoder) --suite decoder --compare peft,unsloth-style --repeats 20
stage small 180 $(gpu_bench small) --suite tokens --tokens 1 --tokens 8 --tokens 64 --tokens 512 --dropout 0 --compare peft,bnb
stage peers 420 $(gpu_bench peers) --suite llama --tokens 8192 --compare peft,peft-compile,unsloth-style,bnb --repeats 20
stage model 240 $(gpu_bench model) --model "${MODEL:-none}" --tokens 4096 --repeats 10
stage memory 120 "$python" bench/model_memory.py --quantize none nf4 --lengths 512 1024 2048 4096 --json "$work/memory.json"
stage collect 10 "$python" bench/collect.py "$work"

echo
column -t -s "$(printf '\t')" "$stages"
exit "$failed"
