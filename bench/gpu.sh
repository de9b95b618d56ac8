#!/usr/bin/env bash
# Everything that only a GPU can say, in a quarter of an hour: builds the extension, tests it there, times steps and
# epochs.
#
#   bench/gpu.sh                                   on a machine with a GPU, any card
#   bench/gpu.sh --results folder                  (default: bench/results)
#   bench/gpu.sh --device cpu --results folder     tiny sizes on a CPU: does it all run
#
# Each part has a time limit of its own, and one that fails or is late does not stop the next. Results are written as
# soon as they are known and named after the card: <card>-step.json, -epoch.json, -at-once.json, -multiples.json, and
# all that is said in <card>-gpu.log.
# PYTHON=/path/to/python uses that interpreter as it is, without any set-up.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda results=bench/results
while [ $# -gt 0 ]; do
    case $1 in
        --device | --results) [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"; shift 2 ;;
        *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
    esac
done
if [ -z "${PYTHON:-}" ]; then
    bash runs.sh setup || exit 1
    PYTHON=.venv/bin/python
fi

SECONDS=0 late=1140 failed=0
mkdir -p "$results"
machine=$("$PYTHON" - "$device" <<'EOF'
import sys
sys.path.insert(0, "bench")
import step
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no CUDA device here: --device cpu tries it all out on a CPU, with tiny sizes")
print(step.results_path(step.describe_machine(torch.device(sys.argv[1])), "").stem.removesuffix("-"))
EOF
) || exit 2
log=$results/$machine-gpu.log
: > "$log"

part() {  # its name, its limit in seconds, the command
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    [ "$limit" -le $((late - SECONDS)) ] || limit=$((late - SECONDS))
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left" | tee -a "$log"
        failed=1
        return
    fi
    echo "== $name: at most $limit s" | tee -a "$log"
    timeout --signal=TERM --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log" || code=$?
    case $code in
        0) code="done" ;;
        124 | 137) code="late, stopped"; failed=1 ;;
        *) code="failed with code $code"; failed=1 ;;
    esac
    echo "== $name: $code after $((SECONDS - began)) s" | tee -a "$log"
}

step() { "$PYTHON" -u bench/step.py --device "$device" --out "$results/$machine-step.json" "$@"; }
epoch() { "$PYTHON" -u bench/epoch.py --device "$device" "$@"; }
export -f step epoch
export PYTHON device results machine

if [ "$device" = cuda ]; then
    # What has a target first, and many runs at once with what time is left: what is late is lost.
    part build 150 env GST_CUDA=1 "$PYTHON" setup.py build_ext --inplace
    part tests 120 "$PYTHON" -m pytest -q -n 8 tests -k cuda
    part epochs 400 bash -c 'epoch --out "$results/$machine-epoch.json" --precisions bf16 --rounds 2 --epochs 1 \
        --variants "eager masked" "eager masked, DataLoader" compile ours "ours x8"'
    part steps 240 bash -c 'step --rounds 3 --steps 20 --batches 20 --points unpruned end \
        --variants "eager dense" "eager masked" ext'
    part at-once 240 bash -c 'epoch --out "$results/$machine-at-once.json" --precisions bf16 --rounds 2 --epochs 1 \
        --variants ours "ours S r4" "ours x2" "ours x4" "ours x16"'
    part multiples 120 bash -c 'epoch --out "$results/$machine-multiples.json" --precisions bf16 --rounds 2 --epochs 1 \
        --models vgg11 --variants ours "ours S r4 m8" "ours S r4 m16" "ours S r4 m32" "ours S r4 m64" \
        "ours scratch m8" "ours scratch m16" "ours scratch m32" "ours scratch m64"'
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    part build 150 "$PYTHON" setup.py build_ext --inplace
    part tests 70 "$PYTHON" -m pytest -q tests/test_ext.py -k cuda
    tiny=(--width 0.05 --batch-size 16 --rounds 2 --models vgg11)
    part epochs 90 bash -c 'epoch --out "$results/$machine-epoch.json" --precisions fp32 --epochs 1 --images 100 "$@" \
        --variants "eager masked" "eager masked, DataLoader" ours "ours x2" "ours S r4"' epochs "${tiny[@]}"
    part steps 60 bash -c 'step --steps 1 --batches 1 --points unpruned --variants "eager masked" ext "$@"' \
        steps "${tiny[@]}"
    part at-once 60 bash -c 'epoch --out "$results/$machine-at-once.json" --precisions fp32 --epochs 1 --images 100 \
        "$@" --variants ours "ours x4" "ours S r4 x8"' at-once "${tiny[@]}"
fi
exit $failed
