"""README and docs: what they name exists, their commands parse, their numbers are the logs'."""
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, read_lines

import analyze
import train

sys.path.insert(0, str(ROOT / "bench"))
import study  # noqa: E402

ARCHIVE = ROOT / "bench/results/nvidia-h200-full-width.tar.xz"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS_OPTIONS = {"--no-build-isolation", "--partition", "--gres", "--cpus-per-task", "--time",
                  "--mem", "--account"}  # of pip and sbatch


@pytest.fixture
def my_score(tmp_path, monkeypatch):
    """The pages' my_score.py and my_networks.py, in the current directory."""
    for file, page in (("my_score.py", README),
                       ("my_networks.py", (ROOT / "docs/networks.md").read_text())):
        code, = re.findall(r"```python\n(.*?)```", page, re.S)
        (tmp_path / file).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SCORES", dict(train.SCORES))
    monkeypatch.setattr(train, "OWN_MODELS", {})


def test_the_score_of_the_readme_prunes_by_itself(my_score, run, directory):
    more = ("--model", "vgg11", "--width", 0.1, "--score", "my_score.py:spread", "--target", "S",
            "--s", 0, "--e", 0, "--p", 0.5, "--r", 1, "--epochs", 1, "--lrs", "--lr", 1e-12)
    assert run(*more) == 0
    assert "spread" in directory(*more).parent.name
    record, = read_lines(directory(*more))
    torch.manual_seed(1)
    block = train.build_model("vgg11", 4, 0.1).prunable[7]  # as it was, with that learning rate
    spread = block.conv.weight.detach().flatten(1).std(1)
    assert record["filters"] == {"7": spread.argsort()[:len(spread) // 2].sort().values.tolist()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page, my_score):
    targets = re.findall(r"^\[(\w+)\]$", (ROOT / "experiments.txt").read_text(), re.M)
    for command in re.findall(r"(?:^ {4}|`)((?:bash|python) [\w./-]+\.(?:sh|py)\b[^`\n]*)",
                              page.read_text().replace("\\\n", " "), re.M):
        _, program, *argv = shlex.split(command.replace("mystudy", "fig2"), comments=True)
        assert (ROOT / program).exists(), command
        if program == "runs.sh" and argv:
            own = ["status", "setup", "test", "bench", "help", "TARGET"]
            assert argv[0] in targets + own, command
            argv = argv[argv.index("--") + 1:] if "--" in argv else ["--help"]
            program = "train.py"
        if program == "train.py" and argv != ["--help"]:
            assert train.parse_options(argv), command
        if program == "analyze.py":
            assert analyze.make_parser().parse_args(argv), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)) == 1
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:bench|csrc|docs|gst_ext|tests|\.github)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:nvidia|amd)-[\w-]+\.[\w.]+)`", text):
        assert (ROOT / "bench/results" / name).exists(), name
    sources = [*ROOT.glob("*.py"), *ROOT.glob("bench/*"), ROOT / "runs.sh"]
    known = "".join(path.read_text() for path in sources if path.is_file())
    known += train.make_parser().format_help()
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - OTHERS_OPTIONS:
        assert re.search(rf"{option}\b(?!-)", known), option


def test_the_overview_of_the_readme_names_what_there_is():
    overview = re.search(r"## How the code is organised\n\n((?: {4}.*\n)+)", README)[1]
    names = re.findall(r"[\w./]+", " ".join(line[:20] for line in overview.splitlines()))
    assert len(names) >= 9 and [name for name in names if not (ROOT / name).exists()] == []


def test_the_table_of_results_is_the_packed_runs(tmp_path):
    study.unpack(tmp_path, ARCHIVE)
    for label, method in (("no pruning", "none"), ("Prune_S, r = 4 (1%)", "S-r4"),
                          ("Prune_S, r = 40 (13%)", "S-r40"), ("Prune_L, r = 40 (13%)", "L-r40")):
        (n, cells), = re.findall(rf"^\| {re.escape(label)} \| (\d+) \|(.*)\|$", README, re.M)
        runs = [json.loads(path.read_text()) for path in tmp_path.glob(
            f"cifar10/vgg11/{method}-x0.598-bf16/seed*/done.json")]
        assert int(n) == len(runs)
        for cell, name in zip(cells.split("|"), ("best_acc", "last_acc", "mean_stability")):
            numbers = [run[name] for run in runs]
            mean, *deviation = map(float, cell.split("±"))
            assert mean == pytest.approx(np.mean(numbers), abs=0.00501)
            assert sum(deviation) == pytest.approx(np.std(numbers, ddof=1), abs=0.00501)


@pytest.mark.parametrize("page, archive, lines", [
    ("results.md", "nvidia-h200-full-width.tar.xz", 6 + 8 + 8 + 6 + 6 + 4 + 5),
    ("depth.md", "depth.tar.xz", 12 + 5 + 10)])
def test_the_tables_of_a_page_are_the_packed_runs(capsys, page, archive, lines):
    page = (ROOT / "docs" / page).read_text()
    assert study.main(["--archive", str(ROOT / "bench/results" / archive)]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(tables) == lines and [line for line in tables if line not in page] == []


def test_the_intervals_of_the_readme_are_those_of_the_pages():
    def intervals(text):
        text = " ".join(text.replace("`", "").split())
        return set(re.findall(r"[+-]?\d+\.\d+ \(-?\d+\.\d+ to -?\d+\.\d+\)", text))

    pages = [(ROOT / "docs" / name).read_text()
             for name in ("results.md", "depth.md", "study.md", "study-tables.md")]
    assert len(intervals(README)) > 10 and not intervals(README) - intervals(" ".join(pages))


def test_the_version_is_said_once_and_its_changes_are_listed():
    version, = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert "version" not in (ROOT / "setup.py").read_text().split("setup(", 1)[1]


def test_what_the_package_needs_is_among_the_requirements():
    needed = json.loads(re.search(r"^dependencies = (\[.*\])$",
                                  (ROOT / "pyproject.toml").read_text(), re.M)[1])
    assert set(needed) <= set((ROOT / "requirements.txt").read_text().splitlines())
    source = "".join(path.read_text() for path in (ROOT / "gst_ext").glob("*.py"))
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) - sys.stdlib_module_names
    assert imported <= {re.split("[><=]", line)[0] for line in needed}
