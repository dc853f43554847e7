"""Tables and figures show what metrics.csv says, on run folders with known numbers."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

import plot

PLOT = Path(plot.__file__)
ANIMALS = (PLOT.parent / "prompts/animals.txt").read_text().split()


def make_run(parent, evaluations, script="ddpo_is", task="compress", seed=1, **changes):
    """A run folder. evaluations: {iteration: eval_reward, or {column: number}}.

    changes: prompts (a list, for prompts.txt), spelling (of --prompts), and other arguments.
    """
    folder = parent / f"{script}__{len(list(parent.glob('*'))):03d}"
    folder.mkdir(parents=True)
    prompts = "".join(f"{prompt}\n" for prompt in changes.pop("prompts", ANIMALS))
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    args = {"reward": task, "seed": seed, "prompts": changes.pop("spelling", "animals")}
    args |= {"model": "models/emoji", "lr": 3e-4, "num_steps": 50, "num_updates": 2} | changes
    (folder / "args.json").write_text(json.dumps({"script": script, "args": args}))

    columns = ["iteration", "samples", "eval_reward", "eval_align", "eval_top1", "loss", "kl_ref"]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for k in range(max(evaluations) + 1):
            row = {"iteration": k, "samples": 16 * k}
            if k > 0:
                row |= {"loss": 0.5 * k, "kl_ref": 2.0 * k}
            if k in evaluations:
                numbers = evaluations[k]
                row |= numbers if isinstance(numbers, dict) else {"eval_reward": numbers}
            writer.writerow(row)
    return folder


def make_pair(parent, contrasts, drifts, aligns=None, **changes):
    """Two runs, both rewards, with these values at iterations 0, 10, 20, ..."""
    for task, sign in (("compress", 1), ("incompress", -1)):
        evaluations = {}
        for i, (contrast, drift) in enumerate(zip(contrasts, drifts)):
            evaluations[10 * i] = {"eval_reward": -2.5 * sign + contrast + sign * drift}
            if aligns is not None:
                evaluations[10 * i]["eval_align"] = aligns[i] + 2 * sign
        make_run(parent, evaluations, task=task, **changes)


def read_tables(capsys, *args):
    """The rows {title: text} of each table that `plot.py table` prints."""
    capsys.readouterr()
    plot.main(["table", *map(str, args)])
    tables = []
    for text in capsys.readouterr().out.split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in text.strip().splitlines()]
        tables.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return tables


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    figures = []
    savefig = plot.Figure.savefig

    def keep_and_save(figure, out):
        figures.append(figure)
        savefig(figure, out)

    monkeypatch.setattr(plot.Figure, "savefig", keep_and_save)
    return figures


def test_t_quantiles():
    """Those of published tables, and for other degrees the sum of the density of Student's t."""
    published = {1: 12.706205, 2: 4.302653, 4: 2.776445, 29: 2.045230, 1e6: 1.959966}
    for degrees, quantile in published.items():
        assert plot.t_quantile(degrees) == pytest.approx(quantile, abs=5e-7)
    for degrees in (1.3, 2.249, 7.77):
        t = np.linspace(0, plot.t_quantile(degrees), 200_001)
        log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)
        density = scale * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
        inside = (density[1:] + density[:-1]).sum() * t[1]
        assert inside == pytest.approx(0.95, abs=1e-8)


def test_values_of_a_setting(tmp_path, capsys):
    for seed, gain in ((1, 0.1), (2, 0.2), (3, 0.6)):
        end = {"eval_reward": -2 + gain, "eval_align": 60 + seed, "eval_top1": 0.5 + gain}
        make_run(tmp_path, {0: {"eval_reward": -2, "eval_align": 70}, 10: end}, seed=seed)
    ((row,),) = read_tables(capsys, tmp_path)
    assert row == {
        "task": "compress",
        "setting": "DDPO-IS, lr 3e-4",
        "iteration": "10",
        "n": "3",
        "reward queries": "160",
        "reward": "-1.700 ± 0.265",
        "gain": "+0.300 (-0.357 to +0.957)",
        "CLIP score": "62.0 ± 1.0",
        "CLIP gain": "**-8.0** (-10.5 to -5.5)",
        "top-1": "0.80 ± 0.26",
        "KL (nats)": "20",
    }


def test_contrast_and_drift_of_pairs(tmp_path, capsys):
    for seed in (1, 2, 3):
        make_pair(tmp_path, [0, 0.1 * seed], [0, 0.05], [70, 60], seed=seed)
    make_run(tmp_path, {0: -2.5, 10: 2}, seed=4)  # no pair
    _, (row,) = read_tables(capsys, tmp_path)
    assert row["n"] == "3" and row["CLIP score"] == "60.0"
    assert row["contrast (kB)"] == "+0.200 (-0.048 to +0.448)"  # 4.302653 * 0.1 / sqrt(3)
    assert row["drift (kB)"] == "**+0.050** (+0.050 to +0.050)"


def test_two_seeds_have_no_interval_and_no_verdict(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path, {0: 0, 10: 1}, seed=seed)
        make_run(tmp_path, {0: 0, 10: 3}, seed=seed, lr=1e-4)
    ((small, large),) = read_tables(capsys, tmp_path)
    assert (small["gain"], large["gain"]) == ("+3.000", "+1.000")
    ((row,),) = read_tables(capsys, tmp_path, "--baseline", "DDPO-IS, lr 3e-4")
    assert (row["n"], row["gain"]) == ("2 paired", "+2.000")


@pytest.mark.parametrize(
    "iteration, n, expected",
    [
        (90, "3 paired", "**-4.000** (-4.000 to -4.000)"),
        # equal variances: 4 degrees of freedom, 2.776445 * sqrt(2 / 3) = 2.266958
        (100, "3 and 3", "**-4.000** (-6.267 to -1.733)"),
        # one variance is 0: 2 degrees of freedom, 4.302653 / sqrt(3) = 2.484138
        (110, "3 and 3", "+2.000 (-0.484 to +4.484)"),
    ],
)
def test_paired_before_100_and_welch_later(tmp_path, capsys, iteration, n, expected):
    for seed in (1, 2, 3):
        make_run(tmp_path, {0: 0, 90: seed, 100: seed, 110: seed}, seed=seed, lr=1e-4)
        make_run(tmp_path, {0: 0, 90: seed + 4, 100: seed + 4, 110: 0}, seed=seed)
    args = ("--iteration", iteration, "--baseline", "DDPO-IS, lr 3e-4")
    ((row,),) = read_tables(capsys, tmp_path, *args)
    assert (row["n"], row["gain"]) == (n, expected)


def test_without_iteration_the_last_common_one_counts(tmp_path, capsys):
    make_run(tmp_path, {0: 0, 10: 1, 20: 2, 30: 3})
    make_run(tmp_path, {0: 0, 10: 5, 20: 7, 40: 9}, lr=1e-4)
    ((row,),) = read_tables(capsys, tmp_path, "--baseline", "DDPO-IS, lr 3e-4")
    assert (row["iteration"], row["gain"]) == ("20", "+5.000")
    make_run(tmp_path, {0: 0, 15: 5}, seed=2)
    with pytest.raises(SystemExit, match="in common"):
        plot.main(["table", str(tmp_path)])


def test_a_task_as_the_baseline(tmp_path, capsys):
    """The control: the same setting and seeds with a reward that is permuted."""
    for seed in (1, 2, 3):
        start = {"eval_reward": -2, "eval_align": 70}
        make_run(tmp_path, {0: start, 10: {"eval_reward": -1, "eval_align": 60}}, seed=seed)
        end = {"eval_reward": -2, "eval_align": 61 + seed}
        make_run(tmp_path, {0: start, 10: end}, task="dir/my.py:compress", seed=seed)
    ((row,),) = read_tables(capsys, tmp_path, "--baseline", "compress")
    assert (row["task"], row["CLIP gain"]) == ("my.py:compress", "**+3.0** (+0.5 to +5.5)")
    assert "gain" not in row  # kB of another reward


@pytest.mark.parametrize("name", ["ddpo_is", "rwr"])
def test_an_ambiguous_or_unknown_baseline_is_refused(tmp_path, name):
    for lr in (3e-4, 1e-4):
        make_run(tmp_path, {0: 0, 10: 1}, lr=lr)
    with pytest.raises(SystemExit, match="DDPO-IS, lr 1e-4; DDPO-IS, lr 3e-4"):
        plot.main(["table", str(tmp_path), "--baseline", name])


@pytest.mark.parametrize("unit", [0.1, 100])
def test_clip_score_when_a_contrast_is_first_reached(tmp_path, capsys, unit):
    """Linear between new bests: 1 at 10 and 3 at 30, the fall in between does not count."""
    for seed in (1, 2, 3):
        aligns = [70, 60 + seed, 10, 40 + seed, 0]
        contrasts = np.array([[0, 1, 0.5, 3, 2], [0, 2, 4, 4, 4]]) * unit
        make_pair(tmp_path, contrasts[0], [0] * 5, aligns, seed=seed, lr=1e-4)
        make_pair(tmp_path, contrasts[1], [0] * 5, [70, 50, 0, 0, 0], seed=seed)
    args = (tmp_path, "--contrast", 2 * unit)
    ((slow, fast),) = read_tables(capsys, *args)
    assert (slow["reward queries"], slow["CLIP score"]) == ("320", "52.0 ± 1.0")
    assert (fast["reward queries"], fast["CLIP score"]) == ("160", "50.0")
    ((row,),) = read_tables(capsys, *args, "--baseline", "DDPO-IS, lr 3e-4")
    assert row["n"] == "3 paired"
    assert row["times its queries"] == "**2.00** (2.00 to 2.00)"
    assert row["CLIP gain"] == "+2.0 (-0.5 to +4.5)"


def test_a_pair_that_never_gets_there_is_named_and_ends_the_comparison(tmp_path, capsys):
    for seed in (1, 2, 3):
        make_pair(tmp_path, [0, 0.3], [0, 0], [70, 60], seed=seed)
        largest = 0.15 if seed == 2 else 0.3
        make_pair(tmp_path, [0, largest], [0, 0], [70, 65], seed=seed, lr=1e-4)
    ((short, _),) = read_tables(capsys, tmp_path, "--contrast", 0.2)
    assert (short["not reached by seed"], short["all reach (kB)"]) == ("2", "0.150")
    assert (short["n"], short["CLIP score"], short["reward queries"]) == ("3", "-", "-")
    args = (tmp_path, "--contrast", 0.2, 0.1, "--baseline", "DDPO-IS, lr 3e-4")
    ((missed, reached),) = read_tables(capsys, *args)
    assert (missed["CLIP gain"], missed["times its queries"]) == ("-", "-")
    # -10 / 3 against -5 / 3, -10 / 3 (seed 2), -5 / 3
    assert reached["CLIP gain"] == "+1.1 (-1.3 to +3.5)"


def read_names(capsys, folder):
    return [(row["task"], row["setting"], row["n"]) for row in read_tables(capsys, folder)[0]]


@pytest.mark.parametrize(
    "script, changes, name",
    [
        ("ddpo_sf", {"num_updates": 1, "lr": 1e-4}, "DDPO-SF, lr 1e-4"),
        ("ddpo_sf", {"num_updates": 4}, "DDPO-SF, lr 3e-4, num updates 4"),
        ("rwr", {"num_updates": 1, "center_weights": True}, "RWR, centred weights, lr 3e-4"),
        ("rwr", {"num_updates": 1, "center_weights": False, "beta": 0}, "RWR, lr 3e-4, beta 0"),
        ("ddpo_iskl", {"kl_coef": 0.03}, "DDPO-ISKL, lr 3e-4, kl coef 0.03"),
        ("mine", {"clip_range": 1.0}, "mine, lr 3e-4, clip range 1"),
    ],
)
def test_a_setting_has_its_full_name_also_alone(tmp_path, capsys, script, changes, name):
    make_run(tmp_path, {0: 0, 10: 1}, script=script, **changes)
    assert read_names(capsys, tmp_path) == [("compress", name, "1")]


def test_settings_are_compared_by_content(tmp_path, capsys):
    """The spelling of --reward and --prompts, the seed and the device make no setting."""
    ends = {0: 0, 10: 1}
    make_run(tmp_path, ends, task="0.5*clip+aesthetic", model="/data/models/emoji", device="cpu")
    make_run(tmp_path, ends, task="aesthetic + 0.5 * clip", seed=2, device="cuda", micro_batch=8)
    make_run(tmp_path, ends, task="aesthetic+0.5*clip", seed=3, spelling="runs/name/prompts.txt")
    task = "0.5*clip + aesthetic"
    assert read_names(capsys, tmp_path) == [(task, "DDPO-IS, lr 3e-4", "3")]

    # other animals in a file of the same name, a flag that older runs do not have, another model
    for i in (1, 2):
        make_run(tmp_path, ends, task=task, spelling=f"{i}/list.txt", prompts=[f"a{i}"])
    make_run(tmp_path, ends, task=task, adv_clip=2.0)
    make_run(tmp_path, ends, task=task, script="mine", model="a/stable-diffusion")
    names = [name for _, name, _ in read_names(capsys, tmp_path)]
    setting = "DDPO-IS, lr 3e-4, model emoji"
    assert names[:2] == ["DDPO-IS, lr 3e-4, adv clip 2, model emoji", setting]
    assert names[2:4] == [f"{setting}, prompts list", f"{setting}, prompts list'"]
    assert names[4:] == ["mine, lr 3e-4, model stable-diffusion"]


def test_a_task_in_one_spelling_and_which_are_pairs_of_sizes(tmp_path):
    tasks = {"compress": "compress", "a/my.py:compress": "my.py:compress"}
    tasks |= {"clip - a/my.py:compress": "clip-a/my.py:compress", "compress+hps": "compress + hps"}
    for reward, task in tasks.items():
        assert plot.name_task(reward) == task
        make_run(tmp_path, {0: 0, 10: 1}, task=reward)
        make_run(tmp_path, {0: 0, 10: 1}, task=reward.replace("compress", "incompress"))
    pairs = plot.make_pairs(plot.load_runs([tmp_path]))
    assert {pair.task for pair in pairs} == {"both", "my.py:both"}


def test_of_two_runs_of_a_seed_the_longer_one_counts(tmp_path, capsys):
    make_run(tmp_path, {0: 0, 10: 5, 20: 5})
    make_run(tmp_path, {0: 0, 10: 1})
    ((row,),) = read_tables(capsys, tmp_path, "--iteration", 10)
    assert (row["n"], row["gain"]) == ("1", "+5.000")


def test_linked_runs_are_found_once(tmp_path, capsys):
    folder = make_run(tmp_path / "elsewhere", {0: 0, 10: 1})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/link").symlink_to(folder, target_is_directory=True)
    (tmp_path / "runs/again").symlink_to(folder.parent, target_is_directory=True)
    (tmp_path / "runs/loop").symlink_to(tmp_path / "runs", target_is_directory=True)
    plot.main(["table", str(tmp_path / "runs")])
    output = capsys.readouterr()
    assert "+1.000" in output.out and not output.err  # no run of the same seed is left out
    with pytest.raises(SystemExit, match="no run folder here"):
        plot.main(["table", str(tmp_path / "runs"), str(tmp_path / "nothing")])


def test_the_error_of_a_damaged_run_names_its_folder(tmp_path):
    folder = make_run(tmp_path, {0: 0, 10: 1})
    (folder / "metrics.csv").write_text("iteration,samples\n0,0\n10,16O\n")
    with pytest.raises(ValueError, match="16O") as caught:
        plot.main(["table", str(tmp_path)])
    assert str(folder) in caught.value.__notes__[0]


def test_curves(tmp_path, drawn):
    """Mean and interval to the last common evaluation, sizes in kB, an end beyond the limits."""
    for seed, end in ((1, -2), (2, -3), (3, -7)):
        evaluations = {k: {"eval_reward": end, "eval_align": 70 - k} for k in (10, 20)}
        evaluations[0] = {"eval_reward": -2.5, "eval_align": 70}
        if seed == 3:
            del evaluations[20]
        make_run(tmp_path, evaluations, seed=seed)
    out = tmp_path / "figure.png"
    args = ["--out", str(out), "--metric", "eval_reward", "eval_align", "--limits", "1.8", "3.4"]
    plot.main(["curves", str(tmp_path), *args])
    sizes, scores = drawn[0].axes
    assert out.stat().st_size > 0
    assert (sizes.get_ylabel(), sizes.get_ylim()) == ("JPEG size (kB)", (1.8, 3.4))
    assert [text.get_text() for text in sizes.texts] == ["DDPO-IS, lr 3e-4: 4.00 at the end"]
    (line,) = sizes.lines
    assert line.get_label() == "DDPO-IS, lr 3e-4 (n = 3)"
    assert np.array(line.get_data()).tolist() == [[0, 160], [2.5, 4]]
    band = sizes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((4 - 6.572416, 4 + 6.572416), abs=1e-5)
    assert scores.get_ylabel() == "CLIP score" and scores.lines[0].get_ydata().tolist() == [70, 60]

    plot.main(["curves", str(tmp_path), "--out", str(out), "--x", "eval_align"])
    assert drawn[1].axes[0].lines[0].get_xdata().tolist() == [70, 60]
    plot.main(["curves", str(tmp_path), "--out", str(out), "--metric", "loss", "--last", "3"])
    assert drawn[2].axes[0].lines[0].get_ydata().tolist() == [0.5, 1, 1.5]


def test_contrast_figure(tmp_path, drawn):
    for seed in (1, 2, 3):
        largest = 0.2 * seed
        make_pair(tmp_path, [0, largest, 0.1], [0, 0.1, 0.3], [70, 50, 30], seed=seed)
    plot.main(["contrast", str(tmp_path), "--out", str(tmp_path / "figure.png")])
    contrast, drift, scores, _ = drawn[0].axes
    assert contrast.lines[0].get_ydata() == pytest.approx([0, 0.4, 0.1])
    assert drift.lines[0].get_ydata() == pytest.approx([0, 0.1, 0.3])
    x, y = scores.lines[0].get_data()  # to what all seeds reach
    assert (x[-1], y[-1]) == pytest.approx((0.2, 70 - 20 * (1 + 1 / 2 + 1 / 3) / 3))


def test_one_colour_per_setting_in_all_figures(tmp_path, drawn):
    out = str(tmp_path / "figure.png")
    make_run(tmp_path / "a", {0: 0, 10: 1}, script="ddpo_iskl")
    for lr in (1e-3, 3e-4, 1e-4, 1e-5, 2e-5, 3e-5, 4e-5):  # more than there are other colours
        make_run(tmp_path / "b", {0: 0, 10: 1}, lr=lr)
    plot.main(["curves", str(tmp_path / "a"), "--out", out])
    plot.main(["curves", str(tmp_path / "b"), str(tmp_path / "a"), "--out", out])
    lines = [line for figure in drawn for line in figure.axes[0].lines]
    looks = {x.get_label(): (to_hex(x.get_color()), x.get_linestyle()) for x in lines[1:]}
    assert to_hex(lines[0].get_color()) == looks["DDPO-ISKL, lr 3e-4 (n = 1)"][0] == "#009e73"
    assert len(set(looks.values())) == 8


def add_pictures(folder, kind, iteration, cells):
    """A grid whose cells, 16 x 16 pixels each, have these grey values (rows, columns)."""
    (folder / kind).mkdir(exist_ok=True)
    grid = np.array(cells, dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(grid).save(folder / kind / f"{iteration:04d}.png")


def read_panels(figure, columns):
    """Rows of (title, grey value or None), and the lines that name the rows."""
    greys = [ax.images[0].get_array().mean() if ax.images else None for ax in figure.axes]
    cells = list(zip([ax.get_title() for ax in figure.axes], greys))
    names = [ax.get_ylabel().split("\n") for ax in figure.axes[::columns]]
    return [cells[i : i + columns] for i in range(0, len(cells), columns)], names


def test_pictures(tmp_path, drawn):
    """Prompts are plain text, and U+2028 in one does not shift the names of the others."""
    prompts = ["a $\\frac{cat}$", "one\u2028line", "$5 dog $10", "Bär"]
    out = str(tmp_path / "figure.png")
    for seed, sizes in ((1, {0: -2.5, 10: -2, 20: -1}), (2, {0: -2.5, 20: -1.5})):
        numbers = {k: {"eval_reward": size, "eval_align": 70 - k} for k, size in sizes.items()}
        changes = {"seed": seed, "prompts": prompts, "spelling": "my.txt"}
        folder = make_run(tmp_path / "runs", numbers, **changes)
        for k in sizes:
            add_pictures(folder, "images", k, [[k + i + 1 for i in range(4)], [0] * 4])
            add_pictures(folder, "trajectory", k, [[k + i for i in range(6)]])
        add_pictures(folder, "images", 30, [[1] * 4, [1] * 4])  # killed before its row was written
    runs = str(tmp_path / "runs")
    setting = ["DDPO-IS", "lr 3e-4", "prompts my"]

    plot.main(["pictures", runs, "--out", out, "--prompt", "1", "3"])
    rows, names = read_panels(drawn[0], 3)
    assert rows[0] == [("iteration 0", 2), ("iteration 10", 12), ("iteration 20", 22)]
    assert rows[3] == [("", 4), ("", None), ("", 24)]
    assert names[0] == [*setting, "seed 1", "one\u2028line"]
    assert names[3] == [*setting, "seed 2", "Bär"]

    args = ["--across", "prompts", "--prompt", "0", "2", "3"]
    plot.main(["pictures", runs, "--out", out, *args])
    rows, names = read_panels(drawn[1], 3)
    assert rows[0] == [("a $\\frac{cat}$", 1), ("$5 dog $10", 3), ("Bär", 4)]
    assert names[0] == ["pretrained", "seed 1", "iteration 0", "2.50 kB", "CLIP 70.0"]
    assert rows[2] == [("", 21), ("", 23), ("", 24)]
    assert names[2] == [*setting, "seed 2", "iteration 20", "1.50 kB", "CLIP 50.0"]

    (folder / "prompts.txt").write_text("1\n2\n3\n4\n")  # of the second run
    plot.main(["pictures", runs, "--out", out, "--across", "prompts"])
    rows, _ = read_panels(drawn[2], 4)
    assert [title for title, _ in rows[1]] == [""] * 4
    assert [title for title, _ in rows[2]] == ["1", "2", "3", "4"]

    plot.main(["pictures", runs, "--out", out, "--across", "steps", "--iteration", "20"])
    rows, _ = read_panels(drawn[3], 6)
    assert rows[0] == [(f"step {step}", 20 + i) for i, step in enumerate((0, 9, 19, 29, 39, 49))]


def test_from_a_notebook_in_another_locale(tmp_path):
    """MPLBACKEND may name what is not installed; files are UTF-8; torch is not imported."""
    folder = make_run(tmp_path, {0: -2, 10: -1}, prompts=["Bär"])
    make_run(tmp_path, {0: -2, 10: -3}, prompts=["Bär"], seed=2)
    add_pictures(folder, "images", 10, [[1, 2], [3, 4]])
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | {"MPLBACKEND": "inline"} | locale
    table = [sys.executable, PLOT, "table", tmp_path]
    result = subprocess.run(table, env=environment, capture_output=True, check=True)
    assert "-2.000 ± 1.414" in result.stdout.decode("utf-8")
    code = "import sys, plot; plot.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    pictures = [sys.executable, "-c", code, "pictures", folder, "--out", tmp_path / "figure.png"]
    subprocess.run(pictures, env=environment, cwd=PLOT.parent, check=True)


def test_report(tmp_path, capsys, monkeypatch):
    """Every line of tables.txt that is a command gets its table, the others stay."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "results/a b", {0: 0, 10: 1})
    make_run(tmp_path / "results/c", {0: 0, 10: 2})
    commands = 'python plot.py table "results/a b"\n\nSecond\n\npython plot.py table results/c*\n'
    (tmp_path / "results/tables.txt").write_text(f"# Title ±\n\n{commands}", encoding="utf-8")
    plot.main(["report"])
    text = capsys.readouterr().out
    for folder in ("results/a b", "results/c"):
        plot.main(["table", folder])
    first, second = capsys.readouterr().out.split("| task")[1:]
    assert f"```\n\n| task{first}\nSecond\n" in text and text.endswith(f"| task{second}\n")
    assert text.startswith('# Title ±\n\n```bash\npython plot.py table "results/a b"\n```\n')
