#!/usr/bin/env python3
"""The tables of docs/study.md, from the logs of its runs.

    python bench/study.py                          # from bench/results/study/logs.tar.xz
    python bench/study.py --log-dir logs           # from your own runs of --preset small
    python bench/study.py --unpack study           # then: python analyze.py --log-dir study --figure 2
    python bench/study.py --pack logs              # the runs below logs/, without checkpoints, into that file
    python bench/study.py --archive bench/results/nvidia-h200-fig2.tar.xz      # the same of another packed file
"""
import argparse
import pathlib
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
from gst_ext import files, flatness  # noqa: E402
from gst_ext.statistics import correlations, measured, paired_test, partial_correlation, ranged  # noqa: E402

ARCHIVE = ROOT / "bench/results/study/logs.tar.xz"
KEPT = ("config.json", "epochs.jsonl", "done.json", "flatness.json", "flatness-train.json")
COLUMNS = {"last_acc": ("last accuracy (%)", 2), "best_acc": ("best accuracy (%)", 2),
           "mean_stability": ("mean stability (%)", 2), "min_stability": ("smallest stability (%)", 1),
           "churn": ("churn (%)", 1), "gap": ("train − test (points)", 1)}
PAIRS = (("L-r40", "S-r4"), ("L-r40", "S-r40"), ("S-r40", "S-r4"), ("S-r4", "none"), ("S-r40", "none"),
         ("L-r40", "none"), ("R-r40", "S-r4"), ("scratch-S", "none"))
NOISE_PAIRS = tuple((noise, other) for noise in analyze.NOISE[2:] for other in ("none", "L-r40-bnkeep"))


def signed(m):
    """A paired_test in words: the mean difference, its 95% interval by Student's t and p."""
    return ranged(m["mean"], m["ci95"], "+.2f") + (f", p = {m['p']:.2g}" if m["p"] is not None else "")


def coefficient(numbers, kind):
    """A correlation in words, with its 95% interval and p."""
    if not numbers[kind]:
        return "undefined"
    r, p = numbers[kind]
    return f"{ranged(r, numbers[f'{kind}_ci95'], '+.2f')}, p = {p:.2g}"


def table(header, rows):
    """Lines of a Markdown table; nothing without rows."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""] if rows else []


def methods_table(groups):
    """n, and mean with 95% interval of each of COLUMNS, a line for each method."""
    def cell(runs, key, digits):
        m = measured(of(runs, key))
        return ranged(m["mean"], m["ci95"], f".{digits}f")

    return table(["method", "n", *(title for title, _ in COLUMNS.values())],
                 [[method, str(len(runs)), *(cell(runs, key, digits) for key, (_, digits) in COLUMNS.items())]
                  for method, runs in groups.items()])


def pairs_table(groups, pairs):
    """Differences of accuracy (points) of pairs of runs with the same seed, with 95% interval and the t-test's p."""
    rows = []
    for a, b in pairs:
        first, second = ({run["seed"]: run for run in groups.get(method, ())} for method in (a, b))
        seeds = sorted(first.keys() & second.keys())
        if seeds:
            rows.append([f"{a} − {b}", str(len(seeds)), *(
                signed(paired_test([first[s][key] for s in seeds], [second[s][key] for s in seeds]))
                for key in ("last_acc", "best_acc"))])
    return table(["pair", "n", "last accuracy (points)", "best accuracy (points)"], rows)


def correlations_table(rows):
    """rows: (what, x, y) each: Pearson's and Kendall's coefficient with interval and p."""
    found = [(what, correlations(x, y)) for what, x, y in rows]
    return table(["between", "n", "Pearson r", "Kendall τ"],
                 [[what, str(c["n"]), coefficient(c, "pearson"), coefficient(c, "kendall")] for what, c in found])


def of(runs, key):
    return [run[key] for run in runs]


def left_out(runs):
    """A line on each run that the tables leave out, and why."""
    return [line for run in runs if run["problem"] for line in (f"Left out: {run['dir']}: {run['problem']}", "")]


def accuracy_rows(runs, name="mean stability"):
    return [(f"{name}, {title}", of(runs, "mean_stability"), of(runs, key))
            for key, title in (("last_acc", "last accuracy"), ("best_acc", "best accuracy"))]


def flatness_tables(groups, split):
    """Each measure, plain and adaptive, of one split: its τ with the last accuracy over all runs, with mean stability
    over those that prune while they train, and how far the control moves it. Other measurements than most are named."""
    dropped, there = [], [dict(run) for group in groups.values() for run in group  # with_flatness notes it in a run
                          if analyze.flatness_file(run["dir"], split).exists()]
    runs = analyze.with_flatness(there, dropped, argparse.Namespace(split=split))
    lines = left_out(dropped)
    if not runs:
        return lines
    pruned, rows = [run for run in runs if run["events"]], []
    for form in analyze.FORMS:
        for measure, title in analyze.MEASURES.items():
            key = form + measure
            all_of, events = ([run for run in some if run[key] is not None] for some in (runs, pruned))
            moved = [m for m in (flatness.moved_by_rescaling(run["flat"], key) for run in runs) if m is not None]
            cells = [coefficient(correlations(of(some, key), of(some, y)), "kendall")
                     for some, y in ((all_of, "last_acc"), (events, "mean_stability"))]
            rows.append([("adaptive " if form else "") + title, str(len(all_of)), cells[0], str(len(events)), cells[1],
                         f"{100 * max(moved):.0f}%" if moved else "–"])
    flats = [run["flat"] for run in runs]
    lines += [f"{flatness.in_words(flats, flats[0]['eigs'])}:", "", *table(
        ["measure", "n", "τ with last accuracy", "n", "τ with mean stability", "moved by rescaling"], rows)]
    three = [run for run in pruned if run["method"] in analyze.ADAM[1:]]
    stability, accuracy, trace = (of(three, key) for key in ("mean_stability", "last_acc", "adaptive_trace"))
    rest = partial_correlation(stability, accuracy, trace)
    if rest:
        lines += [f"Mean stability and last accuracy, n = {len(three)}: Pearson r = "
                  f"{coefficient(correlations(stability, accuracy), 'pearson')}; given the adaptive Tr(H): r = "
                  f"{coefficient(rest, 'pearson')}.", ""]
    return lines


def report(log_dir):
    """All tables, lines of Markdown: for each data set, setting and model what each method gave, and tests on it."""
    found = analyze.find_runs(log_dir)
    runs, lines = [run for run in found if not run["problem"]], left_out(found)
    settings = {}
    for run in runs:
        settings.setdefault((run["dataset"], run["setting"], run["model"]), []).append(run)
    for (dataset, setting, model), here in sorted(settings.items()):
        title = f"{model}, {dataset}, {setting}"
        flat, rates, noise = ({method: group for method in methods
                               if (group := [run for run in here if run["method"] == method])}
                              for methods in (analyze.FLAT["vgg11"], analyze.RATES["vgg11"], analyze.NOISE))
        lines += [f"### {title}", "", *methods_table(flat), *pairs_table(flat, PAIRS)]
        three = [run for method in analyze.ADAM[1:] for run in flat.get(method, ())]
        if three:
            rows = accuracy_rows(three) + [
                (f"{what}, last accuracy", of(three, key), of(three, "last_acc"))
                for key, what in (("min_stability", "smallest stability"), ("churn", "churn"),
                                   ("loss_rise", "rise in test loss"), ("below_99", "events below 99%"))]
            lines += ["Over the runs of S-r4, S-r40 and L-r40:", "", *correlations_table(rows)]
        if rates.keys() - flat.keys():
            few = set.intersection(*({run["seed"] for run in group} for group in rates.values()))
            rates = {m: [run for run in group if run["seed"] in few] for m, group in rates.items() if few}
            lines += [f"#### Rates, {title}", "", *methods_table(rates), *correlations_table(
                [row for target in "SRL" for row in accuracy_rows(
                    [run for method, group in rates.items() if method.startswith(target) for run in group],
                    name=f"Prune_{target}: mean stability")])]
        if noise.keys() - {"none"}:
            seeds = {run["seed"] for method, group in noise.items() if method != "none" for run in group}
            noise = {m: [run for run in group if run["seed"] in seeds] for m, group in noise.items()}
            noise = {m: group for m, group in noise.items() if group}
            lines += [f"#### Noise, {title}", "", *methods_table(noise), *pairs_table(
                noise, (("L-r40-bnkeep", "none"), *NOISE_PAIRS))]
        for split in ("train", "test"):
            found = flatness_tables(flat, split)
            lines += [f"#### Flatness, {title}, {split} images", "", *found] if found else []
    return lines


def pack(log_dir, archive):
    """Writes what the tables and figures need of the finished runs below log_dir; the same bytes for the same logs."""
    log_dir = pathlib.Path(log_dir)
    archive.parent.mkdir(parents=True, exist_ok=True)

    def plain(member):
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    with tarfile.open(archive, "w:xz", preset=9) as file:
        finished = sorted(log_dir.glob("*/*/*/seed*/done.json"))
        for done in finished:
            for path in (done.parent / name for name in KEPT):
                if path.exists():
                    file.add(path, str(path.relative_to(log_dir)), filter=plain)
    of = len(list(log_dir.glob("*/*/*/seed*/config.json")))
    print(f"{archive}: {len(finished)} of {of} runs are finished, {archive.stat().st_size / 2**20:.2f} MiB")


def unpack(folder, archive):
    files.require(archive.exists(), f"{archive} is missing: pack logs with --pack, or read some with --log-dir")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--log-dir", help="read these runs in place of the packed ones")
    action.add_argument("--unpack", metavar="DIR", help="put the packed logs there, for analyze.py --log-dir DIR")
    action.add_argument("--pack", metavar="LOGS", help="pack these logs")
    parser.add_argument("--archive", type=pathlib.Path, default=ARCHIVE, help="the packed file (default: the study's)")
    args = parser.parse_args(argv)
    logs = args.pack or args.log_dir
    try:
        files.require(not logs or pathlib.Path(logs).is_dir(), f"{logs}: there is no such folder")
        if args.pack:
            pack(args.pack, args.archive)
        elif args.unpack:
            unpack(args.unpack, args.archive)
        elif args.log_dir:
            print("\n".join(report(args.log_dir)))
        else:
            with tempfile.TemporaryDirectory() as folder:
                unpack(folder, args.archive)
                print("\n".join(report(folder)))
        return 0
    except (OSError, files.UserError) as error:
        return files.tell(error, "study.py")


if __name__ == "__main__":
    sys.exit(main())
