"""Depth against frequency, of made-up logs whose effects are known (docs/depth.md)."""
import numpy as np
import pytest
from scipy import stats
from test_analyze import draw, no_images, write_run  # noqa: F401

from gst_ext.statistics import holm

RATES, TARGETS = (4, 40, 100), ("S", "Q0.5", "R", "L")


def write_cells(log_dir, depth=0.0, frequency=0.0, deeper=2.0, targets=TARGETS, seeds=10):
    """Writes a run of each r, target and seed.

    Args:
        depth, frequency: Points of last accuracy from one target or r to the next.
        deeper: Points that an event's drop grows from one target to the next.
    """
    random = np.random.default_rng(0)
    for seed in range(1, seeds + 1):
        own = random.normal(0, 2)  # which pairing by seed removes
        for (i, r), (j, target) in ((a, b) for a in enumerate(RATES) for b in enumerate(targets)):
            last = 80 + own + i * frequency + j * depth + random.normal(0, 0.3)
            events = {epoch: (80, 2) for epoch in range(3 - i)}
            drops = [80 - 1 - deeper * j + random.normal(0, 0.2) for _ in events]
            write_run(log_dir, f"--target {target} --r {r}", seed,
                      [*drops, 78, round(last, 2)], events)


def depth_table(tmp_path):
    return draw(tmp_path, "--table", "depth")["tabdepth"]["models"]["vgg11"]


@pytest.mark.parametrize("depth, frequency", [(0.5, 0), (0, 0.5)])
def test_the_table_names_what_made_the_difference(tmp_path, capsys, depth, frequency):
    write_cells(tmp_path / "logs", depth, frequency)
    answers = depth_table(tmp_path)["designs"][0]["answers"]
    assert answers == {"depth": [f"r = {r}" for r in RATES] if depth else [],
                       "frequency": ["r = 40 − r = 4", "r = 100 − r = 40"] if frequency else []}
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for kind, effect in (("depth", depth), ("frequency", frequency)):
        line, = (line for line in lines if line.startswith(f"{kind}: "))
        assert ("not shown" in line) == (not effect) and ("points" in line) == bool(effect)


def test_differences_are_the_paired_tests_of_their_runs(tmp_path):
    write_cells(tmp_path / "logs", 0.2, 0.1, targets=("S", "L"), seeds=4)
    panel = depth_table(tmp_path)
    design, last = panel["designs"][0], {
        name: np.array(method["last_acc"]["values"]) for name, method in panel["methods"].items()}
    p_values = []
    for row, r in zip(design["depth"]["L"], RATES):
        difference = last[f"L-r{r}"] - last[f"S-r{r}"]
        low, high = stats.t.interval(0.95, 3, difference.mean(), stats.sem(difference))
        assert row["where"] == f"r = {r}" and row["seeds"] == [1, 2, 3, 4]
        assert row["last_acc"]["mean"] == pytest.approx(difference.mean())
        assert row["last_acc"]["ci95"] == pytest.approx([low, high])
        p_values.append(stats.ttest_1samp(difference, 0).pvalue)
    assert [row["last_acc"]["p_holm"] for row in design["depth"]["L"]] == pytest.approx(
        holm(p_values))
    for row, (few, many) in zip(design["frequency"], ((40, 4), (100, 40))):
        difference = sum(last[f"{t}-r{few}"] - last[f"{t}-r{many}"] for t in "SL") / 2
        assert row["name"] == f"r = {few} − r = {many}"
        assert row["last_acc"]["mean"] == pytest.approx(difference.mean())


def test_depth_is_not_asked_of_equal_drops_and_not_compared_over_other_schedules(tmp_path, capsys):
    write_cells(tmp_path / "logs", 0.5, deeper=0, targets=("S", "L"))
    write_run(tmp_path / "logs", "--target L --r 4 --p 0.3 0.3 0.3 0.8", 1, [79, 85], {0: (80, 2)})
    panel = depth_table(tmp_path)
    assert panel["designs"][0]["answers"]["depth"] == []
    assert "not asked, since Prune_L's drops are not shown to be deeper: r = 4" in (
        capsys.readouterr().out)
    assert panel["designs"][1]["depth"] == {"L": []} and not panel["designs"][1]["frequency"]


def test_the_figure_has_a_point_for_each_method(tmp_path):
    write_cells(tmp_path / "logs", seeds=3)
    write_run(tmp_path / "logs", "--target none", 1, [70, 80])
    points = draw(tmp_path, "--figure", "depth")["figdepth"]["models"]["vgg11"]["points"]
    assert {(point["r"], point["target"]) for point in points} == {
        (r, target) for r in RATES for target in TARGETS}
    for r in RATES:  # from the shallowest to the deepest
        drops = [point["drop"] for point in points if point["r"] == r]
        assert drops == sorted(drops) and drops[-1] - drops[0] == pytest.approx(7.5, abs=1)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
