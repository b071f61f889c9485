# Stages with a time limit, sourced by gpu.sh and cpu.sh after `wanted`, the names of the stages to run, is set.

export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stages="$work/stages.tsv"
failed=0

# stage NAME SECONDS COMMAND...: if it is wanted, run with a time limit, keep the log, note name, exit code and seconds
stage() {
    local name=$1 limit=$2 start code seconds
    shift 2
    [[ " ${wanted[*]} collect " == *" $name "* ]] || return 0
    echo "== $name (at most ${limit} s): $*"
    start=$(date +%s.%N)
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    code=${PIPESTATUS[0]}
    seconds=$(echo "$(date +%s.%N) $start" | awk '{ printf "%.1f", $1 - $2 }')
    printf '%s\t%s\t%s\n' "$name" "$code" "$seconds" >>"$stages"
    echo "== $name: exit code $code after $seconds s"
    [ "$code" -eq 0 ] || failed=1
}
