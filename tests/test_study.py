"""bench/study.py: the packed logs give the tables of docs/study-tables.md, and figures."""
import json
import pathlib
import sys

import pytest
from test_analyze import line_of, write_run
from test_figures import write_flatness

import analyze

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import study  # noqa: E402


def write_runs(log_dir, more=""):
    """L-r40 ends 1, 2 and 3 points above S-r4; its best epoch is 1 below for each seed."""
    for seed in (1, 2, 3):
        for method, best, last in (("none", 70, 60), ("S-r4", 65 + seed, 60),
                                   ("L-r40", 64 + seed, 60 + seed)):
            pruned = method != "none"
            path = write_run(log_dir, f"{line_of(method)} --preset small {more}", seed,
                             [50, 52 - seed * pruned, best, last], {1: (55, 4)} if pruned else {})
            (path / "done.json").write_text("{}")
            (path / "checkpoint.pt").write_text("large")


def test_pairs_have_their_mean_interval_and_p(tmp_path):
    write_runs(tmp_path)
    lines = study.report(tmp_path)
    assert lines[0] == "### VGG11, CIFAR-10, preset small, n = 3"
    # of 1, 2 and 3: mean 2, sd 1, t = 2 √3, Student's 97.5th percentile of two degrees 4.303
    assert ("| Prune_L, r = 40 (1%) − Prune_S, r = 4 (1%) | 3 | +2.00 (-0.48 to 4.48), p = 0.074 "
            "| -1.00 (-1.00 to -1.00) |") in lines
    assert any(line.startswith("| no pruning | 3 | 60.00 (60.00 to 60.00) | 70.00 (70.00 to 70.00)")
               for line in lines)


def test_other_data_other_measurements_and_bad_runs_are_apart_and_named(tmp_path):
    write_runs(tmp_path)
    write_runs(tmp_path, "--dataset cifar100")
    root = tmp_path / "cifar10/vgg11"
    (root / "L-r40-small/seed3/epochs.jsonl").write_text("")
    for i, path in enumerate(sorted(root.glob("*/*"))):
        write_flatness(path, 1 + i, images=256 if i == 0 else 512)
    lines = study.report(tmp_path)
    assert [line for line in lines if line.startswith("### ")] == [
        f"### VGG11, {name}, preset small, n = {n}"
        for name, n in (("CIFAR-10", "2 to 3"), ("CIFAR-100", "3"))]
    pairs = [line for line in lines if "| Prune_L, r = 40 (1%) − P" in line]
    assert [line.split("|")[2].strip() for line in pairs] == ["2", "3"]
    left_out = [line for line in lines if line.startswith("Left out")]
    assert "L-r40-small/seed3: unfinished, 0 of 4 epochs" in left_out[0]
    assert "L-r40-small/seed1: differs from" in left_out[1] and "in images" in left_out[1]
    head, row = (next(line for line in lines if line.startswith(start))
                 for start in ("| measure", "| \\|ε"))
    assert head.count("|") == row.count("|") - row.count("\\|"), "a pipe in a cell is escaped"
    assert any("Tr(H), exact (looked at afterwards)" in line for line in lines)


def test_what_is_packed_is_all_that_tables_need(tmp_path):
    write_runs(tmp_path / "logs")
    (tmp_path / "logs/cifar10/vgg11/none-small/seed3/done.json").unlink()  # not finished
    for name in ("a", "b"):
        study.pack(tmp_path / "logs", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    study.unpack(tmp_path / "out", tmp_path / "a")
    names = [path.name for path in (tmp_path / "out").rglob("*.*")]
    assert set(names) == {"config.json", "epochs.jsonl", "done.json"}
    assert names.count("done.json") == 8 and study.report(tmp_path / "out")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The study's logs, unpacked."""
    folder = tmp_path_factory.mktemp("study")
    study.unpack(folder, study.ARCHIVE)
    return folder


def test_the_page_has_the_tables_of_the_packed_logs(logs):
    page = (ROOT / "docs/study-tables.md").read_text()
    assert "\n".join(study.report(logs)).strip() == page[page.index("### "):].strip()


def test_the_archive_is_small_and_its_runs_are_whole_and_of_one_commit(logs):
    assert study.ARCHIVE.stat().st_size < 8 * 2**20
    runs = analyze.find_runs(logs)
    assert runs and not [run for run in runs if run["problem"]]
    assert len({json.dumps(run["config"]["git"]) for run in runs}) == 1


def test_a_figure_is_drawn_of_the_packed_logs(logs, tmp_path):
    argv = ["--figure", "2", "--log-dir", str(logs), "--fig-dir", str(tmp_path)]
    assert analyze.main(argv) == 0
    for kind in ("pdf", "png", "json"):
        assert all(path.stat().st_size > 10_000 for path in tmp_path.glob(f"*.{kind}"))
    assert len(list(tmp_path.glob("fig2-cifar10-small*.png"))) == 2
