#!/usr/bin/env bash
# What only a GPU can tell, on any card: does the extension build and pass its tests there, and do
# its CUDA kernels pay beside CUDA graphs (bench/epoch.py)?
#
#   bench/gpu.sh                              in at most 840 seconds
#   bench/gpu.sh 300 --results FOLDER         in 300; results go to FOLDER, not bench/results
#   bench/gpu.sh 60 --device cpu --results FOLDER     tiny sizes on a CPU: does it run?
#
# Each part has a time limit, and one that fails does not stop the next. The same command skips the
# parts that are done and continues the measurements. What it prints is also in <card>-gpu.log, the
# epochs are in <card>-epoch.json.
# PYTHON=/path/to/python uses that interpreter as it is, without any set-up.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda results=bench/results total=840
while [ $# -gt 0 ]; do
    case $1 in
        --device | --results) printf -v "${1#--}" %s "${2:?a value for $1 is missing}"; shift 2 ;;
        [1-9]*) total=$1; shift ;;
        *) sed '1d;/^set/,$d;s/^# \{0,1\}//' "$0"; exit 2 ;;
    esac
done
if [ -z "${PYTHON:-}" ]; then
    bash runs.sh setup || exit 1
    PYTHON=.venv/bin/python
fi
machine=$("$PYTHON" - "$device" <<'END'
import sys
sys.path.insert(0, "bench")
import step, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no CUDA device here: --device cpu tries it all on a CPU")
print(step.results_path(step.describe_machine(torch.device(sys.argv[1])), "").stem.rstrip("-"))
END
) || exit 2
mkdir -p "$results"
log=$results/$machine-gpu.log
failed=0
touch "$log"

part() {  # NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds
    local name=$1 limit=$2 left=$((total - SECONDS)) began=$SECONDS end="done" code=0
    shift 2
    ! grep -qx "== $name: done" "$log" || return 0
    limit=$((limit < left ? limit : left))
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left" | tee -a "$log"
        failed=1
        return
    fi
    echo "== $name: at most $limit s" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log" || code=$?
    [ "$code" = 0 ] || { failed=1 end="stopped with code $code"; }
    printf '%s\n' "== $name took $((SECONDS - began)) s" "== $name: $end" | tee -a "$log"
}

# Only a failed build's output is of interest, and it is long.
build='output=$("$0" setup.py build_ext --inplace 2>&1) || { echo "$output"; exit 1; }'
epochs=("$PYTHON" -u bench/epoch.py --device "$device" --out "$results/$machine-epoch.json")
if [ "$device" = cuda ]; then
    part build 200 env GST_CUDA=1 bash -c "$build" "$PYTHON"
    part tests 300 "$PYTHON" -m pytest -q -n 8 tests -k cuda
    part epochs "$total" "${epochs[@]}" --seconds $((total - SECONDS - 10))
else
    part build 300 bash -c "$build" "$PYTHON"
    part tests 60 "$PYTHON" -m pytest -q tests/test_ext.py -k cuda
    part epochs "$total" "${epochs[@]}" --seconds $((total - SECONDS - 10)) --models vgg11 \
        --width 0.05 --batch-size 32 --images 100 --epochs 1 --rounds 1
fi
echo "the log is $log"
exit $failed
