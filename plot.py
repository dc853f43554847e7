"""
The figures, from run folders alone: no torch, no model. RUN is a run folder or a folder that contains run folders.

    python plot.py curves runs --out figure3.png                      reward against reward queries, a panel a task
    python plot.py curves runs --x iteration --y reward_mean          any column of metrics.csv, on another axis
    python plot.py progress runs/ddpo_is__* --prompt-index 0 7        fixed prompts and noise over training, a row a run
    python plot.py trajectory runs/*__compress__s1__*                 "elephant" while it is denoised, a row a run
    python plot.py tradeoff runs --out tradeoff.pdf                   reward against alignment and KL, a path a run

Groups, titles and colours come from args.json: runs of one script and reward that differ in nothing but the seed (and
in what changes no result, IGNORED below) are one line; another setting is a line of its own and stands in the label.
Folders that are no whole run are named on stderr and skipped; where nothing is left to draw the exit code is 2.
"""

import csv, json, sys  # noqa: I001
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure  # without pyplot: Agg draws, there is no window and no global state
from PIL import Image

NAMES = {"ddpo_sf": "DDPO-SF", "ddpo_is": "DDPO-IS", "ddpo_iskl": "DDPO-ISKL", "rwr": "RWR", "rwr_sparse": "sparse RWR"}
# Okabe and Ito's colours, which colour-blind readers tell apart too; the last three are for scripts of your own
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#D55E00", "#F0E442")
MARKERS = "osD^vPX<>*hp"  # one a setting, for the colour is the algorithm's
LEGEND = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2}  # below, where it hides nothing
UNITS = {"compress": "minus JPEG size (kB)", "incompress": "JPEG size (kB)", "aesthetic": "LAION", "clip": "CLIP"}
X_LABELS = {"samples": "reward queries", "iteration": "iteration", "minutes": "minutes (sample + reward + train)"}
X_LABELS |= {"eval_align": "prompt alignment (CLIP score)", "kl_ref": "KL to the pretrained model (nats)"}
IGNORED = {"reward", "seed", "iterations", "out", "resume", "save_every", "track", "device", "micro_batch"}
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "savefig.dpi": 160})
say = lambda message: print(message, file=sys.stderr)

def load_run(folder):
    """A run: folder, script, args (as in args.json) and rows, a dict {column: float} a line of metrics.csv, blank cells
    left out. "minutes" is added: sample_s + reward_s + train_s, cumulative. Lines that are cut off or not numbers are
    left out, and said on stderr. Raises ValueError, OSError, KeyError, TypeError or csv.Error for what is no run."""
    about = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    script, args = about["script"], about["args"]
    args["reward"], args["seed"], args["num_steps"]  # KeyError for somebody else's args.json
    text = (folder / "metrics.csv").read_bytes().decode()
    lines, rows, minutes = list(csv.reader(text.splitlines())) or [[]], [], 0.0
    for i, cells in enumerate(lines[1:], 2):
        try:
            if len(cells) != len(lines[0]) or (i == len(lines) and not text.endswith("\n")):
                raise ValueError("cut off")
            row = {name: float(cell) for name, cell in zip(lines[0], cells) if cell}
            if row["iteration"] == row["samples"] == 0 and "kl_ref" in lines[0]:
                row.setdefault("kl_ref", 0.0)  # the pretrained model's to itself
        except (ValueError, KeyError) as error:
            say(f"{folder}: line {i} of metrics.csv left out ({error})")
            continue
        minutes += np.nansum([row.get(name, 0.0) for name in ("sample_s", "reward_s", "train_s")]) / 60
        rows.append(row | {"minutes": minutes})
    if not rows:
        raise ValueError("metrics.csv has no whole row")
    return SimpleNamespace(folder=folder, script=script, args=args, rows=rows)

def load_runs(paths):
    """The runs in run folders and in folders of them, each folder once, named by name_runs. Others are named on stderr
    and skipped. Raises ValueError where none is left."""
    folders, runs = {}, []
    for path in map(Path, paths):
        found = sorted({file.parent for name in ("args.json", "metrics.csv") for file in path.rglob(name)})
        folders |= {folder.resolve(): folder for folder in ([path] if path in found else found)}
        if not found:
            say(f"{path}: no run folder here")
    for folder in folders.values():
        try:
            runs.append(load_run(folder))
        except (ValueError, OSError, KeyError, TypeError, csv.Error) as error:
            say(f"{folder}: not a whole run, skipped ({error!r})")
    if not runs:
        raise ValueError(f"no run to draw ({len(folders)} folders looked at)")
    name_runs(runs)
    return runs

def name_runs(runs):
    """Set each run's `label`, and `look`: its script's colour, a marker for the settings (o for the commonest). What
    the runs of a script differ in stands in all of their labels: "DDPO-ISKL, lr 3e-3" beside "DDPO-ISKL, lr 3e-4"."""
    short = lambda x: np.format_float_scientific(x, trim="-", exp_digits=1)  # 3e-4 rather than 0.0003
    show = lambda x: short(x) if isinstance(x, float) and 0 < abs(x) < 0.01 else str(x).removesuffix(".0")
    for script, colour in zip([*NAMES, *sorted({run.script for run in runs} - NAMES.keys())], cycle(COLOURS)):
        mine = [run for run in runs if run.script == script]
        settings = [run.args | {"model": Path(str(run.args.get("model"))).name} for run in mine]  # any spelling
        names = sorted({name for values in settings for name in values} - IGNORED)
        names = [name for name in names if len({show(values.get(name)) for values in settings}) > 1]
        for run, values in zip(mine, settings):
            parts = [f"{name.replace('_', ' ')} {show(values.get(name))}" for name in names]
            run.label = ", ".join([NAMES.get(script, script), *parts])
        markers = dict(zip((label for label, _ in Counter(run.label for run in mine).most_common()), cycle(MARKERS)))
        for run in mine:
            run.look = {"color": colour, "marker": markers[run.label]}

def group_runs(runs):
    """{(reward, label): runs} in the order of drawing. Of runs that have the seed in common too, the one that got
    furthest stays (or is the newest) and the others are named on stderr: they are no seeds of their own."""
    rank = lambda known, name: ([*known, name].index(name), name)
    order = lambda run: (rank(UNITS, run.args["reward"]), rank(NAMES, run.script), MARKERS.index(run.look["marker"]))
    groups = {}
    for run in sorted(runs, key=order):
        seeds, seed = groups.setdefault((run.args["reward"], run.label), {}), run.args["seed"]
        worse, best = sorted([run, seeds.get(seed, run)], key=lambda r: (len(r.rows), r.folder.name))
        if worse is not best:
            say(f"{worse.folder}: skipped, {best.folder} has the same settings and seed, and is longer or newer")
        seeds[seed] = best
    return {group: list(seeds.values()) for group, seeds in groups.items()}

def series(run, *columns):
    """The columns of the rows that have them all, (columns, rows). Rows of NaN are left out, and said on stderr."""
    rows = [[row[c] for c in columns] for row in run.rows if all(c in row for c in columns)]
    values = np.array(rows).reshape(-1, len(columns)).T
    finite = np.isfinite(values).all(0)
    if not finite.all():
        say(f"{run.folder}: {(~finite).sum()} of {len(finite)} rows of {', '.join(columns)} not finite, left out")
    return values[:, finite]

def average(curves):
    """Mean and standard deviation (ddof = 0) of curves [(x, y), ...] at every x that one of them has. A curve counts
    from its first x to its last, so that n falls where the shorter ones end, and is linear between its points (which
    matters where they have different x: minutes, another --save-every). Returns x, mean, std, n, (P,) each."""
    x = np.unique(np.concatenate([curve[0] for curve in curves]))
    y = np.array([np.interp(x, *curve, left=np.nan, right=np.nan) for curve in curves])  # (curves, P)
    return x, np.nanmean(y, 0), np.nanstd(y, 0), np.isfinite(y).sum(0)

def make_panels(panels, columns, y, note):
    """An empty figure, and the axes of panels [(column on x, reward), ...]; ValueError without one."""
    if not panels:
        raise ValueError(f"no run has the columns for {y}")
    rows, width = -(-len(panels) // columns), 7 if columns == 1 else max(10, 3.3 * columns)  # 10 inches: a README's
    figure = Figure(figsize=(width, 4.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (x, reward) in zip(axes, panels):
        ax.set(title=Path(reward).name, xlabel=X_LABELS[x], ylabel=UNITS.get(reward, y) if y == "eval_reward" else y)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.supxlabel(note, fontsize=9.5)
    return figure, axes

def draw_curves(runs, x="samples", y="eval_reward"):
    """Figure 3: y against x ("samples", "iteration", "minutes"), a panel a reward, a line a label: the mean over its
    runs, solid where all n of them are and dashed where some are not; the band is +- one standard deviation (ddof = 0)
    where they are two or more. Returns the Figure. Raises ValueError where no run has y."""
    panels = {}
    for (reward, label), members in group_runs(runs).items():
        curves = [c for run in members if (c := series(run, x, y)).size or say(f"{run.folder}: no {y}, skipped")]
        if curves:
            panels.setdefault((x, reward), []).append((label, members[0].look, curves))
    note = "mean over n seeds; band: standard deviation (ddof = 0); dashed: fewer seeds got there"
    figure, axes = make_panels(list(panels), min(3, len(panels)), y, note)
    for ax, lines in zip(axes, panels.values()):
        for label, look, curves in lines:
            grid, mean, std, n = average(curves)
            full, label = n == len(curves), f"{label} (n = {len(curves)}"
            look = look | {"markersize": 4, "markevery": -(-len(grid) // 20)}
            if not full.all():
                label += f", dashed {', '.join(map(str, np.unique(n[~full])[::-1]))}"
                ax.plot(grid, mean, "--", **look)
            ax.plot(grid[full], mean[full], label=f"{label})", **look)
            if len(curves) > 1:
                ax.fill_between(grid, mean - std, mean + std, where=n > 1, color=look["color"], alpha=0.18, linewidth=0)
        ax.legend(**LEGEND)
    return figure

def draw_tradeoff(runs):
    """Reward on fixed prompts and noise against prompt alignment (first row) and against the KL to the pretrained model
    (second row, where a run has it: of the samples that the evaluated iteration trained on); a column a reward, a path
    a run. Returns the Figure. Raises ValueError where no run has either."""
    panels, runs = {}, sum(group_runs(runs).values(), [])
    for x, run in ((x, run) for x in ("eval_align", "kl_ref") for run in runs):
        path = series(run, x, "eval_reward")
        if path.size:
            panels.setdefault((x, run.args["reward"]), []).append((run, path))
        elif x == "eval_align":
            say(f"{run.folder}: no {x} (it had no CLIP at hand), left out")
    rewards = list(dict.fromkeys(reward for _, reward in panels))
    cells = [(x, reward) for x in dict.fromkeys(x for x, _ in panels) for reward in rewards]
    figure, axes = make_panels(cells, len(rewards), "eval_reward", "ring: pretrained; large marker: end of the run")
    for ax, (x, reward) in zip(axes, cells):
        if x == "kl_ref":  # from a hundred nats to hundreds of thousands, and 0
            ax.set_xscale("symlog", linthresh=100)
        members = panels.get((x, reward), [])
        n = Counter(run.label for run, _ in members)
        for run, path in members:
            label = f"{run.label} (n = {n.pop(run.label)})" if run.label in n else None  # once in the legend
            ax.plot(*path, label=label, markersize=3, linewidth=1.2, **run.look)
            ax.scatter(*path[:, -1], s=70, zorder=3, edgecolors="white", **run.look)
            ax.scatter(*path[:, 0], s=70, zorder=3, facecolors="none", edgecolors="black")
        ax.legend(**LEGEND) if members else ax.remove()
    return figure

def list_pictures(run, kind):
    """{iteration: path} of the PNGs in a run's images/ or trajectory/; says so on stderr where there are none."""
    found = {int(path.stem): path for path in sorted((run.folder / kind).glob("*.png")) if path.stem.isdecimal()}
    return found or say(f"{run.folder}: no pictures in {kind}/, skipped") or {}

def draw_rows(rows, down, across, title):
    """rows [(run, detail, [(caption, PNG, column) or None, ...]), ...]: cells of the first row of grids of pictures,
    which have `down` rows and `across` columns (0: as many as are square). Returns the Figure. Raises ValueError."""
    if not rows or not rows[0][2]:
        raise ValueError("no run has such pictures")
    columns, side = len(rows[0][2]), min(8.4 / len(rows[0][2]), 2)  # inches; with the labels 10, a README's width
    figure = Figure(figsize=(1.6 + side * columns, 0.6 + len(rows) * (side + 0.3)), layout="constrained")
    figure.suptitle(title)
    for axes, (run, detail, cells) in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        lines = [*run.label.split(", "), f"{Path(run.args['reward']).name}, seed {run.args['seed']}", detail]
        axes[0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center")
        for ax, cell in zip(axes, cells):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if cell:
                caption, path, column = cell
                try:
                    grid = np.asarray(Image.open(path).convert("RGB"))
                except (OSError, SyntaxError) as error:  # the second is Pillow's for a broken PNG
                    say(f"{path}: left out ({error})")
                    continue
                height, width = len(grid) // down, grid.shape[1]
                n = across or round(width / height)  # rounded, for wide grids were scaled down to 2048
                if not 0 <= column < n:
                    raise ValueError(f"{path} has no prompt {column}: it shows {n}, from 0")
                ax.imshow(grid[:height, width * column // n : width * (column + 1) // n])
                ax.set_title(caption, fontsize=10)
    return figure

def draw_progress(runs, columns=6, prompt_index=(0,)):
    """Figures 1 and 2: for every run and prompt (from 0) a row of pictures of one noise, at iterations spread evenly
    over those that there are; blank where a run has none of one. Returns the Figure, or raises ValueError."""
    found = [(run, pictures) for run in runs if (pictures := list_pictures(run, "images"))]
    marks = sorted({k for _, pictures in found for k in pictures}) or [0]
    marks = [marks[i] for i in np.unique(np.linspace(0, len(marks) - 1, columns).round().astype(int))]
    cells = lambda pictures, j: [(f"iteration {k}", pictures[k], j) if k in pictures else None for k in marks]
    rows = [(run, f"prompt {j}", cells(pictures, j)) for run, pictures in found for j in prompt_index]
    return draw_rows(rows, 2, 0, "fixed prompts and noise")

def draw_trajectory(runs, iteration=None):
    """Figures 4 and 5: "elephant" after six of the denoising steps, a row a run, by its last weights or by those of one
    iteration. Returns the Figure, or raises ValueError."""
    rows = []
    for run in runs:
        pictures = list_pictures(run, "trajectory")
        k = max(pictures, default=0) if iteration is None else iteration
        steps = [0] + [max(1, i * run.args["num_steps"] // 5) - 1 for i in range(1, 6)]  # as in the scripts' evaluate
        if k in pictures:
            rows.append((run, f"iteration {k}", [(f"step {s}", pictures[k], i) for i, s in enumerate(steps)]))
        elif pictures:
            say(f"{run.folder}: no trajectory/{k:04d}.png, skipped")
    return draw_rows(rows, 1, 6, 'denoising "elephant"')

@dataclass
class Command:  # the comments are the help texts
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders, or folders that contain run folders
    out: Path = Path("figure.png")  # .png or .pdf

@dataclass
class Curves(Command):
    """Figure 3: reward against reward queries, a panel a task, a line an algorithm."""
    x: Literal["samples", "iteration", "minutes"] = "samples"  # minutes of sampling, reward and training
    y: str = "eval_reward"  # a column of metrics.csv: eval_reward (fixed prompts and noise), reward_mean, ...

@dataclass
class Progress(Command):
    """Figures 1 and 2: fixed prompts and noise over training, a row a run."""
    columns: int = 6  # pictures in a row
    prompt_index: tuple[int, ...] = (0,)  # which of the up to 16 fixed prompts, from 0; a row each

@dataclass
class Trajectory(Command):
    """Figures 4 and 5: "elephant" while it is denoised, a row a run."""
    iteration: int | None = None  # of the strip; unset: each run's last

@dataclass
class Tradeoff(Command):
    """Reward against prompt alignment, and against the KL to the pretrained model, a path a run."""

def main(command):
    """Draw what a parsed command says and write its file; what a user can mend ends in one line and exit code 2."""
    draw = {Curves: draw_curves, Progress: draw_progress, Trajectory: draw_trajectory, Tradeoff: draw_tradeoff}
    options = dict(vars(command))
    runs, out = options.pop("runs"), options.pop("out")
    try:
        if out.suffix not in (".png", ".pdf"):
            raise ValueError(f"--out {out}: write a .png or .pdf")
        figure = draw[type(command)](load_runs(runs), **options)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except (ValueError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    print(out)

if __name__ == "__main__":
    main(tyro.cli(Curves | Progress | Trajectory | Tradeoff, description=__doc__))
