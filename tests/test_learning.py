"""Each script learns: the reward of fixed prompts and noise rises in a few iterations."""

import signal

import numpy as np
import pytest
from conftest import ROOT, read_metrics, run
from PIL import Image

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse

# the pictures of the embedded model have a brightness of about 61 of 100
SHORT = {"num_samples": 16, "num_steps": 8, "iterations": 15, "save_every": 30, "seed": 3}
CASES = [
    (ddpo_sf, {"iterations": 8}),
    (ddpo_is, {"iterations": 25}),
    (ddpo_iskl, {}),
]


@pytest.fixture(autouse=True)
def signals():
    """Put back the handlers of the signals that a run catches."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def learn(script, out, reward, **changes):
    """The rows of a short run, and the mean grey levels of its first and its last picture grid."""
    prompts = out / "prompts.txt"
    prompts.write_text("cat\ndog\nhorse\nbee\nfox\nwolf\nfrog\npig\n")
    options = SHORT | {"reward": reward, "prompts": str(prompts)} | changes
    folder = run(script, out, ROOT / "models/emoji", **options)
    rows = read_metrics(folder)
    levels = []
    for row in (rows[0], rows[-1]):
        grid = Image.open(folder / f"images/{row['iteration']:04.0f}.png")
        levels.append(np.asarray(grid).mean())
    return rows, levels


@pytest.mark.parametrize(("script", "changes"), CASES, ids=[script.__name__ for script, _ in CASES])
def test_pictures_become_brighter(tmp_path, brightness, script, changes):
    rows, (before, after) = learn(script, tmp_path, brightness, **changes)
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 3  # of 100
    assert after > before + 7  # of 255: the grid shows it


def test_pictures_become_darker_where_that_is_the_reward(tmp_path, brightness):
    """Training alone does not make them brighter: the sign of the reward decides."""
    rows, (before, after) = learn(ddpo_is, tmp_path, f"-{brightness}", iterations=10)
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 3
    assert after < before - 7


@pytest.mark.parametrize("script", [rwr, rwr_sparse], ids=["rwr", "rwr_sparse"])
def test_regression_on_own_samples_does_not_blur_them(tmp_path, script):
    """With centered weights the reward decides; as printed the pictures become plainer."""
    rows, _ = learn(script, tmp_path, "incompress", iterations=10)
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.03  # kB
    rows, _ = learn(script, tmp_path, "incompress", iterations=8, center_weights=False)
    assert rows[-1]["eval_reward"] < rows[0]["eval_reward"]
