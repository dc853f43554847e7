"""The published tables and runs are what results/ says they are."""

import json
import os
import re
import shlex
import subprocess

import numpy as np
import pytest
from conftest import ROOT, read_metrics
from PIL import Image

import plot
from rewards import load_reward

RESULTS = ROOT / "results"
RUNS = sorted(path.parent for path in RESULTS.rglob("metrics.csv"))


def test_every_table_is_what_its_command_prints(capsys, monkeypatch):
    """results/TABLES.md is written by `python plot.py report > results/TABLES.md`."""
    monkeypatch.chdir(ROOT)
    plot.main(["report"])
    assert capsys.readouterr().out == (RESULTS / "TABLES.md").read_text(encoding="utf-8")


def test_every_set_has_a_table():
    commands = (RESULTS / "tables.txt").read_text(encoding="utf-8")
    for name in {run.relative_to(RESULTS).parts[0] for run in RUNS}:
        assert f"results/{name}" in commands, name


def test_figures_sh_plans_the_published_sets_and_skips_what_is_done(tmp_path):
    out = tmp_path / "a b"
    done = out / "bad_lr/ddpo_iskl--lr3e-3/ddpo_iskl__compress__s1__X"
    begun = done.with_name("ddpo_iskl__compress__s2__X")
    for run, iteration in ((done, 50), (begun, 40)):
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text(f"iteration,samples\n{iteration},0\n")
    sets = {run.relative_to(RESULTS).parts[0] for run in RUNS}
    command = ["bash", ROOT / "figures.sh", *sets, "--dry-run"]
    environment = os.environ | {"OUT": str(out), "PYTHON": "echo"}
    text = subprocess.check_output(command, env=environment, text=True)
    lines = [shlex.split(line) for line in text.splitlines()]
    parents = {line[-1].removeprefix(f"{out}/").split("/")[0] for line in lines if "--out" in line}

    assert sets <= parents
    assert ["echo", "ddpo_iskl.py", "--resume", str(begun), "--iterations", "50"] in lines
    assert not any(str(done) in line for line in lines)
    bad_lr = [line for line in lines if line[-1].startswith(str(out / "bad_lr"))]
    assert len(bad_lr) == 3  # of five, one is done and one resumed
    assert subprocess.call(["bash", ROOT / "figures.sh", "ddpo_iskl"]) == 2  # no set


def test_the_runs_of_a_set_have_one_origin_and_name_no_path_of_a_machine():
    origins = {}
    for run in RUNS:
        text = (run / "args.json").read_text(encoding="utf-8")
        assert '"/' not in text, run
        metadata = json.loads(text)
        assert len(metadata["git"]) == 40, run
        name = run.relative_to(RESULTS).parts[0]
        origins.setdefault(name, set()).add((metadata["git"], metadata["gpu"]))
    assert len(origins) > 5
    for name, found in origins.items():
        expected = 2 if name == "permuted" else 1  # its seed 1 ran before the others
        assert len(found) == expected, name


def test_links_of_the_pages_lead_somewhere():
    for page in (RESULTS / "README.md", RESULTS / "TABLES.md", ROOT / "README.md"):
        targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert targets, page
        for target in targets:
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_means_of_the_readme_are_in_the_tables():
    """A size with its spread, 2.020 ± 0.067, and the CLIP score with its, 63.8 ± 1.4."""
    means = re.findall(r"\d+\.\d+ ± \d+\.\d+", (ROOT / "README.md").read_text(encoding="utf-8"))
    tables = (RESULTS / "TABLES.md").read_text(encoding="utf-8")
    for mean in means:
        assert re.search(rf"[ -]{re.escape(mean)} ", tables), mean


def score_grid(reward, grid):
    """The rewards of the 64 evaluation pictures in images/."""
    cells = np.asarray(Image.open(grid)).reshape(2, 64, 32, 64, 3).swapaxes(1, 2)
    return load_reward(reward)(cells.reshape(64, 64, 64, 3), [""] * 64)[0]


def test_the_learned_reward_of_the_published_pictures():
    grids = sorted(RESULTS.glob("learned/*/*/images/*.png"))
    assert len(grids) == 6
    for grid in grids:
        row = read_metrics(grid.parents[1])[int(grid.stem)]
        rewards = score_grid(f"{RESULTS}/learned/fluent.py:fluent", grid)
        assert rewards.mean() == pytest.approx(row["eval_reward"], abs=1e-4)


def test_the_share_of_the_variance_between_prompts():
    """Of the size of the pretrained model's 64 evaluation pictures: 32 prompts, two noises."""
    (grid,) = RESULTS.glob("main_command_70/*/images/0000.png")
    sizes = score_grid("incompress", grid).reshape(2, 32)
    between = 2 * sizes.mean(axis=0).var(ddof=1)
    within = sizes.var(axis=0, ddof=1).mean()
    share = (between - within) / (between + within)  # intraclass correlation
    page = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    assert f"{100 * share:.0f} % of the variance" in page
