#!/usr/bin/env bash
# Trains what docs/depth.md asks of a GPU: full-width VGG11 with the setting of the packed runs of
# docs/results.md, Prune_L with r = 4 first, then Prune_R, seeds 1 to 6 of each.
#
#   bench/depth.sh                            all twelve runs, three at once
#   bench/depth.sh 550 --log-dir FOLDER       stops after 550 seconds; the same command continues
#   bench/depth.sh 60 --log-dir FOLDER --device cpu --preset quick     does it run?
#
# What follows the folder goes to train.py. PYTHON=/path/to/python uses that interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=36000 logs=logs
case ${1:-} in [1-9]*) seconds=$1; shift ;; esac
if [ "${1:-}" = --log-dir ]; then logs=${2:?a folder is missing}; shift 2; fi
if [ -z "${PYTHON:-}" ]; then
    bash runs.sh setup || exit 1
    PYTHON=.venv/bin/python
fi
export PYTHON logs
deadline=$(($(date +%s) + seconds))
one_run() {  # DEADLINE OPTION... TARGET SEED
    local left=$(($1 - $(date +%s)))
    [ "$left" -gt 5 ] || return 1
    timeout --kill-after=20 "$left" "$PYTHON" train.py --model vgg11 --target "${@: -2:1}" --r 4 \
        --scale-epochs 0.598 --precision bf16 --seed "${@: -1}" --log-dir "$logs" "${@:2:$# - 3}" |
        grep -v " epoch "
}
export -f one_run
printf '%s ' {L,R}\ {1..6} | xargs -n 2 -P 3 bash -c 'one_run "$@"' - "$deadline" "$@"
