# shellcheck shell=bash
# Stages under one deadline: `source bench/stages.sh gpu|cpu SECONDS STAGE...`, the seconds for everything together, start-up
# included, and the names of the stages that are wanted.
#
# A run has a folder, bench/results/<device>/<date>-<commit>.run-<time> (in $OUT if that is set, and a link to it), which git ignores.
# Into it each stage writes its log and its rows as they are made: whatever ends this script, at any moment, loses nothing that was
# measured before. After each stage bench/collect.py gathers the folder into bench/results/<device>/<date>-<commit>.json, which is for
# committing; after an end by force `python bench/collect.py FOLDER` does the same with what is there.

export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
total=$2 wanted=("${@:3}")
reserve=10 # seconds at the end, for a stage that has to be killed and for the last collection
failed=0
run=$(timeout 60 "$python" bench/begin.py "$1") || exit 1
echo "results: $run"

orphans=() # a stage whose script is killed ends too, and leaves the GPU
if command -v setpriv >/dev/null; then orphans=(setpriv --pdeathsig TERM); fi

# note NAME EXIT-CODE-OR-STATE SECONDS REASON: a line of stages.tsv
note() {
    printf '%s\t%s\t%s\t%s\n' "$@" >>"$run/stages.tsv"
}

is_wanted() {
    [[ " ${wanted[*]} " == *" $1 "* ]]
}

# leave_out NAME REASON: of a stage that this machine cannot run
leave_out() {
    is_wanted "$1" || return 0
    echo "== $1: left out: $2"
    note "$1" "left out" 0 "$2"
}

# stage NAME SECONDS COMMAND...: if it is wanted, run for at most so long, or for what is left; exit code 77 means left out
stage() {
    local name=$1 limit=$2 start=$SECONDS left=$((total - reserve - SECONDS)) code
    shift 2
    is_wanted "$name" || return 0
    if ((left < 3)); then
        echo "== $name: not started: the $total s are over"
        note "$name" "not started" 0 "the $total s are over"
        return
    fi
    ((limit < left)) || limit=$left
    echo "== $name (at most $limit s): $*"
    note "$name" started 0 ""
    : >"$run/$name.log"
    # The stage itself writes the log: no pipe that could break, or that a process left behind could keep open.
    "${orphans[@]}" timeout --kill-after=5 "$limit" "$@" >>"$run/$name.log" 2>&1 </dev/null &
    tail --pid=$! --sleep-interval=0.2 --lines=+1 --follow "$run/$name.log"
    wait $!
    code=$?
    note "$name" "$code" $((SECONDS - start)) ""
    echo "== $name: exit code $code after $((SECONDS - start)) s"
    [ "$code" -eq 0 ] || [ "$code" -eq 77 ] || failed=1
    "$python" bench/collect.py "$run"
}

# Ends the script: what each stage came to.
finish() {
    echo
    "$python" bench/collect.py "$run" --table || failed=1
    exit "$failed"
}
