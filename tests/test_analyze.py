"""analyze.py: every number against one computed by hand from logs written here, and what it says of bad logs."""
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

import analyze
import train


def write_run(log_dir, method, seed, accuracies, events=(), setting="", model="vgg11", epochs=None, dataset="cifar10",
              rate=1.3, options=(), **config):
    """A run's files: test accuracies per epoch, and events as {epoch: (before, filters)}. An event raises the loss by
    0.01 for each point of accuracy that it costs, changes twice as many predictions, and takes a tenth of the cost."""
    directory = log_dir / dataset / model / "-".join(filter(None, (method, setting))) / f"seed{seed}"
    directory.mkdir(parents=True)
    config |= {"method": method, "setting": setting, "options": {"model": model, "seed": seed, **dict(options)},
               "schedule": {"epochs": epochs or len(accuracies)}, "iterative_rate": rate, "macs": 1000}
    config["data"] = {"train": 50_000, "val": 0, "test": 10_000, "classes": 10, **config.get("data", {})}
    (directory / "config.json").write_text(json.dumps(config))
    lines, macs = [], 1000
    for epoch, accuracy in enumerate(accuracies):
        before, filters = dict(events).get(epoch, (accuracy, 0))
        macs -= 100 * bool(filters)
        lines.append(json.dumps({
            "epoch": epoch, "train_acc": 90.0 + epoch, "test_acc_before": before, "test_acc": accuracy, "val_acc": None,
            "stability": 100 * accuracy / before if filters else None, "removed": [filters, 0], "seconds": 1.0,
            "test_loss_before": 1.0, "test_loss": 1.0 + (before - accuracy) / 100, "parameters": macs, "macs": macs,
            "churn": 2 * abs(before - accuracy) if filters else None}))
    (directory / "epochs.jsonl").write_text("".join(line + "\n" for line in lines))
    return directory


def figure_of(tmp_path, log_dir, name="fig2"):
    assert analyze.main(["--figure", "2", "--log-dir", str(log_dir), "--fig-dir", str(tmp_path / "figures")]) == 0
    return json.loads((tmp_path / "figures" / f"{name}.json").read_text())


def test_summary_of_a_pruned_run_counts_from_its_last_event(tmp_path):
    # 88 comes before the last event, so it is not the run's accuracy; the event's own epoch is included.
    run = analyze.summarize(write_run(tmp_path, "S-r4", 1, [70, 88, 60, 66, 65], {0: (80, 3), 2: (75, 2)}))
    assert run["problem"] is None
    assert (run["best_acc"], run["best_epoch"], run["last_acc"], run["events"]) == (66, 3, 65, 2)
    assert run["gap"] == 93.0 - 66
    assert run["mean_stability"] == pytest.approx((100 * 70 / 80 + 100 * 60 / 75) / 2)


def test_an_accuracy_on_the_last_event_itself_counts(tmp_path):
    run = analyze.summarize(write_run(tmp_path, "S-r4", 1, [50, 70, 60], {1: (71, 1)}))
    assert (run["best_acc"], run["best_epoch"]) == (70, 1)


def test_an_event_that_removed_nothing_is_none(tmp_path):
    run = analyze.summarize(write_run(tmp_path, "S-r4", 1, [50, 40, 60], {0: (100, 1), 1: (80, 0)}))
    assert run["events"] == 1 and run["mean_stability"] == 50


def test_summary_of_a_baseline_is_over_every_epoch_and_fully_stable(tmp_path):
    run = analyze.summarize(write_run(tmp_path, "none", 1, [70, 88, 60]))
    assert (run["best_acc"], run["best_epoch"], run["mean_stability"], run["events"]) == (88, 1, 100, 0)


def test_validation_chosen_accuracy_is_the_test_accuracy_at_the_best_validation_epoch():
    records = [dict(epoch=i, train_acc=0, test_acc=t, val_acc=v, removed=[], stability=None, seconds=0)
               for i, (t, v) in enumerate([(70, 60), (65, 64), (72, 63)])]
    summary = train.summarize_epochs(records, {})
    assert (summary["best_acc"], summary["val_chosen_acc"]) == (72, 65)


def damage_cut_line(directory):
    path = directory / "epochs.jsonl"
    path.write_text(path.read_text()[:-20])


def damage_order(directory):
    path = directory / "epochs.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def damage_field(directory):
    path = directory / "epochs.jsonl"
    path.write_text(path.read_text().replace("test_acc", "accuracy"))


@pytest.mark.parametrize("damage, word", [
    (damage_cut_line, "line 3 of epochs.jsonl is damaged"), (damage_order, "line 1 of epochs.jsonl is of epoch 2"),
    (damage_field, "damaged"), (lambda d: (d / "epochs.jsonl").write_text(""), "damaged"),
    (lambda d: (d / "epochs.jsonl").unlink(), "has no epochs.jsonl"),
    (lambda d: (d / "config.json").write_text("{"), "config.json is missing or damaged")])
def test_a_damaged_run_is_named_and_not_averaged_in(tmp_path, capsys, damage, word):
    log_dir = tmp_path / "logs"
    for seed in (1, 2, 3):
        directory = write_run(log_dir, "S-r4", seed, [60, 70, 80], {0: (80, 3)})
    damage(directory)
    assert word in analyze.summarize(directory)["problem"]
    numbers = figure_of(tmp_path, log_dir)
    assert numbers["models"]["vgg11"]["methods"]["S-r4"]["seeds"] == [1, 2]
    assert numbers["left_out"] == {str(directory): analyze.summarize(directory)["problem"]}
    assert f"left out: {directory}: " in capsys.readouterr().out


def test_an_unfinished_run_is_named_and_not_averaged_in(tmp_path):
    log_dir = tmp_path / "logs"
    write_run(log_dir, "S-r4", 1, [60, 70, 80], {0: (80, 3)})
    unfinished = write_run(log_dir, "S-r4", 2, [60, 70], {0: (80, 3)}, epochs=3)
    numbers = figure_of(tmp_path, log_dir)
    assert numbers["left_out"] == {str(unfinished): "unfinished, 2 of 3 epochs"}
    assert numbers["models"]["vgg11"]["methods"]["S-r4"]["best_acc"]["n"] == 1


def test_the_figure_holds_the_hand_computed_numbers(tmp_path):
    log_dir = tmp_path / "logs"
    # (before the event, after it, last epoch): stability is 100 * after / before, accuracy the last
    runs = {"S-r4": [(80, 80, 70), (80, 79.2, 71)], "S-r40": [(80, 76, 73), (80, 75.2, 72)],
            "L-r40": [(80, 60, 74), (80, 64, 75)]}
    for method, values in runs.items():
        for seed, (before, after, last) in enumerate(values, 1):
            write_run(log_dir, method, seed, [after, last], {0: (before, 1)})
    for seed in (1, 2):
        write_run(log_dir, "none", seed, [50, 10 * seed])  # far off: the baseline must not enter the correlation
    panel = figure_of(tmp_path, log_dir)["models"]["vgg11"]
    stability = [100 * after / before for values in runs.values() for before, after, _ in values]
    accuracy = [max(after, last) for values in runs.values() for _, after, last in values]
    x, y = np.array(stability) - np.mean(stability), np.array(accuracy) - np.mean(accuracy)
    statistics, = panel["scatters"]
    assert statistics["n"] == 6
    assert statistics["pearson"][0] == pytest.approx((x @ y) / math.sqrt((x @ x) * (y @ y)))
    pairs = [(i, j) for i in range(6) for j in range(i)]
    concordance = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)
    distinct = sum(y[i] != y[j] for i, j in pairs)
    assert statistics["kendall"][0] == pytest.approx(concordance / math.sqrt(len(pairs) * distinct))
    small = panel["methods"]["S-r4"]
    assert small["best_acc"]["mean"] == pytest.approx(79.6)
    assert small["best_acc"]["sd"] == pytest.approx(math.sqrt(0.32))
    assert small["mean_stability"]["mean"] == pytest.approx(99.5)
    assert panel["dynamics"]["S-r4"]["mean"] == pytest.approx([79.6, 70.5])
    assert panel["dynamics"]["S-r4"]["epoch"] == [1, 2]
    difference = panel["paired_best_acc"]["L-r40 minus S-r40"]
    assert difference["values"] == pytest.approx([74 - 76, 75 - 75.2]) and difference["seeds"] == [1, 2]
    assert difference["p"] == pytest.approx(scipy.stats.ttest_1samp([-2, -0.2], 0).pvalue)
    for kind in ("pdf", "png"):
        assert (tmp_path / "figures" / f"fig2.{kind}").stat().st_size > 10_000


def test_settings_and_data_sets_are_never_mixed(tmp_path):
    log_dir = tmp_path / "logs"
    write_run(log_dir, "S-r4", 1, [60, 70], {0: (80, 1)})
    write_run(log_dir, "S-r4", 1, [60, 71], {0: (80, 1)}, setting="w0.25")
    write_run(log_dir, "S-r4", 1, [60, 72], {0: (80, 1)}, dataset="digits")
    assert figure_of(tmp_path, log_dir)["models"]["vgg11"]["methods"]["S-r4"]["best_acc"]["values"] == [70]
    for name, value in (("fig2-cifar10-w0.25", 71), ("fig2-digits", 72)):
        numbers = json.loads((tmp_path / "figures" / f"{name}.json").read_text())
        assert numbers["models"]["vgg11"]["methods"]["S-r4"]["best_acc"]["values"] == [value]


def test_each_model_found_is_a_panel_and_other_methods_are_not_drawn(tmp_path):
    log_dir = tmp_path / "logs"
    for model in ("vgg11", "resnet18"):
        write_run(log_dir, "S-r40", 1, [60, 70], {0: (80, 1)}, model=model)
    write_run(log_dir, "S-r20", 1, [60, 70], {0: (80, 1)})
    panels = figure_of(tmp_path, log_dir)["models"].items()
    assert {model: list(panel["methods"]) for model, panel in panels} == {"vgg11": ["S-r40"], "resnet18": ["S-r40"]}


def test_nothing_to_draw_is_one_line_and_exit_code_2(tmp_path, capsys):
    write_run(tmp_path / "logs", "none", 1, [60, 70])
    assert analyze.main(["--figure", "2", "--log-dir", str(tmp_path / "logs"), "--fig-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bash runs.sh fig2" in error
    assert analyze.main([]) == 2 and analyze.main(["--figure", "99"]) == 2


def test_a_figure_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write_run(tmp_path / "logs", "S-r4", 1, [60, 70], {0: (80, 1)})
    (tmp_path / "file").write_text("")
    options = ["--figure", "2", "--log-dir", str(tmp_path / "logs"), "--fig-dir", str(tmp_path / "file")]
    assert analyze.main(options) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_list_counts_the_runs(tmp_path, capsys):
    write_run(tmp_path, "S-r4", 1, [60, 70], {0: (80, 1)})
    write_run(tmp_path, "S-r4", 2, [60], {0: (80, 1)}, epochs=2)
    assert analyze.main(["--list", "--log-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "cifar10: 1 of 80 runs finished" in out and "1 unfinished or damaged runs" in out


def run_with_images(log_dir, method, seed, counts, events=(), images=797, **more):
    """write_run from numbers of right answers, as train.py logs them."""
    def percent(count):
        return 100 * count / images
    events = {epoch: (percent(before), filters) for epoch, (before, filters) in dict(events).items()}
    return write_run(log_dir, method, seed, list(map(percent, counts)), events,
                     data={"train": 1000, "val": 0, "test": images, "classes": 10}, **more)


def test_equal_differences_of_counts_are_equal(tmp_path):
    # 780 - 779 and 776 - 775 of 797 images: as floats, the gaps differ in the last bit
    gaps = [100 * 780 / 797 - 100 * 779 / 797, 100 * 776 / 797 - 100 * 775 / 797]
    assert gaps[0] != gaps[1]
    for seed, (low, high) in enumerate([(779, 780), (775, 776)], 1):
        run_with_images(tmp_path / "logs", "S-r4", seed, [low], {0: (800 - 10 * seed, 1)})
        run_with_images(tmp_path / "logs", "L-r40", seed, [high], {0: (800 - 10 * seed, 1)})
    panel = figure_of(tmp_path, tmp_path / "logs")["models"]["vgg11"]
    for key in ("paired_best_acc", "paired_last_acc"):
        difference = panel[key]["L-r40 minus S-r4"]
        assert difference["p"] is None and difference["sd"] == 0 and difference["values"] == [100 / 797] * 2
        assert difference["ci95"] == [100 / 797] * 2


def test_an_event_that_changes_nothing_is_exactly_100_percent_stable_in_any_order(tmp_path):
    odd = [n for n in range(1, 798) if 100 * (100 * n / 797) / (100 * n / 797) != 100]
    assert len(odd) > 20  # in floats
    for seed, counts in enumerate([odd, odd[::-1]], 1):
        events = {i: (count, 1) for i, count in enumerate(counts)}
        run = analyze.summarize(run_with_images(tmp_path, "S-r4", seed, counts, events))
        assert run["problem"] is None and run["mean_stability"] == run["min_stability"] == 100 and run["below_99"] == 0
    runs = [run_with_images(tmp_path, "L-r40", seed, [n, 700 + seed], {0: (n, 1)}) for seed, n in enumerate(odd[:5])]
    stabilities = [analyze.summarize(run)["mean_stability"] for run in runs]
    accuracies = [analyze.summarize(run)["best_acc"] for run in runs]
    assert analyze.correlations(stabilities, accuracies)["pearson"] is None


def test_ties_of_counts_are_ties_whatever_the_order_of_events(tmp_path):
    events = [(790, 700), (600, 513), (501, 499), (797, 311)]
    runs = [analyze.summarize(run_with_images(
        tmp_path, "S-r4", seed, [after for _, after in order], {i: (before, 1) for i, (before, _) in enumerate(order)}))
        for seed, order in enumerate([events, events[::-1], events[2:] + events[:2]], 1)]
    assert len({run["mean_stability"] for run in runs}) == 1


def test_a_run_with_an_accuracy_that_is_not_a_number_is_named_and_left_out(tmp_path):
    log_dir = tmp_path / "logs"
    for seed in (1, 2, 3):
        directory = write_run(log_dir, "S-r4", seed, [60, 70, 80], {0: (80, 3)})
    path = directory / "epochs.jsonl"
    path.write_text(path.read_text().replace('"test_acc": 70', '"test_acc": NaN'))
    numbers = figure_of(tmp_path, log_dir)
    assert numbers["left_out"] == {str(directory): "test_acc of epoch 1 is nan"}
    assert numbers["models"]["vgg11"]["methods"]["S-r4"]["seeds"] == [1, 2]


def test_logs_of_before_the_finer_records_are_read(tmp_path):
    directory = write_run(tmp_path / "logs", "S-r4", 1, [60, 70], {0: (80, 3)})
    for name, fields in (("config.json", ("macs", "data")),
                         ("epochs.jsonl", ("test_loss", "test_loss_before", "churn", "parameters", "macs"))):
        lines = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        (directory / name).write_text("".join(json.dumps({k: v for k, v in line.items() if k not in fields}) + "\n"
                                              for line in lines))
    run = analyze.summarize(directory)
    assert run["problem"] is None and run["mean_stability"] == 75 and run["best_acc"] == 70
    assert run["loss_rise"] is run["churn"] is run["compute"] is None and run["below_99"] == 1
    assert figure_of(tmp_path, tmp_path / "logs")["models"]["vgg11"]["methods"]["S-r4"]["best_acc"]["n"] == 1


def test_best_and_last_accuracy_that_disagree_on_a_sign_are_named(tmp_path, capsys):
    for seed in (1, 2, 3, 4, 5, 6):  # less stable is better by the best accuracy, worse by the last epoch's
        write_run(tmp_path / "logs", "S-r4", seed, [65, 70 + seed, 60 + seed], {0: (66, 1)})
        write_run(tmp_path / "logs", "L-r40", seed, [60, 75 + seed, 50 + seed], {0: (80, 1)})
    numbers = figure_of(tmp_path, tmp_path / "logs")
    panel = numbers["models"]["vgg11"]
    assert panel["disagree"] == ["L-r40 minus S-r4"]
    best, last = (panel[f"paired_{k}_acc"]["L-r40 minus S-r4"]["mean"] for k in ("best", "last"))
    assert best > 0 > last
    scatter, = panel["scatters"]
    assert scatter["disagrees"] and scatter["kendall"][0] < 0 < scatter["by last_acc"]["kendall"][0]
    assert "L-r40 minus S-r4" in numbers["notes"][-1] and "they disagree" in capsys.readouterr().out


def test_analyze_leaves_the_matplotlib_of_a_notebook_alone():
    program = """import matplotlib
matplotlib.rcParams["font.size"] = 31
matplotlib.use("svg")
before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
import analyze, sys
assert dict(matplotlib.rcParams) == before and matplotlib.get_backend(auto_select=False) == backend
assert "matplotlib.pyplot" not in sys.modules"""
    root = pathlib.Path(analyze.__file__).parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_a_notebooks_backend_in_the_environment_does_not_matter(tmp_path):
    write_run(tmp_path / "logs", "S-r4", 1, [60, 70], {0: (80, 1)}, dataset="cost$5_$")
    command = [sys.executable, analyze.__file__, "--figure", "2", "--log-dir", tmp_path / "logs", "--fig-dir", tmp_path]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert (tmp_path / "fig2-cost$5_$.png").stat().st_size > 10_000
