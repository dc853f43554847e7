"""Figures and tables show what metrics.csv says, on run folders with known numbers.

The numbers are read back from the axes and the cells. figures.sh, which plans the published runs,
is tested at the end.
"""

import csv
import glob
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT, command, read_metrics, run
from PIL import Image

import ddpo_iskl
import plot

STEP_TIMES = {"sample_s": 3, "reward_s": 1, "train_s": 2}
SCRIPTS = ["ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse"]


def make_run(parent, script="ddpo_is", task="compress", seed=1, evaluations=None, **changes):
    """A run folder of 20 iterations of 16 samples, or as many as it takes.

    evaluations: {iteration: (eval_reward, eval_align)}; reward_mean is -2.1 + 0.01 * iteration, and
    kl_ref (of ISKL alone) is 2 * iteration. changes: other arguments in args.json.
    """
    if evaluations is None:
        evaluations = {0: (-2.0, 80), 10: (-1.9, 70), 20: (-1.8, 60)}
    number = len(list(parent.glob("*")))
    folder = parent / f"{script}__{task}__s{seed}__{number:03d}"
    folder.mkdir(parents=True)
    args = {"reward": task, "seed": seed, "num_steps": 50, "lr": 3e-4} | changes
    (folder / "args.json").write_text(json.dumps({"script": script, "args": args}))

    columns = ["iteration", "samples", "eval_reward", "eval_align", "reward_mean", *STEP_TIMES]
    if script == "ddpo_iskl":
        columns.append("kl_ref")
    rows = []
    for k in range(max(evaluations) + 1):
        row = {"iteration": k, "samples": 16 * k}
        if k in evaluations:
            row["eval_reward"], row["eval_align"] = evaluations[k]
        if k > 0:
            row |= STEP_TIMES | {"reward_mean": -2.1 + 0.01 * k}
        if k > 0 and script == "ddpo_iskl":
            row["kl_ref"] = 2.0 * k
        rows.append(row)
    write_rows(folder, columns, rows)
    return folder


def write_rows(folder, columns, rows):
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def replace_in(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def add_pictures(folder, kind, iteration, cells):
    """A grid whose cells, 16 x 16 pixels each, have these grey values (rows, columns)."""
    (folder / kind).mkdir(exist_ok=True)
    grid = np.array(cells, dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(grid).save(folder / kind / f"{iteration:04d}.png")


def lines(ax):
    """{label: (x, y)} of the lines in the legend."""
    found = {}
    for line in ax.get_lines():
        if not line.get_label().startswith("_"):
            found[line.get_label()] = line.get_data()
    return found


def only(items):
    """The one item that there is."""
    (item,) = items
    return item


def shown(figure):
    """The pictures of a figure, by the one grey value that each of them has."""
    values = []
    for ax in figure.axes:
        if ax.images:
            values.append(only(np.unique(ax.images[0].get_array())))
    return values


def main(capsys, *words):
    """Run the command line. Returns what it printed and what it said on stderr."""
    plot.main(tyro.cli(plot.COMMANDS, args=[str(word) for word in words]))
    return capsys.readouterr()


def refusal(capsys, *words):
    """The one line with which the command line ends in exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(capsys, *words)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return only(output.err.splitlines())


# --------------------------------------------------------------------------------------------------
# curves


def test_curves_are_the_mean_and_the_standard_deviation_over_seeds(tmp_path):
    rewards = [[-2.0, -1.9, -1.5], [-2.0, -1.6, -1.2], [-2.0, -1.3, -1.5]]
    for seed, (start, middle, end) in enumerate(rewards):
        evaluations = {0: (start, 80), 10: (middle, 70), 20: (end, 60)}
        make_run(tmp_path, seed=seed, evaluations=evaluations)
    ax = only(plot.draw_curves(plot.load_runs([tmp_path])).axes)
    label, (x, y) = only(lines(ax).items())
    assert label == "DDPO-IS (n = 3)"
    np.testing.assert_allclose(x, [0, 160, 320])
    np.testing.assert_allclose(y, [-2.0, -1.6, -1.4])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("reward queries", "minus JPEG size (kB)")

    corners = only(ax.collections).get_paths()[0].vertices
    for where, mean, std in [(0, -2.0, 0), (160, -1.6, 0.3), (320, -1.4, math.sqrt(0.03))]:
        band = corners[corners[:, 0] == where][:, 1]
        np.testing.assert_allclose([band.min(), band.max()], [mean - std, mean + std])


def test_a_panel_for_each_task_and_no_band_around_one_run(tmp_path):
    for task in ("mine.py:redness", "aesthetic", "incompress", "compress"):
        make_run(tmp_path, task=task)
    make_run(tmp_path, task="compress", seed=2)
    axes = plot.draw_curves(plot.load_runs([tmp_path])).axes
    titles = [ax.get_title() for ax in axes]
    assert titles == ["compress", "incompress", "aesthetic", "mine.py:redness"]
    first, second, *_ = axes
    assert list(lines(second)) == ["DDPO-IS (n = 1)"]
    assert len(first.collections) == 1
    assert len(second.collections) == 0


def test_where_a_shorter_run_has_ended_the_line_is_dashed(tmp_path):
    longer = {0: (-2.0, 80), 10: (-1.9, 70), 20: (-1.8, 60), 30: (-1.7, 50)}
    make_run(tmp_path, seed=1, evaluations=longer)
    make_run(tmp_path, seed=2, evaluations={0: (-2.0, 80), 10: (-1.5, 70)})
    ax = only(plot.draw_curves(plot.load_runs([tmp_path])).axes)
    label, (x, y) = only(lines(ax).items())
    assert label == "DDPO-IS (n = 2, dashed 1)"
    np.testing.assert_allclose(x, [0, 160])
    dashed = only(line for line in ax.get_lines() if line.get_linestyle() == "--")
    np.testing.assert_allclose(dashed.get_xdata(), [0, 160, 320, 480])
    np.testing.assert_allclose(dashed.get_ydata(), [-2.0, -1.7, -1.8, -1.7])


def test_curves_with_different_x_are_interpolated_but_not_extrapolated():
    first = np.array([[0.0, 4.0], [0.0, 8.0]])
    second = np.array([[2.0, 4.0, 6.0], [2.0, 2.0, 5.0]])
    x, mean, std, n = plot.average_curves([first, second])
    np.testing.assert_allclose(x, [0, 2, 4, 6])
    np.testing.assert_allclose(mean, [0, 3, 5, 5])
    np.testing.assert_allclose(n, [1, 2, 2, 1])
    np.testing.assert_allclose(std, [np.nan, math.sqrt(2), math.sqrt(18), np.nan])


def test_trailing_mean():
    values = np.array([1.0, 2.0, 6.0, 7.0])
    np.testing.assert_allclose(plot.trailing_mean(values, 2), [1, 1.5, 4, 6.5])
    np.testing.assert_allclose(plot.trailing_mean(values, 3), [1, 1.5, 3, 5])
    np.testing.assert_allclose(plot.trailing_mean(values, 1), values)


def test_the_training_reward_is_smoothed_and_the_label_says_so(tmp_path):
    make_run(tmp_path)
    runs = plot.load_runs([tmp_path])
    ax = only(plot.draw_curves(runs, x="iteration", metric="reward_mean", smooth=3).axes)
    x, y = only(lines(ax).values())
    np.testing.assert_allclose(x, np.arange(1, 21))
    np.testing.assert_allclose(y[:4], [-2.09, -2.085, -2.08, -2.07])
    assert "mean of the last 3 iterations" in ax.get_ylabel()
    assert "training samples" in ax.get_ylabel()

    ax = only(plot.draw_curves(runs, metric="reward_mean", smooth=1).axes)
    _, y = only(lines(ax).values())
    np.testing.assert_allclose(y, -2.1 + 0.01 * np.arange(1, 21))
    assert "mean" not in ax.get_ylabel()
    ax = only(plot.draw_curves(runs, metric="eval_align", smooth=3).axes)
    _, y = only(lines(ax).values())
    np.testing.assert_allclose(y, [80, 70, 60])
    assert ax.get_ylabel() == "eval_align"


def test_minutes_are_those_of_sampling_reward_and_training(tmp_path):
    make_run(tmp_path)
    ax = only(plot.draw_curves(plot.load_runs([tmp_path]), x="minutes").axes)
    x, _ = only(lines(ax).values())
    np.testing.assert_allclose(x, [0, 1, 2])  # 10 iterations of 6 s


def test_a_run_that_was_never_evaluated_shows_its_training_reward(tmp_path, capsys):
    folder = make_run(tmp_path)
    replace_in(folder / "metrics.csv", "eval_reward", "eval_other")
    ax = only(plot.draw_curves(plot.load_runs([tmp_path])).axes)
    assert "training samples" in ax.get_ylabel()
    assert len(only(lines(ax).values())[0]) == 20
    assert "no run has eval_reward" in capsys.readouterr().err


def test_a_run_without_the_column_is_skipped_among_others(tmp_path, capsys):
    make_run(tmp_path, script="ddpo_iskl")
    other = make_run(tmp_path, script="ddpo_is")
    ax = only(plot.draw_curves(plot.load_runs([tmp_path]), metric="kl_ref", smooth=1).axes)
    _, y = only(lines(ax).values())
    np.testing.assert_allclose(y, 2.0 * np.arange(21))  # 0: of the pretrained model to itself
    assert f"skipped: {other}: no row with samples, kl_ref" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# settings: labels, colours, which runs belong together


def test_another_learning_rate_is_a_line_of_its_own(tmp_path):
    make_run(tmp_path, script="ddpo_iskl", lr=3e-3)
    for seed in (1, 2):
        make_run(tmp_path, script="ddpo_iskl", seed=seed)
    make_run(tmp_path, script="ddpo_sf")
    ax = only(plot.draw_curves(plot.load_runs([tmp_path])).axes)
    assert list(lines(ax)) == [
        "DDPO-SF (n = 1)",
        "DDPO-ISKL, lr 3e-4 (n = 2)",
        "DDPO-ISKL, lr 3e-3 (n = 1)",
    ]
    colours = [line.get_color() for line in ax.get_lines()]
    assert colours[:2] == [plot.COLOURS["ddpo_sf"], plot.COLOURS["ddpo_iskl"]]
    assert len(set(colours)) == 3


def test_a_sweep_is_in_the_order_of_its_values_each_in_its_colour(tmp_path):
    for coefficient in (0.01, 0.0, 10.0, 0.003, 2.0):
        make_run(tmp_path, script="ddpo_iskl", kl_coef=coefficient)
    for script in SCRIPTS:
        make_run(tmp_path, script=script, kl_coef=0.01, seed=2)
    make_run(tmp_path, script="mine")
    ax = only(plot.draw_curves(plot.load_runs([tmp_path])).axes)
    names = [label.partition(" (n")[0] for label in lines(ax)]
    assert names == [
        "DDPO-SF",
        "DDPO-IS",
        "DDPO-ISKL, kl coef 0",
        "DDPO-ISKL, kl coef 3e-3",
        "DDPO-ISKL, kl coef 0.01",
        "DDPO-ISKL, kl coef 2",
        "DDPO-ISKL, kl coef 10",
        "RWR",
        "sparse RWR",
        "mine",
    ]
    drawn = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    assert len({line.get_color() for line in drawn}) == len(names)
    assert len({line.get_marker() for line in drawn}) == len(names)
    assert drawn[4].get_color() == plot.COLOURS["ddpo_iskl"]  # n = 2: the commonest


def test_what_changes_no_result_is_no_other_setting(tmp_path):
    ours = {"model": "models/emoji", "iterations": 20, "save_every": 10, "micro_batch": 64}
    theirs = {"model": "../models/emoji/", "iterations": 70, "save_every": 5, "micro_batch": 8}
    make_run(tmp_path, seed=1, compile=False, **ours)
    make_run(tmp_path, seed=2, compile=True, **theirs)
    assert only(plot.group_runs(plot.load_runs([tmp_path]))).label == "DDPO-IS"


def test_other_pretrained_weights_are_another_setting(tmp_path):
    for seed, weights in [(1, "0123456789"), (2, "abcdefghij")]:
        folder = make_run(tmp_path, seed=seed)
        metadata = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(metadata | {"weights": weights}))
    groups = plot.group_runs(plot.load_runs([tmp_path]))
    labels = [group.label for group in groups]
    assert labels == ["DDPO-IS, weights 0123456", "DDPO-IS, weights abcdefg"]


def test_a_seed_counts_once(tmp_path, capsys):
    """A folder that is named twice, and a run that was begun twice: the longer one counts."""
    longer = make_run(tmp_path)
    shorter = make_run(tmp_path, evaluations={0: (-1.0, 80), 10: (-1.0, 70)})
    runs = plot.load_runs([tmp_path, longer, longer / ".." / longer.name])
    assert len(runs) == 2
    assert only(only(plot.group_runs(runs)).runs).folder == longer
    assert f"skipped: {shorter}: {longer} has the same setting" in capsys.readouterr().err
    newer = make_run(tmp_path)
    assert only(only(plot.group_runs(plot.load_runs([tmp_path]))).runs).folder == newer


# --------------------------------------------------------------------------------------------------
# trade-off


def test_tradeoff_shows_mean_paths(tmp_path):
    make_run(tmp_path, seed=1, evaluations={0: (1, 80), 10: (2, 70), 20: (4, 60)})
    make_run(tmp_path, seed=2, evaluations={0: (1, 80), 10: (3, 60), 20: (8, 46)})
    ax = only(plot.draw_tradeoff(plot.load_runs([tmp_path])).axes)
    x, y = only(lines(ax).values())
    np.testing.assert_allclose(x, [80, 65, 53])
    np.testing.assert_allclose(y, [1, 2.5, 6])
    ends = [marker.get_offsets().tolist() for marker in ax.collections[-2:]]
    assert ends == [[[53, 6]], [[80, 1]]]  # the large marker and the ring
    assert ax.get_xscale() == "linear"
    _, _, bars = only(ax.containers)
    horizontal, vertical = [bar.get_segments()[0] for bar in bars]
    np.testing.assert_allclose(np.ptp(horizontal, axis=0), [2 * math.sqrt(98), 0])
    np.testing.assert_allclose(np.ptp(vertical, axis=0), [0, 2 * math.sqrt(8)], atol=1e-12)


def test_a_mean_path_ends_where_a_seed_ends(tmp_path, capsys):
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=2, evaluations={0: (-2.0, 80), 5: (-1, 1), 10: (-1.5, 50)})
    ax = only(plot.draw_tradeoff(plot.load_runs([tmp_path])).axes)
    x, y = only(lines(ax).values())
    np.testing.assert_allclose(x, [80, 60])
    np.testing.assert_allclose(y, [-2.0, -1.7])
    assert "DDPO-IS: drawn to iteration 10, which all" in capsys.readouterr().err


def test_seeds_without_a_common_evaluation_have_no_mean_path(tmp_path, capsys):
    make_run(tmp_path, seed=1, evaluations={0: (1, 80)})
    make_run(tmp_path, seed=2, evaluations={5: (1, 80)})
    line = refusal(capsys, "tradeoff", tmp_path)
    assert line == "error: the runs of DDPO-IS have no evaluated iteration in common"


def test_the_baseline_is_the_thick_path(tmp_path, capsys):
    make_run(tmp_path, script="ddpo_is")
    make_run(tmp_path, script="ddpo_sf", task="incompress")
    make_run(tmp_path, script="ddpo_sf")
    runs = plot.load_runs([tmp_path])
    for baseline in ("ddpo_is", "DDPO-IS"):
        ax, other = plot.draw_tradeoff(runs, baseline=baseline).axes
        widths = {line.get_label(): line.get_linewidth() for line in ax.get_lines()}
        text = "DDPO-IS, stopped early: the line to beat (n = 1)"
        assert widths[text] > widths["DDPO-SF (n = 1)"]
        assert list(lines(other)) == ["DDPO-SF (n = 1)"]
    assert capsys.readouterr().err == ""
    plot.draw_tradeoff(runs, baseline="rwr")
    assert "--baseline rwr: no such run" in capsys.readouterr().err


def test_a_baseline_of_several_settings_must_be_chosen(tmp_path, capsys):
    make_run(tmp_path, lr=1e-4, evaluations={0: (1, 80), 10: (3, 40)})
    make_run(tmp_path, lr=3e-4, evaluations={0: (1, 80), 10: (2, 50)})
    for name in ("tradeoff", "equal"):
        line = refusal(capsys, name, tmp_path)
        assert line.endswith('choose "DDPO-IS, lr 1e-4" or "DDPO-IS, lr 3e-4"')
    row = only(plot.make_equal_table(plot.load_runs([tmp_path]), baseline="DDPO-IS, lr 1e-4"))
    assert row["setting"] == "DDPO-IS, lr 3e-4"
    assert row["mean"] == "-10.0"  # 50, where the baseline has 60


def test_tradeoff_against_the_kl(tmp_path):
    make_run(tmp_path, script="ddpo_iskl")
    ax = only(plot.draw_tradeoff(plot.load_runs([tmp_path]), x="kl_ref").axes)
    x, y = only(lines(ax).values())
    np.testing.assert_allclose(x, [0, 20, 40])
    np.testing.assert_allclose(y, [-2.0, -1.9, -1.8])
    assert ax.get_xscale() == "symlog"


# --------------------------------------------------------------------------------------------------
# tables


def test_the_envelope_has_the_evaluations_that_are_better_than_all_before():
    rewards = np.array([1.0, 2.0, 1.5, 2.0, 3.0, 2.5])
    aligns = np.array([80.0, 60.0, 90.0, 95.0, 40.0, 99.0])
    rewards, aligns = plot.monotone_envelope(rewards, aligns)
    np.testing.assert_allclose(rewards, [1, 2, 3])
    np.testing.assert_allclose(aligns, [80, 60, 40])


def make_pair(tmp_path, seed, reward, align, start=1.0):
    """A baseline and an ISKL run that ends with this reward and CLIP score.

    The baseline's envelope is (1, 80), (2, 60), (3, 40); for seed 2 the last two are 10 lower.
    """
    path = {0: (1, 80), 10: (2, 60), 20: (1.5, 99), 30: (3, 40)}
    if seed == 2:
        path = {0: (1, 80), 10: (2, 50), 20: (1.5, 99), 30: (3, 30)}
    make_run(tmp_path, seed=seed, evaluations=path)
    path = {0: (start, 80), 10: (1, 70), 20: (reward, align)}
    make_run(tmp_path, script="ddpo_iskl", seed=seed, evaluations=path)


def test_equal_compares_with_the_baseline_of_the_seed_at_the_same_reward(tmp_path):
    make_pair(tmp_path, seed=1, reward=2.5, align=58)  # the baseline has 50 there
    make_pair(tmp_path, seed=2, reward=1.5, align=67)  # 65
    row = only(plot.make_equal_table(plot.load_runs([tmp_path])))
    assert row == {
        "task": "compress",
        "setting": "DDPO-ISKL",
        "iteration": "20",
        "n": "2",
        "CLIP score minus that of DDPO-IS, by seed": "1: +8.0, 2: +2.0",
        "mean": "+5.0",
        "95 % interval": "-33.1 to +43.1",  # 5 -+ 12.7062 * 4.2426 / sqrt(2)
        "verdict": "not significant",
        "left out": "",
    }


def test_equal_calls_an_interval_without_zero_significant(tmp_path):
    for seed, align in [(1, 52), (2, 43), (3, 54)]:
        make_pair(tmp_path / "more", seed=seed, reward=2.5, align=align)
        make_pair(tmp_path / "less", seed=seed, reward=2.5, align=align - 6)
    more = only(plot.make_equal_table(plot.load_runs([tmp_path / "more"])))
    less = only(plot.make_equal_table(plot.load_runs([tmp_path / "less"])))
    # 3 -+ 4.3027 * 1 / sqrt(3), and -3
    assert (more["95 % interval"], more["verdict"]) == ("+0.5 to +5.5", "significant")
    assert (less["95 % interval"], less["verdict"]) == ("-5.5 to -0.5", "significant")


def test_equal_leaves_out_what_the_baseline_never_reached_and_says_so(tmp_path, capsys):
    make_pair(tmp_path, seed=1, reward=3.0, align=41)
    make_pair(tmp_path, seed=2, reward=3.01, align=58)
    make_pair(tmp_path, seed=3, reward=0.99, align=58)
    make_pair(tmp_path, seed=4, reward=2.5, align=58, start=1.02)
    make_run(tmp_path, script="ddpo_iskl", seed=5)
    row = only(plot.make_equal_table(plot.load_runs([tmp_path])))
    assert row["left out"] == "2: above, 3: below, 4: another start, 5: no baseline"
    assert (row["n"], row["mean"], row["95 % interval"]) == ("1", "+1.0", "-")
    assert row["verdict"] == "not significant"
    assert "their reward is outside the range of DDPO-IS: 2 run(s)" in capsys.readouterr().err


def test_equal_at_an_earlier_iteration(tmp_path):
    make_pair(tmp_path, seed=1, reward=2.5, align=58)
    runs = plot.load_runs([tmp_path])
    row = only(plot.make_equal_table(runs, iteration=10))
    assert (row["iteration"], row["mean"]) == ("10", "-10.0")  # 70 at reward 1, where it has 80
    row = only(plot.make_equal_table(runs, iteration=15))
    assert (row["n"], row["mean"], row["left out"]) == ("0", "-", "1: not evaluated")


def test_equal_needs_the_baseline_on_the_same_task(tmp_path, capsys):
    make_pair(tmp_path, seed=1, reward=2.5, align=58)
    make_run(tmp_path, script="rwr", task="incompress")
    assert len(plot.make_equal_table(plot.load_runs([tmp_path]))) == 1
    assert "RWR on incompress: DDPO-IS has no run of that task" in capsys.readouterr().err
    line = refusal(capsys, "equal", tmp_path, "--baseline", "ddpo_sf")
    assert "--baseline ddpo_sf: no such run" in line
    assert "DDPO-IS, DDPO-ISKL, RWR" in line
    folder = make_run(tmp_path / "alone")
    assert str(folder) in refusal(capsys, "equal", folder)


def test_compare_pairs_the_runs_of_a_seed(tmp_path, capsys):
    for seed, final in [(1, 2.0), (2, 2.5), (3, 3.5)]:
        ends = {0: (1, 80), 10: (1.5, 70), 20: (2, 60 + seed)}
        make_run(tmp_path, seed=seed, evaluations=ends)
        ends = {0: (1, 80), 10: (1.5, 70), 20: (final, 60)}
        make_run(tmp_path, script="ddpo_iskl", seed=seed, evaluations=ends)
    make_run(tmp_path, script="ddpo_iskl", seed=4, evaluations={0: (1, 80), 20: (9, 9)})
    runs = plot.load_runs([tmp_path])
    assert only(plot.make_compare_table(runs)) == {
        "task": "compress",
        "setting": "DDPO-ISKL",
        "iteration": "20",
        "n": "3",
        "eval_reward minus that of DDPO-IS, by seed": "1: +0.000, 2: +0.500, 3: +1.500",
        "mean": "+0.667",
        "95 % interval": "-1.231 to +2.564",  # 0.667 -+ 4.3027 * 0.7638 / sqrt(3)
        "verdict": "not significant",
        "left out": "4: no baseline",
    }
    # -2 -+ 4.3027 * 1 / sqrt(3)
    aligned = only(plot.make_compare_table(runs, metric="eval_align"))
    assert (aligned["mean"], aligned["95 % interval"]) == ("-2.0", "-4.5 to +0.5")
    assert only(plot.make_compare_table(runs, iteration=10))["mean"] == "+0.000"

    printed = main(capsys, "compare", tmp_path, "--metric", "eval_align").out
    assert "eval_align minus that of DDPO-IS" in printed
    assert "no such run" in refusal(capsys, "compare", tmp_path, "--baseline", "rwr")


def test_gain_compares_a_run_with_its_own_start(tmp_path, capsys):
    for seed, final in [(1, 2.0), (2, 2.5), (3, 3.5)]:
        ends = {0: (1 + seed, 80), 10: (2 + seed, 70), 20: (1 + seed + final, 60)}
        make_run(tmp_path, seed=seed, evaluations=ends)
    make_run(tmp_path, seed=4, evaluations={10: (9, 9)})
    runs = plot.load_runs([tmp_path])
    assert only(plot.make_gain_table(runs)) == {
        "task": "compress",
        "setting": "DDPO-IS",
        "iteration": "20",
        "n": "3",
        "eval_reward minus that of iteration 0, by seed": "1: +2.000, 2: +2.500, 3: +3.500",
        "mean": "+2.667",
        "95 % interval": "+0.769 to +4.564",  # 2.667 -+ 4.3027 * 0.7638 / sqrt(3)
        "verdict": "significant",
        "left out": "4: not evaluated",
    }
    assert only(plot.make_gain_table(runs, iteration=10))["mean"] == "+1.000"
    printed = main(capsys, "gain", tmp_path, "--metric", "eval_align").out
    assert "-20.0" in printed
    assert "no eval_reward at" in refusal(capsys, "gain", tmp_path, "--iteration", "15")


def student_t(x, degrees):
    """The cumulative distribution function of Student's t at x > 0, by numerical integration."""
    t = np.linspace(0, x, 100_001)
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    norm = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    return 0.5 + norm * np.trapezoid(density, t)


def test_t_quantiles():
    assert len(plot.T_QUANTILES) == 29
    assert plot.T_QUANTILES[1] == 4.3027  # a standard table's, for two degrees of freedom
    for degrees, quantile in enumerate(plot.T_QUANTILES, start=1):
        assert student_t(quantile, degrees) == pytest.approx(0.975, abs=3e-6)


def test_t_interval():
    assert plot.t_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.4842, 2 + 2.4842), abs=1e-4)
    mean, low, high = plot.t_interval([7])
    assert mean == 7 and math.isnan(low) and math.isnan(high)
    mean, low, high = plot.t_interval([0, 1] * 50)
    assert high - mean == pytest.approx(2.0452 * 0.502519 / 10, abs=1e-5)


def test_the_table_has_the_first_and_the_last_evaluation(tmp_path, capsys):
    make_run(tmp_path, seed=1, evaluations={0: (1, 80), 10: (2, 70), 20: (4, 60)})
    make_run(tmp_path, seed=2, evaluations={0: (1, 80), 10: (3, 60), 30: (8, 46)})
    other = make_run(tmp_path, script="rwr", task="incompress")
    runs = plot.load_runs([tmp_path])
    first, second = plot.make_table(runs)
    assert first == {
        "task": "compress",
        "setting": "DDPO-IS",
        "n": "2",
        "iterations": "20 to 30",
        "queries": "320 to 480",
        "minutes": "2.5",
        "eval_reward, first": "1.000 +- 0.000",
        "eval_reward, last": "6.000 +- 2.828",
        "eval_reward_se, last": "-",
        "eval_align, first": "80.0 +- 0.0",
        "eval_align, last": "53.0 +- 9.9",
    }
    assert (second["setting"], second["eval_reward, last"]) == ("RWR", "-1.800")
    first, second = plot.make_table(runs, iteration=10)
    assert (first["iterations"], first["minutes"]) == ("10", "1.0")
    assert first["eval_reward, last"] == "2.500 +- 0.707"
    assert capsys.readouterr().err == ""
    assert only(plot.make_table(runs, iteration=30))["n"] == "1"
    assert f"skipped: {other}: no eval_reward at iteration 30" in capsys.readouterr().err


def test_the_table_without_alignment_and_with_a_standard_error(tmp_path):
    for seed, error in [(1, 0.02), (2, 0.04)]:
        folder = make_run(tmp_path, seed=seed)
        rows = [
            {"iteration": 0, "samples": 0, "eval_reward": 1, "eval_reward_se": 1},
            {"iteration": 200, "samples": 3200, "eval_reward": 2, "eval_reward_se": error},
        ]
        write_rows(folder, list(rows[0]), rows)
    row = only(plot.make_table(plot.load_runs([tmp_path])))
    assert row["eval_reward_se, last"] == "0.030"
    assert row["eval_align, last"] == "-"
    assert row["queries"] == "3,200"


def test_tables_are_markdown_or_csv(tmp_path, capsys):
    make_pair(tmp_path / "runs", seed=1, reward=2.5, align=58)
    markdown = main(capsys, "table", tmp_path / "runs").out.splitlines()
    assert markdown[0].startswith("| task | setting | n |")
    assert markdown[1].startswith("| --- | --- | --- |")
    assert markdown[2].startswith("| compress | DDPO-IS | 1 |")
    assert len(markdown) == 4

    for ending in ("md", "csv"):
        path = tmp_path / f"new/table.{ending}"
        assert main(capsys, "table", tmp_path / "runs", "--out", path).out == f"{path}\n"
    assert (tmp_path / "new/table.md").read_text().splitlines() == markdown
    with open(tmp_path / "new/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == plot.make_table(plot.load_runs([tmp_path / "runs"]))


# --------------------------------------------------------------------------------------------------
# pictures


def test_progress_shows_the_first_noise_of_a_prompt_over_training(tmp_path):
    a = make_run(tmp_path, seed=1)
    b = make_run(tmp_path, seed=2)
    for iteration in (0, 10, 20):
        grid = np.arange(8).reshape(2, 4) * 10 + iteration // 10
        add_pictures(a, "images", iteration, grid)
    add_pictures(b, "images", 10, np.arange(8).reshape(2, 4) + 100)
    runs = plot.load_runs([tmp_path])
    figure = plot.draw_progress(runs, prompt_index=(2, 0))
    assert shown(figure) == [20, 21, 22, 0, 1, 2, 102, 100]
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == ["iteration 0", "iteration 10", "iteration 20"]
    assert set(titles[3:]) == {""}
    assert figure.axes[0].get_ylabel() == "DDPO-IS\ncompress\nseed 1\nprompt 2"
    framed = [ax.spines["top"].get_visible() for ax in figure.axes]
    assert framed == [True] * 6 + [False, True, False] * 2  # seed 2 has iteration 10 alone
    assert shown(plot.draw_progress(runs, columns=2)) == [0, 2]  # evenly spread: 0 and 20
    with pytest.raises(plot.PlotError, match="no prompt 4, its grids show 0 to 3"):
        plot.draw_progress(runs, prompt_index=(4,))


def test_progress_names_the_prompts_of_a_run_that_kept_them(tmp_path):
    folder = make_run(tmp_path)
    add_pictures(folder, "images", 0, np.zeros((2, 4)))
    names = [f"animal {i}" for i in range(10)]
    (folder / "prompts.txt").write_text("\n".join(names) + "\n")
    figure = plot.draw_progress(plot.load_runs([folder]), prompt_index=(0, 1, 3))
    labels = [ax.get_ylabel().splitlines()[-1] for ax in figure.axes]
    # as evaluate spreads four prompts over ten: 0, 3, 6, 9
    assert labels == ['"animal 0"', '"animal 3"', '"animal 9"']


def test_pictures_that_are_no_squares_are_cut_as_the_strip_is(tmp_path):
    folder = make_run(tmp_path)
    add_pictures(folder, "images", 0, np.arange(12).reshape(2, 6) // 2)
    add_pictures(folder, "trajectory", 0, np.arange(12).reshape(1, 12) // 2)
    runs = plot.load_runs([folder])
    figure = plot.draw_progress(runs, prompt_index=(0, 1, 2))
    assert shown(figure) == [0, 1, 2]
    assert figure.axes[0].images[0].get_array().shape == (16, 32, 3)
    assert shown(plot.draw_trajectory(runs)) == [0, 1, 2, 3, 4, 5]


def test_trajectory_shows_the_steps_of_a_run_at_its_iterations(tmp_path, capsys):
    a = make_run(tmp_path, script="ddpo_sf")
    b = make_run(tmp_path, script="ddpo_is", num_steps=20)
    for iteration in (0, 20):
        add_pictures(a, "trajectory", iteration, [np.arange(6) + iteration])
    add_pictures(b, "trajectory", 10, [np.arange(6) + 100])
    runs = plot.load_runs([a, b])
    figure = plot.draw_trajectory(runs)
    assert shown(figure) == [20, 21, 22, 23, 24, 25, 100, 101, 102, 103, 104, 105]
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:6] == [f"step {step}" for step in (0, 9, 19, 29, 39, 49)]
    assert titles[6:] == [f"step {step}" for step in (0, 3, 7, 11, 15, 19)]
    assert figure.axes[0].get_ylabel() == "DDPO-SF\ncompress\nseed 1\niteration 20"

    assert capsys.readouterr().err == ""
    figure = plot.draw_trajectory(runs, iteration=(20, 0))
    assert shown(figure) == [20, 21, 22, 23, 24, 25, 0, 1, 2, 3, 4, 5]
    assert f"skipped: {b}: no trajectory/0020.png" in capsys.readouterr().err
    line = refusal(capsys, "trajectory", a, "--iteration", 7)
    assert line == f"error: {a}: no trajectory/0007.png"


def test_a_broken_picture_is_left_blank_and_said(tmp_path, capsys):
    folder = make_run(tmp_path)
    for iteration in (0, 10, 20):
        add_pictures(folder, "images", iteration, np.full((2, 4), iteration))
    whole = (folder / "images/0020.png").read_bytes()
    (folder / "images/0020.png").write_bytes(whole[:60])
    (folder / "images/0010.png").write_bytes(b"")
    Image.new("RGB", (3, 1)).save(folder / "images/0030.png")
    (folder / "images/notes.png").write_bytes(b"no iteration")
    assert shown(plot.draw_progress(plot.load_runs([folder]))) == [0]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    for number, line in zip((10, 20, 30), said):
        assert line.startswith(f"{folder}/images/{number:04d}.png: left out")


# --------------------------------------------------------------------------------------------------
# damaged and missing input


def test_damaged_runs_among_good_ones_are_skipped_with_a_line_each(tmp_path, capsys):
    good = make_run(tmp_path)
    damages = {
        "args_half": lambda folder: (folder / "args.json").write_text('{"script": "ddpo_is"'),
        "args_list": lambda folder: (folder / "args.json").write_text("[1, 2]"),
        "args_binary": lambda folder: (folder / "args.json").write_bytes(b"\xff\xfe\x00"),
        "args_other": lambda folder: (folder / "args.json").write_text('{"args": {"model": 3}}'),
        "args_gone": lambda folder: (folder / "args.json").unlink(),
        "csv_gone": lambda folder: (folder / "metrics.csv").unlink(),
        "csv_empty": lambda folder: (folder / "metrics.csv").write_text(""),
        "csv_binary": lambda folder: (folder / "metrics.csv").write_bytes(b"\xff\xfe\x00\n"),
        "csv_header": lambda folder: (folder / "metrics.csv").write_text("iteration,samples\n"),
    }
    folders = []
    for name, damage in damages.items():
        folder = make_run(tmp_path / name)
        damage(folder)
        folders.append(folder)
    assert only(plot.load_runs([tmp_path])).folder == good
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(damages)
    for folder in folders:
        assert only(line for line in said if line.startswith(f"skipped: {folder}"))
    for folder in folders:
        with pytest.raises(plot.PlotError, match=str(folder)):
            plot.load_runs([folder])


def test_damaged_lines_are_left_out_and_said(tmp_path, capsys):
    folder = make_run(tmp_path)
    text = (folder / "metrics.csv").read_text()
    replacements = {
        "\n5,80,": "\n5,80,7,7,",  # two cells too many
        "\n6,96,": "\n6,x,",
        "\n7,112,": "\n7,,",
        "\n8,128,": "\n4,64,",
    }
    for old, new in replacements.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "metrics.csv").write_text(text.removesuffix("\n"))
    iterations = [row["iteration"] for row in plot.read_rows(folder)]
    assert iterations == [k for k in range(20) if k not in (5, 6, 7, 8)]
    said = capsys.readouterr().err
    assert "the last line is cut off" in said
    for number, reason in [(7, "10 cells for 8 columns"), (8, "'x'"), (9, "no samples")]:
        assert f"line {number} is left out" in said and reason in said
    assert "line 10 is left out (its iteration is not after the one before)" in said


def test_rows_that_are_not_finite_are_left_out_and_said(tmp_path, capsys):
    folder = make_run(tmp_path)
    replace_in(folder / "metrics.csv", "10,160,-1.9,", "10,160,nan,")
    runs = plot.load_runs([folder])
    for draw, expected in [(plot.draw_curves, [0, 320]), (plot.draw_tradeoff, [80, 60])]:
        x, y = only(lines(only(draw(runs).axes)).values())
        np.testing.assert_allclose(x, expected)
        np.testing.assert_allclose(y, [-2.0, -1.8])
        assert f"{folder}: 1 rows of" in capsys.readouterr().err
    assert only(plot.make_table(runs))["eval_reward, last"] == "-1.800"


@pytest.mark.parametrize(
    "name", ["curves", "tradeoff", "equal", "compare", "gain", "table", "progress", "trajectory"]
)
def test_what_cannot_be_shown_is_one_line_and_exit_code_2(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert "name a run folder" in refusal(capsys, name)
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        assert refusal(capsys, name, folder) == f"error: {folder}: no run folder here"
    folder = make_run(tmp_path)
    text = (folder / "args.json").read_text()
    (folder / "args.json").unlink()
    assert refusal(capsys, name, folder) == f"error: {folder}: no args.json"
    (folder / "args.json").write_text(text)
    replace_in(folder / "metrics.csv", "eval_reward", "eval_other")
    if name == "curves":
        line = refusal(capsys, name, folder, "--metric", "beauty")
        assert "no beauty in" in line and "eval_align" in line
    else:
        line = refusal(capsys, name, folder)
    assert str(folder) in line
    (folder / "metrics.csv").unlink()
    assert refusal(capsys, name, folder) == f"error: {folder}: no metrics.csv"


def test_flags_that_cannot_be_are_refused(tmp_path, capsys):
    folder = make_run(tmp_path)
    add_pictures(folder, "images", 0, np.zeros((2, 4)))
    assert "figure.gif: must end in .png or .pdf" in refusal(
        capsys, "curves", folder, "--out", "figure.gif"
    )
    assert "must end in .md or .csv" in refusal(capsys, "table", folder, "--out", "table.png")
    assert "--smooth 0" in refusal(capsys, "curves", folder, "--smooth", 0)
    assert "--columns 0" in refusal(capsys, "progress", folder, "--columns", 0)
    out = folder / "args.json/figure.png"
    assert f"--out {out}" in refusal(capsys, "curves", folder, "--out", out)


# --------------------------------------------------------------------------------------------------
# the command line, and what a script really writes


def test_every_command_writes_its_file_without_torch(tmp_path):
    folder = make_run(tmp_path / "runs")
    other = make_run(tmp_path / "runs", script="ddpo_iskl")
    for run_folder in (folder, other):
        add_pictures(run_folder, "images", 0, np.arange(8).reshape(2, 4) * 30)
        add_pictures(run_folder, "trajectory", 0, [np.arange(6) * 40])
    code = (
        "import shlex, sys, tyro, plot\n"
        "commands = plot.Curves | plot.Tradeoff | plot.Equal | plot.Table\n"
        "commands = commands | plot.Progress | plot.Trajectory\n"
        "for line in sys.argv[1:]:\n"
        "    plot.main(tyro.cli(commands, args=shlex.split(line)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    command_lines = []
    for name in ("curves", "tradeoff", "progress", "trajectory"):
        command_lines.append(f"{name} runs --out new/{name}.png")
    command_lines += ["curves runs --out new/curves.pdf", "equal runs --out new/equal.md"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command_lines],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("curves", "tradeoff", "progress", "trajectory"):
        picture = np.asarray(Image.open(tmp_path / f"new/{name}.png").convert("L"))
        assert picture.std() > 5
    assert (tmp_path / "new/curves.pdf").read_bytes().startswith(b"%PDF")
    assert "| DDPO-ISKL | 20 | 1 |" in (tmp_path / "new/equal.md").read_text()


def test_the_command_line_ends_with_one_line(tmp_path):
    done = command(ROOT / "plot.py", "curves", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: no run folder here\n"


def test_what_a_script_writes_is_shown(tiny_sd, tmp_path):
    folder = run(ddpo_iskl, tmp_path, tiny_sd, save_every=1)
    rows = read_metrics(folder)
    runs = plot.load_runs([tmp_path])
    x, y = only(lines(only(plot.draw_curves(runs).axes)).values())
    assert x.tolist() == [0, 4, 8]
    assert y.tolist() == [row["eval_reward"] for row in rows]
    assert only(plot.make_table(runs))["eval_reward_se, last"] != "-"
    x, _ = only(lines(only(plot.draw_tradeoff(runs, x="kl_ref").axes)).values())
    assert x.tolist() == [0.0, *(row["kl_ref"] for row in rows[1:])]

    strip = np.asarray(Image.open(Path(folder) / "trajectory/0002.png"))
    pictures = [ax.images[0].get_array() for ax in plot.draw_trajectory(runs).axes]
    assert (np.concatenate(pictures, axis=1) == strip).all()
    grid = np.asarray(Image.open(Path(folder) / "images/0001.png"))
    ax = plot.draw_progress(runs, columns=3, prompt_index=(31,)).axes[1]
    assert (ax.images[0].get_array() == grid[:16, -16:]).all()
    assert ax.figure.axes[0].get_ylabel().endswith('"kangaroo"')


# --------------------------------------------------------------------------------------------------
# figures.sh


def plan(tmp_path, *words, **environment):
    """The run commands and the plot commands that figures.sh plans, split into words."""
    done = subprocess.run(
        ["bash", ROOT / "figures.sh", "--dry-run", *words],
        env=os.environ | {"OUT": str(tmp_path / "runs")} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    planned = [shlex.split(line) for line in done.stdout.splitlines()]
    run_commands = [line for line in planned if line[1:] and line[1] != "plot.py"]
    plot_commands = [line for line in planned if line[1:] and line[1] == "plot.py"]
    return run_commands, plot_commands


def parse_run(words):
    """The script and the arguments of a planned run."""
    _, file, *flags = words
    script = file.removesuffix(".py")
    return script, tyro.cli(importlib.import_module(script).Args, args=flags)


def test_figures_sh_plans_runs_that_the_scripts_accept(tmp_path):
    run_commands, _ = plan(tmp_path)
    counts = Counter()
    for words in run_commands:
        _, args = parse_run(words)
        assert (args.num_steps, args.model, args.precision) == (50, "models/emoji", "fp32")
        folder = Path(args.out)
        assert folder.is_relative_to(tmp_path / "runs")
        counts[folder.parent.name] += 1
    assert counts == {
        "table1": 30,
        "one_update": 20,
        "small_lr": 18,
        "bad_lr": 5,
        "clip": 9,
        "kl": 30,
        "rwr": 15,
        "rwr_printed": 15,
        "rwr_many": 12,
    }
    assert len({tuple(words) for words in run_commands}) == sum(counts.values())


def test_figures_sh_makes_its_figures_from_its_runs(tmp_path, capsys):
    run_commands, plot_commands = plan(tmp_path, SEEDS="1 2")
    for words in run_commands:
        script, args = parse_run(words)
        changes = dict(vars(args))
        seed = changes.pop("seed")
        folder = make_run(Path(args.out), script, args.reward, seed, **changes)
        if seed == 1:
            add_pictures(folder, "images", 0, np.zeros((2, 32)))
            for iteration in (0, 50, 100, 200):
                add_pictures(folder, "trajectory", iteration, np.zeros((1, 6)))
    assert len(plot_commands) > 5
    for _, _, *words in plot_commands:
        expanded = []
        for word in words:
            expanded += sorted(glob.glob(word)) if "*" in word else [word]
        written = main(capsys, *expanded).out.strip()
        assert Path(written).stat().st_size > 0


def test_figures_sh_on_a_gpu_takes_the_papers_model_and_tasks(tmp_path):
    run_commands, _ = plan(tmp_path, "--gpu", "table1")
    tasks = Counter(words[words.index("--reward") + 1] for words in run_commands)
    assert tasks == {"compress": 15, "incompress": 15, "aesthetic": 15}
    assert all("CompVis/stable-diffusion-v1-4" in words for words in run_commands)


def test_figures_sh_skips_finished_runs_and_resumes_the_others(tmp_path):
    before, _ = plan(tmp_path, "small_lr", SEEDS="1")
    assert len(before) == 6
    index = before[0].index("--out")
    parent = Path(before[0][index + 1])
    folder = make_run(parent, script="ddpo_sf", lr=1e-4)
    started, _ = plan(tmp_path, "small_lr", SEEDS="1")
    assert started == [["python", "ddpo_sf.py", "--resume", str(folder)], *before[1:]]

    with open(folder / "metrics.csv", "a") as file:
        file.write("200,3200\n")
    (folder / "checkpoint").mkdir()
    finished, _ = plan(tmp_path, "small_lr", SEEDS="1")
    assert finished == before[1:]
