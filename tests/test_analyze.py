"""analyze.py reads logs: numbers against ones computed by hand, what is left out, and selection."""
import argparse
import json
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import scipy.stats

import analyze
import train

EVENT = {0: (80, 3)}  # epoch: (accuracy before, filters)


def write_run(log_dir, line, seed, accuracies, events=(), images=10_000, epochs=None, **config):
    """Writes a run's files.

    An event raises the loss by 0.01 for each point of accuracy that it costs, changes twice as
    many predictions, and takes a tenth of the cost.

    Args:
        line: Options of train.py.
        accuracies: Test accuracies in %, one an epoch.
        events: {epoch: (accuracy before, number of filters)}.
        epochs: How many there should be.
        config: More of config.json; "options" replaces single options.
    """
    options = train.parse_options([*shlex.split(line), "--seed", str(seed), "--log-dir",
                                   str(log_dir)])
    directory, (method, setting) = train.run_path(options), train.run_name(options)
    directory.mkdir(parents=True)
    data = {"train": 50_000, "val": 0, "test": images, "classes": 10} | config.pop("data", {})
    options = train.experiment_options(options) | config.pop("options", {})
    (directory / "config.json").write_text(json.dumps({
        "method": method, "setting": setting, "options": options, "data": data, "macs": 1000,
        "schedule": {"epochs": epochs or len(accuracies), "save_epoch": 0}, "iterative_rate": 1.3,
        "parameters": 2000, **config}))
    lines, macs = [], 1000
    for epoch, accuracy in enumerate(accuracies):
        before, filters = dict(events).get(epoch, (accuracy, 0))
        macs -= 100 * bool(filters)
        lines.append(json.dumps({
            "epoch": epoch, "train_acc": 90.0 + epoch, "test_acc_before": before,
            "test_acc": accuracy, "val_acc": None, "removed": [filters, 0], "seconds": 1.0,
            "stability": 100 * accuracy / before if filters else None, "test_loss_before": 1.0,
            "test_loss": 1.0 + (before - accuracy) / 100, "parameters": macs, "macs": macs,
            "churn": 2 * abs(before - accuracy) if filters else None}) + "\n")
    (directory / "epochs.jsonl").write_text("".join(lines))
    return directory


def line_of(name):
    """The options of a method by its name in JSON: none, S-r4, scratch-S, zero-50."""
    kind, _, rest = name.partition("-")
    if kind in ("zero", "gauss"):
        return f"--target L --noise {kind} --noise-batches {rest}"
    if kind == "scratch":
        return f"--target {rest} --scratch"
    return f"--target {kind}" + f" --r {rest[1:]}" * bool(rest)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def draw(tmp_path, *options, log_dir="logs"):
    """Runs analyze.py; returns {file: numbers} of the figures drawn."""
    before = set(tmp_path.glob("*.json"))
    argv = [*options, "--log-dir", str(tmp_path / log_dir), "--fig-dir", str(tmp_path)]
    assert analyze.main(argv) == 0
    return {path.stem: json.loads(path.read_text(), parse_constant=pytest.fail)
            for path in set(tmp_path.glob("*.json")) - before}


def draw_panel(tmp_path, name, *more, model="vgg11"):
    """Draws one figure; returns the numbers of one network's panel."""
    return draw(tmp_path, "--figure", name, *more)[f"fig{name}"]["models"][model]


@pytest.fixture
def refusal(tmp_path, capsys):
    """Runs analyze.py on bad options; returns the one line on stderr."""
    def refused(*options, code=2, log_dir="logs", fig_dir=""):
        capsys.readouterr()
        assert analyze.main([*options, "--log-dir", str(tmp_path / log_dir),
                             "--fig-dir", str(tmp_path / fig_dir)]) == code
        line, = capsys.readouterr().err.splitlines()
        return line
    return refused


@pytest.fixture(autouse=True)
def no_images(monkeypatch, request):
    """Figures are laid out and their numbers written, but no PDF and PNG; by file name."""
    if "real_files" in request.fixturenames:
        return None
    figures = {}

    def save(figure, path, numbers):
        figure.draw_without_rendering()
        figures[path.name] = figure
        path.with_name(f"{path.name}.json").write_text(json.dumps(numbers))
    monkeypatch.setattr(analyze.plots, "save", save)
    return figures


@pytest.fixture
def real_files():
    """Lets a test write PDF and PNG."""


# +-- Summaries --------------------------------------------------------------------------------+

def run_of_counts(log_dir, line, seed, counts, events=(), images=797):
    """write_run from counts of right answers, as percentages, which is what old logs have."""
    events = {epoch: (100 * before / images, n) for epoch, (before, n) in dict(events).items()}
    return write_run(log_dir, line, seed, [100 * c / images for c in counts], events, images)


def test_equal_differences_of_counts_are_equal(tmp_path):
    assert 100 * 780 / 797 - 100 * 779 / 797 != 100 * 776 / 797 - 100 * 775 / 797  # as floats
    for seed, low in enumerate([779, 775], 1):
        for method, count in (("S-r4", low), ("L", low + 1)):
            run_of_counts(tmp_path / "logs", line_of(method), seed, [count], {0: (790, 1)})
    panel = draw_panel(tmp_path, "2")
    for key in ("paired_best_acc", "paired_last_acc"):
        test = panel[key]["L-r40 minus S-r4"]
        assert test["p"] is None and test["sd"] == 0
        assert test["values"] == test["ci95"] == [100 / 797] * 2


def test_equal_stabilities_and_gaps_of_counts_are_equal(tmp_path):
    def summary(seed, events):
        return analyze.summarize(run_of_counts(
            tmp_path, "--target S", seed, [after for _, after in events],
            {i: (before, 1) for i, (before, _) in enumerate(events)}))

    odd = [n for n in range(1, 798) if 100 * (100 * n / 797) / (100 * n / 797) != 100]
    run = summary(1, [(n, n) for n in odd])  # no event changes anything, but not so as floats
    assert run["mean_stability"] == run["min_stability"] == 100 and run["below_99"] == 0 < len(odd)
    events = [(790, 700), (600, 513), (501, 499), (797, 311)]
    assert len({summary(seed, order)["mean_stability"] for seed, order in enumerate(
        [events, events[::-1], events[2:] + events[:2]], 2)}) == 1
    path = write_run(tmp_path, "", 1, [100 * 600 / 797], images=797)
    edit(path / "epochs.jsonl", '"train_acc": 90.0', '"train_acc": 0, "train_correct": 45000')
    assert analyze.summarize(path)["gap"] == 100 * (45000 * 797 - 600 * 50000) / (797 * 50000)


def test_logged_counts_are_used_and_an_accuracy_of_no_count_stays(tmp_path):
    path = write_run(tmp_path, "--target S", 1, [60, 70], EVENT)
    edit(path / "epochs.jsonl", '"test_acc": 70', '"test_acc": 70, "test_correct": 7001')
    run = analyze.summarize(path)
    assert run["last_acc"] == 70.01 and run["last_correct"] == 7001
    run = analyze.summarize(write_run(tmp_path, "--target S", 2, [60, 71.7], EVENT, images=10))
    assert run["last_acc"] == 71.7 and run["last_correct"] is None


def test_logs_without_the_finer_records_are_read(tmp_path):
    path = write_run(tmp_path / "logs", "--target S", 1, [60, 70], EVENT)
    missing = {"macs", "data", "test_loss", "test_loss_before", "churn", "parameters"}
    for name in ("config.json", "epochs.jsonl"):
        lines = map(json.loads, (path / name).read_text().splitlines())
        (path / name).write_text("".join(json.dumps(
            {k: v for k, v in line.items() if k not in missing}) + "\n" for line in lines))
    edit(path / "config.json", '"noise_restore": null, ', "")  # an option of later
    run = analyze.summarize(path)
    assert run["problem"] is None and run["mean_stability"] == 75 and run["best_acc"] == 70
    assert run["loss_rise"] is run["churn"] is run["compute"] is None and run["below_99"] == 1
    assert draw_panel(tmp_path, "2")["methods"]["S-r40"]


# +-- What is left out, by name ----------------------------------------------------------------+

@pytest.mark.parametrize("name, change, problem", [
    ("epochs.jsonl", lambda t: t[:-20], "line 3 of epochs.jsonl is missing or damaged"),
    ("epochs.jsonl", lambda t: "\n".join(reversed(t.splitlines())),
     "line 1 of epochs.jsonl is of epoch 2"),
    ("epochs.jsonl", lambda t: t.replace("test_acc", "accuracy"), "damaged (KeyError)"),
    ("epochs.jsonl", lambda t: t.replace('"test_acc": 70', '"test_acc": NaN'),
     "test_acc of epoch 1 is nan"),
    ("epochs.jsonl", lambda t: "", "unfinished, 0 of 3 epochs"),
    ("epochs.jsonl", None, "epochs.jsonl is missing"),
    ("config.json", lambda t: t.replace('"epochs": 3', '"epochs": 4'), "unfinished, 3 of 4 epochs"),
    ("config.json", lambda t: t.replace('"seed": 3', '"seed": "3"'), "damaged (ValueError)"),
    ("config.json", lambda t: "{", "config.json is missing or damaged")])
def test_a_bad_run_is_named_and_not_averaged_in(tmp_path, capsys, name, change, problem):
    for seed in (1, 2, 3):
        path = write_run(tmp_path / "logs", "--target S --r 4", seed, [60, 70, 80], EVENT)
    file = path / name
    file.write_text(change(file.read_text())) if change else file.unlink()
    numbers = draw(tmp_path, "--figure", "2")["fig2"]
    assert numbers["models"]["vgg11"]["methods"]["S-r4"]["seeds"] == [1, 2]
    assert problem in numbers["left_out"][str(path)]
    assert f"left out: {path}: " in capsys.readouterr().out


def problems(log_dir):
    """{method/seed: problem} of what find_runs leaves out."""
    return {"/".join(pathlib.Path(run["dir"]).parts[-2:]): run["problem"]
            for run in analyze.find_runs(log_dir) if run["problem"]}


def test_a_run_under_another_name_is_left_out(tmp_path):
    path = write_run(tmp_path, "--target S --r 4", 1, [60, 70], EVENT)
    names = ("S-r4.buggy/seed1", ".trash-S-r4/seed1", "S-r4/seed1.old", "AAA/seed1")
    for name in names:
        shutil.copytree(path, path.parents[1] / name)
    assert problems(tmp_path) == dict.fromkeys(
        names, "its config.json is of cifar10/vgg11/S-r4/seed1")


def test_a_method_under_two_names_is_one_and_its_second_run_is_left_out(tmp_path):
    place = tmp_path / "logs/cifar10/vgg11"
    for score in ("l1", "l2"):
        for seed in (1, 2):
            path = write_run(tmp_path / score, "--target R", seed, [60 + seed, 70], EVENT,
                             method=f"R-r40-{score}", options={"score": score})
            shutil.copytree(path, place / f"R-r40-{score}/seed{seed}")
    assert problems(tmp_path / "logs") == {
        f"R-r40-l2/seed{k}": f"is the same run as {place}/R-r40-l1/seed{k}" for k in (1, 2)}
    assert draw_panel(tmp_path, "stability")["methods"]["R-r40"]["seeds"] == [1, 2]


def test_runs_that_differ_in_more_than_the_method_are_left_out(tmp_path):
    for line, seed, more in (
            *(("--target S", seed, {}) for seed in (1, 2, 3)),
            ("--target S", 4, {"options": {"test_batch_size": 64}}),
            ("--target S", 5, {"data": {"crc32": 2}}), ("--target S", 6, {"score_crc32": 7}),
            ("", 1, {"options": {"batch_size": 12, "lr": 0.02}}),
            ("--target L --noise zero --test-batch-size 256", 1, {})):  # the method's own batches
        write_run(tmp_path, line, seed, [60, 70], EVENT, **{"data": {"crc32": 1}} | more)
    usual = f"differs from {tmp_path}/cifar10/vgg11/S-r40/seed1 in"
    assert problems(tmp_path) == {
        "S-r40/seed4": f"{usual} test_batch_size", "S-r40/seed5": f"{usual} crc32",
        "S-r40/seed6": f"{usual} source of the score", "none/seed1": f"{usual} batch_size, lr"}


def test_a_run_that_removed_nothing_is_left_out_and_labels_have_what_goes(tmp_path):
    write_run(tmp_path, "--target L", 1, [60, 70])
    write_run(tmp_path, "--target S --scratch", 1, [60, 70], parameters=1000)
    write_run(tmp_path, "--target S --scratch", 2, [60, 70])
    found = problems(tmp_path)
    assert found.keys() == {"L-r40/seed1", "scratch-S/seed1"}
    assert "removed no filter" in found["L-r40/seed1"]
    path = write_run(tmp_path, "--target S", 1, [60, 70], {0: (80, 2)}, iterative_rate=3.3,
                     pruned_layers=[{"layer": layer, "filters": 16} for layer in (6, 7)])
    assert analyze.summarize(path)["label"] == "Prune_S, r = 40 (12%)"


@pytest.mark.parametrize("line, label", [
    ("--target S --r 4", "Prune_S, r = 4 (1%)"), ("", "no pruning"),
    ("--target S --scratch", "Prune_S at initialization"),
    ("--target L --noise zero --noise-batches 50", "Zeroing, 50 batches"),
    ("--target L --noise gauss", "Gaussian noise, 1 batch"),
    ("--target L --prune-bn keep", "Prune_L, r = 40 (1%), batch norm kept"),
    ("--target S --score ebn --p .25 .8 .25 .95",
     "Prune_S, r = 40 (1%), score ebn, p 0.25,0.8,0.25,0.95")])
def test_labels_name_the_method(line, label):
    assert analyze.method_label(train.parse_options(line.split()), 1.3) == label


def test_options_that_make_no_difference_are_no_part_of_a_method():
    def key(line, **others):
        options = train.parse_options(line.split())
        return analyze.method_key(argparse.Namespace(**vars(options) | others))

    assert key("--target R", score="l1") == key("--target R", score="l2")
    assert key("", r=4, s=[1], p=[0.5], score="l1") == key("")
    assert key("--target S --scratch", r=4, e=[7]) == key("--target S --scratch")
    assert key("--target S --test-batch-size 64") == key("--target S")
    noise = "--target L --noise zero"
    for a, *others in (
            ("--target S", "--target L", "--target S --prune-bn keep", "--target S --r 4",
             "--target S --score l1"), ("--model resnet18", "--model resnet18 --optimizer sgd"),
            (noise, f"{noise} --noise-batches 50", f"{noise} --noise-restore", "--target L",
             f"{noise} --test-batch-size 256")):
        for b in others:
            assert key(a) != key(b), (a, b)


def test_every_line_of_experiments_txt_is_an_own_method_of_its_block():
    for name, block in analyze.read_experiments().items():
        for preset in (None, "quick", "small"):
            keys = [analyze.method_key(o) for o in analyze.block_options(block, preset)]
            assert len(set(keys)) == len(keys), name
    used = {experiment for _, experiment, _ in analyze.OUTPUTS.values()} - {None}
    blocks = analyze.read_experiments()
    assert used == {name for name in blocks if "--experiment" not in blocks[name].get("draw", "")}


def test_a_bad_line_of_experiments_txt_is_named(tmp_path):
    path = tmp_path / "experiments.txt"
    for text in ("--target S\n", "[a]\nwhat\n"):
        path.write_text("# a comment\n" + text)
        with pytest.raises(analyze.UserError, match=r"experiments.txt, line [23]: give a"):
            analyze.read_experiments(path)


def test_a_users_own_block_is_drawn_by_its_name(tmp_path, monkeypatch, capsys, refusal):
    path = tmp_path / "experiments.txt"
    path.write_text(analyze.EXPERIMENTS.read_text() + "\n[mystudy]\n--model vgg11 --target none\n"
                    "--model vgg11 --target S --r 10 --score l1\n")
    monkeypatch.setattr(analyze.read_experiments, "__defaults__", (path,))
    for seed in (1, 2, 3):
        for line in ("", "--target S --r 10 --score l1", "--target S"):
            write_run(tmp_path / "logs", f"--preset quick {line}", seed, [60 - seed, 70 + seed],
                      EVENT if line else ())
    (tmp_path / "logs/digits/vgg11/none-quick/seed3/epochs.jsonl").unlink()
    drawn = draw(tmp_path, "--figure", "stability", "compute", "--experiment", "mystudy")
    assert set(drawn) == {f"fig{name}-mystudy-digits-quick" for name in ("stability", "compute")}
    for numbers in drawn.values():
        methods = numbers["models"]["vgg11"]["methods"]
        assert {name: m["seeds"] for name, m in methods.items()} == {
            "none": [1, 2], "S-r10-l1": [1, 2, 3]}
        assert numbers["title"] == "VGG11, digits, preset quick, n = 2 to 3"
    assert "5 of 6 runs are there; the rest: bash runs.sh mystudy --seeds 1-3 --preset quick" in (
        capsys.readouterr().out)
    refusal("--figure", "2", "--experiment", "mystudy")
    refusal("--figure", "compute", "--experiment", "nothing")


@pytest.mark.parametrize("experiment, options", [
    ("fig2", "--width 0.1 --scale-epochs 0.02 --lrs 100 200 --val-split 9"),
    ("fig4", "--no-augment --batch-size 64"), ("tabF1", "--preset quick"),
    ("fig2", "--preset small --label-noise 0.3"), ("fig6", "")])
def test_the_command_for_the_rest_trains_just_the_missing_runs(experiment, options):
    block = analyze.read_experiments()[experiment]
    preset = "quick" if "quick" in options else "small" if "small" in options else None
    lines = [f"{line} {options} {block.get(preset, '')}" for line in block["lines"]]
    parsed = [train.parse_options(shlex.split(line)) for line in lines]
    runs = [{"options": o, "seed": seed, "key": analyze.method_key(o)}
            for o in parsed[::2] for seed in (2, 3)]
    place = (parsed[0].dataset, analyze.setting_in(parsed, train.run_name(parsed[0])[1]))
    there, wanted, command = analyze.missing_runs(experiment, block, place, runs, "my logs")
    words = shlex.split(command)
    assert words[:3] == ["bash", "runs.sh", experiment] and there == len(runs)
    seeds = {"fig6": 10}.get(experiment, 2)
    assert wanted == seeds * len(lines) and words[4] == ("1-10" if seeds == 10 else "2-3")
    more = words[words.index("--") + 1:]
    preset = words[5:7] if preset else []
    for line, expected in zip(block["lines"], parsed):
        extra = shlex.split(block.get(preset[1], "")) if preset else []
        ours = train.parse_options([*shlex.split(line), *extra, *preset, *more])
        assert train.run_path(ours) == pathlib.Path("my logs", *train.run_path(expected).parts[1:])


# +-- The command ------------------------------------------------------------------------------+

def test_settings_and_data_sets_are_never_mixed(tmp_path):
    for line, last in (("", 70), ("--width 0.25", 71), ("--dataset digits", 72)):
        write_run(tmp_path / "logs", f"--target S --r 4 {line}", 1, [60, last], EVENT)
    for model in ("vgg11", "resnet18"):
        write_run(tmp_path / "logs", f"--model {model} --target S --r 20", 1, [60, 70], EVENT)
    drawn = draw(tmp_path, "--figure", "2")
    assert {file: [m["last_acc"]["values"] for m in n["models"]["vgg11"]["methods"].values()]
            for file, n in drawn.items()} == {
        "fig2": [[70]], "fig2-cifar10-w0.25": [[71]], "fig2-digits": [[72]]}
    assert [list(n["models"]) for n in drawn.values()] == [["vgg11"]] * 3  # no r = 20


def test_two_data_sets_are_never_one_file_and_nothing_to_draw_is_one_line(tmp_path, refusal):
    for name in ("my set", "my-set"):
        write_run(tmp_path / "logs", f"--target S --dataset '{name}'", 1, [60, 70], EVENT)
    write_run(tmp_path / "baselines", "", 1, [60, 70])
    assert "would both be fig2-my-set: rename one" in refusal("--figure", "2")
    assert "bash runs.sh fig2" in refusal("--figure", "2", log_dir="baselines")
    for argv in ([], ["--figure", "99"], ["--live"]):
        refusal(*argv)
    refusal("--list", log_dir="nowhere")


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path, refusal, monkeypatch, real_files):
    write_run(tmp_path / "logs", "--target S --r 4", 1, [60, 70], EVENT)
    (tmp_path / "file").write_text("")
    for folder in ("file", "/dev/full"):
        refusal("--figure", "2", code=1, fig_dir=folder)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refusal("--figure", "2", code=1, fig_dir="figures")
    assert not list((tmp_path / "figures").iterdir())


def test_list_counts_the_runs(tmp_path, capsys):
    write_run(tmp_path, "--target S --r 4", 1, [60, 70], EVENT)
    write_run(tmp_path, "--target S --r 4", 2, [60], EVENT, epochs=2)
    assert analyze.main(["--list", "--log-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "cifar10: 1 of 80 runs finished" in out and "1 unfinished or damaged runs" in out


def test_a_name_that_cannot_be_printed_and_a_notebooks_backend_do_not_matter(tmp_path):
    path = write_run(tmp_path / "logs", "--target S --r 4 --dataset cost", 1, [60, 70], EVENT)
    name = os.fsdecode("cost$5_$é".encode("latin-1"))
    edit(path / "config.json", '"dataset": "cost"', f'"dataset": {json.dumps(name)}')
    path.parents[2].rename(tmp_path / "logs" / name)
    program = """import matplotlib, sys
matplotlib.rcParams["font.size"] = 31
matplotlib.use("svg")
before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
import analyze
assert dict(matplotlib.rcParams) == before
assert matplotlib.get_backend(auto_select=False) == backend
assert "matplotlib.pyplot" not in sys.modules"""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline",
                                "PYTHONIOENCODING": "ascii:strict"}
    for argv, more in ((["-c", program], {}), (
            ["analyze.py", "--figure", "2", "--log-dir", tmp_path / "logs", "--fig-dir", tmp_path],
            {"env": environment})):
        result = subprocess.run([sys.executable, *argv], cwd=pathlib.Path(analyze.__file__).parent,
                                capture_output=True, text=True, **more)
        assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (tmp_path / f"fig2-{name}.png").stat().st_size > 10_000


def test_the_figure_holds_the_hand_computed_numbers(tmp_path):
    # (before the event, after it, last epoch): stability is 100 * after / before
    runs = {"S-r4": [(80, 80, 70), (80, 79.2, 71)], "S-r40": [(80, 76, 73), (80, 75.2, 72)],
            "L-r40": [(80, 60, 74), (80, 64, 75)]}
    for seed in (1, 2):
        for method, values in runs.items():
            before, after, last = values[seed - 1]
            write_run(tmp_path / "logs", line_of(method), seed, [after, last], {0: (before, 1)})
        write_run(tmp_path / "logs", "", seed, [50, 10 * seed])  # not in the correlation
    panel = draw_panel(tmp_path, "2")
    x = [100 * after / before for v in runs.values() for before, after, _ in v]
    y = [max(after, last) for v in runs.values() for _, after, last in v]
    statistics, = panel["scatters"]
    assert statistics["n"] == 6
    assert statistics["pearson"][0] == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    assert statistics["kendall"][0] == pytest.approx(scipy.stats.kendalltau(x, y)[0])
    small = panel["methods"]["S-r4"]
    assert small["label"] == "Prune_S, r = 4 (1%)"
    assert small["best_acc"]["mean"] == pytest.approx(79.6)
    assert small["best_acc"]["sd"] == pytest.approx(math.sqrt(0.32))
    assert small["mean_stability"]["mean"] == pytest.approx(99.5)
    assert panel["dynamics"]["S-r4"]["mean"] == pytest.approx([79.6, 70.5])
    assert panel["dynamics"]["S-r4"]["epoch"] == [1, 2]
    test = panel["paired_best_acc"]["L-r40 minus S-r40"]
    assert test["values"] == pytest.approx([74 - 76, 75 - 75.2]) and test["seeds"] == [1, 2]
    assert test["p"] == pytest.approx(scipy.stats.ttest_1samp([-2, -0.2], 0).pvalue)


def test_best_and_last_accuracy_that_disagree_are_noted_below(tmp_path, capsys, no_images):
    for seed in range(1, 7):  # less stable is better by the best accuracy, worse by the last
        for method, after, best, last in (("S-r4", 65, 70, 60), ("L", 60, 75, 50)):
            write_run(tmp_path / "logs", line_of(method), seed, [after, best + seed, last + seed],
                      {0: (66, 1)})
    numbers = draw(tmp_path, "--figure", "2")["fig2"]
    panel = numbers["models"]["vgg11"]
    assert panel["disagree"] == ["L-r40 minus S-r4"]
    best, last = (panel[f"paired_{k}_acc"]["L-r40 minus S-r4"]["mean"] for k in ("best", "last"))
    assert best > 0 > last
    scatter, = panel["scatters"]
    assert scatter["disagrees"] and scatter["kendall"][0] < 0 < scatter["by last_acc"]["kendall"][0]
    assert "Prune_L, r = 40 (1%) minus Prune_S, r = 4 (1%)" in numbers["notes"][-1]
    assert "they disagree" in capsys.readouterr().out
    axis = no_images["fig2"].axes[1]
    assert "by last accuracy" in axis.get_xlabel() and "last" not in axis.get_title()
    assert no_images["fig2"].get_suptitle() == numbers["title"] == "VGG11, CIFAR-10, n = 6"
