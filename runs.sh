#!/usr/bin/env bash
# Trains and draws the experiments of experiments.txt. Each block there is a target:
#
#   bash runs.sh fig2 --quick    Figure 2 in minutes: images of digits, narrow networks
#   bash runs.sh fig2            the figure itself: CIFAR-10, 80 runs of 325 epochs
#   bash runs.sh fig2 --seeds 1-3 --jobs 2 -- --device cpu --scale-epochs 0.08
#   bash runs.sh status   every target's runs: done, running, failed and why, waiting, time left
#   bash runs.sh test     ruff, then the tests (options go to pytest)
#   bash runs.sh bench    times a training step (options: bench/step.py) and, on a GPU, an epoch
#   bash runs.sh setup    the set-up alone; other commands do it when needed
#
#   --seeds 1-10 or 1,4,7     (default: the block's own, else 1-10)
#   --preset quick or small   smaller runs, which fit a CPU: minutes or hours
#   --quick                   --preset quick with the first two seeds
#   --jobs N                  processes at once (default: 1; with a preset one per core, up to 4)
#   --devices 0,1,...         one process for each of these GPUs
#   --slurm "sbatch options"  submit a job array, --jobs of its tasks at once, and a job that draws
#   --group N                 runs for each task of Slurm, in turn (default: 8 with a GPU, else 1)
#   --retry-failed            train failed runs again, too
#   --print                   only print the train.py commands, or what --slurm would submit
#   -- ...                    more options for every train.py command
#
# Finished runs are skipped and half-done ones continued: repeat the command after any stop.
# PYTHON=/path/to/python uses that interpreter as it is, without set-up.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "runs.sh: $*" >&2; exit 2; }

# --- The experiments ---

read_experiments() {  # writes each block to $work/block.NAME and the names to $work/targets
    awk -v path="$work/block." '
        /^#/ || !NF { next }
        /^\[[A-Za-z0-9_-]+\]$/ && !seen[$0]++ {
            name = substr($0, 2, length($0) - 2)
            printf "" > path name
            print name
            next
        }
        name && /^(--|(seeds|draw|quick|small|only): )/ { print > path name; next }
        { print NR ": " $0; exit 1 }' experiments.txt > "$work/targets" ||
        fail "experiments.txt, line $(tail -n 1 "$work/targets"): see the format in its head"
}

setting() { sed -n "s/^$2: *//p" "$work/block.$1"; }  # NAME KEY

expand_seeds() {  # 1-3,7 -> 1 2 3 7
    local part parts
    IFS=, read -ra parts <<< "$1"
    for part in "${parts[@]}"; do
        [[ $part =~ ^[0-9]+(-[0-9]+)?$ && 10#${part%-*} -le 10#${part#*-} ]] ||
            fail "--seeds $1: give a range or a list, such as 1-10 or 1,4,7"
        seq "${part%-*}" "${part#*-}"
    done
}

list_runs() {  # NAME: writes its runs to $work/runs/NAME, a line of options each
    local more="" seed all line
    [ -z "$preset" ] || more=" --preset $preset $(setting "$1" "$preset")"
    all=$(setting "$1" seeds)
    all=$(expand_seeds "${seeds:-${all:-1-10}}")
    [ -z "$quick" ] || [ "$seeds" ] || all=$(head -n 2 <<< "$all")
    [ "$preset" ] || [ "$(setting "$1" only)" != preset ] || all=""
    for seed in $all; do
        while read -r line; do
            [[ $line != --* ]] || echo "$line --seed $seed${more% }$options"
        done < "$work/block.$1"
    done > "$work/runs/$1"
}

# --- Set-up ---

setup() {  # .venv with the packages, then the extension; once, and after a change
    if [ "${PYTHON:-}" ]; then
        command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such interpreter"
        return
    fi
    PYTHON=.venv/bin/python
    install requirements.txt
    [ "$command" != test ] || install requirements-tests.txt
    [ -e .venv/build.done ] && [ -z "$(find csrc setup.py -newer .venv/build.done)" ] && return
    echo "set-up: building the extension"
    if PATH=.venv/bin:$PATH $PYTHON setup.py build_ext --inplace > .venv/build.log 2>&1; then
        touch .venv/build.done
    else
        echo "runs.sh: no extension is built (.venv/build.log): $(tail -n 1 .venv/build.log)" >&2
        [ "$command" != test ] || exit 1
    fi
}

install() {  # FILE: the packages that it lists
    ! cmp -s "$1" ".venv/$1.done" || return 0
    echo "set-up: installing $1 into .venv (PyTorch is several GB)"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' && python3 -m venv .venv ||
        fail "Python 3.10 or newer with venv is missing: install it (python3-venv), or set PYTHON="
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
    cp "$1" ".venv/$1.done"
}

# --- The command line ---

seeds="" preset="" quick="" jobs="" devices="" slurm="" group="" retry="" print=""
options="" logs=logs folders=""  # from what follows --; drawing needs the folders, too
known=" --seeds --preset --quick --jobs --devices --slurm --group --retry-failed --print -- "

read_options() {
    local given=" "
    while [ $# -gt 0 ]; do
        [[ $known == *" $1 "* ]] || fail "unknown option $1: bash runs.sh help lists them"
        [[ $given != *" $1 "* ]] || fail "$1 is given twice: give it once"
        given+="$1 "
        case $1 in
            --print) print=1 ;;
            --quick) quick=1 ;;
            --retry-failed) retry=$1 ;;
            --slurm)
                slurm=" "
                [[ $known == *" ${2:---} "* ]] || { slurm=$2; shift; } ;;
            --) shift; read_train_options "$@"; break ;;
            *)
                [ "${2:-}" ] || fail "$1 needs a value"
                printf -v "${1#--}" %s "$2"
                shift ;;
        esac
        shift
    done
    [ -z "$quick" ] || [ -z "$preset" ] || fail "--quick is a preset: give one of the two"
    preset=${quick:+quick}$preset
    check preset "quick|small" "quick or small"
    check jobs "[1-9][0-9]*" "1 or more"
    check group "[1-9][0-9]*" "1 or more"
    check devices "[^, ]+(,[^, ]+)*" "a list, such as 0,1"
    [ -z "$devices" ] || [ -z "$jobs$slurm" ] || fail "--devices excludes --jobs and --slurm"
    [ -z "$group" ] || [ "$slurm" ] || fail "--group is for --slurm: add that"
}

check() { [[ ${!1} =~ ^($2)?$ ]] || fail "--$1 ${!1}: give $3"; }  # OPTION PATTERN WHAT

read_train_options() {
    local name value
    while [ $# -gt 0 ]; do
        name=${1%%=*} value=${1#*=}
        [ "$name" != "$1" ] || value=${2:-}
        case $name in
            --seed | --seeds | --preset | --retry-failed)
                fail "$1 after --: give --seeds, --preset, --retry-failed before it" ;;
            --log-dir) logs=$value folders+=" $name $(printf %q "$value")" ;;
            --data-dir) folders+=" $name $(printf %q "$value")" ;;
        esac
        options+=$(printf ' %q' "$1")
        shift
    done
}

# --- The commands ---

status() {
    local name lists=()
    read_options "$@"
    [ -z "$jobs$devices$print$retry$slurm" ] ||
        fail "status takes --seeds, --preset, --quick and -- only"
    for name in $(cat "$work/targets"); do
        list_runs "$name"
        [ ! -s "$work/runs/$name" ] || lists+=("$work/runs/$name")
    done
    setup
    "$PYTHON" train.py --status "${lists[@]}"
}

run_target() {
    local name=$1 draw code=0
    shift
    read_options "$@"
    list_runs "$name"
    if [ "$print" ] && [ -z "$slurm" ]; then
        sed 's/^/python train.py /' "$work/runs/$name"
        return
    fi
    setup
    "$PYTHON" train.py --plan "$work/runs/$name" $retry > "$work/left"
    draw=$(setting "$name" draw)
    draw="analyze.py ${draw:---figure stability compute --experiment $name}$folders"
    draw="$(printf %q "$PYTHON") $draw"
    case $preset in
        quick) draw+=" --eigs 10 --images 64" ;;
        small) draw+=" --eigs 30 --images 64" ;;
    esac
    [ -z "$slurm" ] || { submit "$name" "$draw"; return; }
    train_here || code=$?
    [ "$code" -lt 128 ] || exit "$code"  # a signal
    [ "$code" = 0 ] || "$PYTHON" train.py --plan "$work/runs/$name" > /dev/null || true
    eval "$draw" || code=$?
    return "$code"
}

train_here() {  # the runs in $work/left
    local gpus=(${devices//,/ }) workers=${jobs:-1} cores n i
    cores=$(getconf _NPROCESSORS_ONLN)
    [ -z "$devices" ] || workers=${#gpus[@]}
    [ -z "$preset" ] || [ "$jobs$devices" ] || workers=$((cores < 4 ? cores : 4))
    # Not by the number of runs that are left: other threads, other rounding, other results.
    [ "$workers" = 1 ] ||
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > workers ? cores / workers : 1))}
    n=$(wc -l < "$work/left")
    n=$((workers < n ? workers : n))
    [ "$n" != 0 ] || return 0
    if [ "$n" = 1 ]; then
        ${devices:+env CUDA_VISIBLE_DEVICES=${gpus[0]}} "$PYTHON" train.py --runs "$work/left"
        return
    fi
    for ((i = 0; i < n; i++)); do
        awk -v n="$n" -v i="$i" 'NR % n == i' "$work/left" > "$work/left.$i"
        echo "${devices:+CUDA_VISIBLE_DEVICES=${gpus[i]}} '$PYTHON' train.py --runs '$work/left.$i'"
    done | xargs -P "$n" -L 1 env | cat  # on a terminal their progress bars would mix
}

submit() {  # NAME DRAW: a job array for the runs in $work/left, then a job that draws
    local folder files runs tasks most id start job=(--requeue --open-mode append)
    folder=$logs/slurm/$1-$(date +%Y%m%d-%H%M%S)-$$
    [[ $slurm != *gpu* ]] || group=${group:-8}
    group=${group:-1}
    runs=$(wc -l < "$work/left")
    tasks=$(((runs + group - 1) / group))
    most=$(scontrol show config 2> /dev/null | awk '$1 == "MaxArraySize" {print $3 - 1}' || true)
    [ "$tasks" -le "${most:=1000}" ] ||
        fail "$tasks tasks, but an array has $most: give --group $(((runs + most - 1) / most))"
    files=$folder
    if [ "$print" ]; then
        files=$work/slurm
        exec 3>&1
        sbatch() { echo "sbatch $*" >&3; echo ARRAY; }
    fi
    command -v sbatch > /dev/null || fail "--slurm: there is no sbatch"
    mkdir -p "$files"
    awk -v n="$group" -v list="$files/list." \
        '{ file = list (int((NR - 1) / n) + 1); print >> file; close(file) }' "$work/left"
    start="#!/bin/bash
cd $(printf %q "$PWD")
export OMP_NUM_THREADS=\${OMP_NUM_THREADS:-\$SLURM_CPUS_ON_NODE}"
    echo "$start
$2" > "$files/figure.sh"
    cat > "$files/task.sh" <<END
$start
# Slurm's signal before the time limit puts this task back into the queue, and it alone: the last
# task's SLURM_JOB_ID names the array.
trap 'again=1; kill -TERM \$child' USR1
trap 'kill -TERM \$child' TERM
$(printf %q "$PYTHON") train.py --runs $(printf %q "$folder")/list.\$SLURM_ARRAY_TASK_ID &
child=\$!
while wait \$child; code=\$?; kill -0 \$child 2> /dev/null; do :; done
[ -z "\$again" ] || scontrol requeue "\${SLURM_ARRAY_JOB_ID}_\$SLURM_ARRAY_TASK_ID"
exit \$code
END
    [ -z "$print" ] || tail -n +1 "$files"/*
    if [ "$tasks" != 0 ]; then
        id=$(sbatch --parsable "${job[@]}" --job-name "$1" --array "1-$tasks${jobs:+%$jobs}" \
            --signal B:USR1@60 --output "$folder/%a.log" $slurm "$folder/task.sh") ||
            { rm -r "$folder"; exit 1; }
        job+=(--dependency "afterany:${id%%;*}")
    fi
    sbatch "${job[@]}" --job-name "$1-figure" --output "$folder/figure.log" $slurm \
        "$folder/figure.sh" > /dev/null
    [ "$print" ] || echo "submitted $tasks tasks and a job that draws; see $folder"
}

work=$(mktemp -d)
mkdir "$work/runs"
trap 'rm -rf "$work"' EXIT
command=${1:-help}
[ $# = 0 ] || shift
case $command in
    setup) setup ;;
    test)
        setup
        "$PYTHON" -m ruff check --quiet
        OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 tests "$@" ;;
    bench)
        setup
        "$PYTHON" bench/step.py "$@"
        [ $# != 0 ] || "$PYTHON" bench/epoch.py ;;
    help | --help | -h) sed '1d;/^set/,$d;s/^# \{0,1\}//' "$0" ;;
    *)
        read_experiments
        [ "$command" != status ] || { status "$@"; exit; }
        grep -qxF -- "$command" "$work/targets" ||
            fail "unknown target $command: experiments.txt has $(xargs < "$work/targets")"
        run_target "$command" "$@" ;;
esac
