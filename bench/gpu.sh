#!/usr/bin/env bash
# Tests and measurements on a GPU machine where nothing of this package is installed; under 9 minutes, --quick under 2.
#
#   bench/gpu.sh [--quick]
#
# Stages: nvidia-smi, the test suite on the GPU, bench/addmm_beta.py, `python -m lora_kernels bench --suite llama`. A stage
# that fails or runs into its time limit does not stop those after it; the exit code is 1 if any did. Results are written to
# bench/results/<device>/<date>-<commit>.json, and copied to $OUT if that is set.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

quick=
case "${1:-}" in
    --quick) quick=1 ;;
    "") ;;
    *)
        echo "bench/gpu.sh: got '$1', expected --quick or nothing" >&2
        exit 2
        ;;
esac

export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stages="$work/stages.tsv"
failed=0

# stage NAME SECONDS COMMAND...: run with a time limit, keep the log, note name, exit code and seconds
stage() {
    local name=$1 limit=$2 start code seconds
    shift 2
    echo "== $name (at most ${limit} s): $*"
    start=$(date +%s.%N)
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    code=${PIPESTATUS[0]}
    seconds=$(echo "$(date +%s.%N) $start" | awk '{ printf "%.1f", $1 - $2 }')
    printf '%s\t%s\t%s\n' "$name" "$code" "$seconds" >>"$stages"
    echo "== $name: exit code $code after $seconds s"
    [ "$code" -eq 0 ] || failed=1
}

if [ -n "$quick" ]; then
    tests=(tests/test_dropout.py tests/test_functional.py)
    addmm_options=(--quick --repeats 10)
    bench_options=(--tokens 8192 --dropout 0.1 --shape 4096x4096 --shape 4096x14336 --repeats 10)
    limits=(35 20 40)
else
    tests=(tests)
    addmm_options=()
    bench_options=()
    limits=(210 80 200)
fi

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n 4) # they share one GPU: more only queue on it
fi

stage nvidia-smi 10 nvidia-smi
stage tests "${limits[0]}" env LORA_KERNELS_TEST_DEVICE=cuda \
    "$python" -m pytest "${tests[@]}" -q -x -p no:cacheprovider "${workers[@]}"
stage addmm_beta "${limits[1]}" "$python" bench/addmm_beta.py --json "$work/addmm_beta.json" "${addmm_options[@]}"
stage bench "${limits[2]}" "$python" -m lora_kernels bench --suite llama --json "$work/bench.json" "${bench_options[@]}"

stage collect 10 "$python" bench/collect.py "$work"

echo
column -t -s "$(printf '\t')" "$stages"
exit "$failed"
