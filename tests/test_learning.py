"""Training moves the reward of fixed prompts and noise the right way."""

import pytest
from conftest import ROOT, read_metrics, run

import ddpo_is
import rwr


def rise(script, out, model, few_prompts, **changes):
    """The gain in evaluated reward, with which no sample of training has anything in common."""
    options = {"num_samples": 16, "num_steps": 5, "save_every": 100, "prompts": few_prompts}
    rows = read_metrics(run(script, out, model, **options | changes))
    return rows[-1]["eval_reward"] - rows[0]["eval_reward"]


@pytest.mark.parametrize("sign", ["", "-"], ids=["brighter", "darker"])
def test_a_policy_gradient_makes_pictures(tmp_path, tiny_sd, few_prompts, brightness, sign):
    """Training alone makes them neither: the sign of the reward decides."""
    changes = {"reward": sign + brightness, "iterations": 15, "lr": 1e-3}
    assert rise(ddpo_is, tmp_path, tiny_sd, few_prompts, **changes) > 0.1


def test_regression_makes_pictures_brighter(tmp_path, few_prompts, brightness):
    model = ROOT / "models/emoji"
    changes = {"reward": brightness, "iterations": 6, "lr": 1e-4}
    assert rise(rwr, tmp_path, model, few_prompts, **changes) > 2
