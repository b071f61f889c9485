#!/usr/bin/env bash
# The CPU's numbers, on a quiet machine: everything that README's CPU table and bench/results/<device>/README.md are made of.
#
#   bench/cpu.sh [STAGE...]
#
# Stages that run if none is named: layer (2048x2048, fp32, over tokens and dropout), small (SmolLM2's layers),
# blocks (its q, k, v, its MLP and both, fused and each layer alone), bf16, avx2 (bf16 without bf16 instructions, as on older CPUs),
# nf4 (against bitsandbytes + PEFT), model (a step of SmolLM2-135M, fused and each layer alone, beside PEFT) and memory (over the
# sequence length). Together at most 11 minutes. Stages that run only if named:
# dora, dora_nf4, dora_avx2 and dora_model (layers and the model with DoRA, at most 6 minutes together), ranks (AdaLoRA's allocator, 2),
# populations (EGGROLL's forward passes, 1) and eggroll (a training without gradients, 1), experts (beside PEFT's, 4), adapters
# (several in one batch, beside PEFT's loop, 1),
# unet and unet_last (a step of a UNet beside PEFT's, contiguous and in channels-last memory, 1 each),
# nf4_parts (quantise, dequantise and products apart, at most 5) and curves (loss curves of accelerated PEFT models beside PEFT's, at
# most 15). Rows and logs are written as they are made: see stages.sh. The folder's README.md and plots are made anew.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

default="layer small blocks bf16 avx2 nf4 model memory"
known="$default dora dora_nf4 dora_avx2 dora_model ranks populations eggroll experts adapters unet unet_last nf4_parts curves"
for argument in "$@"; do
    if [[ " $known " != *" $argument "* ]]; then
        echo "bench/cpu.sh: got '$argument', expected stages among: $known" >&2
        exit 2
    fi
done
wanted=("$@")
[ "${#wanted[@]}" -gt 0 ] || read -ra wanted <<<"$default"
# shellcheck source=bench/stages.sh
source bench/stages.sh cpu 2000 "${wanted[@]}"

# bench NAME SECONDS OPTIONS...: a stage of `lora-kernels bench`
bench() {
    stage "$1" "$2" "$python" -m lora_kernels bench --device cpu --json "$run/$1.json" "${@:3}"
}
both=(--dropout 0 --dropout 0.1 --rank 8)

bench layer 80 --shape 2048x2048 --tokens 2048 --tokens 512 --tokens 256 --tokens 128 "${both[@]}" \
    --compare peft,unsloth-style --repeats 7
bench small 50 --shape 576x192 --shape 576x1536 --tokens 2048 --tokens 512 --tokens 256 --tokens 128 "${both[@]}" \
    --compare peft,unsloth-style --repeats 9
bench blocks 60 --suite decoder-small --tokens 256 "${both[@]}" --compare peft,unsloth-style --repeats 9
bench bf16 45 --shape 2048x2048 --tokens 512 --tokens 2048 "${both[@]}" --dtype bfloat16 --repeats 5
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
    bench avx2 110 --shape 2048x2048 --tokens 128 --dropout 0.1 --rank 8 --dtype bfloat16 --repeats 2
bench nf4 40 --shape 2048x2048 --tokens 512 --tokens 2048 --dropout 0.1 --rank 8 --compare bnb --repeats 5
model=$("$python" -c 'from lora_kernels.commands.pretrained import default_model_directory; print(default_model_directory())')
bench model 150 --model "$model" --tokens 256 --rank 8 --dropout 0.1 --repeats 3
stage memory 75 "$python" bench/model_memory.py --device cpu --quantize none nf4 --json "$run/memory.json"
wide=(--shape 2048x2048 --tokens 512 --tokens 2048 --dropout 0 --rank 16 --variant dora)
bench dora 80 "${wide[@]}" --repeats 9
bench dora_nf4 80 "${wide[@]}" --compare bnb --quantize nf4 --repeats 7
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
    bench dora_avx2 150 --shape 2048x2048 --tokens 128 --dropout 0 --rank 16 --dtype bfloat16 --variant dora --repeats 2
bench dora_model 150 --model "$model" --tokens 256 --rank 16 --dropout 0 --variant dora --repeats 3
stage ranks 120 env OMP_NUM_THREADS=1 "$python" bench/rank_allocator.py --json "$run/ranks.json"
stage populations 60 "$python" bench/populations.py times --json "$run/populations.json"
stage eggroll 90 "$python" bench/populations.py training --json "$run/eggroll.json"
stage experts 240 "$python" bench/experts.py --json "$run/experts.json"
OMP_NUM_THREADS=1 stage adapters 60 "$python" bench/adapters.py --json "$run/adapters.json"
OMP_NUM_THREADS=1 stage unet 90 "$python" bench/unet.py --json "$run/unet.json"
OMP_NUM_THREADS=1 stage unet_last 90 "$python" bench/unet.py --channels-last --json "$run/unet_last.json"
stage nf4_parts 300 "$python" bench/nf4.py --json "$run/nf4_parts.json"
stage curves 900 "$python" bench/loss_curves.py --json "$run/curves.json"
"$python" bench/report.py || failed=1
finish
