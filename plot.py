"""
Figures and tables from run folders alone: no torch, no model.

    python plot.py curves runs --out figure3.png                  # reward against reward queries
    python plot.py curves runs --x iteration --metric kl_ref      # any column of metrics.csv
    python plot.py tradeoff runs --baseline ddpo_is               # reward against CLIP score
    python plot.py equal runs --baseline ddpo_is                  # CLIP score at equal reward
    python plot.py compare runs --baseline ddpo_is                # rewards at the same iteration
    python plot.py gain runs                                      # rewards minus those of the start
    python plot.py table runs --iteration 70                      # first and last evaluation
    python plot.py progress runs/ddpo_is__* --prompt-index 0 7    # fixed prompts over training
    python plot.py trajectory runs/*__compress__s1__*             # "elephant" while it is denoised

Each path is a run folder, or a folder that contains run folders. Runs are grouped by what their
args.json says: runs of one script and reward that differ in nothing but the seed are one setting.
The flags in which the settings of a script differ stand in its label, "DDPO-ISKL, lr 3e-3".

A damaged run among good ones is skipped with one line on stderr. Where nothing is left to show, the
last line says why, and the exit code is 2.
"""

import csv
import io
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure  # not pyplot: no window, no global state
from PIL import Image

NAMES = {
    "ddpo_sf": "DDPO-SF",
    "ddpo_is": "DDPO-IS",
    "ddpo_iskl": "DDPO-ISKL",
    "rwr": "RWR",
    "rwr_sparse": "sparse RWR",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart too
COLOURS = {
    "ddpo_sf": "#E69F00",
    "ddpo_is": "#0072B2",
    "ddpo_iskl": "#009E73",
    "rwr": "#CC79A7",
    "rwr_sparse": "#56B4E9",
}
# for further settings and for scripts of your own
SPARE_COLOURS = ["#D55E00", "#000000", "#882255", "#7F7F7F", "#8C6D31", "#332288", "#999933"]
MARKERS = "osD^vPX<>*hp"
UNITS = {
    "compress": "minus JPEG size (kB)",
    "incompress": "JPEG size (kB)",
    "aesthetic": "LAION aesthetic score",
    "clip": "CLIP score",
}
X_LABELS = {
    "samples": "reward queries",
    "iteration": "iteration",
    "minutes": "minutes of sampling, reward and training",
    "eval_align": "prompt alignment (CLIP score)",
    "kl_ref": "KL to the pretrained model (nats)",
}
# flags that tell runs of one setting apart, or change speed and memory alone
IGNORED = {
    "compile",
    "device",
    "gradient_checkpointing",
    "iterations",
    "micro_batch",
    "out",
    "resume",
    "reward",
    "save_every",
    "seed",
    "track",
}
# 97.5 % quantiles of Student's t with 1, 2, ..., 29 degrees of freedom
T_QUANTILES = [
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452),
]
matplotlib.rcParams.update(
    {
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "savefig.dpi": 160,
    }
)


class PlotError(ValueError):
    """What the user can put right: the command ends with this one line."""


@dataclass
class Run:
    folder: Path
    script: str
    args: dict
    """as in args.json, and the first digits of the fingerprint of the pretrained weights"""
    rows: list
    """of metrics.csv: {column: number}, blank cells left out"""
    label: str = ""
    """of its setting, set by label_runs"""
    order: list | None = None
    """the place of its setting among those of the script, set by label_runs"""


@dataclass
class Group:
    """The runs of one setting on one task, of different seeds."""

    task: str
    script: str
    label: str
    runs: list


def say(message):
    print(message, file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# reading runs


def read_args(folder):
    """Script and arguments of a run. Raises PlotError for an args.json that is not a script's."""
    path = folder / "args.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlotError(f"{folder}: no args.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlotError(f"{path}: cannot be read ({error})") from None

    types = {"reward": str, "seed": int, "num_steps": int}
    if not isinstance(metadata, dict) or not isinstance(metadata.get("args"), dict):
        raise PlotError(f"{path}: not the args.json of a run")
    for name, kind in types.items():
        if not isinstance(metadata["args"].get(name), kind):
            raise PlotError(f"{path}: not the args.json of a run, it has no {name}")

    args = dict(metadata["args"])
    args["model"] = Path(str(args.get("model"))).name  # the same from any working directory
    args["weights"] = str(metadata.get("weights", "unknown"))[:7]
    return str(metadata.get("script", "unknown")), args


def read_rows(folder):
    """The rows of metrics.csv as {column: number}, blank cells left out.

    The column "minutes" is added: sampling, reward and training so far. Lines that are cut off, are
    not numbers or go back in time are left out with a message. Raises PlotError without any row.
    """
    path = folder / "metrics.csv"
    try:
        text = path.read_text(encoding="utf-8")
        lines = list(csv.reader(text.splitlines()))
    except FileNotFoundError:
        raise PlotError(f"{folder}: no metrics.csv") from None
    except (OSError, ValueError, csv.Error) as error:
        raise PlotError(f"{path}: cannot be read ({error})") from None

    if text and not text.endswith("\n"):
        say(f"{path}: the last line is cut off and left out")
        lines.pop()
    columns = lines[0] if lines else []
    rows = []
    minutes = 0.0
    for number, cells in enumerate(lines[1:], start=2):
        try:
            row = read_row(columns, cells, rows)
        except ValueError as error:
            say(f"{path}: line {number} is left out ({error})")
            continue
        for name in ("sample_s", "reward_s", "train_s"):
            minutes += row.get(name, 0.0) / 60
        row["minutes"] = minutes
        rows.append(row)
    if not rows:
        raise PlotError(f"{path}: no complete row")
    return rows


def read_row(columns, cells, earlier_rows):
    """One line of metrics.csv as {column: number}. Raises ValueError where it is damaged."""
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells for {len(columns)} columns")
    row = {}
    for name, cell in zip(columns, cells):
        if cell:
            row[name] = float(cell)
    for name in ("iteration", "samples"):
        if not math.isfinite(row.get(name, math.nan)):
            raise ValueError(f"no {name}")
    if earlier_rows and row["iteration"] <= earlier_rows[-1]["iteration"]:
        raise ValueError("its iteration is not after the one before")
    if row["iteration"] == 0 and "kl_ref" in columns:
        row.setdefault("kl_ref", 0.0)  # of the pretrained model to itself
    return row


def load_runs(paths):
    """The runs in run folders and in folders of them, each once, with their labels.

    Others are skipped with a message. Raises PlotError where none is left.
    """
    folders = {}
    problems = []
    for path in paths:
        found = find_run_folders(Path(path))
        if not found:
            problems.append(f"{path}: no run folder here")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)

    runs = []
    for folder in folders.values():
        try:
            script, args = read_args(folder)
            runs.append(Run(folder, script, args, read_rows(folder)))
        except PlotError as error:
            problems.append(str(error))
    if not paths:
        raise PlotError("name a run folder, or a folder that contains run folders")
    if not runs:
        raise PlotError("; ".join(problems))
    for problem in problems:
        say(f"skipped: {problem}")
    label_runs(runs)
    return runs


def find_run_folders(path):
    """The run folders at or below a path: those with an args.json or a metrics.csv."""
    names = ("args.json", "metrics.csv")
    if any((path / name).exists() for name in names):
        return [path]
    folders = set()
    for name in names:
        folders.update(file.parent for file in path.rglob(name))
    return sorted(folders)


def label_runs(runs):
    """Set the label of each run, "DDPO-ISKL, lr 3e-3", and the order of its setting.

    The label has the flags in which the runs of a script differ; the order is that of their values.
    """
    for script in {run.script for run in runs}:
        own = [run for run in runs if run.script == script]
        flags = find_differing_flags(own)
        for run in own:
            parts = [NAMES.get(script, script)]
            for flag in flags:
                parts.append(f"{flag.replace('_', ' ')} {show_value(run.args.get(flag))}")
            run.label = ", ".join(parts)
            run.order = [sort_key(run.args.get(flag)) for flag in flags]


def find_differing_flags(runs):
    """The names of the arguments in which runs of one script differ."""
    names = set()
    for run in runs:
        names.update(run.args)
    flags = []
    for name in sorted(names - IGNORED):
        values = {show_value(run.args.get(name)) for run in runs}
        if len(values) > 1:
            flags.append(name)
    return flags


def show_value(value):
    """An argument as a user writes it: 3e-4, 0.01, 1."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    return str(value).removesuffix(".0")


def sort_key(value):
    """Numbers in their order, then everything else by its text."""
    if isinstance(value, int | float):
        return (0, value, "")
    return (1, 0, str(value))


def group_runs(runs):
    """The groups of runs, in the order of drawing, with one run per seed.

    Two runs of one setting and seed are no independent runs: the one that got further counts, or
    else the newer one. The other is skipped with a message.
    """

    def order(run):
        task = run.args["reward"]
        known_task = list(UNITS).index(task) if task in UNITS else len(UNITS)
        known_script = list(NAMES).index(run.script) if run.script in NAMES else len(NAMES)
        return (known_task, task, known_script, run.script, run.order, run.args["seed"])

    members = {}
    for run in sorted(runs, key=order):
        seeds = members.setdefault((run.args["reward"], run.label), {})
        seed = run.args["seed"]
        if seed not in seeds:
            seeds[seed] = run
            continue
        rivals = [seeds[seed], run]
        rivals.sort(key=lambda rival: (rival.rows[-1]["iteration"], rival.folder.name))
        seeds[seed] = rivals[1]
        say(
            f"skipped: {rivals[0].folder}: {rivals[1].folder} has the same setting and seed, "
            "and is longer or newer"
        )

    groups = []
    for (task, label), seeds in members.items():
        own = list(seeds.values())
        groups.append(Group(task, own[0].script, label, own))
    return groups


def read_columns(run, *columns):
    """The rows that have all of these columns, as an array (columns, rows).

    Rows that are not finite are left out with a message.
    """
    rows = []
    for row in run.rows:
        if all(name in row for name in columns):
            rows.append([row[name] for name in columns])
    values = np.array(rows).reshape(-1, len(columns)).T
    finite = np.isfinite(values).all(axis=0)
    if not finite.all():
        count = len(finite) - finite.sum()
        say(f"{run.folder}: {count} rows of {', '.join(columns)} are not finite and left out")
    return values[:, finite]


def name_folders(runs):
    """The folders of some runs, for a message."""
    names = [str(run.folder) for run in runs[:3]]
    if len(runs) > 3:
        names.append(f"{len(runs) - 3} more")
    return ", ".join(names)


# --------------------------------------------------------------------------------------------------
# figures of numbers


def choose_looks(groups):
    """{label: its colour and marker}.

    The commonest setting of a script has the script's own colour, so that it is the same in all
    figures. The others take those that are left.
    """
    counts = Counter()
    scripts = {}
    for group in groups:
        counts[group.label] += len(group.runs)
        scripts.setdefault(group.script, []).append(group.label)
    spare = SPARE_COLOURS + [COLOURS[name] for name in COLOURS if name not in scripts]
    spare = cycle(spare)
    markers = cycle(MARKERS)

    looks = {}
    for script, labels in scripts.items():
        commonest = max(labels, key=counts.get)
        for label in dict.fromkeys(labels):
            own = label == commonest and script in COLOURS
            colour = COLOURS[script] if own else next(spare)
            looks[label] = {"color": colour, "marker": next(markers)}
    return looks


def make_panels(panels, columns, xlabel, ylabel, note):
    """A figure with a panel for each task, and their axes.

    panels: {task: lines}, as `collect` returns them; ylabel is a function of the task.
    """
    rows = math.ceil(len(panels) / columns)
    legend_lines = max(len(lines) for lines in panels.values())
    width = 7 if columns == 1 else 5 * columns  # inches
    height = rows * (3.9 + 0.2 * legend_lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, task in zip(axes, panels):
        ax.set(title=Path(task).name, xlabel=xlabel, ylabel=ylabel(task))
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.supxlabel(note, fontsize=9)
    return figure, axes


def add_legend(ax):
    """Below the panel, where it hides nothing."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.6)


def trailing_mean(values, window):
    """The mean of each value and of up to `window` - 1 values before it. values (P,) -> (P,)"""
    means = np.zeros(len(values))
    for i in range(len(values)):
        means[i] = values[max(0, i + 1 - window) : i + 1].mean()
    return means


def average_curves(curves):
    """Mean, standard deviation (ddof = 1) and number of some curves at every x of any of them.

    curves: one (2, P) array of x and y per run. A curve counts from its first x to its last, and is
    linear between its points. Returns x, mean, std, n, (Q,) each; std is NaN where n = 1.
    """
    x = np.unique(np.concatenate([curve[0] for curve in curves]))
    y = [np.interp(x, curve[0], curve[1], left=np.nan, right=np.nan) for curve in curves]
    y = np.array(y)  # (curves, Q)
    n = np.isfinite(y).sum(axis=0)
    mean = np.nansum(y, axis=0) / n
    squares = np.nansum((y - mean) ** 2, axis=0)
    std = np.full(len(x), np.nan)
    several = n > 1
    std[several] = np.sqrt(squares[several] / (n[several] - 1))
    return x, mean, std, n


def choose_metric(runs, metric):
    """The metric; reward_mean where eval_reward is asked for and no run was ever evaluated."""
    columns = {}
    for run in runs:
        for row in run.rows:
            columns.update(dict.fromkeys(row))
    if metric in columns:
        return metric
    if metric == "eval_reward" and "reward_mean" in columns:
        say("no run has eval_reward: this is reward_mean, the reward of the training samples")
        return "reward_mean"
    raise PlotError(f"no {metric} in {name_folders(runs)}: they have {', '.join(columns)}")


def collect(groups, *columns):
    """{task: [(group, arrays), ...]}, where each array (columns, rows) is of one run.

    Runs without these columns are skipped with a message. Raises PlotError where none is left.
    """
    panels = {}
    without = []
    for group in groups:
        arrays = []
        for run in group.runs:
            values = read_columns(run, *columns)
            if values.size > 0:
                arrays.append(values)
            else:
                without.append(run)
        if arrays:
            panels.setdefault(group.task, []).append((group, arrays))
    wanted = f"no row with {', '.join(columns)}"
    if not panels:
        raise PlotError(f"{wanted} in {name_folders(without)}")
    for run in without:
        say(f"skipped: {run.folder}: {wanted}")
    return panels


def draw_curves(runs, x="samples", metric="eval_reward", smooth=10):
    """Figures 3 and 3b: a metric against x, a panel per task, a line per setting.

    The line is the mean over seeds, dashed where some of them had ended; the band is one standard
    deviation (ddof = 1), from two seeds on. Training columns are smoothed, evaluations are not.
    """
    metric = choose_metric(runs, metric)
    window = 1 if metric.startswith("eval_") else smooth
    groups = group_runs(runs)
    looks = choose_looks(groups)
    panels = collect(groups, x, metric)

    def ylabel(task):
        label = metric
        if metric == "eval_reward":
            label = UNITS.get(task, metric)
        elif metric == "reward_mean":
            label = f"{UNITS.get(task, metric)} of the training samples"
        if window > 1:
            label += f",\nmean of the last {window} iterations"
        return label

    note = "mean over n seeds; band: one standard deviation (ddof = 1); dashed: fewer seeds"
    columns = min(3, len(panels))
    figure, axes = make_panels(panels, columns, X_LABELS[x], ylabel, note)
    for ax, lines in zip(axes, panels.values()):
        for group, curves in lines:
            for curve in curves:
                curve[1] = trailing_mean(curve[1], window)
            draw_mean_curve(ax, group.label, curves, looks[group.label])
        add_legend(ax)
    return figure


def draw_mean_curve(ax, label, curves, look):
    """The mean of a setting's curves and its band."""
    x, mean, std, n = average_curves(curves)
    style = look | {"markersize": 4, "markevery": math.ceil(len(x) / 20)}
    everyone = n == len(curves)
    text = f"{label} (n = {len(curves)}"
    if not everyone.all():
        fewer = np.unique(n[~everyone])[::-1]
        text += f", dashed {', '.join(str(count) for count in fewer)}"
        ax.plot(x, mean, linestyle="dashed", **style)
    ax.plot(x[everyone], mean[everyone], label=f"{text})", **style)
    if len(curves) > 1:
        low = mean - std
        high = mean + std
        ax.fill_between(x, low, high, where=n > 1, color=look["color"], alpha=0.18, linewidth=0)


def find_baseline(groups, baseline):
    """The label of the setting that --baseline names, by its script or by the label itself.

    Returns None where there is none. Raises PlotError where a script has several settings.
    """
    labels = [group.label for group in groups if baseline in (group.script, group.label)]
    labels = list(dict.fromkeys(labels))
    if len(labels) > 1:
        quoted = " or ".join(f'"{label}"' for label in labels)
        raise PlotError(f"--baseline {baseline} has several settings: choose {quoted}")
    return labels[0] if labels else None


def average_paths(paths):
    """Mean and standard deviation over runs, at the iterations that all of them were evaluated at.

    paths: one (3, P) array per run: iteration, x, reward. Returns the mean (3, Q), and the standard
    deviation (3, Q) with ddof = 1, NaN for one run. Q is 0 where they have no evaluation in common.
    """
    common = set(paths[0][0])
    for path in paths:
        common &= set(path[0])
    common = sorted(common)
    stacked = np.array([path[:, np.isin(path[0], common)] for path in paths])  # (runs, 3, Q)
    std = np.full(stacked.shape[1:], np.nan)
    if len(paths) > 1:
        std = stacked.std(axis=0, ddof=1)
    return stacked.mean(axis=0), std


def draw_tradeoff(runs, x="eval_align", baseline="ddpo_is"):
    """Reward against prompt alignment, or against the KL: a panel per task, a path per setting.

    A path is the mean over seeds, with a marker per evaluation. Whoever stops the baseline early
    gets a point of its path, so that path is drawn thick: a method is worth its cost where it gets
    beyond.
    """
    groups = group_runs(runs)
    looks = choose_looks(groups)
    baseline_label = find_baseline(groups, baseline)
    if baseline_label is None:
        say(f"--baseline {baseline}: no such run, so no path is drawn thick")
    panels = collect(groups, "iteration", x, "eval_reward")

    def ylabel(task):
        return UNITS.get(task, "eval_reward")

    note = "mean over n seeds; ring: pretrained; large marker: end, +- one standard deviation"
    columns = min(2, len(panels))
    figure, axes = make_panels(panels, columns, X_LABELS[x], ylabel, note)
    for ax, lines in zip(axes, panels.values()):
        if x == "kl_ref":  # 0 at the start, then a hundred to hundreds of thousands
            ax.set_xscale("symlog", linthresh=100)
        for group, paths in lines:
            emphasised = group.label == baseline_label
            draw_mean_path(ax, group.label, paths, looks[group.label], emphasised)
        add_legend(ax)
    return figure


def draw_mean_path(ax, label, paths, look, emphasised):
    """The mean path of a setting, with its start and its end marked."""
    mean, std = average_paths(paths)
    longest = max(path[0, -1] for path in paths)
    _, x, reward = mean
    if x.size == 0:
        raise PlotError(f"the runs of {label} have no evaluated iteration in common")
    if mean[0, -1] < longest:
        say(f"{label}: drawn to iteration {mean[0, -1]:.0f}, which all of its seeds reached")

    width = 1.5
    if emphasised:
        label = f"{label}, stopped early: the line to beat"
        width = 2.5
        ax.plot(x, reward, color=look["color"], linewidth=7, alpha=0.3, zorder=1)
    text = f"{label} (n = {len(paths)})"
    ax.plot(x, reward, label=text, linewidth=width, markersize=3.5, **look)
    if len(paths) > 1:
        ax.errorbar(
            x[-1],
            reward[-1],
            xerr=std[1, -1],
            yerr=std[2, -1],
            color=look["color"],
            elinewidth=1,
            alpha=0.7,
        )
    ax.scatter(x[-1], reward[-1], s=80, zorder=3, edgecolors="white", **look)
    ax.scatter(x[0], reward[0], s=90, zorder=4, facecolors="none", edgecolors="black")


# --------------------------------------------------------------------------------------------------
# tables


def choose_iteration(run, iteration, *columns):
    """The iteration to report: the given one, or the last. None if it lacks one of the columns."""
    iterations = read_columns(run, "iteration", *columns)[0]
    if iteration is None and len(iterations) > 0:
        return iterations[-1]
    if iteration in iterations:
        return iteration
    return None


def value_at(run, column, iteration):
    """One number of metrics.csv, NaN where it is missing."""
    for row in run.rows:
        if row["iteration"] == iteration:
            return row.get(column, math.nan)
    return math.nan


def show_mean(values, digits):
    """ "1.650 +- 0.207": mean and standard deviation (ddof = 1) over seeds."""
    if not np.isfinite(values).all():
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):.{digits}f}"
    return text


def show_range(values):
    """ "3,200", or "1,120 to 3,200" where seeds differ."""
    if not values:
        return "-"
    text = f"{min(values):,.0f}"
    if max(values) > min(values):
        text += f" to {max(values):,.0f}"
    return text


def make_table(runs, iteration=None):
    """A row per setting: first and last evaluation, mean +- standard deviation (ddof = 1).

    eval_reward_se is the mean over seeds of the last evaluation's standard error, "-" for old runs,
    which lack it. Minutes are sampling, reward and training.
    """
    rows = []
    without = []
    for group in group_runs(runs):
        first = {"eval_reward": [], "eval_align": []}
        last = {"iteration": [], "samples": [], "minutes": [], "eval_reward_se": []}
        last |= {"eval_reward": [], "eval_align": []}
        for run in group.runs:
            end = choose_iteration(run, iteration, "eval_reward")
            if end is None:
                without.append(run)
                continue
            start = read_columns(run, "iteration", "eval_reward")[0, 0]
            for name, values in first.items():
                values.append(value_at(run, name, start))
            for name, values in last.items():
                values.append(value_at(run, name, end))
        if not last["iteration"]:
            continue
        row = {
            "task": group.task,
            "setting": group.label,
            "n": str(len(last["iteration"])),
            "iterations": show_range(last["iteration"]),
            "queries": show_range(last["samples"]),
            "minutes": f"{np.mean(last['minutes']):.1f}",
            "eval_reward, first": show_mean(first["eval_reward"], 3),
            "eval_reward, last": show_mean(last["eval_reward"], 3),
            "eval_reward_se, last": show_mean([np.mean(last["eval_reward_se"])], 3),
            "eval_align, first": show_mean(first["eval_align"], 1),
            "eval_align, last": show_mean(last["eval_align"], 1),
        }
        rows.append(row)
    wanted = "no eval_reward" if iteration is None else f"no eval_reward at iteration {iteration}"
    if not rows:
        raise PlotError(f"{wanted} in {name_folders(without)}")
    for run in without:
        say(f"skipped: {run.folder}: {wanted}")
    return rows


def monotone_envelope(rewards, aligns):
    """The evaluations of a run whose reward is higher than at every one before.

    rewards, aligns (P,) in the order of training, the pretrained model first. Returns both, (Q,)
    each: at the reward of one of these evaluations the run would be stopped for the first time.
    """
    best = -np.inf
    chosen = []
    for i, reward in enumerate(rewards):
        if reward > best:
            best = reward
            chosen.append(i)
    return rewards[chosen], aligns[chosen]


def t_interval(values):
    """Mean of n values and its 95 % confidence interval by Student's t: mean, low, high.

    low and high are NaN for n = 1. For n > 30 the quantile is that of n = 30, a little too wide.
    """
    mean = np.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    degrees = min(len(values) - 1, len(T_QUANTILES))
    margin = T_QUANTILES[degrees - 1] * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, mean - margin, mean + margin


def compare_at_equal_reward(group, baseline_group, iteration=None):
    """CLIP score of each run minus that of the baseline run of its seed at the same reward.

    A run has eval_reward r and eval_align a at the chosen iteration. The baseline run of the same
    seed, stopped when it first reaches r, has the CLIP score b: linear in the reward between two
    neighbours of its monotone envelope (see there). The difference is a - b: positive where the run
    keeps more of the prompt than the baseline stopped early. Nothing is extrapolated: a run whose
    reward is above the highest or below the first of the baseline is left out, and so is one whose
    pretrained model scores another reward (another model, other prompts or steps).

    Returns {seed: difference}, {seed: why it is left out}, and the iterations of the former.
    """
    baselines = {run.args["seed"]: run for run in baseline_group.runs}
    differences = {}
    left_out = {}
    iterations = []
    for run in group.runs:
        seed = run.args["seed"]
        chosen = choose_iteration(run, iteration, "eval_reward", "eval_align")
        if chosen is None:
            left_out[seed] = "not evaluated"
            continue
        path = np.empty((2, 0))
        if seed in baselines:
            path = read_columns(baselines[seed], "eval_reward", "eval_align")
        if path.size == 0:
            left_out[seed] = "no baseline"
            continue
        rewards, aligns = monotone_envelope(*path)
        start = value_at(run, "eval_reward", 0)
        if abs(start - rewards[0]) > 0.01 * abs(rewards[0]):
            left_out[seed] = "another start"
            continue
        reward = value_at(run, "eval_reward", chosen)
        if reward > rewards[-1]:
            left_out[seed] = "above"
        elif reward < rewards[0]:
            left_out[seed] = "below"
        else:
            baseline_align = np.interp(reward, rewards, aligns)
            differences[seed] = value_at(run, "eval_align", chosen) - baseline_align
            iterations.append(chosen)
    return differences, left_out, iterations


def pair_groups(runs, baseline):
    """[(group, the baseline's group of the same task), ...] for all settings but the baseline's."""
    groups = group_runs(runs)
    baseline_label = find_baseline(groups, baseline)
    if baseline_label is None:
        labels = ", ".join(dict.fromkeys(group.label for group in groups))
        raise PlotError(f"--baseline {baseline}: no such run in {name_folders(runs)} ({labels})")

    baseline_groups = {}
    for group in groups:
        if group.label == baseline_label:
            baseline_groups[group.task] = group
    pairs = []
    for group in groups:
        if group.label == baseline_label:
            continue
        if group.task in baseline_groups:
            pairs.append((group, baseline_groups[group.task]))
        else:
            say(f"skipped: {group.label} on {group.task}: {baseline_label} has no run of that task")
    if not pairs:
        raise PlotError(f"nothing to compare with {baseline_label} in {name_folders(runs)}")
    return pairs


def make_equal_table(runs, baseline="ddpo_is", iteration=None):
    """A row per setting but the baseline's: the CLIP score minus the baseline's at equal reward.

    The interval is that of the mean over seeds, by Student's t. "left out" has the seeds whose
    reward is above or below the baseline's range, or that have no counterpart.
    """
    rows = []
    outside = 0
    for group, baseline_group in pair_groups(runs, baseline):
        differences, left_out, iterations = compare_at_equal_reward(
            group, baseline_group, iteration
        )
        reasons = list(left_out.values())
        outside += reasons.count("above") + reasons.count("below")
        row = {"task": group.task, "setting": group.label, "iteration": show_range(iterations)}
        title = f"CLIP score minus that of {baseline_group.label}, by seed"
        rows.append(row | show_differences(title, differences, left_out, 1))
    if outside > 0:
        label = baseline_group.label
        say(f"left out, as their reward is outside the range of {label}: {outside} run(s)")
    return rows


def make_compare_table(runs, baseline="ddpo_is", metric="eval_reward", iteration=None):
    """A row per setting but the baseline's: its metric minus the baseline's at one iteration.

    Runs of the same seed are compared; without an iteration, the last evaluation of each. The
    interval is that of the mean over seeds, by Student's t.
    """
    rows = []
    for group, baseline_group in pair_groups(runs, baseline):
        values = []  # of the setting and of its baseline, {seed: number}
        iterations = []
        for compared in (group, baseline_group):
            found = {}
            for run in compared.runs:
                chosen = choose_iteration(run, iteration, metric)
                if chosen is not None:
                    found[run.args["seed"]] = value_at(run, metric, chosen)
                    iterations.append(chosen)
            values.append(found)
        ours, theirs = values
        differences = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
        left_out = {seed: "no baseline" for seed in ours if seed not in theirs}
        row = {"task": group.task, "setting": group.label, "iteration": show_range(iterations)}
        title = f"{metric} minus that of {baseline_group.label}, by seed"
        decimals = 3 if "reward" in metric else 1
        rows.append(row | show_differences(title, differences, left_out, decimals))
    return rows


def make_gain_table(runs, metric="eval_reward", iteration=None):
    """A row per setting: its metric minus that of the same run at iteration 0.

    Iteration 0 is the pretrained model. Without an iteration, the last evaluation of each run is
    taken. The interval is that of the mean over seeds, by Student's t.
    """
    rows = []
    for group in group_runs(runs):
        differences = {}
        left_out = {}
        iterations = []
        for run in group.runs:
            seed = run.args["seed"]
            chosen = choose_iteration(run, iteration, metric)
            start = value_at(run, metric, 0)
            if chosen is None or math.isnan(start):
                left_out[seed] = "not evaluated"
                continue
            differences[seed] = value_at(run, metric, chosen) - start
            iterations.append(chosen)
        row = {"task": group.task, "setting": group.label, "iteration": show_range(iterations)}
        title = f"{metric} minus that of iteration 0, by seed"
        decimals = 3 if "reward" in metric else 1
        rows.append(row | show_differences(title, differences, left_out, decimals))
    if all(row["n"] == "0" for row in rows):
        raise PlotError(f"no {metric} at iteration 0 and later in {name_folders(runs)}")
    return rows


def show_differences(title, differences, left_out, decimals):
    """The cells of one comparison: differences {seed: number}, left_out {seed: why}."""
    mean, low, high = math.nan, math.nan, math.nan
    if differences:
        mean, low, high = t_interval(list(differences.values()))
    verdict = "not significant" if differences else "-"
    if low > 0 or high < 0:  # False where they are NaN
        verdict = "significant"

    def show(number):
        return f"{number:+.{decimals}f}"

    each = [f"{seed}: {show(difference)}" for seed, difference in differences.items()]
    reasons = [f"{seed}: {reason}" for seed, reason in left_out.items()]
    return {
        "n": str(len(differences)),
        title: ", ".join(each),
        "mean": show(mean) if differences else "-",
        "95 % interval": f"{show(low)} to {show(high)}" if len(differences) > 1 else "-",
        "verdict": verdict,
        "left out": ", ".join(reasons),
    }


def to_markdown(rows):
    """Rows {column: text} as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append(list(row.values()))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(rows):
    """Rows {column: text} as csv."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------
# figures of pictures


def find_pictures(runs, kind):
    """[(run, {iteration: path}), ...] of the runs with pictures in images/ or trajectory/."""
    found = []
    without = []
    for run in runs:
        pictures = {}
        for path in sorted((run.folder / kind).glob("*.png")):
            if path.stem.isdecimal():
                pictures[int(path.stem)] = path
        if pictures:
            found.append((run, pictures))
        else:
            without.append(run)
    if not found:
        raise PlotError(f"no pictures in {kind}/ of {name_folders(runs)}")
    for run in without:
        say(f"skipped: {run.folder}: no pictures in {kind}/")
    return found


def read_picture(path):
    """A PNG as an array (H, W, 3), None with a message where it is damaged."""
    try:
        with Image.open(path) as image:
            if image.width < 6 or image.height < 2:
                raise ValueError("too small")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's for a broken PNG
        say(f"{path}: left out ({error})")
        return None


def picture_aspect(run):
    """Width / height of one picture, from the strip of six in trajectory/; else it is a square."""
    for path in sorted((run.folder / "trajectory").glob("*.png")):
        strip = read_picture(path)
        if strip is not None:
            return strip.shape[1] / 6 / strip.shape[0]
    return 1.0


def cut_grid(grid, aspect):
    """The first line of a grid of two lines, as a list of its pictures."""
    line = grid[: len(grid) // 2]
    count = max(1, round(line.shape[1] / len(line) / aspect))  # large grids were scaled down
    edges = line.shape[1] * np.arange(count + 1) // count
    return [line[:, left:right] for left, right in zip(edges[:-1], edges[1:])]


def name_prompt(run, index, count):
    """Which of `count` fixed prompts this is: its text, if the run has its prompts.txt."""
    path = run.folder / "prompts.txt"
    if not path.is_file():
        return f"prompt {index}"
    prompts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(prompts) < count:
        return f"prompt {index}"
    # spread over the list, as the scripts' evaluate chooses them
    chosen = np.linspace(0, len(prompts) - 1, count).astype(int)
    return f'"{prompts[chosen[index]][:24]}"'


def draw_rows(rows, title):
    """rows: [(run, detail, [(caption, picture (H, W, 3) or None), ...]), ...], of equal length."""
    columns = len(rows[0][2])
    side = min(8.4 / columns, 2)  # inches
    size = (1.8 + side * columns, 0.6 + len(rows) * (side + 0.15))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    captions_above = None
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (run, detail, cells) in zip(grid, rows):
        lines = [*run.label.split(", "), Path(run.args["reward"]).name]
        lines += [f"seed {run.args['seed']}", detail]
        axes[0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", fontsize=9)
        captions = [caption for caption, _ in cells]
        for ax, (caption, picture) in zip(axes, cells):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_color("lightgrey")  # a white picture is not a missing one
            if captions != captions_above:
                ax.set_title(caption, fontsize=10)
            if picture is None:
                ax.spines[:].set_visible(False)
            else:
                ax.imshow(picture)
        captions_above = captions
    return figure


def draw_progress(runs, columns=6, prompt_index=(0,)):
    """Figures 1 and 2: a row of pictures of one prompt and noise per run and prompt.

    The iterations are spread evenly over those that any run has; a run without one has a blank.
    """
    found = find_pictures(runs, "images")
    iterations = set()
    for _, pictures in found:
        iterations.update(pictures)
    iterations = sorted(iterations)
    spread = np.linspace(0, len(iterations) - 1, columns).round().astype(int)
    iterations = [iterations[i] for i in np.unique(spread)]

    rows = []
    for run, pictures in found:
        rows += read_progress(run, pictures, iterations, prompt_index)
    if not rows:
        raise PlotError(f"no picture in images/ of {name_folders(runs)} can be read")
    return draw_rows(rows, "fixed prompts and noise over training")


def read_progress(run, pictures, iterations, prompt_index):
    """The rows of one run, one per prompt. Raises PlotError for a prompt that is not there."""
    aspect = picture_aspect(run)
    grids = {}
    for iteration in iterations:
        grid = read_picture(pictures[iteration]) if iteration in pictures else None
        if grid is not None:
            grids[iteration] = cut_grid(grid, aspect)
    if not grids:
        return []
    count = max(len(grid) for grid in grids.values())

    rows = []
    for index in prompt_index:
        if not 0 <= index < count:
            raise PlotError(f"{run.folder}: no prompt {index}, its grids show 0 to {count - 1}")
        cells = []
        for iteration in iterations:
            grid = grids.get(iteration, [])
            picture = grid[index] if index < len(grid) else None
            cells.append((f"iteration {iteration}", picture))
        rows.append((run, name_prompt(run, index, count), cells))
    return rows


def draw_trajectory(runs, iteration=()):
    """Figures 4 and 5: "elephant" after six of the denoising steps, a row per run and iteration.

    Without an iteration it is each run's last. Step 49 of 50 is the finished picture.
    """
    rows = []
    problems = []
    for run, pictures in find_pictures(runs, "trajectory"):
        # as in the scripts' evaluate: the first step, then every fifth part
        num_steps = run.args["num_steps"]
        steps = [0] + [max(1, part * num_steps // 5) - 1 for part in range(1, 6)]
        for number in iteration or [max(pictures)]:
            if number not in pictures:
                problems.append(f"{run.folder}: no trajectory/{number:04d}.png")
                continue
            strip = read_picture(pictures[number])
            if strip is not None:
                captions = [f"step {step}" for step in steps]
                cells = list(zip(captions, np.array_split(strip, 6, axis=1)))
                rows.append((run, f"iteration {number}", cells))
    if not rows and not problems:
        raise PlotError(f"no picture in trajectory/ of {name_folders(runs)} can be read")
    if not rows:
        raise PlotError("; ".join(problems))
    for problem in problems:
        say(f"skipped: {problem}")
    return draw_rows(rows, 'denoising "elephant"')


# --------------------------------------------------------------------------------------------------
# the commands


@dataclass
class Command:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders, or folders that contain run folders"""


@dataclass
class FigureCommand(Command):
    out: Path = Path("figure.png")
    """file to write, .png or .pdf"""


@dataclass
class TableCommand(Command):
    out: Path | None = None
    """file to write, .md or .csv; without it the table is printed as Markdown"""
    iteration: int | None = None
    """the evaluation to report; without it each run's last one"""


@dataclass
class Curves(FigureCommand):
    """Figures 3 and 3b: reward against reward queries, mean over seeds with its spread."""

    x: Literal["samples", "iteration", "minutes"] = "samples"
    """samples: reward queries; minutes: of sampling, reward and training"""
    metric: str = "eval_reward"
    """column of metrics.csv; where no run was evaluated, reward_mean takes eval_reward's place"""
    smooth: int = 10
    """columns of training (all but eval_*) are the mean of this many last iterations; 1: as is"""


@dataclass
class Tradeoff(FigureCommand):
    """Reward against CLIP score, a mean path per setting, and the early-stopped baseline's."""

    x: Literal["eval_align", "kl_ref"] = "eval_align"
    """the CLIP score, or the KL to the pretrained model"""
    baseline: str = "ddpo_is"
    """script, or label as in the legend, of the path to beat"""


@dataclass
class Equal(TableCommand):
    """CLIP score at equal reward: each run minus the early-stopped baseline of the same seed."""

    baseline: str = "ddpo_is"
    """script, or label as in the table, that the others are compared with"""


@dataclass
class Compare(TableCommand):
    """A column of metrics.csv minus that of the baseline's run of the same seed and iteration."""

    baseline: str = "ddpo_is"
    """script, or label as in the table, that the others are compared with"""
    metric: str = "eval_reward"
    """column of metrics.csv"""


@dataclass
class Gain(TableCommand):
    """A column of metrics.csv minus that of the same run at iteration 0, the pretrained model."""

    metric: str = "eval_reward"
    """column of metrics.csv"""


@dataclass
class Table(TableCommand):
    """First and last evaluation of each setting, mean +- standard deviation over seeds."""


@dataclass
class Progress(FigureCommand):
    """Figures 1 and 2: fixed prompts and noise over training, a row per run and prompt."""

    columns: int = 6
    """pictures in a row"""
    prompt_index: tuple[int, ...] = (0,)
    """which of the fixed prompts, from 0"""


@dataclass
class Trajectory(FigureCommand):
    """Figures 4 and 5: "elephant" while it is denoised, a row per run and iteration."""

    iteration: tuple[int, ...] = ()
    """iterations to show; without it each run's last one"""


COMMANDS = Curves | Tradeoff | Equal | Compare | Gain | Table | Progress | Trajectory


def check_flags(command):
    """Refuse what no command can use, before any work is done."""
    endings = (".md", ".csv") if isinstance(command, TableCommand) else (".png", ".pdf")
    if command.out is not None and command.out.suffix not in endings:
        raise PlotError(f"--out {command.out}: must end in {' or '.join(endings)}")
    if isinstance(command, Curves) and command.smooth < 1:
        raise PlotError(f"--smooth {command.smooth}: must be 1 or greater")
    if isinstance(command, Progress) and command.columns < 1:
        raise PlotError(f"--columns {command.columns}: must be 1 or greater")


def make_output(command):
    """The Figure of a command, or the rows of its table."""
    runs = load_runs(command.runs)
    if isinstance(command, Curves):
        return draw_curves(runs, command.x, command.metric, command.smooth)
    if isinstance(command, Tradeoff):
        return draw_tradeoff(runs, command.x, command.baseline)
    if isinstance(command, Equal):
        return make_equal_table(runs, command.baseline, command.iteration)
    if isinstance(command, Compare):
        return make_compare_table(runs, command.baseline, command.metric, command.iteration)
    if isinstance(command, Gain):
        return make_gain_table(runs, command.metric, command.iteration)
    if isinstance(command, Table):
        return make_table(runs, command.iteration)
    if isinstance(command, Progress):
        return draw_progress(runs, command.columns, command.prompt_index)
    return draw_trajectory(runs, command.iteration)


def write_output(output, out):
    """Write the file; a table without one is printed."""
    if out is None:
        print(to_markdown(output), end="")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".md":
            out.write_text(to_markdown(output), encoding="utf-8")
        elif out.suffix == ".csv":
            out.write_text(to_csv(output), encoding="utf-8")
        else:
            output.savefig(out)
    except OSError as error:
        raise PlotError(f"--out {out}: {error}") from None
    print(out)


def main(command):
    """Run a parsed command."""
    try:
        check_flags(command)
        output = make_output(command)
        write_output(output, command.out)
    except PlotError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(tyro.cli(COMMANDS, description=__doc__))
