#!/usr/bin/env bash
# Every experiment of the paper as a list of train.py commands, and what runs them.
#
#   bash runs.sh fig2 --quick          Figure 2 in minutes: handwritten digits, narrow networks, two seeds
#   bash runs.sh fig2 --preset small   the same on a laptop in hours: few images of CIFAR-10, narrow networks
#   bash runs.sh fig2                  Figure 2 itself: CIFAR-10, 2 networks x 4 methods x 10 seeds, 325 epochs each
#   bash runs.sh fig2 --seeds 1-3 --jobs 2 -- --device cpu --scale-epochs 0.08
#   bash runs.sh fig3 --slurm "--partition gpu --gres=gpu:1 --time 8:00:00"    on a cluster (docs/cluster.md)
#   bash runs.sh status                every target's runs: done, running, failed and why, waiting, time left
#   bash runs.sh test                  ruff, then the tests (options go to pytest)
#   bash runs.sh bench                 what a training step costs, against plain PyTorch (options: bench/step.py), and
#                                      where there is a GPU, what an epoch costs (bench/epoch.py)
#   bash runs.sh setup                 only the set-up, which every other target does by itself
#
#   targets   fig2 fig3 fig4 fig5 fig6 figB1 figB2 tabC1 figC3 figD1 figD2 tabF1
#   --seeds   1-10, or 1,4,7            (default: the paper's number)
#   --preset  quick or small, a setting of train.py's that fits a CPU; --quick is --preset quick with seeds 1-2
#   --jobs    N processes at once      (default: 1; with a preset one per core, at most 4; with --slurm no limit)
#   --devices 0,1,... one process for each of these GPUs, which its runs share
#   --slurm   ["sbatch options"] submit the runs as a job array, of which --jobs tasks run at once, and a job that draws
#   --group   N runs for each of Slurm's tasks, which share its device
#             (default: 8 where the sbatch options ask for a GPU, else 1)
#   --retry-failed   train failed runs again, too
#   --print   print the train.py commands, or with --slurm all that would be submitted, and do nothing
#   -- ...    more options for every train.py command
#
# status takes --seeds, --preset, --quick and -- as a target does, to look at the same runs.
# Finished runs are skipped and half-done ones continued, so the same command picks up after any interruption.
# PYTHON=/path/to/python uses that interpreter as it is, without any set-up.
set -euo pipefail
cd "$(dirname "$0")"

# +------------------------------------------------------------------------------------------------------------------+
# | The experiments: `run` adds one run for the seed at hand                                                         |
# +------------------------------------------------------------------------------------------------------------------+

fig2() {
    for model in vgg11 resnet18; do
        run --model $model --target none
        run --model $model --target S --r 4
        run --model $model --target S --r 40
        run --model $model --target L --r 40
    done
}

fig3() {  # C1 and C2 too
    for r in 4 20 40 60 100 200 300; do
        for target in S R L; do
            run --model vgg11 --target $target --r $r
        done
    done
}

fig4() {
    for model in resnet18 resnet20 resnet56; do
        run --model $model --optimizer sgd --target none
        run --model $model --optimizer sgd --target S --r 30
        run --model $model --optimizer sgd --target S --r 60
    done
}

fig5() {
    run --model vgg11 --target none
    run --model vgg11 --target L --r 40 --prune-bn keep
    for k in 1 50 1105; do
        run --model vgg11 --target L --r 40 --noise zero --noise-batches $k
        run --model vgg11 --target L --r 40 --noise gauss --noise-batches $k
    done
}

fig6() {  # E1 to E6 too
    run --model vgg11 --target none
    run --model vgg11 --target S --r 4
    run --model vgg11 --target S --r 40
    run --model vgg11 --target R --r 40
    run --model vgg11 --target L --r 40
    run --model vgg11 --target S --scratch
}

figB1() { [ -z "$preset" ] || run --model vgg19 --target none; }  # else ImageNet's weights, or the runs there are

figD1() { :; }

figB2() {
    run --model vgg11 --target none
    run --model vgg11 --score ebn --target S --r 4
    run --model vgg11 --score ebn --target S --r 40
    run --model vgg11 --score ebn --target L --r 40
    run --model resnet18 --target none
    run --model resnet18 --score ebn-signed --s 3 4 5 6 --target S --r 4
    run --model resnet18 --score ebn-signed --s 3 4 5 6 --target S --r 40
    run --model resnet18 --score ebn-signed --s 3 4 5 6 --target L --r 40
}

tabC1() {  # 46% of all parameters (Figure 2's runs), then 59%
    for p in "0.25 0.4 0.25 0.95" "0.25 0.8 0.25 0.95"; do
        run --model resnet18 --target S --r 4 --p $p
        run --model resnet18 --target S --r 40 --p $p
        run --model resnet18 --target L --r 40 --p $p
    done
}

figC3() {
    run --model resnet18 --optimizer sgd --target none
    for p in 0.06 0.1; do
        run --model resnet18 --optimizer sgd --target S --s 24x16 --e 100x16 --r 1 --p ${p}x16
    done
}

figD2() {
    run --model vgg11 --target none
    run --model vgg11 --target L --r 40
    for k in 89 630 1220 2480; do
        run --model vgg11 --target L --r 40 --noise zero --noise-batches $k --noise-restore --noise-filters all \
            --test-batch-size 256
    done
}

tabF1() {
    local base="--model resnet18 --lr 0.0001 --epochs 4000 --lrs 2000 --augment"
    local prune="--score ebn-signed --p 0 0 0 0.7"
    case $preset in  # in about as many epochs as the preset makes of the other targets' 325
        quick) base+=" --scale-epochs 0.004" ;;
        small) base+=" --dataset cifar100 --scale-epochs 0.008" ;;
        *) base+=" --dataset cifar100" ;;
    esac
    run $base --target none
    run $base --target S --scratch $prune
    run $base --target S $prune --s 2500x4 --e 3250x4 --r 750
    run $base --target L $prune --s 2500x4 --e 3250x4 --r 750
}

# +------------------------------------------------------------------------------------------------------------------+
# | Set-up                                                                                                           |
# +------------------------------------------------------------------------------------------------------------------+

fail() { echo "runs.sh: $*" >&2; exit 2; }
cores() { getconf _NPROCESSORS_ONLN; }

setup() {  # .venv with the requirements, then the extension; what is done and unchanged is left alone
    if [ "${PYTHON:-}" ]; then
        command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: there is no such interpreter"
        return
    fi
    PYTHON=.venv/bin/python
    cmp -s requirements.txt .venv/requirements.done || install
    [ -e .venv/build.done ] && [ -z "$(find csrc setup.py -newer .venv/build.done)" ] && return
    echo "set-up: building the extension"
    if PATH=.venv/bin:$PATH $PYTHON setup.py build_ext --inplace > .venv/build.log 2>&1; then
        touch .venv/build.done
    else
        echo "runs.sh: the extension is not built ($(grep '^setup.py: ' .venv/build.log | tail -n 1 | grep . ||
            echo "see .venv/build.log")); the plain PyTorch reference takes its place" >&2
        [ $target != test ] || exit 1
    fi
}

install() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "python3 is missing or older than 3.10: install a newer Python, or name one with PYTHON="
    echo "set-up: installing requirements.txt into .venv (PyTorch is several GB; once)"
    python3 -m venv .venv || fail "python3 cannot make a virtual environment: install its venv module (python3-venv)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
        fail "the packages in requirements.txt cannot be installed: mend what pip says above, then start this again"
    cp requirements.txt .venv/requirements.done
}

# +------------------------------------------------------------------------------------------------------------------+
# | Running a target                                                                                                 |
# +------------------------------------------------------------------------------------------------------------------+

run() { echo "$* --seed $seed$more" >> "$list"; }

seeds_of() {  # 1-3,7 -> 1 2 3 7
    local part parts
    IFS=, read -ra parts <<< "$1"
    for part in "${parts[@]}"; do
        [[ $part =~ ^[0-9]+(-[0-9]+)?$ && 10#${part%-*} -le 10#${part#*-} ]] ||
            fail "--seeds $1: give a range or a list, such as 1-10 or 1,4,7"
        seq "${part%-*}" "${part#*-}"
    done
}

places() {  # where train.py's options put the logs, and where the data are
    while [ $# -gt 0 ]; do
        case $1 in
            --log-dir) logs=${2:-} ;;
            --log-dir=*) logs=${1#*=} ;;
            --data-dir) data=${2:-} ;;
            --data-dir=*) data=${1#*=} ;;
        esac
        shift
    done
}

read_options() {  # of a target or of status
    while [ $# -gt 0 ]; do
        case $1 in
            --seeds | --preset | --jobs | --devices | --group)
                [ "${2:-}" ] || fail "$1 needs a value"
                printf -v "${1#--}" %s "$2"
                shift ;;
            --print) print=1 ;;
            --quick) preset=quick own=1-2 ;;
            --retry-failed) retry=$1 ;;
            --slurm)
                slurm=" "
                case ${2:-} in
                    "" | --seeds | --preset | --jobs | --devices | --group | --print | --quick | --retry-failed | --) ;;
                    *) slurm=$2; shift ;;
                esac ;;
            --)
                shift
                [ $# = 0 ] || options=$(printf ' %q' "$@")
                places "$@"
                break ;;
            *) fail "unknown option $1: bash runs.sh help lists them" ;;
        esac
        shift
    done
    [[ $preset =~ ^(|quick|small)$ ]] || fail "--preset $preset: give quick or small"
    [[ ${jobs:-1} =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs: give a number of processes, 1 or more"
    [[ ${group:-1} =~ ^[1-9][0-9]*$ ]] || fail "--group $group: give a number of runs, 1 or more"
    [[ ${devices:-0} =~ ^[^,\ ]+(,[^,\ ]+)*$ ]] || fail "--devices $devices: give a list of GPUs, such as 0,1"
    [ -z "$devices" ] || [ -z "$jobs$slurm" ] || fail "--devices excludes --jobs and --slurm: choose one"
    [ -z "$group" ] || [ "$slurm" ] || fail "--group is for --slurm: add that, or leave it out"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
}

list_runs() {  # writes $work/<experiment>, a line of train.py options for each run
    local experiment=$1 more="${preset:+ --preset $preset}$options" usual=${own:-1-10} all seed
    case $1 in
        tabF1) usual=${own:-1-3} ;;
        figB1 | figD1) usual=1 ;;
    esac
    list=$work/$1
    : > "$list"
    all=$(seeds_of "${seeds:-$usual}")
    for seed in $all; do "$experiment"; done
}

status() {
    local seeds="" jobs="" devices="" group="" print="" preset="" own="" retry="" slurm="" options="" logs=logs data=""
    local lists=()
    read_options "$@"
    [ -z "$jobs$devices$print$retry$slurm" ] || fail "status takes --seeds, --preset, --quick and -- only"
    for name in $targets; do
        list_runs "$name"
        [ ! -s "$list" ] || lists+=("$list")
    done
    setup
    "$PYTHON" train.py --status "${lists[@]}"
}

run_target() {
    local experiment=$1 seeds="" jobs="" devices="" group="" print="" preset="" own="" retry="" slurm="" options=""
    local logs=logs data="" flat="" left failed=0
    shift
    read_options "$@"
    list_runs "$experiment"
    if [ "$print" ] && [ -z "$slurm" ]; then
        sed 's/^/python train.py /' "$list"
        return
    fi
    setup
    left=$work/left
    case $preset in
        quick) flat="--eigs 10 --images 64" ;;
        small) flat="--eigs 30 --images 64" ;;
    esac
    [ -z "$data" ] || flat+=" --data-dir $(printf %q "$data")"
    "$PYTHON" train.py --plan "$list" $retry > "$left" || exit $?
    if [ "$slurm" ]; then
        submit
    else
        train_here || failed=1
        draw "$experiment" "$logs" "$flat" || failed=1
        return $failed
    fi
}

train_here() {
    local device=(${devices//,/ }) workers=${jobs:-1} worker runs
    [ -z "$devices" ] || workers=${#device[@]}
    [ -z "$preset" ] || [ "$jobs$devices" ] || workers=$(($(cores) < 4 ? $(cores) : 4))
    runs=$(wc -l < "$left")
    workers=$((workers < runs ? workers : runs))
    [ "$workers" != 0 ] || return 0
    if [ "$workers" = 1 ]; then
        ${device:+env CUDA_VISIBLE_DEVICES=$device} "$PYTHON" train.py --runs "$left"
        return
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(cores) / workers > 0 ? $(cores) / workers : 1))}
    for ((worker = 0; worker < workers; worker++)); do
        awk -v n="$workers" -v k=$worker 'NR % n == k' "$left" > "$work/part.$worker"
        echo "${device[worker]:+CUDA_VISIBLE_DEVICES=${device[worker]}} '$PYTHON' train.py --runs $work/part.$worker"
    done | xargs -P "$workers" -L 1 env | cat
}

submit() {  # the runs left as a job array, and a job that draws when all its tasks have ended
    local folder tasks python id
    [[ -n "$group" || $slurm != *gpu* ]] || group=8
    folder=$logs/slurm/$experiment-$(date +%Y%m%d-%H%M%S)-$$
    python=$(printf %q "$PYTHON")
    mkdir "$work/slurm"
    split -a 4 -d -l "${group:-1}" --numeric-suffixes=1 "$left" "$work/slurm/list."
    tasks=$(find "$work/slurm" -name 'list.*' | wc -l)
    job_script > "$work/slurm/task.sh" <<END
# The runs of one list, each from where it stands. The time limit's signal puts the task back into the queue.
trap 'again=1; kill -TERM \$child' USR1
trap 'kill -TERM \$child' TERM
$python train.py --runs $(printf %q "$folder")/list.\$(printf %04d "\$SLURM_ARRAY_TASK_ID") &
child=\$!
while wait \$child; code=\$?; kill -0 \$child 2> /dev/null; do :; done
[ -z "\$again" ] || scontrol requeue "\$SLURM_JOB_ID"
exit \$code
END
    PYTHON=$python draw_command "$experiment" "$(printf %q "$logs")" "$flat" | job_script > "$work/slurm/figure.sh"

    if [ "$print" ]; then
        (cd "$work/slurm" && tail -n +1 -v -- *; echo)
    else
        command -v sbatch > /dev/null || fail "sbatch is missing: --slurm is for a machine that submits to Slurm"
        mkdir -p "$logs/slurm"
        cp -r "$work/slurm" "$folder"
    fi
    set -- --requeue --open-mode append
    if [ "$tasks" != 0 ]; then
        sbatch_ "$@" --job-name "$experiment" --array "1-$tasks${jobs:+%$jobs}" --signal B:USR1@60 \
            --output "$folder/%a.log" $slurm "$folder/task.sh"
        set -- "$@" --dependency "afterany:$id"
    fi
    sbatch_ "$@" --job-name "$experiment-figure" --output "$folder/figure.log" $slurm "$folder/figure.sh"
    [ "$print" ] || echo "submitted $tasks tasks and the job that draws; their lists and logs are in $folder"
}

job_script() {
    cat <<END
#!/bin/bash
cd $(printf %q "$PWD")
export OMP_NUM_THREADS=\${OMP_NUM_THREADS:-\$SLURM_CPUS_ON_NODE}
END
    cat
}

sbatch_() {  # submits, or prints; leaves the job's number in id
    id=ARRAY
    if [ "$print" ]; then
        echo "sbatch $*"
    else
        id=$(sbatch --parsable "$@") || exit 1
        id=${id%%;*}
    fi
}

draw_command() {  # target, log directory, options
    local names
    case $1 in
        fig3) names="--figure 3 C1 C2" ;;
        fig6) names="--figure 6 E1 E2 E3 E4 E5 E6 flatness density" ;;
        fig*) names="--figure ${1#fig}" ;;
        tab*) names="--table ${1#tab}" ;;
    esac
    echo $PYTHON analyze.py $names --log-dir "$2" $3
}

draw() { eval "$(PYTHON=$(printf %q "$PYTHON") draw_command "$1" "$(printf %q "$2")" "$3")"; }

targets="fig2 fig3 fig4 fig5 fig6 figB1 figB2 tabC1 figC3 figD1 figD2 tabF1"
target=${1:-help}
[ $# = 0 ] || shift
case $target in
    fig[2-6] | figB[12] | tabC1 | figC3 | figD[12] | tabF1) run_target "$target" "$@" ;;
    status) status "$@" ;;
    setup) setup ;;
    test)
        setup
        "$PYTHON" -m ruff check --quiet
        OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -q -n 2 tests "$@"
        ;;
    bench)
        setup
        $PYTHON bench/step.py "$@"
        [ $# != 0 ] || ! $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
            $PYTHON bench/epoch.py
        ;;
    help | --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" ;;
    *) fail "unknown target $target: bash runs.sh help lists them" ;;
esac
