#!/usr/bin/env bash
# Tests and measurements on a GPU machine where nothing of this package is installed: torch, Triton, NumPy and pytest are enough, and
# what lacks another package is named.
#
#   bench/gpu.sh [--quick] [--seconds N] [STAGE...]
#
# Stages that run if none is named, in this order: nvidia-smi; csrc (builds the CUDA extension in place, for this GPU's family);
# smoke (bench/smoke.py: is anything wrong or rejected); tests (the suite on the GPU, in up to 12 processes); addmm_beta, kernels
# (bench/kernel_passes.py) and nf4 (bench/nf4_gpu.py) at few shapes; ncu (the counters of the side kernels); bench (layers beside
# PEFT's); sanitizer (compute-sanitizer's memcheck over small shapes). Together they take at most 590 seconds, with --quick 290, or
# --seconds N: each has a limit of its own and no more than what is left. Stages that run only if named, most with --seconds 1800:
# addmm_beta_all, kernels_all and nf4_all (every shape), tune (`lora-kernels tune`, which writes
# lora_kernels/backends/triton/tuned/<device>.json), decoder (a decoder layer's linears and activation, fused
# and each alone), dora (layers with a magnitude, beside PEFT's), small (few tokens, as CUDA graphs), peers
# (every peer at Llama's shapes), model (a step of the model in $MODEL) and memory (over the sequence length).
#
# A stage that fails costs only itself; the exit code is 1 if any did. Rows and logs are written as they are made: see stages.sh.
# bench/report.py makes tables of the collected file. DEVICE=cpu is for rehearsals without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

default="nvidia-smi csrc smoke tests addmm_beta kernels nf4 ncu bench sanitizer"
known="$default addmm_beta_all kernels_all nf4_all tune decoder dora small peers model memory"
quick='' total=590 wanted=()
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=1 total=290 ;;
    --seconds) seconds=${2:-} && shift ;;
    *) wanted+=("$1") ;;
    esac
    shift
done
total=${seconds-$total}
if ! [[ $total =~ ^[1-9][0-9]*$ ]]; then
    echo "bench/gpu.sh: --seconds: got '$total', expected a whole number of seconds" >&2
    exit 2
fi
for name in "${wanted[@]}"; do
    if [[ " $known " != *" $name "* ]]; then
        echo "bench/gpu.sh: got '$name', expected --quick, --seconds N or stages among: $known" >&2
        exit 2
    fi
done
[ "${#wanted[@]}" -gt 0 ] || read -ra wanted <<<"$default"

# shellcheck source=bench/stages.sh
source bench/stages.sh gpu "$total" "${wanted[@]}"

device=${DEVICE:-cuda} workers=$(nproc)
((workers < 12)) || workers=12 # more only queue on the GPU
[ "$device" = cuda ] || export TRITON_INTERPRET=1
# What the GPU's own kernels are tested by comes first, in case time runs out.
tests=(tests/test_triton_gpu.py tests/test_csrc_gpu.py tests/test_triton_linear.py tests/test_triton_group.py
    tests/test_triton_magnitude.py tests/test_triton_glu_mlp.py tests/test_triton_nf4.py tests/test_triton_segments.py
    tests/test_experts_activation.py tests/test_experts_nf4.py tests/test_triton_eggroll.py tests/test_linear.py
    tests/test_linear_group.py tests/test_dora.py tests/test_glu_mlp.py
    tests/test_csrc_kernels.py tests/test_csrc_backend.py tests/test_dropout.py tests/test_conv2d.py tests/test_embedding.py)
if [ -n "$quick" ]; then
    limits=(60 30 60 15 25 25 35 45)
    options=(--quick --repeats 10)
    bench_options=(--tokens 8192 --dropout 0.1 --shape 4096x4096 --shape 4096x14336 --repeats 10)
else
    limits=(80 45 150 30 60 50 60 110)
    for file in tests/test_*.py; do # all others but the offline compilation, which needs no GPU
        [[ " ${tests[*]} tests/test_triton_offline.py " == *" $file "* ]] || tests+=("$file")
    done
    options=(--quick)
    bench_options=()
fi
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd 0-9)
family=${capability:-1} # 1: every family
[ "$family" -lt 90 ] || family+=a

# measure NAME SECONDS SCRIPT OPTIONS...: a stage that writes rows
measure() {
    stage "$1" "$2" "$python" "bench/$3.py" --device "$device" --json "$run/$1.json" "${@:4}"
}

stage nvidia-smi 10 nvidia-smi
if ! command -v nvcc >/dev/null && [ -z "${CUDA_HOME:-}" ]; then
    leave_out csrc "there is no nvcc, neither in CUDA_HOME nor on the PATH"
elif ! "$python" -c 'import pybind11, ninja' 2>/dev/null; then
    leave_out csrc "the Python packages pybind11 and ninja are not installed"
else
    stage csrc "${limits[0]}" env "LORA_KERNELS_BUILD_CUDA=$family" "$python" setup.py build_ext --inplace --parallel 2
fi
measure smoke "${limits[1]}" smoke
stage tests "${limits[2]}" env OMP_NUM_THREADS=1 "LORA_KERNELS_TEST_DEVICE=$device" \
    "$python" bench/suite.py --workers "$workers" --rows "$run/tests.jsonl" "${tests[@]}"
measure addmm_beta "${limits[3]}" addmm_beta "${options[@]}"
measure kernels "${limits[4]}" kernel_passes "${options[@]}"
measure nf4 "${limits[5]}" nf4_gpu "${options[@]}"
stage ncu "${limits[6]}" "$python" bench/ncu.py --json "$run/ncu.json"
measure bench "${limits[7]}" layers --suite llama "${bench_options[@]}"
measure addmm_beta_all 300 addmm_beta
measure kernels_all 600 kernel_passes
measure nf4_all 600 nf4_gpu
stage tune 540 "$python" -m lora_kernels tune --folder lora_kernels/backends/triton/tuned --json "$run/tune.json"
measure decoder 270 layers --suite decoder --compare peft,unsloth-style
measure dora 180 layers --suite tokens --tokens 512 --tokens 2048 --tokens 8192 --dropout 0 --variant dora --compare peft,bnb
measure small 180 layers --suite tokens --tokens 1 --tokens 8 --tokens 64 --tokens 512 --dropout 0 --compare peft,bnb
measure peers 420 layers --suite llama --tokens 8192 --compare peft,peft-compile,unsloth-style,bnb
stage model 240 "$python" -m lora_kernels bench --device "$device" --json "$run/model.json" --model "${MODEL:-none}" \
    --tokens 4096 --repeats 10
measure memory 120 model_memory --quantize none nf4 --lengths 512 1024 2048 4096
if command -v compute-sanitizer >/dev/null; then
    stage sanitizer 120 env "LORA_KERNELS_TEST_DEVICE=$device" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --error-exitcode 1 --target-processes all \
        "$python" -m pytest tests/test_linear.py tests/test_triton_lowrank_product.py tests/test_triton_nf4.py \
        tests/test_triton_magnitude.py tests/test_csrc_kernels.py -o addopts= -v -x -p no:cacheprovider \
        -k "(features and not torch-) or ragged or address or tokens or any_strides or the_scale"
else
    leave_out sanitizer "there is no compute-sanitizer on the PATH"
fi
finish
