"""The figures show what metrics.csv says: values read back from the axes, on run folders in the scripts' format."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT, read_metrics
from PIL import Image

import plot

COLUMNS = "iteration samples eval_reward eval_align reward_mean kl_ref sample_s reward_s train_s".split()


def make_run(folder, script="ddpo_is", reward="compress", seed=1, iterations=20, offset=0.0, **args):
    """A run folder with evaluations at 0, 10, 20, ... and pictures; rewards are a known function of the iteration."""
    folder = folder / f"{script}__{reward}__s{seed}__{len(list(folder.glob('*')))}"
    for kind in ("images", "trajectory"):
        (folder / kind).mkdir(parents=True)
    args = {"reward": reward, "seed": seed, "num_steps": 50, "lr": 3e-4, "iterations": iterations} | args
    (folder / "args.json").write_text(json.dumps({"script": script, "args": args}))
    columns = [c for c in COLUMNS if c != "kl_ref" or script == "ddpo_iskl"]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for k in range(iterations + 1):
            row = {"iteration": k, "samples": 16 * k}
            if k % 10 == 0:
                row |= {"eval_reward": -2.0 + 0.01 * k + offset, "eval_align": 80.0 - k}
                for j, (kind, size) in enumerate([("images", (96, 32)), ("trajectory", (96, 16))]):
                    Image.new("RGB", size, (k, 40 * seed, 200 * j)).save(folder / kind / f"{k:04d}.png")
            if k:
                row |= {"reward_mean": -2.1 + 0.01 * k, "kl_ref": 2.0 * k, "sample_s": 3, "reward_s": 1, "train_s": 2}
            writer.writerow(row)
    return folder


def lines(ax):
    """{label: (x, y)} of the lines with a label"""
    return {line.get_label(): line.get_data() for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_curves_are_the_csvs_mean_with_numpys_std(tmp_path):
    runs = [make_run(tmp_path, seed=seed, offset=offset) for seed, offset in ((1, 0.0), (2, 0.3), (3, -0.1))]
    other = make_run(tmp_path, script="rwr", reward="incompress")
    figure = plot.draw_curves(plot.load_runs([tmp_path]))
    first, second = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["compress", "incompress"]
    values = np.array([[row["eval_reward"] for row in read_metrics(run) if "eval_reward" in row] for run in runs])
    ((label, (x, y)),) = lines(first).items()
    assert label == "DDPO-IS (n = 3)"
    np.testing.assert_allclose(x, [0, 160, 320])
    np.testing.assert_allclose(y, values.mean(0))
    (band,) = first.collections
    corners = band.get_paths()[0].vertices
    for k, xk in enumerate(x):
        at = corners[corners[:, 0] == xk][:, 1]
        assert at.max() == pytest.approx(values[:, k].mean() + values[:, k].std())
        assert at.min() == pytest.approx(values[:, k].mean() - values[:, k].std())
    ((label, (x, y)),) = lines(second).items()
    assert label == "RWR (n = 1)" and not second.collections  # one seed has no band
    np.testing.assert_allclose(y, [row["eval_reward"] for row in read_metrics(other) if "eval_reward" in row])


def test_a_shorter_run_is_not_truncated_silently(tmp_path):
    make_run(tmp_path, seed=1, iterations=40)
    make_run(tmp_path, seed=2, iterations=20, offset=0.2)
    (ax,) = plot.draw_curves(plot.load_runs([tmp_path])).axes
    dashed, full = sorted(ax.get_lines(), key=lambda line: line.get_linestyle(), reverse=False)[::-1]
    dashed, full = (full, dashed) if dashed.get_linestyle() == "-" else (dashed, full)
    np.testing.assert_allclose(full.get_xdata(), [0, 160, 320])
    np.testing.assert_allclose(dashed.get_xdata(), [0, 160, 320, 480, 640])
    np.testing.assert_allclose(dashed.get_ydata(), [-1.9, -1.8, -1.7, -1.7, -1.6])  # of both, then of the longer one
    assert full.get_label() == "DDPO-IS (n = 2, dashed 1)"


def test_other_axes_and_columns(tmp_path):
    make_run(tmp_path)
    runs = plot.load_runs([tmp_path])
    (ax,) = plot.draw_curves(runs, x="minutes", y="reward_mean").axes
    ((x, y),) = lines(ax).values()
    np.testing.assert_allclose(x, np.arange(1, 21) * 6 / 60)
    np.testing.assert_allclose(y, -2.1 + 0.01 * np.arange(1, 21))
    with pytest.raises(ValueError, match="beauty"):
        plot.draw_curves(runs, y="beauty")


def test_another_learning_rate_is_a_line_of_its_own_in_the_same_colour(tmp_path):
    for lr in (3e-4, 3e-3):
        make_run(tmp_path, script="ddpo_iskl", lr=lr)
    make_run(tmp_path, script="ddpo_sf")
    (ax,) = plot.draw_curves(plot.load_runs([tmp_path])).axes
    colors = {line.get_label(): line.get_color() for line in ax.get_lines()}
    assert colors.keys() == {"DDPO-SF (n = 1)", "DDPO-ISKL, lr 3e-4 (n = 1)", "DDPO-ISKL, lr 3e-3 (n = 1)"}
    assert len(set(colors.values())) == 2


def test_tradeoff_is_reward_against_alignment_and_kl(tmp_path):
    run = make_run(tmp_path, script="ddpo_iskl", reward="incompress")
    align, kl = plot.draw_tradeoff(plot.load_runs([run])).axes
    rows = [row for row in read_metrics(run) if "eval_reward" in row]
    for ax, x in ((align, [80, 70, 60]), (kl, [0, 20, 40])):
        ((drawn_x, drawn_y),) = lines(ax).values()
        np.testing.assert_allclose(drawn_x, x)
        np.testing.assert_allclose(drawn_y, [row["eval_reward"] for row in rows])


def test_progress_and_trajectory_show_the_runs_pictures(tmp_path):
    a, b = make_run(tmp_path, seed=1), make_run(tmp_path, seed=2, iterations=10)
    runs = plot.load_runs([a, b])
    figure = plot.draw_progress(runs, columns=3)
    shown = [(ax.get_title(), ax.images[0].get_array()) for ax in figure.axes if ax.images]
    assert [title for title, _ in shown] == [f"iteration {k}" for k in (0, 10, 20, 0, 10)]
    assert all(picture.shape == (16, 16, 3) for _, picture in shown)
    assert [tuple(picture[0, 0]) for _, picture in shown] == [
        (0, 40, 0),
        (10, 40, 0),
        (20, 40, 0),
        (0, 80, 0),
        (10, 80, 0),
    ]
    figure = plot.draw_trajectory(runs)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == 2 * [f"step {k}" for k in (0, 9, 19, 29, 39, 49)]
    assert tuple(figure.axes[0].images[0].get_array()[0, 0]) == (20, 40, 200)
    assert tuple(figure.axes[6].images[0].get_array()[0, 0]) == (10, 80, 200)


def test_a_cut_line_and_a_row_of_nan_are_left_out_and_said(tmp_path, capsys):
    run = make_run(tmp_path, iterations=30)
    text = (run / "metrics.csv").read_text().replace("20,320,-1.8,", "20,320,nan,")
    (run / "metrics.csv").write_text(text[: text.rindex("30,480,") + 9])
    (ax,) = plot.draw_curves(plot.load_runs([run])).axes
    ((x, _),) = lines(ax).values()
    np.testing.assert_allclose(x, [0, 160])
    said = capsys.readouterr().err
    assert "line 32 of metrics.csv left out" in said and "1 of 3 rows" in said


def test_foreign_folders_are_named_and_skipped(tmp_path, capsys):
    make_run(tmp_path)
    for name, text in (("half", '{"script": "ddpo_is"'), ("foreign", '{"model": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.csv").write_text("")
    assert len(plot.load_runs([tmp_path])) == 1
    said = capsys.readouterr().err
    assert all(name in said for name in ("half", "foreign", "empty"))


@pytest.mark.parametrize("figure", ["curves", "progress", "trajectory", "tradeoff"])
def test_the_commands_write_their_files_without_torch(tmp_path, figure):
    make_run(tmp_path / "runs", script="ddpo_iskl")
    code = f"import sys, plot, tyro; sys.argv = ['plot.py', '{figure}', 'runs', '--out', 'a/figure.png']\n"
    code += "plot.main(tyro.cli(plot.Curves | plot.Progress | plot.Trajectory | plot.Tradeoff))\n"
    code += "assert 'torch' not in sys.modules"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "a/figure.png").convert("L")).std() > 5


def test_nothing_to_draw_is_one_line_and_exit_code_2(tmp_path):
    for words in (["curves", tmp_path], ["curves"], ["curves", tmp_path, "--out", "figure.gif"]):
        done = subprocess.run([sys.executable, ROOT / "plot.py", *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error:"), done.stderr


def plan(tmp_path, *flags, **env):
    env = os.environ | {"OUT": str(tmp_path / "runs")} | env
    done = subprocess.run(["bash", ROOT / "figures.sh", "--dry-run", *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_figures_sh_prints_commands_that_the_scripts_accept(tmp_path):
    planned = plan(tmp_path, OUT=str(tmp_path / "two words"))
    assert len(planned) == 5 * (3 * 3 + 1) + 3 * 4 + 4 == len(set(planned))
    for line in planned[:-4]:
        python, script, *words = shlex.split(line)
        args = tyro.cli(__import__(script.removesuffix(".py")).Args, args=words)
        assert Path(args.out).parent == tmp_path / "two words"
        assert (args.iterations, args.num_steps, args.model) == (200, 50, "models/emoji")
    assert sum("--lr 3e-3" in line for line in planned) == 5
    for line in planned[-4:]:
        tyro.cli(plot.Curves | plot.Progress | plot.Trajectory | plot.Tradeoff, args=shlex.split(line)[2:])
    gpu = plan(tmp_path, "--gpu")
    assert any("aesthetic" in line for line in gpu) and all("stable-diffusion-v1-4" in line for line in gpu[:-4])


def test_figures_sh_skips_finished_runs_and_resumes_the_others(tmp_path):
    first, *_ = plan(tmp_path, SEEDS="1", ITERATIONS="20")
    folder = make_run(tmp_path / "runs/ddpo_sf", script="ddpo_sf", iterations=10)
    assert plan(tmp_path, SEEDS="1", ITERATIONS="20")[0] == first  # without a checkpoint it starts again
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/state.safetensors").write_bytes(b"")
    assert plan(tmp_path, SEEDS="1", ITERATIONS="20")[0] == f"{first} --resume {folder}"
    assert first not in plan(tmp_path, SEEDS="1", ITERATIONS="10")
    assert not any("ddpo_sf.py --reward compress" in line for line in plan(tmp_path, SEEDS="1", ITERATIONS="10"))


def test_a_last_line_without_its_end_is_left_out_though_it_has_every_cell(tmp_path, capsys):
    run = make_run(tmp_path)
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text[:-2].replace("10,160,", "10,160,7,7,", 1))  # and a cell too many in line 12
    kept = [row["iteration"] for row in plot.load_run(run).rows]
    assert kept == [k for k in range(20) if k != 10]
    said = capsys.readouterr().err
    assert "line 12 " in said and "line 22 " in said


def test_a_row_of_nan_in_the_middle_is_not_drawn(tmp_path):
    run = make_run(tmp_path)
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace("10,160,-1.9,", "10,160,nan,"))
    for figure, x in ((plot.draw_curves, [0, 320]), (plot.draw_tradeoff, [80, 60])):
        (ax,) = figure(plot.load_runs([run])).axes
        ((drawn, y),) = lines(ax).values()
        np.testing.assert_allclose(drawn, x)
        np.testing.assert_allclose(y, [-2.0, -1.8])


def test_what_changes_no_result_does_not_split_a_line(tmp_path):
    make_run(tmp_path, seed=1, model="models/emoji", save_every=10, micro_batch=64, device="cpu")
    make_run(tmp_path, seed=2, model="../models/emoji/", save_every=5, micro_batch=8, device="cuda", iterations=10)
    (ax,) = plot.draw_curves(plot.load_runs([tmp_path])).axes
    assert lines(ax).keys() == {"DDPO-IS (n = 2, dashed 1)"}


def test_a_run_counts_once(tmp_path, capsys):
    """Named twice, or begun twice with the same seed: the longer one is drawn, the other is named."""
    stub, run = make_run(tmp_path, iterations=10, offset=1.0), make_run(tmp_path, iterations=20)
    assert len(plot.load_runs([tmp_path, run, run / ".." / run.name])) == 2
    (ax,) = plot.draw_curves(plot.load_runs([run, stub])).axes
    ((label, (x, y)),) = lines(ax).items()
    assert label == "DDPO-IS (n = 1)" and x[-1] == 320 and y[0] == -2.0
    assert f"{stub}: skipped" in capsys.readouterr().err


def test_only_the_kl_has_a_logarithmic_axis(tmp_path):
    run = make_run(tmp_path, script="ddpo_iskl")
    assert [ax.get_xscale() for ax in plot.draw_tradeoff(plot.load_runs([run])).axes] == ["linear", "symlog"]


def test_pictures_are_cut_at_their_prompt_and_step(tmp_path, capsys):
    run = make_run(tmp_path)
    for kind, rows in (("images", 2), ("trajectory", 1)):
        for iteration in (0, 20):
            cells = np.arange(6 * rows).reshape(rows, 6) * 10 + iteration
            grid = np.repeat(np.repeat(cells, 16, 0), 16, 1).astype(np.uint8)
            Image.fromarray(grid).save(run / kind / f"{iteration:04d}.png")
    (run / "images/0010.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    runs = plot.load_runs([run])
    colours = lambda figure: [np.unique(ax.images[0].get_array()).tolist() for ax in figure.axes if ax.images]
    assert colours(plot.draw_progress(runs, prompt_index=(4, 1))) == [[40], [60], [10], [30]]  # the first noise
    assert "0010.png: left out" in capsys.readouterr().err
    assert colours(plot.draw_trajectory(runs)) == [[20 + 10 * i] for i in range(6)]
    assert colours(plot.draw_trajectory(runs, iteration=0)) == [[10 * i] for i in range(6)]
    with pytest.raises(ValueError, match="no prompt 6"):
        plot.draw_progress(runs, prompt_index=(6,))
    with pytest.raises(ValueError, match="no run has such pictures"):
        plot.draw_trajectory(runs, iteration=7)
    assert "no trajectory/0007.png" in capsys.readouterr().err


def test_only_png_and_pdf_are_written(tmp_path, capsys):
    run = make_run(tmp_path)
    plot.main(plot.Curves(runs=(run,), out=tmp_path / "figure.pdf"))
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Curves(runs=(run,), out=tmp_path / "figure.gif"))
    assert stop.value.code == 2 and "figure.gif" in capsys.readouterr().err
    assert not (tmp_path / "figure.gif").exists()


def test_what_a_script_really_writes_is_drawn(tiny_sd, tmp_path):
    import ddpo_iskl

    options = dict(num_samples=4, num_steps=5, iterations=2, save_every=1, device="cpu", out=str(tmp_path))
    folder = ddpo_iskl.main(ddpo_iskl.Args(model=tiny_sd, **options))
    rows, runs = read_metrics(folder), plot.load_runs([tmp_path])
    (ax,) = plot.draw_curves(runs).axes
    ((x, y),) = lines(ax).values()
    assert x.tolist() == [0, 4, 8] and y.tolist() == [row["eval_reward"] for row in rows]
    (kl,) = plot.draw_tradeoff(runs).axes  # the pipeline has no CLIP, so that there is no alignment
    assert next(iter(lines(kl).values()))[0].tolist() == [0.0, *(row["kl_ref"] for row in rows[1:])]
    strip = np.asarray(Image.open(folder / "trajectory/0002.png"))
    shown = [ax.images[0].get_array() for ax in plot.draw_trajectory(runs).axes]
    assert (np.concatenate(shown, 1) == strip).all()
    grid = np.asarray(Image.open(folder / "images/0001.png"))
    last = plot.draw_progress(runs, columns=3, prompt_index=(15,)).axes[1].images[0]
    assert (last.get_array() == grid[:16, -16:]).all()
