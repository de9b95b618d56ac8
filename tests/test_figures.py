"""Every figure and table of logs written here: what is in it, how it looks, what it leaves out."""
# ruff: noqa: F401, F811 (fixtures)
import json
import shlex
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision
from test_analyze import EVENT, draw, draw_panel, edit, line_of, no_images, refusal, write_run

import analyze
import appendix_figures
import train
from gst_ext.errors import UserError

BLOCKS = analyze.read_experiments()
ALL = {"lines": ["--target none", "--target S --r 4", "--target S", "--target S --r 20",
                 "--target S --scratch", "--target S --score ebn", "--model resnet18 --target S"]}
DRAWN = [name for name in analyze.OUTPUTS if name not in ("B1", "D1")]


def write_flatness(directory, seed, k=12, **more):
    random = np.random.default_rng(seed)
    values = np.sort(random.exponential(5, k))[::-1]
    values[-1] *= -0.1
    plain = {"eigenvalues": list(values), "converged": [True] * (k - 1) + [seed != 2],
             "trace_eigs": values.sum(), "trace": values.sum() * 1.1, "tr_c": 3 + seed,
             "tr_f": 4 + seed, "tic": (3 + seed) / values.sum(), "tic_trace": 0.2 + seed,
             "c_over_f": 0.7, "epsilon_min": None if seed == 2 else 0.1 * seed}
    moved = plain | {"trace_eigs": plain["trace_eigs"] * 1.04, "adaptive": plain} | {
        name: plain[name] * 4 for name in ("trace", "tr_c", "tr_f")}
    (directory / "flatness.json").write_text(json.dumps({
        "images": 512, "eig": "lanczos", "eigs": k, "epoch": 315, "split": "test", **plain,
        "adaptive": plain, "control": {"1": plain | {"adaptive": plain}, "0.5": moved},
        "density": {"width": 0.1, "grid": [-1 - seed, 0, 9 + seed],
                    "density": [0, 1 / (5 + seed), 0]},
        "line": {"epsilon": [-0.4, 0, 0.4], "loss": [[1.0 + i, 0.5, None] for i in range(10)]},
        **more}))


def lines_of(name):
    """The lines of an output's block."""
    return BLOCKS.get(analyze.OUTPUTS[name][1], ALL)["lines"]


def write_all(log_dir, name, seeds=(1, 2, 3), flat=True):
    """Writes runs of every line of an output's block, each with its own rate and accuracies."""
    random = np.random.default_rng(0)
    for i, line in enumerate(lines_of(name)):
        pruned = "--target none" not in line and "--scratch" not in line
        for seed in seeds:
            path = write_run(
                log_dir, line, seed, 80 + 8 * random.random(9),
                {3: (85, 2), 5: (86 + i % 3, 4)} if pruned else {},
                iterative_rate=0.5 * 2 ** (i // 3), parameters=11_173_962, data={"crc32": {}},
                pruned_layers=[{"layer": layer, "filters": 64} for layer in (12, 13, 14, 15)])
            live = [64] * 12 + [384, 307, 384, 26]
            edit(path / "epochs.jsonl", '"val_acc"', f'"live": {live}, "val_acc"')
            if flat:
                write_flatness(path, seed)


def draw_output(tmp_path, name, *more):
    """Draws a figure or table by its name in OUTPUTS; returns its numbers."""
    kind, number = ("figure", name) if name in analyze.FIGURES else name.split()
    numbers, = draw(tmp_path, f"--{kind}", number, *more).values()
    return numbers


@pytest.mark.parametrize("name", DRAWN)
def test_every_output_is_complete_and_readable(tmp_path, no_images, name):
    write_all(tmp_path / "logs", name)
    numbers = draw_output(tmp_path, name)
    wanted = {}
    for line in lines_of(name):
        options = train.parse_options(shlex.split(line))
        wanted.setdefault(options.model, set()).add(train.run_name(options)[0])
    assert not numbers["left_out"]
    assert {model: set(panel["methods"]) for model, panel in numbers["models"].items()} == wanted
    for panel in numbers["models"].values():
        for method in panel["methods"].values():
            assert method["best_acc"]["n"] == 3 == len(method["runs"])
    figure, = no_images.values()
    with analyze.matplotlib.rc_context(analyze.plots.RC_PARAMS):
        figure.draw_without_rendering()
    edges = figure.get_window_extent()
    for text in figure.findobj(analyze.matplotlib.text.Text):
        assert not text.get_text().strip() or text.get_fontsize() >= 7
    for axis in figure.axes:
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            box = text.get_window_extent()
            assert not text.get_text() or edges.x0 - 1 <= box.x0 and box.x1 <= edges.x1 + 1 and (
                edges.y0 - 1 <= box.y0 and box.y1 <= edges.y1 + 1), "cut off at the edge"
        legend = axis.get_legend()
        if legend:  # below the label, and each method is told from the others
            assert legend.get_window_extent().y1 <= axis.xaxis.label.get_window_extent().y0 + 1
            looks = [(h.get_color(), h.get_linestyle(), h.get_marker())
                     for h in legend.legend_handles]
            assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("name", [  # one for each function that draws unfinished runs
    "2", "3", "5", "6", "C1", "C2", "stability", "table C1", "depth", "table depth"])
def test_live_waits_for_epochs_and_draws_until_all_runs_are_finished(
        tmp_path, monkeypatch, recwarn, name):
    write_all(tmp_path / "logs", name, seeds=(1, 2), flat=False)
    logs = {path: path.read_text().splitlines(True) for path in tmp_path.rglob("epochs.jsonl")}
    lengths, drawn = iter([0, 1, 5, 9]), []

    def go_on(seconds=0):
        drawn.append(len(list(tmp_path.glob("*.json"))))
        length = next(lengths)
        for i, (path, lines) in enumerate(sorted(logs.items())):
            path.write_text("".join(lines[:length + i % 3 if length in (1, 5) else length]))
            if length == 9:  # before, flatness cannot be measured
                write_flatness(path.parent, 1)
    go_on()
    monkeypatch.setattr(analyze.time, "sleep", go_on)
    numbers = draw_output(tmp_path, name, "--live")
    assert next(lengths, None) is None and numbers["left_out"] == {}
    assert drawn[:3] == [0, 0, name not in analyze.NEEDS_FLATNESS]
    assert not [str(warning.message) for warning in recwarn]


def test_a_method_has_one_look_and_targets_differ():
    def look(name):
        return analyze.method_style(train.parse_options(line_of(name).split()))

    assert look("S-r40") == look("S-r300") != look("S-r4")
    assert look("zero-1") != look("zero-1105")
    names = ("none", "S-r4", "S-r40", "R-r40", "L-r40", "scratch-S")
    assert len({look(name)[0] for name in names}) == len(names)


@pytest.mark.parametrize("p, percent", [
    ((0.25, 0.4, 0.25, 0.95), 46), ((0.25, 0.8, 0.25, 0.95), 59), ((0, 0, 0, 0.7), 15),
    ((0, 0, 0, 0), 0)])
def test_total_pruning_percentages_are_the_papers(p, percent):
    live = [train.num_filters_to_keep(512, fraction, 1)[0] for fraction in p]
    run = {"options": train.parse_options(["--model", "resnet18"]), "live": [64] * 12 + live,
           "config": {"data": {"classes": 10}, "parameters": 11_173_962,
                      "pruned_layers": [{"layer": layer} for layer in (12, 13, 14, 15)]}}
    assert round(appendix_figures.total_pruned(run)) == percent


def test_table_c1_tests_59_against_46_percent_as_the_paper_does(tmp_path):
    # C.2: of the changes from 46% (10 runs) to 59% (3 runs), the last two are below 10%
    paper, high = analyze.PAPER["table C1", "resnet18"], appendix_figures.HIGH
    methods = ("S-r4", "S-r40", "L-r40")
    p = [scipy.stats.ttest_ind_from_stats(*paper[m][1:3], 10, *paper[m + high][1:3], 3).pvalue
         for m in methods]
    assert p[0] > 0.1 > max(p[1:])
    write_all(tmp_path / "logs", "table C1", flat=False)
    panel = draw(tmp_path, "--table", "C1")["tabC1"]["models"]["resnet18"]
    assert set(panel["t_tests"]) == {f"{m}{high} against {m}" for m in methods}
    a, b = (panel["methods"]["S-r4" + more]["best_acc"]["values"] for more in (high, ""))
    test = panel["t_tests"][f"S-r4{high} against S-r4"]
    assert test["student"][1] == pytest.approx(scipy.stats.ttest_ind(a, b).pvalue)
    assert panel["paper"]["L-r40"][1] == 88.03 and panel["total_pruned"]["S-r40"]["mean"] > 0


def test_rates_that_scaling_makes_equal_are_drawn_once(tmp_path):
    for r, rate in ((4, 8.0), (20, 8.0), (40, 16.0)):
        write_run(tmp_path / "logs", f"--target S --r {r}", 1, [60, 70], EVENT,
                  iterative_rate=rate)
    rates = draw_panel(tmp_path, "3")["by_rate"]
    assert {rate: numbers["r"] for rate, numbers in rates.items()} == {"8": 4, "16": 40}


def test_scatters_have_the_right_runs_and_the_papers_numbers_their_own_figure(tmp_path):
    write_all(tmp_path / "logs", "E5")
    write_all(tmp_path / "sgd", "4", flat=False)
    write_all(tmp_path / "sgd", "C3", seeds=(4,), flat=False)
    drawn = draw(tmp_path, "--figure", "E5", "E3") | draw(
        tmp_path, "--figure", "4", "C3", log_dir="sgd")
    counts = {name: {s["n"] for panel in numbers["models"].values() for s in panel["scatters"]}
              for name, numbers in drawn.items()}
    # E3: the runs of seed 2 never reached the rise. 4 and C3: only runs that prune.
    assert counts == {"figE5": {18}, "figE3": {12}, "fig4": {6}, "figC3": {2}}
    four, c3 = (drawn[name]["models"]["resnet18"] for name in ("fig4", "figC3"))
    assert four["paper"] is None and set(c3["paper"]) == set(c3["methods"])


def test_flatness_of_other_weights_settings_or_none_is_left_out(tmp_path, capsys):
    write_all(tmp_path / "logs", "E5")
    root = tmp_path / "logs/cifar10/vgg11"
    edit(root / "S-r4/seed1/flatness.json", '"images": 512', '"images": 64')
    (root / "S-r4/seed2/flatness.json").write_text("{")
    (root / "S-r4/seed3/flatness.json").unlink()  # and has no checkpoint to measure
    for seed, crc32 in ((1, 907060870), (2, 7)):
        (root / f"L-r40/seed{seed}/checkpoint.pt").write_bytes(b"hello")
        write_flatness(root / f"L-r40/seed{seed}", seed, checkpoint="checkpoint.pt", crc32=crc32)
    write_flatness(root / "L-r40/seed3", 3, converged=[False] * 12)
    left_out = draw(tmp_path, "--figure", "E5")["figE5"]["left_out"]
    words = {"S-r4/seed1": "in images", "S-r4/seed2": "is damaged",
             "S-r4/seed3": "is not finished: continue", "L-r40/seed2": "of other weights",
             "L-r40/seed3": "none of the eigenpairs"}
    assert left_out.keys() == {str(root / run) for run in words}
    assert all(word in left_out[str(root / run)] for run, word in words.items())
    assert "13 of 60 runs are there; the rest: bash runs.sh fig6 --seeds 1-10" in (
        capsys.readouterr().out)
    numbers = draw(tmp_path, "--figure", "E6")["figE6"]  # which needs no flatness
    assert numbers["left_out"] == {} and numbers["models"]["vgg11"]["scatters"][0]["n"] == 18


def test_live_draws_unfinished_curves_and_stops_with_the_last_run(tmp_path, monkeypatch):
    write_run(tmp_path / "logs", "--target S --r 4", 1, [60, 70, 80], EVENT)
    log = write_run(tmp_path / "logs", "--target S --r 4", 2, [62, 70], EVENT,
                    epochs=3) / "epochs.jsonl"
    drawn = []

    def sleep(seconds):
        drawn.append(json.loads((tmp_path / "fig2.json").read_text())["models"]["vgg11"])
        record = json.loads(log.read_text().splitlines()[-1])
        log.write_text(log.read_text() + json.dumps(record | {"epoch": 2, "test_acc": 82}) + "\n")

    monkeypatch.setattr(analyze.time, "sleep", sleep)
    drawn.append(draw_panel(tmp_path, "2", "--live"))
    assert [panel["dynamics"]["S-r4"]["mean"] for panel in drawn] == [[61, 70], [61, 70, 81]]
    # Only finished runs have a best accuracy.
    assert [panel["methods"]["S-r4"]["best_acc"]["n"] for panel in drawn] == [1, 2]


def test_all_draws_what_is_there_and_names_what_is_not(tmp_path, capsys, monkeypatch):
    def no_network(*_):
        raise UserError("no network")
    monkeypatch.setattr(appendix_figures, "weight_path", lambda kind: [0.1, 0.0])
    monkeypatch.setattr(appendix_figures, "imagenet_networks", no_network)
    write_all(tmp_path / "logs", "2", seeds=(1,))
    assert set(draw(tmp_path, "--figure", "all")) >= {"fig2", "fig3", "figC1", "fig6", "figD1"}
    error = capsys.readouterr().err
    assert "4: no finished runs of Figure 4" in error and "B1: no network" in error
    assert "table F1: no finished runs of table F1" in error and "Traceback" not in error


def test_one_weight_under_pruning_zeroing_and_noise():
    prune, zero, gauss = (np.array(appendix_figures.weight_path(kind))
                          for kind in ("prune", "zero", "gauss"))
    event = len(prune) // 2
    assert (prune[:event] == zero[:event]).all() and (prune[:event] == gauss[:event]).all()
    assert len(set(prune[:event])) > event // 2 and not prune[event:].any()
    assert not zero[event:event + 15].any() and zero[event + 15:].all()
    steps = np.abs(np.diff(gauss))
    assert len(gauss) == 2 * event and steps[event:event + 14].max() > 5 * steps[:event - 1].max()


def test_normalised_activations_have_mean_0_and_variance_1_and_skip_dead_maps():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),
                                torch.nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
    images = torch.randn(5, 3, 8, 8)
    first, second = appendix_figures.normalised_activations(model, [model[0], model[2]], images)
    assert first.shape == (5 * 3 * 6 * 6,) and second.shape == (5 * 2 * 4 * 4,)
    for values in (first, second):
        assert abs(values.mean()) < 1e-6 and values.var() == pytest.approx(1, abs=1e-5)


def test_figure_b1_from_a_vgg19_run_and_from_torchvision(
        tmp_path, tiny, monkeypatch, refusal):
    options = "--model vgg19 --width 0.05 --device cpu --batch-size 32 --epochs 2 --lrs 2".split()
    assert train.main([*options, "--dataset", str(tiny), "--log-dir", str(tmp_path / "logs")]) == 0
    numbers, = draw(tmp_path, "--figure", "B1").values()
    layers = numbers["models"]["vgg19"]["layers"]
    assert [(x["when"], x["convolution"]) for x in layers] == [
        (when, 9 + i) for when in ("before training", "after training") for i in range(8)]
    assert all(0 < x["ks"] < 1 for x in layers)

    network = torchvision.models.VGG(torchvision.models.vgg.make_layers(
        [4, "M", 4, "M", *[4] * 4, "M", *[4] * 4, "M", *[4] * 4, "M"], batch_norm=True),
        init_weights=False)
    network.classifier = torch.nn.Identity()
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)).astype(np.uint8)
    monkeypatch.setattr(torchvision.models, "vgg19_bn", lambda weights: network)
    monkeypatch.setattr(train, "load_arrays", lambda *a: ({"test_x": images}, {}))
    numbers = draw(tmp_path, "--figure", "B1", log_dir="none")["figB1-imagenet"]
    assert "torchvision" in numbers["models"]["vgg19"]["run"]

    def offline(weights):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.models, "vgg19_bn", offline)
    error = refusal("--figure", "B1", log_dir="none")
    assert "no route" in error and "bash runs.sh figB1" in error


def test_depths_of_events_that_leave_the_panel_are_marked(tmp_path, no_images):
    for method, depth in (("S-r40", 12), ("L-r40", 21), ("S-r4", 5)):
        curve = [70 + i / 10 for i in range(60)]
        curve[20], curve[30] = 2, depth  # the first is a fluctuation without an event
        write_run(tmp_path / "logs", line_of(method), 1, curve, {30: (73, 1), 40: (75, 1)})
    draw(tmp_path, "--figure", "2")
    texts = no_images["fig2"].axes[0].texts
    assert {text.get_text() for text in texts} == {"5%", "12%", "21%"}
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:])), "they hide each other"


def test_runs_of_one_epoch_are_visible(tmp_path, no_images):
    for seed in (1, 2):
        write_run(tmp_path / "logs", "--target S --r 4", seed, [60 + seed], EVENT)
    draw(tmp_path, "--figure", "2")
    line, = no_images["fig2"].axes[0].lines
    assert line.get_marker() not in ("", "None", None) and line.get_markersize() >= 3


def test_the_stability_figure_holds_hand_computed_numbers(tmp_path):
    methods = [("S-r4", 3), ("S-r40", 1), ("L-r40", 1), ("R-r40", 2)]
    for i, (method, events) in enumerate(methods):
        for seed in (1, 2):
            write_run(tmp_path / "logs", line_of(method), seed,
                      [80 - i - seed / 10] * events + [70 + i + seed, 70 + seed],
                      {e: (80, 1) for e in range(events)})
    for method, events in (("none", {}), ("scratch-S", {}), ("zero-50", {0: (70, 1)})):
        write_run(tmp_path / "logs", line_of(method), 1, [50, 60], events)
    drawn = draw(tmp_path, "--figure", "stability", "compute")
    panel = drawn["figstability"]["models"]["vgg11"]
    scatters = {(s["x"], s["y"]): s for s in panel["scatters"]}
    assert list(scatters) == [(x, y) for y in ("best_acc", "last_acc") for x in (
        "mean_stability", "loss_rise", "churn", "min_stability", "below_99")]
    assert {s["n"] for s in panel["scatters"]} == {8}  # neither noise nor pruning before training
    assert list(panel["methods"]) == ["none", "S-r4", "S-r40", "L-r40", "R-r40", "scratch-S"]
    drop = panel["methods"]["R-r40"]
    assert drop["loss_rise"]["values"] == pytest.approx([0.031, 0.032])
    assert drop["churn"]["values"] == pytest.approx([6.2, 6.4])
    assert drop["mean_stability"]["values"] == drop["min_stability"]["values"] == [96.125, 96.0]
    assert [panel["methods"][m]["below_99"]["mean"] for m, _ in methods] == [0, 1, 1, 2]
    numbers = scatters["below_99", "last_acc"]
    x, y = [0, 0, 1, 1, 1, 1, 2, 2], [71, 72] * 4
    assert numbers["kendall"] == pytest.approx(scipy.stats.kendalltau(x, y))
    assert numbers["given events"]["pearson"][0] == pytest.approx(0, abs=1e-12)
    panel = drawn["figcompute"]["models"]["vgg11"]
    assert [(s["y"], s["n"]) for s in panel["scatters"]] == [("best_acc", 10), ("last_acc", 10)]
    # an event takes a tenth of the cost of the epochs after it
    compute = panel["methods"]["S-r40"]["compute"]["values"]
    assert compute == pytest.approx([100 * (1000 + 2 * 900) / 3000] * 2)


def test_panels_note_what_rescaling_moved_and_what_has_not_converged(
        tmp_path, no_images):
    write_all(tmp_path / "logs", "flatness")
    numbers = draw(tmp_path, "--figure", "flatness", "6")["figflatness"]
    assert "12 eigenpairs (100 asked)" in numbers["title"] and "512 test images" in numbers["title"]
    panel = numbers["models"]["vgg11"]
    converged = panel["methods"]["S-r4"]["converged"]["values"]
    assert converged == pytest.approx([1, 11 / 12, 1])
    scatters = {s["x"]: s for s in panel["scatters"]}
    assert len(scatters) == 14 and scatters["tr_f"]["kendall_ci95"]
    assert scatters["tr_f"]["moved_by_rescaling"] == pytest.approx([3] * 18)
    assert scatters["trace_eigs"]["moved_by_rescaling"] == pytest.approx([0.04] * 18)

    def noted(sign):
        labels = [axis.get_xlabel().split("\n") for axis in no_images["figflatness"].axes]
        return {label for label, *notes in labels if sign in " ".join(notes)}

    labels = analyze.LABELS
    assert noted("†") == {labels["tr_f"], labels["tr_c"]}
    assert noted("white dot") == {
        labels[form + k] for form in analyze.FORMS for k in ("trace_eigs", "tic")}
    marked = {axis.get_ylabel() for axis in no_images["fig6"].axes if "†" in axis.get_xlabel()}
    assert labels["tr_c"] in marked, "a measure may be the y of a panel"


def test_spectra_are_drawn_on_one_grid_and_narrow_ones_are_not_lost(
        tmp_path, refusal):
    def curves():
        (tmp_path / "figdensity.json").unlink(missing_ok=True)
        found = [*draw_panel(tmp_path, "density")["density"].values()]
        for curve in found:
            assert np.trapezoid(curve["mean"], curve["lambda"]) == pytest.approx(1, abs=0.01)
        return found

    write_all(tmp_path / "logs", "density")
    for curve in curves():
        assert (curve["lambda"][0], curve["lambda"][-1]) == (-4, 12) and curve["n"] == 3
    grid, runs = np.linspace(0, 10, 2001), [*(tmp_path / "logs").glob("*/*/*/seed*")]
    for path in runs:
        scale = 1 if path.parent.name == "S-r4" else 100
        write_flatness(path, 1, density={
            "width": 0.1 * scale, "grid": list(grid * scale),
            "density": list(scipy.stats.norm.pdf(grid, 5, 0.1) / scale)})
    assert curves()
    for path in runs:
        write_flatness(path, 1, density=None, adaptive={}, control={})
    assert refusal("--figure", "density") == (
        "analyze.py: a flatness.json without density: delete it to measure again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # panels without points must not break the layout
        draw(tmp_path, "--figure", "flatness")
