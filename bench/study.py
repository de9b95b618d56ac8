#!/usr/bin/env python3
"""The tables of docs/study-tables.md, from the logs of the study's runs.

    python bench/study.py                     # from bench/results/study/logs.tar.xz
    python bench/study.py --log-dir logs      # from your own runs of --preset small
    python bench/study.py --unpack study      # then: python analyze.py --log-dir study ...
    python bench/study.py --pack logs         # the finished runs below logs/, without weights
"""
import argparse
import functools
import pathlib
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
from appendix_figures import (  # noqa: E402
    depth_rows, describe_flatness, flatness_path, measure_of, moved_by_rescaling, pruning_cells,
    read_flatness)
from gst_ext.errors import UserError, check, report_error  # noqa: E402
from gst_ext.statistics import (  # noqa: E402
    correlations, format_ci, format_test, partial_correlation, summary_stats)

ARCHIVE = ROOT / "bench/results/study/logs.tar.xz"
PACKED = ("config.json", "epochs.jsonl", "done.json", "flatness.json", "flatness-train.json")
COLUMNS = {"last_acc": ("last accuracy (%)", 2), "best_acc": ("best accuracy (%)", 2),
           "mean_stability": ("mean stability (%)", 2),
           "min_stability": ("smallest stability (%)", 1), "churn": ("churn (%)", 1),
           "gap": ("train − test (points)", 1)}
PAIRS = (("L-r40", "S-r4"), ("L-r40", "S-r40"), ("S-r40", "S-r4"), ("S-r4", "none"),
         ("S-r40", "none"), ("L-r40", "none"), ("R-r40", "S-r4"), ("scratch-S", "none"))
NOISE_PAIRS = (("L-r40-bnkeep", "none"), *(
    (f"{kind}-{k}", other) for kind in ("zero", "gauss") for k in (1, 50, 1105)
    for other in ("none", "L-r40-bnkeep")))
AFTERWARDS = "(looked at afterwards)"  # not registered before the runs
MEASURES = analyze.MEASURES | {
    "tr_f": f"Tr(H), exact {AFTERWARDS}", "c_over_f": "Tr(C)/Tr(F)", "trace": "Tr(H), Hutch++",
    "tic_trace": "Tr(C)/Tr(H), Hutch++"}
THREE = ("S-r4", "S-r40", "L-r40")


def values(runs, key):
    return [run[key] for run in runs]


def coefficient(numbers, kind):
    """Formats a correlation with its interval and p."""
    if not numbers[kind]:
        return "undefined"
    r, p = numbers[kind]
    return format_test(r, numbers[f"{kind}_ci95"], p)


def table(head, rows):
    """Returns the lines of a Markdown table; none without rows."""
    lines = [[cell.replace("|", "\\|") for cell in line]
             for line in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""] if rows else []


def methods_table(groups):
    """A line for each method: n, and means with 95% intervals."""
    rows = []
    for runs in groups.values():
        stats = [(summary_stats(values(runs, key)), digits)
                 for key, (_, digits) in COLUMNS.items()]
        rows.append([runs[0]["label"], str(len(runs)), *(
            format_ci(s["mean"], s["ci95"], f".{digits}f") for s, digits in stats)])
    return table(["method", "n", *(title for title, _ in COLUMNS.values())], rows)


def pairs_table(groups, pairs):
    """A line for each pair of methods: the differences of accuracy of runs with the same seed."""
    rows = []
    for a, b in pairs:
        tests = [test for which in ("last", "best") if a in groups and b in groups for test in
                 analyze.accuracy_differences({b: groups[b], a: groups[a]}, which).values()]
        if tests:
            labels = " − ".join(groups[name][0]["label"] for name in (a, b))
            rows.append([labels, str(tests[0]["n"]), *(
                format_test(test["mean"], test["ci95"], test["p"]) for test in tests)])
    return table(["pair", "n", "last accuracy (points)", "best accuracy (points)"], rows)


def correlations_table(rows):
    """A line for each (name, x, y)."""
    numbers = [(name, correlations(x, y)) for name, x, y in rows]
    return table(["between", "n", "Pearson r", "Kendall τ"], [
        [name, str(c["n"]), coefficient(c, "pearson"), coefficient(c, "kendall")]
        for name, c in numbers])


def accuracy_rows(runs, name="mean stability"):
    return [(f"{name}, {title}", values(runs, "mean_stability"), values(runs, key))
            for key, title in (("last_acc", "last accuracy"), ("best_acc", "best accuracy"))]


def depth_tables(groups):
    """Depth and frequency (docs/depth.md) of each schedule with several of both."""
    lines = []
    for cells in pruning_cells(groups):
        by_rate, tests, _, answers = depth_rows(cells)
        if len(by_rate) > 1 and tests:
            for rows in (by_rate, tests):
                lines += table(list(rows[0]), [[str(cell) for cell in row.values()]
                                               for row in rows])
            lines += [f"- {line}" for line in answers] + [""]
    return lines


def left_out(runs):
    return [line for run in runs if run["problem"]
            for line in (f"Left out: {run['dir']}: {run['problem']}", "")]


def flatness_tables(groups, split):
    """Kendall's τ of each measure with accuracy over all runs, with stability over pruned ones."""
    measured = [run for runs in groups.values() for run in runs
                if flatness_path(run["dir"], split).exists()]
    runs = analyze.attach_flatness(measured, functools.partial(
        read_flatness, split=split, measure=None))
    lines, runs = left_out(runs), [run for run in runs if not run["problem"]]
    if not runs:
        return lines
    rows, pruned = [], [run for run in runs if run["events"]]
    for form in analyze.FORMS:
        for measure, title in MEASURES.items():
            key, cells = form + measure, []
            for run in runs:
                run[key] = measure_of(run["flat"], key)
            for some, y in ((runs, "last_acc"), (pruned, "mean_stability")):
                known = [run for run in some if run[key] is not None]
                c = correlations(values(known, key), values(known, y))
                cells += [str(len(known)), coefficient(c, "kendall")]
            moved = [m for run in runs if (
                m := moved_by_rescaling(run["flat"], key)) is not None]
            rows.append([("adaptive " if form else "") + title, *cells,
                         f"{100 * max(moved):.0f}%" if moved else "–"])
    flats = values(runs, "flat")
    lines += [f"{describe_flatness(flats, flats[0]['eigs'])}:", "", *table(
        ["measure", "n", "τ with last accuracy", "n", "τ with mean stability",
         "moved by rescaling"], rows)]
    three = [run for run in runs if run["method"] in THREE]
    stability, accuracy = values(three, "mean_stability"), values(three, "last_acc")
    stated = [coefficient(correlations(stability, accuracy), "pearson")]
    for key, name in (("adaptive_trace", "the adaptive Tr(H)"),
                      ("adaptive_tr_f", f"the exact one {AFTERWARDS}")):
        rest = partial_correlation(stability, accuracy, values(three, key))
        stated += [f"given {name}: r = {coefficient(rest, 'pearson')}"] if rest else []
    if len(stated) > 1:
        lines += [f"Mean stability and last accuracy, n = {len(three)}: Pearson r = "
                  f"{'; '.join(stated)}.", ""]
    return lines


def report(log_dir):
    """Returns all tables as lines of Markdown, for each data set, setting and model."""
    runs, blocks = analyze.find_runs(log_dir), analyze.read_experiments()
    fig2, fig3, fig5, fig6 = (analyze.select_runs(blocks[name], runs)[0]
                              for name in ("fig2", "fig3", "fig5", "fig6"))
    everything = analyze.select_runs(None, runs)[0]
    lines = left_out(runs)
    for place, model in sorted({(place, model) for selection in (fig2, fig3, fig5, fig6, everything)
                                for place, models in selection.items() for model in models}):
        methods, rates, noise, every = (selection.get(place, {}).get(model, {}) for selection in (
            fig6 if model in fig6.get(place, ()) else fig2, fig3, fig5, everything))
        methods = methods or ({} if rates or noise else every)
        title = analyze.title_of({model: methods or rates or noise}, place[0])
        lines += [f"### {title}", "", *methods_table(methods), *pairs_table(methods, PAIRS)]
        three = [run for name in THREE for run in methods.get(name, ())]
        if three:
            labels = "; ".join(dict.fromkeys(values(three, "label")))
            rows = accuracy_rows(three) + [
                (f"{what}, last accuracy", values(three, key), values(three, "last_acc"))
                for key, what in (("min_stability", "smallest stability"), ("churn", "churn"),
                                  ("loss_rise", "rise in test loss"),
                                  ("below_99", "events below 99%"))]
            lines += [f"Over the runs of {labels}:", "", *correlations_table(rows)]
        if rates.keys() - methods.keys():
            seeds = set.intersection(*({run["seed"] for run in same} for same in rates.values()))
            rates = {name: [run for run in same if run["seed"] in seeds]
                     for name, same in rates.items() if seeds}
            rows = [row for target in "SRL" if any(name[0] == target for name in rates)
                    for row in accuracy_rows(
                        [run for name, same in rates.items() if name[0] == target for run in same],
                        f"Prune_{target}: mean stability")]
            lines += [f"#### Rates, {title}", "", *methods_table(rates), *correlations_table(rows)]
        tables = depth_tables(every)
        lines += [f"#### Depth and frequency, {title}", "", *tables] if tables else []
        if noise.keys() - {"none", "L-r40-bnkeep"}:
            seeds = {run["seed"] for name, same in noise.items() if name != "none" for run in same}
            noise = {name: paired for name, same in noise.items()
                     if (paired := [run for run in same if run["seed"] in seeds])}
            lines += [f"#### Noise, {title}", "", *methods_table(noise),
                      *pairs_table(noise, NOISE_PAIRS)]
        for split in ("train", "test"):
            tables = flatness_tables(methods, split)
            lines += [f"#### Flatness, {title}, {split} images", "", *tables] if tables else []
    return lines


def pack(log_dir, archive):
    """Packs what tables and figures need of the finished runs; equal logs give equal bytes."""
    log_dir = pathlib.Path(log_dir)
    archive.parent.mkdir(parents=True, exist_ok=True)

    def plain(member):
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    finished = sorted(log_dir.glob("*/*/*/seed*/done.json"))
    with tarfile.open(archive, "w:xz", preset=9) as file:
        for path in (done.parent / name for done in finished for name in PACKED):
            if path.exists():
                file.add(path, str(path.relative_to(log_dir)), filter=plain)
    started = len(list(log_dir.glob("*/*/*/seed*/config.json")))
    size = archive.stat().st_size / 2**20
    print(f"{archive}: {len(finished)} of {started} runs are finished, {size:.2f} MiB")


def unpack(folder, archive):
    check(archive.exists(),
          f"{archive} is missing: pack logs with --pack, or read some with --log-dir")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--log-dir", help="read these runs instead of the packed ones")
    action.add_argument("--unpack", metavar="DIR", help="unpack the logs there, for analyze.py")
    action.add_argument("--pack", metavar="LOGS", help="pack these logs")
    parser.add_argument("--archive", type=pathlib.Path, default=ARCHIVE,
                        help="the packed file (default: the study's)")
    arguments = parser.parse_args(argv)
    logs = arguments.pack or arguments.log_dir
    try:
        check(not logs or pathlib.Path(logs).is_dir(), f"{logs}: there is no such folder")
        if arguments.pack:
            pack(logs, arguments.archive)
        elif arguments.unpack:
            unpack(arguments.unpack, arguments.archive)
        else:
            with tempfile.TemporaryDirectory() as folder:
                if not logs:
                    unpack(folder, arguments.archive)
                print("\n".join(report(logs or folder)))
        return 0
    except (OSError, UserError) as error:
        return report_error(error, "study.py", "")


if __name__ == "__main__":
    sys.exit(main())
