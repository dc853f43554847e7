"""Training moves the reward of fixed prompts and noise the right way."""

import pytest
from conftest import ROOT, read_metrics, run

import ddpo_is
import rwr


def rise(script, out, model, prompts, **changes):
    """The gain in evaluated reward, with which no sample of training has anything in common."""
    options = {"prompts": prompts, "num_samples": 16, "num_steps": 8, "save_every": 100}
    before, *_, after = read_metrics(run(script, out, model, **options | changes))
    return after["eval_reward"] - before["eval_reward"]


@pytest.mark.parametrize("sign", ["", "-"], ids=["brighter", "darker"])
def test_a_policy_gradient_makes_pictures(tmp_path, tiny_sd, few_prompts, brightness, sign):
    """Training alone makes them neither: the sign of the reward decides."""
    changes = {"iterations": 15, "lr": 2e-3, "num_updates": 4, "clip_range": 1e-2}
    gain = rise(ddpo_is, tmp_path, tiny_sd, few_prompts, reward=sign + brightness, **changes)
    assert gain > 0.2


def test_regression_makes_pictures_brighter(tmp_path, few_prompts, brightness):
    changes = {"reward": brightness, "iterations": 6, "num_steps": 5, "lr": 1e-4}
    gain = rise(rwr, tmp_path, ROOT / "models/emoji", few_prompts, **changes)
    assert gain > 2
