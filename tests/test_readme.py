"""README and docs: their code runs as it stands there, their numbers are the result files', what they name exists."""
import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, read_lines

import train

sys.path.insert(0, str(ROOT / "bench"))
import study  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))


def block_with(text):
    """The README's one Python block that holds `text`."""
    block, = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if text in code)
    return block


def call(script, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, *map(str, options)], cwd=script.parent, env=environment,
                          capture_output=True, text=True)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_experiment_in_ten_lines_is_one_and_train_py_begins_with_it(tmp_path):
    header, code = block_with("prune_now").split("\n\n")
    assert header == "from train import *" and len(code.splitlines()) == 10
    assert textwrap.indent(code, "    ") in train.__doc__
    script = tmp_path / "ten.py"
    smaller = ['--target', 'L', '--width', '0.05', '--batch-size', '50', '--scale-epochs', '0.016']
    script.write_text(block_with("prune_now").replace('"--target", "L"', str(smaller)[1:-1]) + "    print(gone)\n")
    done = call(script)
    assert done.returncode == 0, done.stderr
    records, gone = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert [record.split()[0] for record in records] == list("012345")
    assert gone[-1] == "{}" and any("[" in filters for filters in gone)
    assert all(("'stability': None" in record) == (filters == "{}") for record, filters in zip(records, gone))


def test_the_functions_of_the_experiment_are_under_their_headings():
    source = (ROOT / "train.py").read_text()
    parts = re.split(r"# \+-+\+\n# \| ([^|:]*?) *(?::[^|]*)?\|\n# \+-+\+\n", source)
    sections = dict(zip(parts[1::2], parts[2::2]))
    places = re.search(r"under these headings:(.*?)Training", README, re.S)[1].replace("\n", " ")
    named = {name: heading for heading, names in re.findall(r"([A-Z][\w ]*) \((.*?)\)", places)
             for name in re.findall(r"`(\w+)`", names)}
    used = set(re.findall(r"(?<![.\w])(\w+)\(", block_with("prune_now"))) - {"range", "len", "print", "bool"}
    assert set(named) < used
    for name in used:
        assert f"\ndef {name}(" in sections[named.get(name, "Training")], name


def test_the_score_of_the_readme_prunes_by_itself(tmp_path, tiny):
    script = tmp_path / "my_score.py"
    script.write_text(block_with("SCORES"))
    done = call(script, "--score", "spread", "--target", "S", "--dataset", tiny, "--width", "0.1", "--s", 0, "--e", 0,
                "--p", 0.5, "--r", 1, "--epochs", 1, "--lrs", 1, "--lr", 1e-12, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    directory, = (path.parent for path in tmp_path.glob("logs/*/*/*/*/done.json"))
    assert "spread" in directory.parent.name
    record, = read_lines(directory)
    torch.manual_seed(1)
    block = train.build_model("vgg11", 4, 0.1).prunable[7]  # as it was, for that learning rate
    spread = block.conv.weight.detach().flatten(1).std(1)
    assert record["filters"] == {"7": spread.argsort()[:len(spread) // 2].sort().values.tolist()}
    refused = call(script, "--score", "spraed", "--target", "S")
    assert refused.returncode == 2 and "spread" in refused.stderr


def test_the_table_of_results_is_the_packed_runs(tmp_path):
    study.unpack(tmp_path, ROOT / "bench/results/nvidia-h200-fig2.tar.xz")
    methods = {}
    for path in tmp_path.glob("cifar10/vgg11/*/seed*/done.json"):
        methods.setdefault(path.parts[-3], []).append(json.loads(path.read_text()))
    rows = {"no pruning": "none", "Prune_S, r 4": "S-r4", "Prune_S, r 40": "S-r40", "Prune_L, r 40": "L-r40"}
    for label, method in rows.items():
        line, = re.findall(rf"^\| {label} \| (\d+) \|(.*)\|$", README, re.M)
        runs = methods[f"{method}-x0.598-bf16"]
        assert int(line[0]) == len(runs)
        for cell, measure in zip(line[1].split("|"), ("best_acc", "last_acc", "mean_stability")):
            found, (mean, *deviation) = [run[measure] for run in runs], [float(value) for value in cell.split("±")]
            assert mean == pytest.approx(np.mean(found), abs=0.00501)
            assert sum(deviation) == pytest.approx(np.std(found, ddof=1), abs=0.00501)


def test_the_tables_of_the_gpu_page_are_the_packed_runs_and_the_result_files(capsys):
    page, results = (ROOT / "docs/gpu.md").read_text(), ROOT / "bench" / "results"
    assert study.main(["--archive", str(results / "nvidia-h200-fig2.tar.xz")]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(tables) == 6 + 8 + 8 and all(line in page for line in tables)
    rows = json.loads((results / "nvidia-h200-epoch.json").read_text())["epochs"]
    shown = re.findall(r"(\d\.\d\d) \((\d\.\d\d)–(\d\.\d\d)\)", page)
    seconds = [np.divide(row["rounds"], row["runs"]) for pair in zip(rows[:5], rows[5:]) for row in pair]
    for cell, times in zip(shown, seconds, strict=True):
        assert [float(x) for x in cell] == pytest.approx([np.median(times), min(times), max(times)], abs=0.00501)
    pool = json.loads((results / "nvidia-h200-pool.json").read_text())
    for times in (np.ravel(pool[side]["rounds"]) for side in ("after", "before")):
        assert f"{np.median(times):.3f} s ({min(times):.3f}–{max(times):.3f})" in page


def test_the_rows_of_the_study_are_its_page_s():
    rows, page = re.search(r"\| question \|.*?\n\n", README, re.S)[0], (ROOT / "docs/study.md").read_text()
    numbers = re.findall(r"[+-]\d+\.\d+ \([+-]\d+\.\d+ to [+-]\d+\.\d+\)", rows)
    assert len(numbers) == rows.count(" to ") >= 10 and not [number for number in numbers if number not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for program in re.findall(r"(?:bash|python) ([\w./]+\.(?:sh|py))\b", text):
        assert (ROOT / program).exists() or program == "my_score.py", program
    for path in re.findall(r"`((?:bench|csrc|docs|gst_ext|tests|\.github)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    targets = re.search(r'^targets="(.*)"', (ROOT / "runs.sh").read_text(), re.M)[1].split()
    for target in re.findall(r"bash runs\.sh (\w+)", text):
        assert target in [*targets, "status", "setup", "test", "bench", "help", "TARGET"], target


def test_the_version_is_said_once_and_its_changes_are_listed():
    project = (ROOT / "pyproject.toml").read_text()
    version, = re.findall(r'^version = "(.*)"$', project, re.M)
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert "version" not in (ROOT / "setup.py").read_text().split("setup(", 1)[1]


def test_what_the_package_needs_is_among_the_requirements():
    needed = re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(json.loads(needed)) <= set(requirements)
    source = "".join(path.read_text() for path in (ROOT / "gst_ext").glob("*.py"))
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) - set(sys.stdlib_module_names)
    assert imported <= {re.split("[><=]", line)[0] for line in json.loads(needed)}
