"""
Figures and tables from run folders: no torch, no model.

    python plot.py table runs --iteration 60 100                # reward, contrast, drift, CLIP
    python plot.py table runs --baseline "DDPO-IS, lr 1e-4"     # the same minus that setting's
    python plot.py table runs --contrast 0.2                    # CLIP score at equal contrast
    python plot.py contrast runs                                # the same as curves
    python plot.py curves runs --metric eval_reward eval_align  # columns of metrics.csv
    python plot.py curves runs --x eval_align                   # reward against CLIP score
    python plot.py pictures runs --prompt 0 7                   # fixed prompts over training
    python plot.py pictures runs --across steps                 # "elephant" while it is denoised
    python plot.py report > results/TABLES.md                   # every published table

A path is a run folder, or a folder that contains run folders. Runs whose args.json differ in the
seed and the reward only are one setting, and its name is the same in all figures. Two runs of one
setting and seed, one rewarded for small files and one for large ones, are a pair. With their gains
of eval_reward since iteration 0, g_c and g_i in kB,

    contrast = (g_c + g_i) / 2      what the reward did
    drift    = (g_c - g_i) / 2      what happened with either reward; above 0 the files shrink

Intervals are 95 % t intervals over seeds, from three seeds on; a mean is bold if its interval
excludes 0. Two settings are compared by the differences of the same seeds before iteration 100 and
at equal contrast, and later by Welch's interval over all runs, as a seed then fixes little.
"""

import csv
import glob
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

os.environ["MPLBACKEND"] = "agg"  # the backend of a notebook is inherited, and may not exist here

from matplotlib import rcParams
from matplotlib.figure import Figure  # not pyplot: no window, no global state
from matplotlib.font_manager import get_font_names

SIZE = re.compile(r"([^ *-]+:)?(in)?compress")  # a task in kB: no sum, no user's other reward
NAMES = {
    "ddpo_sf": "DDPO-SF",
    "ddpo_is": "DDPO-IS",
    "ddpo_iskl": "DDPO-ISKL",
    "ddpo_is_groups": "DDPO-IS in groups",
    "rwr": "RWR",
    "rwr_sparse": "sparse RWR",
}
# flags that the name of a setting leaves out at these values
DEFAULTS = {
    "prompts": "animals",
    "num_steps": 50,
    "num_updates": 2,
    "clip_range": 1e-4,
    "kl": "exact",
    "kl_coef": 0.01,
    "beta": 10.0,
}
ONE_UPDATE = ("ddpo_sf", "rwr", "rwr_common", "rwr_sparse")  # by default
# flags that tell the runs of a setting apart, or change speed and memory only
NOT_NAMED = "reward seed iterations out resume save_every track".split()
NOT_NAMED += "device micro_batch gradient_checkpointing compile".split()
# colours of Okabe and Ito and of Tol, which colour-blind readers can tell apart too
LOOKS = {
    "DDPO-SF, lr 1e-4": ("#E69F00", "o"),
    "DDPO-SF, lr 3e-4, num updates 4": ("#D55E00", "o"),
    "DDPO-IS, lr 3e-4": ("#0072B2", "s"),
    "DDPO-IS, lr 1e-4": ("#56B4E9", "s"),
    "DDPO-ISKL, lr 3e-4": ("#009E73", "D"),
    "DDPO-ISKL, lr 3e-3": ("#332288", "D"),
    "RWR, centred weights, lr 3e-5": ("#CC79A7", "^"),
    "sparse RWR, centred weights, lr 3e-5": ("#882255", "v"),
}
OTHER_LOOKS = [("#000000", "P"), ("#8C6D31", "X"), ("#7F7F7F", "<"), ("#999933", ">")]
# columns of metrics.csv and of pairs, in the order of a table: their titles and decimals
COLUMNS = {
    "samples": ("reward queries", 0),
    "eval_reward": ("reward", 3),
    "gain": ("gain", 3),
    "contrast": ("contrast (kB)", 3),
    "drift": ("drift (kB)", 3),
    "eval_align": ("CLIP score", 1),
    "align_gain": ("CLIP gain", 1),
    "eval_top1": ("top-1", 2),
    "kl_ref": ("KL (nats)", 0),
}
GAINS = {"eval_reward": "gain", "eval_align": "align_gain"}  # since iteration 0
# for what matplotlib's own font lacks, Chinese prompts for instance
FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans", "SimHei"]
rcParams["font.family"] = ["DejaVu Sans"] + [name for name in FONTS if name in get_font_names()]
rcParams["text.parse_math"] = False  # a prompt may have dollar signs
rcParams["axes.grid"] = True
rcParams["grid.alpha"] = 0.3
rcParams["legend.frameon"] = False
rcParams["savefig.dpi"] = 160

LISTS = Path(__file__).parent / "prompts"
RunPaths = tyro.conf.Positional[tuple[Path, ...]]


@dataclass
class Run:
    """A run folder, or a pair of them."""

    folder: Path
    script: str
    task: str
    """the reward in one spelling; "both" for a pair"""
    args: dict
    rows: list
    """of metrics.csv, {column: number}, with GAINS; blank cells are left out"""
    label: str = ""
    """the full name of its setting, set by label_runs"""

    def evaluations(self, *columns):
        """{iteration: row} of the rows that have all of these columns."""
        return {row["iteration"]: row for row in self.rows if row.keys() >= set(columns)}


# ---- reading runs --------------------------------------------------------------------------------


def load_runs(paths):
    """The runs in run folders and in folders of them, each once: SF, IS, ISKL, RWR, then others."""
    folders = {}
    for path in paths:
        # unlike Path.rglob, this follows links
        found = glob.glob(f"{glob.escape(str(path))}/**/metrics.csv", recursive=True)
        if not found:
            sys.exit(f"{path}: no run folder here")
        for file in sorted(found):
            folder = Path(file).parent
            folders.setdefault(folder.resolve(), folder)

    runs = []
    for folder in folders.values():
        try:
            runs.append(load_run(folder))
        except Exception as error:
            error.add_note(f"in the run folder {folder}")
            raise
    label_runs(runs)
    scripts = [*NAMES, *sorted({run.script for run in runs})]
    runs.sort(key=lambda run: (scripts.index(run.script), run.label, run.task, run.args["seed"]))
    return runs


def load_run(folder):
    metadata = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    args = dict(metadata["args"])
    args["model"] = Path(args["model"]).name  # the same from any working directory
    rows = []
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            rows.append({name: float(cell) for name, cell in cells.items() if cell != ""})

    if "kl_ref" in rows[-1]:
        rows[0]["kl_ref"] = 0.0  # of the pretrained model to itself
    for row in rows:
        for name, gain in GAINS.items():
            if name in row:
                row[gain] = row[name] - rows[0][name]
    return Run(folder, metadata["script"], name_task(args["reward"]), args, rows)


def name_task(reward):
    """A reward in one spelling: "0.5 * clip+dir/my.py:f" -> "0.5*clip + my.py:f"."""
    terms = []
    for term in "".join(reward.split()).split("+"):
        weight, star, name = term.rpartition("*")
        # a minus may be one of the path, or the sign of another term
        terms.append(weight + star + (name if "-" in name else Path(name).name))
    return " + ".join(sorted(terms))


def read_prompts(path):
    """One prompt per line, () without a file. splitlines would cut them at U+2028."""
    if not path.exists():
        return ()
    return tuple(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))


def label_runs(runs):
    """Set each run's label: the flags that are not at DEFAULTS, and others in which runs differ."""
    # by content: a resumed run names a file with the prompts of the list that it began with
    names = {read_prompts(path): path.stem for path in sorted(LISTS.glob("*.txt"))}
    for run in runs:
        name = Path(run.args["prompts"]).stem
        prompts = read_prompts(run.folder / "prompts.txt")
        while prompts and prompts not in names and name in names.values():
            name += "'"
        run.args["prompts"] = names.setdefault(prompts, name) if prompts else name

    flags = {}  # of a script; an older run of it may lack one
    for run in runs:
        flags.setdefault(run.script, set()).update(run.args)
    values = {}
    for run in runs:
        for flag in flags[run.script]:
            values.setdefault(flag, set()).add(show_flag(run.args.get(flag)))
    for run in runs:
        centred = ", centred weights" if run.args.get("center_weights") else ""
        run.label = f"{NAMES.get(run.script, run.script)}{centred}, lr {show_flag(run.args['lr'])}"
        for flag in sorted(run.args.keys() - {"center_weights", "lr", *NOT_NAMED}):
            value = run.args[flag]
            default = DEFAULTS.get(flag)
            if flag == "num_updates" and run.script in ONE_UPDATE:
                default = 1
            if value != default and (flag in DEFAULTS or len(values[flag]) > 1):
                run.label += f", {flag.replace('_', ' ')} {show_flag(value)}"


def show_flag(value):
    """The value of a flag as a user writes it: 3e-4, 0.01, 1."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    return str(value).removesuffix(".0")


def group_runs(runs):
    """{(task, label): {seed: run}}, by task. Of two runs of one seed the longer one counts."""
    groups = {}
    for run in sorted(runs, key=lambda run: run.task):
        seeds = groups.setdefault((run.task, run.label), {})
        other = seeds.setdefault(run.args["seed"], run)
        if other is not run:
            print(f"the longer one counts of {other.folder} and {run.folder}", file=sys.stderr)
            seeds[run.args["seed"]] = max(other, run, key=lambda run: run.rows[-1]["iteration"])
    return groups


def make_pairs(runs):
    """A Run for each setting and seed with both JPEG rewards, or with a user's my.py:compress."""
    groups = group_runs(runs)
    pairs = []
    for (task, label), seeds in groups.items():
        prefix = task.removesuffix("compress")
        partners = groups.get((f"{prefix}incompress", label), {}) if SIZE.fullmatch(task) else {}
        for seed, run in seeds.items():
            if seed not in partners:
                continue
            compress = run.evaluations("gain")
            incompress = partners[seed].evaluations("gain")
            rows = []
            for iteration in sorted(compress.keys() & incompress.keys()):
                first, second = compress[iteration], incompress[iteration]
                row = {"iteration": iteration, "samples": first["samples"]}
                row["contrast"] = (first["gain"] + second["gain"]) / 2
                row["drift"] = (first["gain"] - second["gain"]) / 2
                columns = first.keys() & second.keys()
                for name in columns & {"eval_align", "align_gain", "eval_top1"}:
                    row[name] = (first[name] + second[name]) / 2
                rows.append(row)
            pairs.append(Run(run.folder, run.script, f"{prefix}both", run.args, rows, label))
    return pairs


def stop_at(pair, contrast, column):
    """A column where both runs are stopped as their contrast first reaches this; NaN if never.

    Linear between the evaluations that set a new best contrast.
    """
    best = []
    values = []
    for row in pair.evaluations("contrast", column).values():
        if not best or row["contrast"] > best[-1]:
            best.append(row["contrast"])
            values.append(row[column])
    return np.interp(contrast, best or [0], values or [np.nan], right=np.nan)


# ---- intervals -----------------------------------------------------------------------------------


@cache
def t_quantile(degrees):
    """The 97.5 % quantile of Student's t for degrees of freedom from 1 on, whole or not.

    P(|T| < sqrt(degrees) tan(a)) is the integral of cos^(degrees - 1) from 0 to a, normalised.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_ratio = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = 2 / math.sqrt(math.pi) * math.exp(log_ratio)
    low, high = 1.9, 13.0
    for _ in range(50):  # bisection
        middle = (low + high) / 2
        half = math.atan(middle / math.sqrt(degrees)) / 2
        integral = half * (weights @ np.cos(half * (nodes + 1)) ** (degrees - 1))
        if scale * integral < 0.95:
            low = middle
        else:
            high = middle
    return middle


def mean_interval(values):
    """Mean, low, high of some numbers; low and high are NaN below three, and all without any."""
    mean = np.mean(values) if len(values) > 0 else math.nan
    if len(values) < 3:
        return mean, math.nan, math.nan
    margin = t_quantile(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, mean - margin, mean + margin


def welch_interval(values, baseline):
    """Difference of two means, low, high, by Welch for unequal variances."""
    difference = mean_interval(values)[0] - mean_interval(baseline)[0]
    if min(len(values), len(baseline)) < 3:
        return difference, math.nan, math.nan
    ours = np.var(values, ddof=1) / len(values)
    theirs = np.var(baseline, ddof=1) / len(baseline)
    if ours + theirs == 0:
        return difference, difference, difference
    total = ours**2 / (len(values) - 1) + theirs**2 / (len(baseline) - 1)
    margin = t_quantile((ours + theirs) ** 2 / total) * math.sqrt(ours + theirs)
    return difference, difference - margin, difference + margin


def compare(values, baseline, paired):
    """The interval of values minus baseline, and how many seeds it is of. Both {seed: number}."""
    if not paired:
        count = f"{len(values)} and {len(baseline)}"
        return welch_interval(list(values.values()), list(baseline.values())), count
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    return mean_interval(differences), f"{len(differences)} paired"


# ---- tables --------------------------------------------------------------------------------------


def make_tables(
    runs: RunPaths = (Path("runs"),),
    iteration: tuple[int, ...] = (),
    contrast: tuple[float, ...] = (),
    baseline: str | None = None,
) -> str:
    """Markdown tables of settings by task, then of pairs.

    Args:
        iteration: the evaluations to report; by default the last one that all of the runs have
        contrast: in kB: pairs as they first reach it, both runs stopped at once. A setting of
            which one pair never reaches it has no value there, and no difference
        baseline: differences to it: a setting (its script is enough if it has only one), or a task
    """
    loaded = load_runs(runs)
    pairs = make_pairs(loaded)
    if baseline is not None and baseline not in {run.task for run in loaded}:
        chosen = {run.label for run in loaded if baseline in (run.script, run.label)}
        if len(chosen) != 1:
            known = "; ".join(sorted({run.label for run in loaded}))
            sys.exit(f"--baseline {baseline} is {len(chosen)} settings of these: {known}")
        baseline = chosen.pop()

    if contrast:
        tables = [make_rows(pairs, contrast, baseline, stop_pairs)]
    else:
        common = set.intersection(*[set(run.evaluations("gain")) for run in loaded])
        iterations = iteration or (max(common, default=0),)
        if iterations == (0,):
            sys.exit("the runs have no evaluation but the first in common: use --iteration")
        tables = [make_rows(kind, iterations, baseline, read_columns) for kind in (loaded, pairs)]
    if not any(tables):
        sys.exit("no run was evaluated there, or none that can be compared")
    return "\n".join(to_markdown(rows) for rows in tables if rows)


def make_rows(runs, points, baseline, read):
    """A row per task, point and setting, {title: text}; with a baseline, differences to it."""
    groups = group_runs(runs)
    tasks = [task for task, _ in groups]
    point_title = "at contrast" if read is stop_pairs else "iteration"
    title = "setting" if baseline is None else f"setting, minus {baseline}"
    rows = []
    for point in points:
        for (task, label), seeds in groups.items():
            values = read(seeds, point)
            if baseline in tasks:
                values["gain"] = {}  # the rewards of two tasks do not compare
            partner = (baseline, label) if baseline in tasks else (task, baseline)
            others = read(groups.get(partner, {}), point)
            row = {"task": task, title: label, point_title: f"{point:g}"}
            if baseline is None and values["samples"]:
                row |= show_values(values)
            elif values["samples"] and others["samples"] and partner != (task, label):
                row |= show_differences(values, others, paired=read is stop_pairs or point < 100)
            else:
                continue
            if read is stop_pairs:
                missing = [str(seed) for seed in seeds if math.isnan(values["samples"][seed])]
                row["not reached by seed"] = ", ".join(missing) or "-"
                largest = min(max(row["contrast"] for row in pair.rows) for pair in seeds.values())
                row["all reach (kB)"] = f"{largest:.3f}"
            rows.append(row)
    return sorted(rows, key=lambda row: row["task"])


def read_columns(seeds, iteration):
    """{column: {seed: number}} at one iteration; a column that not all seeds have is empty."""
    found = {seed: run.evaluations("samples").get(iteration) for seed, run in seeds.items()}
    chosen = {seed: row for seed, row in found.items() if row is not None}
    columns = dict.fromkeys(COLUMNS, {})
    for name in COLUMNS:
        if all(name in row for row in chosen.values()):
            columns[name] = {seed: row[name] for seed, row in chosen.items()}
    return columns


def stop_pairs(seeds, contrast):
    """{column: {seed: number}} as pairs first reach a contrast, NaN if one never does."""
    columns = dict.fromkeys(COLUMNS, {})
    for name in ("samples", "eval_align", "align_gain", "eval_top1"):
        columns[name] = {seed: stop_at(pair, contrast, name) for seed, pair in seeds.items()}
    return columns


def show_values(values):
    """The cells of one setting. values: {column: {seed: number}}"""
    cells = {"n": str(len(values["samples"]))}
    for name, (title, decimals) in COLUMNS.items():
        numbers = list(values[name].values())
        if name in ("gain", "contrast", "drift", "align_gain"):
            cells[title] = show_interval(mean_interval(numbers), decimals)
        else:
            cells[title] = show_spread(numbers, decimals)
    return cells


def show_differences(values, others, paired):
    """The cells of one setting minus another. values, others: {column: {seed: number}}"""
    sides = (values["samples"], others["samples"])
    logs = [{seed: math.log(queries) for seed, queries in side.items()} for side in sides]
    interval, count = compare(*logs, paired)
    cells = {"n": count, "times its queries": "-"}
    if interval[0] != 0:
        cells["times its queries"] = show_interval(np.exp(interval), 2, sign="", null=1)
    for name, (title, decimals) in COLUMNS.items():
        if name not in ("samples", "eval_reward", "eval_align"):  # they differ as their gains do
            interval, _ = compare(values[name], others[name], paired)
            cells[title] = show_interval(interval, decimals)
    return cells


def show_spread(numbers, decimals):
    """ "1.650 ± 0.207": mean and standard deviation over seeds (ddof = 1)."""
    if not numbers or not np.isfinite(numbers).all():
        return "-"
    text = f"{np.mean(numbers):,.{decimals}f}"
    if len(numbers) > 1 and np.ptp(numbers) > 0:
        text += f" ± {np.std(numbers, ddof=1):,.{decimals}f}"
    return text


def show_interval(interval, decimals, sign="+", null=0):
    """ "**+0.203** (+0.101 to +0.304)", bold if it excludes the value without a difference."""
    mean, low, high = [f"{number:{sign},.{decimals}f}" for number in interval]
    if math.isnan(interval[0]):
        return "-"
    if math.isnan(interval[1]):
        return mean
    if not interval[1] <= null <= interval[2]:
        mean = f"**{mean}**"
    return f"{mean} ({low} to {high})"


def to_markdown(rows):
    """Rows {title: text} as a Markdown table without the columns that are "-" everywhere."""
    titles = [title for title in rows[0] if any(row[title] != "-" for row in rows)]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        lines.append([row[title] for title in titles])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- figures of numbers --------------------------------------------------------------------------


def choose_looks(runs):
    """{label: style}, the same in all figures for the settings of LOOKS."""
    other_looks = cycle(product(("-", "--", ":"), OTHER_LOOKS))
    looks = {}
    for run in runs:
        if run.label not in looks:
            look = LOOKS.get(run.label)
            line, (colour, marker) = ("-", look) if look else next(other_looks)
            looks[run.label] = {"color": colour, "marker": marker, "markersize": 4, "ls": line}
    return looks


def draw_mean(ax, label, look, xs, ys):
    """The mean of the seeds' curves and its interval. xs, ys: (seeds, P)"""
    x = np.mean(xs, axis=0)
    mean, low, high = np.array([mean_interval(numbers) for numbers in np.transpose(ys)]).T
    ax.plot(x, mean, label=f"{label} (n = {len(ys)})", markevery=math.ceil(len(x) / 20), **look)
    if np.ptp(xs, axis=0).max() == 0:  # seeds differ in y only
        ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return mean[-1]


def read_curves(seeds, x, y, last=None):
    """Two columns at the iterations for which all seeds have both: (seeds, P) each."""
    found = [run.evaluations(x, y) for run in seeds.values()]
    common = set.intersection(*[set(rows) for rows in found])
    common = sorted(k for k in common if last is None or k <= last)
    return [np.array([[rows[k][name] for k in common] for rows in found]) for name in (x, y)]


def draw_curves(
    runs: RunPaths = (Path("runs"),),
    out: Path = Path("curves.png"),
    metric: tuple[str, ...] = ("eval_reward",),
    x: str = "samples",
    limits: tuple[float, float] | None = None,
    last: int | None = None,
) -> None:
    """Figures 3 and 3b: columns of metrics.csv, a panel per task and column.

    A curve ends at the last iteration that all of its seeds have.

    Args:
        metric: columns of metrics.csv
        x: another one: samples (reward queries), iteration, eval_align (CLIP score), kl_ref
        limits: of the y axis of the first column; curves that end beyond are named there
        last: iteration at which the curves end
    """
    loaded = load_runs(runs)
    groups = group_runs(loaded)
    looks = choose_looks(loaded)
    tasks = list(dict.fromkeys(task for task, _ in groups))
    figure = Figure(figsize=(4.8 * len(tasks), 3.2 * len(metric) + 1), layout="constrained")
    panels = figure.subplots(len(metric), len(tasks), squeeze=False)
    beyond = {}
    for (task, label), seeds in groups.items():
        for name, axes in zip(metric, panels):
            ax = axes[tasks.index(task)]
            xs, ys = read_curves(seeds, x, name, last)
            if ys.size == 0:
                continue
            title = COLUMNS.get(name, (name,))[0]
            if name in ("eval_reward", "reward_mean") and SIZE.fullmatch(task):
                title = "JPEG size (kB)"
                ys = abs(ys)
            end = draw_mean(ax, label, looks[label], xs, ys)
            ax.set(title=task, xlabel=COLUMNS.get(x, (x,))[0], ylabel=title)
            if limits is not None and name == metric[0]:
                ax.set_ylim(limits)
                if not limits[0] <= end <= limits[1]:
                    beyond.setdefault(ax, []).append(f"{label}: {end:.2f} at the end")
    for ax, lines in beyond.items():
        ax.text(0.97, 0.97, "\n".join(lines), ha="right", va="top", transform=ax.transAxes)
    handles = {}
    for ax in figure.axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    note = "mean over n seeds"
    if x in ("samples", "iteration"):
        note += ", band: 95 % interval"
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, title=note)
    figure.savefig(out)
    print(out)


def draw_contrast(runs: RunPaths = (Path("runs"),), out: Path = Path("contrast.png")) -> None:
    """Contrast and drift against reward queries, and the CLIP score against contrast.

    The latter when pairs first reach a contrast, up to the largest that all seeds reach.
    """
    pairs = make_pairs(load_runs(runs))
    if not pairs:
        sys.exit("no setting and seed has runs of both compress and incompress")
    looks = choose_looks(pairs)
    figure = Figure(figsize=(9.6, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for (_, label), seeds in group_runs(pairs).items():
        for name, ax in zip(("contrast", "drift"), panels[0]):
            draw_mean(ax, label, looks[label], *read_curves(seeds, "samples", name))
            ax.set(xlabel="reward queries", ylabel=COLUMNS[name][0])
        largest = [max(row["contrast"] for row in pair.rows) for pair in seeds.values()]
        levels = np.linspace(0, min(largest), 41)
        scores = [stop_at(pair, levels, "eval_align") for pair in seeds.values()]
        draw_mean(panels[1, 0], label, looks[label], [levels], scores)
    panels[1, 0].set(xlabel="contrast (kB)", ylabel="CLIP score as it is first reached")
    panels[1, 1].set_axis_off()
    note = "mean over n seeds (pairs of runs), 95 % interval"
    panels[1, 1].legend(*panels[0, 0].get_legend_handles_labels(), loc="center", title=note)
    figure.savefig(out)
    print(out)


# ---- figures of pictures -------------------------------------------------------------------------


def draw_pictures(
    runs: RunPaths = (Path("runs"),),
    out: Path = Path("pictures.png"),
    across: Literal["iterations", "prompts", "steps"] = "iterations",
    iteration: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (),
) -> None:
    """Figures 1, 2, 4 and 5: pictures of the evaluations.

    Args:
        across: iterations: a row per run and prompt. prompts: the pretrained model, then a row per
            run. steps: "elephant" while it is denoised, a row per run
        iteration: the evaluations to show; by default six spread over the first run's, or the last
            one of each run where a row has prompts or steps
        prompt: which of the fixed prompts, from 0; by default the first, or the first eight
    """
    loaded = load_runs(runs)
    kind = "trajectory" if across == "steps" else "images"
    found = [list_pictures(run, kind) for run in loaded]
    spread = np.linspace(0, len(found[0]) - 1, 6).round().astype(int)
    shortest = min(len(read_grid(run, own[0], kind)) for run, own in zip(loaded, found) if own)
    chosen = prompt or range(min(8, shortest) if across == "prompts" else 1)
    rows = []
    if across == "prompts":
        start = loaded[found.index(min(found))]
        rows.append(read_row(start, 0, "pretrained", kind, chosen))
    for run, own in zip(loaded, found):
        if across == "iterations":
            shown = iteration or [found[0][i] for i in np.unique(spread)]
            rows += [read_progress(run, shown, index) for index in chosen]
        else:
            indices = chosen if across == "prompts" else range(6)
            shown = iteration or own[-1:]
            rows += [read_row(run, number, run.label, kind, indices) for number in shown]
    draw_rows(rows).savefig(out)
    print(out)


def list_pictures(run, kind):
    """The iterations of the pictures in images/ or trajectory/ that have their row."""
    numbers = sorted(int(path.stem) for path in (run.folder / kind).glob("*.png"))
    return [number for number in numbers if number in run.evaluations("eval_reward")]


def read_grid(run, iteration, kind):
    """[(caption, picture), ...] of the first line of a grid, or of a strip of denoising steps."""
    with Image.open(run.folder / kind / f"{iteration:04d}.png") as picture:
        line = np.asarray(picture.convert("RGB"))
    if kind == "trajectory":  # the steps of Figure 4
        parts = np.arange(6) * run.args["num_steps"] // 5
        captions = [f"step {max(1, part) - 1}" for part in parts]
    else:
        line = line[: len(line) // 2]
        count = round(line.shape[1] / len(line))  # squares; large grids were scaled down
        prompts = read_prompts(run.folder / "prompts.txt")  # older runs do not have one
        prompts = prompts or read_prompts(LISTS / f"{run.args['prompts']}.txt")
        # spread over the list, as in the scripts' evaluate
        spread = np.linspace(0, len(prompts) - 1, count).astype(int)
        captions = [prompts[i][:24] for i in spread]
    return list(zip(captions, np.array_split(line, len(captions), axis=1)))


def read_progress(run, iterations, index):
    """One prompt and noise over training; an iteration without a grid stays blank."""
    cells = []
    name = f"prompt {index}"
    for iteration in iterations:
        picture = None
        if iteration in list_pictures(run, "images"):
            name, picture = read_grid(run, iteration, "images")[index]
        cells.append((f"iteration {iteration}", picture))
    return run.label, [run.task, f"seed {run.args['seed']}", name], cells


def read_row(run, iteration, label, kind, indices):
    """Pictures of one evaluation, with its JPEG size and CLIP score."""
    evaluation = run.evaluations("eval_reward")[iteration]
    lines = [run.task, f"seed {run.args['seed']}", f"iteration {iteration}"]
    if SIZE.fullmatch(run.task):
        lines.append(f"{abs(evaluation['eval_reward']):.2f} kB")
    if "eval_align" in evaluation:
        lines.append(f"CLIP {evaluation['eval_align']:.1f}")
    grid = read_grid(run, iteration, kind)
    return label, lines, [grid[i] for i in indices]


def draw_rows(rows):
    """rows: [(setting, further lines, [(caption, picture (H, W, 3) or None), ...]), ...]

    Lines that all rows have stand above the figure.
    """
    common = set.intersection(*[set(lines) for _, lines, _ in rows])
    columns = len(rows[0][2])
    side = min(8 / columns, 2)  # inches
    size = (1.6 + side * columns, 0.6 + len(rows) * (side + 0.1))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(", ".join(line for line in rows[0][1] if line in common), fontsize=11)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for i, (label, lines, cells) in enumerate(rows):
        lines = label.split(", ") + [line for line in lines if line not in common]
        panels[i, 0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", fontsize=10)
        for ax, (caption, picture), (first, _) in zip(panels[i], cells, rows[0][2]):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_color("lightgrey")  # a white picture is not a missing one
            if i == 0 or caption != first:
                ax.set_title(caption, fontsize=10)
            if picture is None:
                ax.spines[:].set_visible(False)
            else:
                ax.imshow(picture)
    return figure


# ---- the report and the commands -----------------------------------------------------------------


def make_report(folder: tyro.conf.Positional[Path] = Path("results")) -> str:
    """Every published table: folder/tables.txt, with a table below each of its commands."""
    text = ""
    for line in (folder / "tables.txt").read_text(encoding="utf-8").split("\n"):
        if not line.startswith("python plot.py table "):
            text += f"{line}\n"
            continue
        words = []
        for word in shlex.split(line)[3:]:
            paths = sorted(glob.glob(word, root_dir=folder.parent))
            words += [str(folder.parent / path) for path in paths] or [word]
        text += f"```bash\n{line}\n```\n\n{tyro.cli(make_tables, args=words)}"
    return text


COMMANDS = {
    "table": make_tables,
    "contrast": draw_contrast,
    "curves": draw_curves,
    "pictures": draw_pictures,
    "report": make_report,
}


def main(args=None):
    text = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=args, description=__doc__)
    if text is not None:
        print(text, end="")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
