"""bench/study.py: the study's packed logs give the tables that docs/study.md shows, and figures are drawn of them."""
import json
import pathlib
import sys

import pytest
from test_analyze import write_run
from test_figures import fake_flatness

import analyze

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import study  # noqa: E402


def write_runs(log_dir):
    """Three seeds of three methods; L-r40 ends 1, 2 and 3 points above S-r4, its best epoch 1 below for each seed."""
    for seed in (1, 2, 3):
        for method, best, last in (("none", 70, 60), ("S-r4", 65 + seed, 60), ("L-r40", 64 + seed, 60 + seed)):
            events = {1: (55, 4)} if method != "none" else {}
            directory = write_run(log_dir, method, seed, [50, 52 - seed * bool(events), best, last], events, "small")
            (directory / "done.json").write_text("{}")
            (directory / "checkpoint.pt").write_text("large")


def test_pairs_have_their_mean_interval_and_p(tmp_path):
    write_runs(tmp_path)
    lines = study.report(tmp_path)
    assert lines[0] == "### vgg11, cifar10, small"
    # of 1, 2 and 3: mean 2, deviation 1, t = 2 √3, and Student's 97.5th percentile of two degrees of freedom 4.303
    assert "| L-r40 − S-r4 | 3 | +2.00 (-0.48 to +4.48), p = 0.074 | -1.00 (-1.00 to -1.00) |" in lines
    assert any(line.startswith("| none | 3 | 60.00 (60.00 to 60.00) | 70.00 (70.00 to 70.00) |") for line in lines)


def test_other_data_other_measurements_and_unfinished_runs_are_kept_apart_and_named(tmp_path):
    write_runs(tmp_path)
    write_runs(tmp_path / "others")
    (tmp_path / "others/cifar10").rename(tmp_path / "cifar100")
    (tmp_path / "cifar10/vgg11/L-r40-small/seed3/epochs.jsonl").write_text("")
    for i, path in enumerate(sorted(tmp_path.glob("cifar10/*/*/*"))):
        fake_flatness(path, seed=1 + i)
        if i == 0:
            flat = json.loads((path / "flatness.json").read_text())
            (path / "flatness.json").write_text(json.dumps(flat | {"images": 256}))
    lines = study.report(tmp_path)
    assert [line for line in lines if line.startswith("### ")] == ["### vgg11, cifar10, small",
                                                                  "### vgg11, cifar100, small"]
    assert [line.split("|")[2].strip() for line in lines if line.startswith("| L-r40 − S-r4 |")] == ["2", "3"]
    left_out = [line for line in lines if line.startswith("Left out")]
    assert [line for line in left_out if "L-r40-small/seed3: epochs.jsonl" in line]
    assert [line for line in left_out if "L-r40-small/seed1: differs from" in line and "in images" in line]
    header, row = (next(line for line in lines if line.startswith(start)) for start in ("| measure", "| \\|ε"))
    assert header.count("|") == row.count("|") - row.count("\\|"), "a pipe in a cell is escaped"


def test_what_is_packed_is_all_that_tables_need(tmp_path):
    write_runs(tmp_path / "logs")
    (tmp_path / "logs/cifar10/vgg11/none-small/seed3/done.json").unlink()  # not finished
    for name in ("a", "b"):
        study.pack(tmp_path / "logs", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    study.unpack(tmp_path / "out", tmp_path / "a")
    assert {path.name for path in (tmp_path / "out").rglob("*.*")} == {"config.json", "epochs.jsonl", "done.json"}
    assert len(list((tmp_path / "out").rglob("done.json"))) == 8
    assert [line for line in study.report(tmp_path / "out") if line.startswith("| L-r40 −")]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The study's logs, unpacked."""
    folder = tmp_path_factory.mktemp("study")
    study.unpack(folder, study.ARCHIVE)
    return folder


def test_the_study_s_page_shows_the_tables_of_its_logs(logs):
    page = (ROOT / "docs/study.md").read_text().splitlines()
    lines = [line for line in study.report(logs) if line]
    assert lines and not [line for line in lines if line not in page]


def test_the_study_s_archive_is_small_and_its_runs_are_whole_and_of_one_commit(logs):
    assert study.ARCHIVE.stat().st_size < 8 * 2**20
    runs = analyze.find_runs(logs)
    assert runs and not [run for run in runs if run["problem"]]
    assert len({json.dumps(run["config"]["git"]) for run in runs}) == 1


def test_a_figure_is_drawn_of_the_study_s_logs(logs, tmp_path):
    assert analyze.main(["--figure", "2", "--log-dir", str(logs), "--fig-dir", str(tmp_path)]) == 0
    assert list(tmp_path.glob("fig2*small*.png"))
