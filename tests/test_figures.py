"""Every figure and table from logs written here: what is in it, how it looks, what is said of missing runs."""
import json
import pathlib
import shlex
import subprocess
import warnings

import numpy as np
import pytest
import scipy.stats
import torch

import analyze
from gst_ext import files
import train
from test_analyze import write_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN_FIGURES = [name for name in analyze.EVERYTHING if name not in ("B1", "D1")]


def fake_flatness(directory, seed, k=12):
    random = np.random.default_rng(seed)
    values = np.sort(random.exponential(5, k))[::-1]
    values[-1] *= -0.1
    plain = {
        "eigenvalues": list(values), "converged": [True] * (k - 1) + [seed != 2], "trace_eigs": values.sum(),
        "trace": values.sum() * 1.1, "trace_se": 0.1, "tr_c": 3 + seed, "tr_f": 4 + seed,
        "tic": (3 + seed) / values.sum(), "tic_trace": 0.2 + seed, "c_over_f": 0.7, "epsilon": [0.2] * 10,
        "epsilon_min": None if seed == 2 else 0.1 * seed}
    moved = {k: v * 4 if k in ("trace", "tr_c") else v * 1.04 if k == "trace_eigs" else v for k, v in plain.items()}
    (directory / "flatness.json").write_text(json.dumps({
        "images": 512, "eig": "lanczos", "eigs": k, "epoch": 315, **plain, "adaptive": plain,
        "control": {"1": plain | {"adaptive": plain}, "0.5": moved | {"adaptive": plain}},
        "density": {"probes": 4, "steps": 20, "width": 0.1, "grid": [-1 - seed, 0, 9 + seed],
                    "density": [0, 1 / (5 + seed), 0], "se": [0, 0, 0]},
        "line": {"epsilon": [-0.4, 0.0, 0.4], "loss": [[1.0 + i, 0.5, None] for i in range(10)]}}))


def methods_of(name):
    """{model: the methods whose runs write_all writes}."""
    anything = {"vgg11": (*analyze.FLAT["vgg11"], "S-r20", "S-r40-ebn"), "resnet18": analyze.ADAM}
    return anything if analyze.EVERYTHING[name][2] is analyze.ANY else analyze.EVERYTHING[name][2]


def write_all(log_dir, name, seeds=(1, 2, 3), dataset="cifar10", setting=""):
    """Runs of every method of a figure, each with its own rate, stability and accuracy."""
    random = np.random.default_rng(0)
    for model, methods in methods_of(name).items():
        sgd = "sgd" if name in ("4", "C3") and model == "resnet18" else ""
        for i, method in enumerate(methods):
            for seed in seeds:
                kept = [64] * 12 + [384, 307, 384, 26] if i % 2 else [64] * 16
                events = {} if method == "none" or "scratch" in method else {3: (85, 2), 5: (86 + i % 3, 4)}
                directory = write_run(
                    log_dir, method, seed, 80 + 8 * random.random(9), events, "-".join(filter(None, (sgd, setting))),
                    model, dataset=dataset, rate=0.5 * 2 ** (i // 3), options={"width": 1.0},
                    data={"train": 50_000, "val": 0, "test": 10_000, "classes": 10}, parameters=11_173_962,
                    pruned_layers=[{"layer": layer} for layer in (12, 13, 14, 15)])
                lines = [json.loads(line) for line in (directory / "epochs.jsonl").read_text().splitlines()]
                (directory / "epochs.jsonl").write_text("".join(json.dumps(x | {"live": kept}) + "\n" for x in lines))
                fake_flatness(directory, seed)


@pytest.fixture
def canvases(monkeypatch):
    """Every canvas that is saved, by file name."""
    kept, save = {}, analyze.drawing.save
    monkeypatch.setattr(analyze.drawing, "save", lambda canvas, name, numbers: (kept.update({name.name: canvas}),
                                                                               save(canvas, name, numbers)))
    return kept


def file_of(name):
    return f"fig{name}" if name in analyze.FIGURES else name.replace("table ", "tab")


def call(*options, log_dir, fig_dir):
    return analyze.main([*options, "--log-dir", str(log_dir), "--fig-dir", str(fig_dir)])


def option(name):
    return ["--figure", name] if name in analyze.FIGURES else ["--table", name.split()[1]]


def title_of(name):  # what Table F1 trains at is a setting of its own
    return {"dataset": "cifar100", "setting": "epochs4000-lrs2000-lr0.0001-augment"} if name == "table F1" else {}


@pytest.mark.parametrize("name", RUN_FIGURES)
def test_every_figure_and_table_is_drawn_complete_and_readable(tmp_path, canvases, capsys, name):
    write_all(tmp_path / "logs", name, **title_of(name))
    assert call(*option(name), log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    canvas = canvases[file_of(name)]
    numbers = json.loads((tmp_path / f"{file_of(name)}.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert set(numbers["models"]) == set(methods_of(name)) and not numbers["left_out"]
    for panel in numbers["models"].values():
        for method in panel.get("methods", {}).values():
            assert method["best_acc"]["n"] == 3 == len(method["best_acc"]["values"]) == len(method["runs"])
    for kind in ("pdf", "png"):
        assert (tmp_path / f"{file_of(name)}.{kind}").stat().st_size > 5_000
    with analyze.matplotlib.rc_context(analyze.drawing.LOOK):  # ticks are made while drawing
        canvas.draw_without_rendering()
    edges = canvas.get_window_extent()
    for text in canvas.findobj(analyze.matplotlib.text.Text):
        if text.get_visible() and text.get_text().strip():
            assert text.get_fontsize() >= 7
    for text in [t for axis in canvas.axes for t in (axis.title, axis.xaxis.label, axis.yaxis.label)]:
        if text.get_text():  # nothing is cut off at the edge
            box = text.get_window_extent()
            assert edges.x0 - 1 <= box.x0 and box.x1 <= edges.x1 + 1
            assert edges.y0 - 1 <= box.y0 and box.y1 <= edges.y1 + 1
    if name in analyze.FIGURES:
        assert any(axis.get_xlabel() for axis in canvas.axes) and any(axis.get_ylabel() for axis in canvas.axes)
    for axis in canvas.axes:
        legend = axis.get_legend()
        if legend:  # below the axes, so that it covers no data; each method told apart from the others
            assert legend.get_window_extent().y1 <= axis.get_window_extent().y0
            looks = [(h.get_color(), h.get_linestyle(), h.get_marker()) for h in legend.legend_handles]
            assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("name", [n for n in analyze.EVERYTHING if analyze.EVERYTHING[n][2] and n != "B1"])
def test_the_methods_of_a_figure_are_those_that_runs_sh_trains(name):
    _, target, models = analyze.EVERYTHING[name]
    methods = {(args.model, train.run_name(args)[0]) for args in directories(target, "--seeds", "1").values()}
    assert methods == {(model, method) for model, methods in models.items() for method in methods}


def directories(target, *options):
    """The runs of a target: {directory: args}."""
    command = ["bash", "runs.sh", target, "--print", *options]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {train.run_directory(args): args for args in (train.parse_options(shlex.split(line)[2:]) for line in lines)}


def test_a_method_has_one_look_and_pruning_targets_differ():
    assert analyze.style("S-r40") == analyze.style("S-r40-ebn") == analyze.style("S-r300")
    assert analyze.style("S-r4") == analyze.style("S-r4-ebn-signed-s3,4,5,6") != analyze.style("S-r40")
    assert analyze.style("zero-1") != analyze.style("zero-1105") and analyze.style("zero-1220-all-restore-tb256")
    assert analyze.style("S-r1-s24x16")[0] != analyze.style("S-r1-s24x16-p0.06x16")[0]
    assert len({analyze.style(m)[0] for m in ("none", "S-r4", "S-r40", "R-r40", "L-r40", "scratch-S")}) == 6


@pytest.mark.parametrize("p, percent", [((0.25, 0.4, 0.25, 0.95), 46), ((0.25, 0.8, 0.25, 0.95), 59),
                                        ((0, 0, 0, 0.7), 15)])
def test_total_pruning_percentages_are_the_papers(p, percent):
    kept = [train.kept_filters(512, fraction, 1)[0] for fraction in p]
    run = {"config": {"options": {"model": "resnet18", "width": 1.0}, "data": {"classes": 10}, "parameters": 11_173_962,
                      "pruned_layers": [{"layer": layer} for layer in (12, 13, 14, 15)]}, "live": [64] * 12 + kept}
    assert round(analyze.total_pruned(run)) == percent
    run["live"] = [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    assert analyze.total_pruned(run) == 0


def test_the_papers_stars_in_table_c1_are_students_t_tests():
    # C.2: of the three changes from 46% (10 runs) to 59% (3 runs), the last two are significant below 10%
    paper = analyze.PAPER["table C1", "resnet18"]
    p = [scipy.stats.ttest_ind_from_stats(*paper[m][1:3], 10, *paper[m + analyze.HIGH][1:3], 3).pvalue
         for m in ("S-r4", "S-r40", "L-r40")]
    assert p[0] > 0.1 and p[1] < 0.1 and p[2] < 0.1


def test_table_c1_holds_the_tests_of_59_against_46_percent(tmp_path):
    write_all(tmp_path / "logs", "table C1")
    assert call("--table", "C1", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    panel = json.loads((tmp_path / "tabC1.json").read_text())["models"]["resnet18"]
    assert list(panel["t_tests"]) == [f"{m}{analyze.HIGH} against {m}" for m in ("S-r4", "S-r40", "L-r40")]
    low, high = (panel["methods"]["S-r4" + p]["best_acc"]["values"] for p in ("", analyze.HIGH))
    test = panel["t_tests"][f"S-r4{analyze.HIGH} against S-r4"]
    assert test["student"][1] == pytest.approx(scipy.stats.ttest_ind(high, low).pvalue)
    assert panel["paper"]["L-r40"][1] == 88.03 and panel["methods"]["S-r40"]["total_pruned"]["mean"] > 0


def test_rates_that_scaling_makes_equal_are_drawn_once(tmp_path):
    for r, rate in ((4, 8.0), (20, 8.0), (40, 16.0)):
        write_run(tmp_path / "logs", f"S-r{r}", 1, [60, 70], {0: (80, 1)}, rate=rate)
    assert call("--figure", "3", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    numbers = json.loads((tmp_path / "fig3.json").read_text())["models"]["vgg11"]
    assert {k: v["r"] for k, v in numbers["by_rate"].items()} == {"8": 4, "16": 40}


def test_scatters_of_all_six_methods_and_of_pruned_runs_only(tmp_path):
    write_all(tmp_path / "logs", "E5")
    write_all(tmp_path / "logs4", "4")
    for name, log_dir, n in (("E5", "logs", 18), ("4", "logs4", 6)):
        assert call("--figure", name, log_dir=tmp_path / log_dir, fig_dir=tmp_path) == 0
        for panel in json.loads((tmp_path / f"fig{name}.json").read_text())["models"].values():
            assert {s["n"] for s in panel["scatters"]} == {n}
            assert panel["scatters"][-1].get("by last_acc", {"n": n})["n"] == n


def test_a_run_that_never_reached_the_rise_is_left_out_of_that_panel_only(tmp_path):
    write_all(tmp_path / "logs", "E3")
    assert call("--figure", "E3", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    panel = json.loads((tmp_path / "figE3.json").read_text())["models"]["vgg11"]
    assert [s["n"] for s in panel["scatters"]] == [12, 12]


def test_runs_measured_otherwise_or_not_at_all_are_named(tmp_path, capsys):
    write_all(tmp_path / "logs", "E5")
    other = tmp_path / "logs/cifar10/vgg11/S-r4/seed1/flatness.json"
    other.write_text(other.read_text().replace('"images": 512', '"images": 64'))
    damaged = tmp_path / "logs/cifar10/vgg11/S-r4/seed2/flatness.json"
    damaged.write_text("{")
    (tmp_path / "logs/cifar10/vgg11/S-r4/seed3/flatness.json").unlink()  # and has no checkpoint to measure
    assert call("--figure", "E5", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    left_out = json.loads((tmp_path / "figE5.json").read_text())["left_out"]
    assert {pathlib.Path(k).name: v for k, v in left_out.items()}.keys() == {"seed1", "seed2", "seed3"}
    assert "in images" in left_out[str(other.parent)] and "flatness.json is damaged" in left_out[str(damaged.parent)]
    out = capsys.readouterr().out
    assert "15 of 60 runs are there; the rest: bash runs.sh fig6 --seeds 1-10" in out
    assert call("--figure", "E5", "E6", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    numbers = json.loads((tmp_path / "figE6.json").read_text())  # which needs no flatness
    assert numbers["left_out"] == {} and numbers["models"]["vgg11"]["scatters"][0]["n"] == 18


def test_the_papers_numbers_stand_beside_their_own_figure_only(tmp_path):
    write_all(tmp_path / "logs", "C1")
    write_all(tmp_path / "logs", "C3")
    assert call("--figure", "C1", "C3", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    c1, c3 = (json.loads((tmp_path / f"fig{name}.json").read_text())["models"] for name in ("C1", "C3"))
    assert c1["vgg11"]["paper"] is None and c3["resnet18"]["paper"].keys() == c3["resnet18"]["methods"].keys()


def test_mixed_configurations_and_doubled_runs_are_named(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, "S-r4", seed, [60, 70], {0: (80, 1)}, options={"test_batch_size": 128}, data={"crc32": 1})
    write_run(tmp_path, "S-r4", 4, [60, 70], {0: (80, 1)}, options={"test_batch_size": 64}, data={"crc32": 1})
    write_run(tmp_path, "S-r4", 5, [60, 70], {0: (80, 1)}, options={"test_batch_size": 128}, data={"crc32": 2})
    twin = write_run(tmp_path, "S-r4", 2, [60, 70], {0: (80, 1)}, setting="copy", options={"test_batch_size": 128},
                     data={"crc32": 1})
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"setting": ""}))
    problems = {run["dir"]: run["problem"] for run in analyze.find_runs(tmp_path)}
    first = tmp_path / "cifar10/vgg11/S-r4"
    assert [problems[str(first / f"seed{seed}")] for seed in (1, 3)] == [None, None]
    assert problems[str(first / "seed4")].endswith("in test_batch_size")
    assert problems[str(first / "seed5")].endswith("in crc32")
    assert [problems[str(first / "seed2")], problems[str(twin)]] == [None, f"is the same run as {first / 'seed2'}"]


@pytest.mark.parametrize("target, more, extra", [
    ("fig2", "--seeds 1-2 -- --width 0.1 --scale-epochs 0.02 --lrs 100 200 --val-split 9".split(),
     " -- --width 0.1 --scale-epochs 0.02 --lrs 100 200 --val-split 9"),
    ("fig4", ["--seeds", "2,4", "--", "--no-augment", "--batch-size", "64"], " -- --batch-size 64 --no-augment"),
    ("tabF1", ["--quick", "--seeds", "1-2"], " --preset quick"), ("fig4", ["--quick"], " --preset quick"),
    ("fig2", "--preset small --seeds 1-3 -- --label-noise 0.3".split(), " --preset small -- --label-noise 0.3"),
    ("fig6", [], "")])
def test_the_command_for_the_rest_trains_just_the_missing_runs(tmp_path, target, more, extra):
    wanted = directories(target, *more)
    found = []
    for args in list(wanted.values())[::3]:
        method, setting = train.run_name(args)
        found.append({"model": args.model, "method": method, "setting": setting, "seed": args.seed,
                      "config": {"options": vars(args)}})
    seeds = {run["seed"] for run in found}
    name = {"tabF1": "table F1"}.get(target, target.removeprefix("fig"))
    setting = found[0]["setting"].removeprefix("sgd").lstrip("-")
    there, total, command = analyze.rest_command(name, found[0]["config"]["options"]["dataset"], setting, found)
    assert there == len(found)
    words = command.split()
    assert words[:3] == ["bash", "runs.sh", target] and all(word in words for word in extra.split())
    printed = directories(*words[2:])
    assert total == len(printed)
    assert printed.keys() == {d for d, args in wanted.items() if not more or args.seed in seeds}


def test_live_draws_the_unfinished_runs_curves_and_stops_with_the_last(tmp_path, monkeypatch):
    log_dir = tmp_path / "logs"
    write_run(log_dir, "S-r4", 1, [60, 70, 80], {0: (80, 3)})
    running = write_run(log_dir, "S-r4", 2, [62, 70], {0: (80, 3)}, epochs=3)
    drawn = []

    def sleep(seconds):
        drawn.append(json.loads((tmp_path / "fig2.json").read_text())["models"]["vgg11"])
        line = json.loads((running / "epochs.jsonl").read_text().splitlines()[-1]) | {"epoch": 2, "test_acc": 82}
        with open(running / "epochs.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    monkeypatch.setattr(analyze.time, "sleep", sleep)
    assert call("--figure", "2", "--live", log_dir=log_dir, fig_dir=tmp_path) == 0
    assert len(drawn) == 1 and drawn[0]["dynamics"]["S-r4"]["mean"] == [61, 70]
    assert drawn[0]["methods"]["S-r4"]["best_acc"]["n"] == 1  # only a finished run has an accuracy
    last = json.loads((tmp_path / "fig2.json").read_text())["models"]["vgg11"]
    assert last["dynamics"]["S-r4"]["mean"] == [61, 70, 81] and last["methods"]["S-r4"]["best_acc"]["n"] == 2
    assert call("--figure", "3", "--live", log_dir=log_dir, fig_dir=tmp_path) == 2


def test_all_draws_what_is_there_and_says_what_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze, "weight_path", lambda kind: ([1, 2], [0.1, 0.0], 1))
    monkeypatch.setattr(analyze, "vgg19_from_torchvision", no_network)
    write_all(tmp_path / "logs", "2", seeds=(1,))
    assert call("--figure", "all", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    assert {p.stem for p in tmp_path.glob("*.png")} >= {"fig2", "fig3", "figC1", "fig6", "figE1", "figD1"}
    err = capsys.readouterr().err
    assert "4: no finished runs of Figure 4" in err and "table F1: no finished runs of table F1" in err
    assert "B1: no network" in err and "Traceback" not in err


def no_network(args):
    raise files.UserError("no network")


def test_one_weight_under_pruning_zeroing_and_noise():
    paths = {kind: analyze.weight_path(kind) for kind in ("prune", "zero", "gauss")}
    event = paths["prune"][2]
    before = {kind: values[:event] for kind, (_, values, _) in paths.items()}
    assert before["prune"] == before["zero"] == before["gauss"] and len(set(before["prune"])) > event // 2
    assert set(paths["prune"][1][event:]) == {0.0}
    zeroed = paths["zero"][1][event:]
    assert set(zeroed[:15]) == {0.0} and 0.0 not in zeroed[15:] and len(zeroed) == event
    gauss = np.array(paths["gauss"][1])
    assert np.abs(np.diff(gauss[event:event + 15])).max() > 5 * np.abs(np.diff(gauss[:event])).max()


def test_normalised_activations_have_mean_0_and_variance_1_and_skip_dead_maps():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
    first, second = analyze.normalised_activations(model, [model[0], model[2]], torch.randn(5, 3, 8, 8))
    assert first.shape == (5 * 3 * 6 * 6,) and second.shape == (5 * 2 * 4 * 4,)
    for values in (first, second):
        assert abs(values.mean()) < 1e-6 and values.var() == pytest.approx(1, abs=1e-5)


def test_figure_b1_from_a_vgg19_run_and_from_torchvision(tmp_path, tiny, monkeypatch, capsys):
    options = "--model vgg19 --width 0.05 --device cpu --batch-size 32 --epochs 2 --lrs 2".split()
    assert train.main([*options, "--dataset", str(tiny), "--log-dir", str(tmp_path / "logs")]) == 0
    assert call("--figure", "B1", log_dir=tmp_path / "logs", fig_dir=tmp_path / "own") == 0
    name, = (p for p in (tmp_path / "own").glob("*.json"))
    layers = json.loads(name.read_text())["models"]["vgg19"]["layers"]
    assert [(x["when"], x["convolution"]) for x in layers] == [(w, 9 + i) for w in ("before training", "after training")
                                                                 for i in range(8)]
    assert all(0 < x["ks"] < 1 for x in layers)

    import torchvision
    network = torchvision.models.VGG(torchvision.models.vgg.make_layers(
        [4, "M", 4, "M", *[4] * 4, "M", *[4] * 4, "M", *[4] * 4, "M"], batch_norm=True), init_weights=False)
    network.classifier = torch.nn.Identity()
    monkeypatch.setattr(torchvision.models, "vgg19_bn", lambda weights: network)
    monkeypatch.setattr(train, "load_data", lambda *a: {"test_x": np.random.default_rng(0).integers(
        0, 256, (40, 32, 32, 3)).astype(np.uint8)})
    assert call("--figure", "B1", log_dir=tmp_path / "none", fig_dir=tmp_path) == 0
    assert "torchvision" in json.loads((tmp_path / "figB1-imagenet.json").read_text())["models"]["vgg19"]["run"]

    def offline(weights):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "vgg19_bn", offline)
    capsys.readouterr()
    assert call("--figure", "B1", log_dir=tmp_path / "none", fig_dir=tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no route to host" in err and "bash runs.sh figB1 --quick" in err


def test_depth_marks_in_one_place_stand_on_top_of_each_other(tmp_path, canvases):
    for method, depth in (("S-r40", 12), ("L-r40", 21), ("S-r4", 5)):
        curve = [70 + i / 10 for i in range(60)]
        curve[30] = depth
        write_run(tmp_path / "logs", method, 1, curve, {30: (73, 1)})
    assert call("--figure", "2", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    canvas = canvases["fig2"]
    canvas.draw_without_rendering()
    marks = {text.get_text(): text.get_window_extent() for text in canvas.axes[0].texts}
    assert set(marks) == {"5%", "12%", "21%"}
    boxes = sorted(marks.values(), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))


def test_runs_of_one_epoch_are_visible(tmp_path, canvases):
    for seed in (1, 2):
        write_run(tmp_path / "logs", "S-r4", seed, [60 + seed], {0: (80, 1)})
    assert call("--figure", "2", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    line, = canvases["fig2"].axes[0].lines
    assert line.get_marker() not in ("", "None", None) and line.get_markersize() >= 3


def test_the_stability_figure_holds_hand_computed_numbers(tmp_path):
    log_dir = tmp_path / "logs"
    for i, (method, events) in enumerate([("S-r4", 3), ("S-r40", 1), ("L-r40", 1), ("R-r40", 2)]):
        for seed in (1, 2):
            drops = {e: (80, 1) for e in range(events)}
            write_run(log_dir, method, seed, [80 - i - seed / 10] * events + [70 + i + seed, 70 + seed], drops)
    write_run(log_dir, "none", 1, [50, 60])
    write_run(log_dir, "scratch-S", 1, [50, 60])
    write_run(log_dir, "zero-50", 1, [50, 60], {0: (70, 1)})
    assert call("--figure", "stability", "compute", log_dir=log_dir, fig_dir=tmp_path) == 0
    panel = json.loads((tmp_path / "figstability.json").read_text())["models"]["vgg11"]
    assert [(s["x"], s["y"]) for s in panel["scatters"]] == [
        (x, y) for y in ("best_acc", "last_acc") for x in ("mean_stability", "loss_rise", "churn", "min_stability",
                                                           "below_99")]
    assert {s["n"] for s in panel["scatters"]} == {8}  # neither noise nor what never pruned while training
    assert list(panel["methods"]) == ["none", "S-r4", "S-r40", "L-r40", "R-r40", "scratch-S"]
    drop = panel["methods"]["R-r40"]
    assert drop["loss_rise"]["values"] == pytest.approx([0.031, 0.032])
    assert drop["churn"]["values"] == pytest.approx([6.2, 6.4])
    assert drop["mean_stability"]["values"] == drop["min_stability"]["values"] == [96.125, 96.0]
    assert [panel["methods"][m]["below_99"]["mean"] for m in ("S-r4", "S-r40", "L-r40", "R-r40")] == [0, 1, 1, 2]
    found = {(s["x"], s["y"]): s for s in panel["scatters"]}["below_99", "last_acc"]
    x, y, events = [0, 0, 1, 1, 1, 1, 2, 2], [71, 72] * 4, [3, 3, 1, 1, 1, 1, 2, 2]
    assert found["kendall"] == pytest.approx(scipy.stats.kendalltau(x, y)) and found["pearson"][0] == pytest.approx(0)
    assert found["given events"]["pearson"][0] == pytest.approx(0, abs=1e-12) and len(events) == len(x)
    compute = json.loads((tmp_path / "figcompute.json").read_text())["models"]["vgg11"]
    assert [(s["y"], s["n"]) for s in compute["scatters"]] == [("best_acc", 10), ("last_acc", 10)]
    # an event takes a tenth of the cost of the epochs after it: of three epochs, the second and third
    assert compute["methods"]["S-r40"]["compute"]["values"] == pytest.approx([100 * (1000 + 2 * 900) / 3000] * 2)


def test_flatness_measures_say_what_rescaling_moved_and_what_has_not_converged(tmp_path, canvases):
    write_all(tmp_path / "logs", "flatness")
    none = tmp_path / "logs/cifar10/vgg11/L-r40/seed3/flatness.json"
    flat = json.loads(none.read_text())
    none.write_text(json.dumps(flat | {"converged": [False] * 12}))
    assert call("--figure", "flatness", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    numbers = json.loads((tmp_path / "figflatness.json").read_text())
    assert "none of the eigenpairs" in numbers["left_out"][str(none.parent)]
    assert "12 eigenpairs (100 asked)" in numbers["notes"][0] and "512 test images" in numbers["notes"][0]
    panel = numbers["models"]["vgg11"]
    assert panel["methods"]["S-r4"]["converged"]["values"] == pytest.approx([1, 11 / 12, 1])
    scatters = {s["x"]: s for s in panel["scatters"]}
    assert len(scatters) == 16 and scatters["trace"]["kendall_ci95"]
    assert scatters["trace"]["moved_by_rescaling"] == pytest.approx([3] * 17)
    assert scatters["trace_eigs"]["moved_by_rescaling"] == pytest.approx([0.04] * 17)
    titles = {axis.get_xlabel(): axis.get_title() for axis in canvases["figflatness"].axes}
    marked = {label for label, title in titles.items() if "†" in title}
    assert marked == {analyze.LABELS["trace"], analyze.LABELS["tr_c"]}
    doubtful = {label for label, title in titles.items() if "white dot" in title}
    assert doubtful == {analyze.LABELS[form + k] for form in ("", "adaptive_") for k in ("trace_eigs", "tic")}
    assert call("--figure", "6", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    marked = {axis.get_ylabel() for axis in canvases["fig6"].axes if "†" in axis.get_title()}
    assert marked >= {analyze.LABELS["tr_c"]}, "a measure may be the y of a panel"


def test_the_density_of_spectra_is_drawn_on_one_grid(tmp_path):
    write_all(tmp_path / "logs", "density")
    assert call("--figure", "density", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    density = json.loads((tmp_path / "figdensity.json").read_text())["models"]["vgg11"]["density"]
    assert list(density) == list(analyze.FLAT["vgg11"])
    for curve in density.values():
        grid, mean = np.array(curve["lambda"]), np.array(curve["mean"])
        assert (grid[0], grid[-1]) == (-4, 12) and curve["n"] == 3
        assert np.trapezoid(mean, grid) == pytest.approx(1, abs=0.01)  # the mean of three densities


def test_a_narrow_spectrum_is_not_lost_beside_a_wide_one(tmp_path):
    write_all(tmp_path / "logs", "density")
    grid = np.linspace(0, 10, 2001)
    for path in (tmp_path / "logs").glob("*/*/*/*/flatness.json"):
        scale = 1 if "S-r4/" in str(path) else 100
        density = scipy.stats.norm.pdf(grid, 5, 0.1) / scale
        path.write_text(json.dumps(json.loads(path.read_text()) | {"density": {
            "probes": 4, "steps": 20, "width": 0.1 * scale, "grid": list(grid * scale), "density": list(density)}}))
    assert call("--figure", "density", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    for curve in json.loads((tmp_path / "figdensity.json").read_text())["models"]["vgg11"]["density"].values():
        assert np.trapezoid(curve["mean"], curve["lambda"]) == pytest.approx(1, abs=0.01)


def test_a_flatness_json_without_density_is_one_line(tmp_path, capsys):
    write_all(tmp_path / "logs", "density", seeds=(1,))
    for path in (tmp_path / "logs").glob("*/*/*/*/flatness.json"):
        flat = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in flat.items() if k not in ("density", "adaptive", "control")}))
    assert call("--figure", "density", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 2
    assert capsys.readouterr().err == "analyze.py: a flatness.json without density: delete it to measure again\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # panels without points must not take the layout apart
        assert call("--figure", "flatness", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0


def test_the_rest_is_trained_where_the_logs_are_and_a_log_dir_that_is_missing_is_named(tmp_path, capsys):
    write_all(tmp_path / "my logs", "2", seeds=(1, 2))
    assert call("--figure", "2", log_dir=tmp_path / "my logs", fig_dir=tmp_path) == 0
    command = shlex.split(capsys.readouterr().out.split("the rest: ")[1])
    assert command[command.index("--log-dir") + 1] == str(tmp_path / "my logs")
    assert call("--list", log_dir=tmp_path / "nowhere", fig_dir=tmp_path) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err


def test_a_flatness_json_that_cannot_be_read_is_one_line(tmp_path, capsys):
    write_all(tmp_path / "logs", "E5", seeds=(1,))
    path = tmp_path / "logs/cifar10/vgg11/L-r40/seed1/flatness.json"
    path.unlink()
    path.mkdir()
    assert call("--figure", "E5", log_dir=tmp_path / "logs", fig_dir=tmp_path) == 0
    assert "flatness.json is damaged (IsADirectoryError)" in capsys.readouterr().out
