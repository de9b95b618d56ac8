#!/usr/bin/env bash
# Part of Figure 2 on one GPU in a stated time: vgg11 without pruning, with Prune_S r 4 and r 40, and Prune_L r 40; in
# bf16, unless --precision says otherwise.
#
#   bench/reproduce.sh 60              an hour: plans what fits, trains, draws
#   bench/reproduce.sh 9 60            the same in slices of 9 minutes: call it until it says that nothing is left
#   bench/reproduce.sh 2 4 --device cpu --dataset digits --width 0.05     more options for every run, here a dry run
#
# The first call measures an epoch and an epoch with a pruning event, and plans for the whole time: the full 325 epochs
# for as many seeds as fit, ten at most; where not even three fit, three seeds with all epochs scaled down. The plan
# stays in logs/reproduce/, the runs are where runs.sh fig2 would put them, and the figure is in figures/. A slice ends
# with SIGTERM, so that at most an epoch of each run is lost. LOGS and FIGURES name other folders.
# PYTHON=/path/to/python uses that interpreter as it is, without any set-up.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} =~ ^[0-9]+$ && ${2:-$1} =~ ^([0-9]+|--.*)$ ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
minutes=$1 total=$1
shift
[[ ! ${1:-} =~ ^[0-9]+$ ]] || { total=$1; shift; }
start=$SECONDS logs=${LOGS:-logs}
plan=$logs/reproduce
if [ -z "${PYTHON:-}" ]; then
    bash runs.sh setup
    PYTHON=.venv/bin/python
fi
mkdir -p "$plan"

if [ ! -s "$plan/runs" ]; then
    "$PYTHON" - "$plan" "$total" --log-dir "$logs" --precision bf16 "$@" <<'EOF'
import pathlib, shlex, sys
sys.path[:0] = [".", "bench"]
import epoch, train
from gst_ext import files
from gst_ext.runs import choose_device

folder, minutes, more = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
METHODS, FEWEST, MOST = epoch.METHODS, 3, 10


def lines(seeds, scale):
    """Seed by seed, so that a plan cut short still holds whole seeds."""
    scaled = [] if scale == 1 else ["--scale-epochs", f"{scale:.3f}"]
    return [shlex.join(["--model", "vgg11", *method, *more, *scaled, "--seed", str(seed)])
            for seed in range(1, seeds + 1) for method in METHODS.values()]


def seconds(seeds, scale, epoch_seconds, event_seconds):
    return sum(epoch.run_seconds(train.parse_options(shlex.split(line)), epoch_seconds, event_seconds)
               for line in lines(seeds, scale))


def main():
    options = train.parse_options(shlex.split(lines(1, 1)[0]))
    job = {name: getattr(options, name)
           for name in ("model", "width", "batch_size", "device", "precision", "dataset", "data_dir")}
    on_gpu = choose_device(options).type == "cuda"
    pace = {}
    with epoch.tempfile.TemporaryDirectory() as job["folder"]:
        train.load_data(options.dataset, options.data_dir)  # a download should fail, or be done, before the clock runs
        for name in ("ours x8", "ours S r4 x8") if on_gpu else ("ours", "ours S r4"):
            job["variant"] = name
            with epoch.step.start_worker(job, epoch.__file__) as worker:
                epoch.step.ask(worker, 0)
                answer = epoch.step.ask(worker, 2)
            files.require("failed" not in answer, f"an epoch of {name} failed: {answer.get('failed')}", 1)
            pace[name] = answer["seconds"] / (epoch.OURS | epoch.PRUNINGS)[name]
    one, other = pace.values()
    cost = one, max(0, other - one)
    budget = 60 * minutes * 0.85  # start, evaluation of what is cut off, and what is not foreseen take the rest
    scale, seeds = 1.0, next((n for n in range(MOST, FEWEST - 1, -1) if seconds(n, 1, *cost) <= budget), FEWEST)
    while seconds(seeds, scale, *cost) > budget and scale > 0.02:
        scale = round(scale * 0.95, 3)
    runs = lines(seeds, scale)
    files.write_json(folder / "plan.json", {
        "minutes": minutes, "seconds_per_epoch_and_run": pace, "seeds": seeds, "scale_epochs": scale,
        "epochs": train.schedule(train.parse_options(shlex.split(runs[0])))["epochs"], "runs": len(runs),
        "expected_minutes": round(seconds(seeds, scale, *cost) / 60, 1)})
    files.write_atomically(folder / "runs", "".join(line + "\n" for line in runs).encode())


try:
    main()
except files.UserError as error:
    sys.exit(f"reproduce.sh: {error}")
EOF
fi
cat "$plan/plan.json"

left=$((60 * minutes - (SECONDS - start) - 20))  # the figure takes seconds
code=0
timeout --signal=TERM --kill-after=20 "$((left > 1 ? left : 1))" "$PYTHON" train.py --runs "$plan/runs" || code=$?
[[ $code =~ ^(0|124|137)$ ]] || { echo "reproduce.sh: some runs failed (code $code)" >&2; exit 1; }
unfinished=$("$PYTHON" train.py --plan "$plan/runs")  # it says on stderr what is done
[ -z "$unfinished" ] || echo "reproduce.sh: not all is trained yet; the same command goes on"
if compgen -G "$logs/*/vgg11/*/seed*/done.json" > /dev/null; then
    "$PYTHON" analyze.py --figure 2 --log-dir "$logs" --fig-dir "${FIGURES:-figures}"
fi
