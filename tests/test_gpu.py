"""
The five scripts on a CUDA GPU. Without one, all of this file is skipped.

Which of these tests have run on a GPU is in results/README.md, Speed.
"""

import importlib
import math

import pytest
import torch
from conftest import ROOT, load_policy, read_args, read_metrics, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

EMOJI = ROOT / "models/emoji"
SCRIPTS = ["ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse"]
TRAINED = ["reward_mean", "loss", "grad_norm"]


def on_gpu(name, out, **changes):
    """A short run of a script on the GPU. Returns its folder."""
    script = importlib.import_module(name)
    options = {"device": "cuda", "num_samples": 8}
    return run(script, out, EMOJI, **options | changes)


def load_state(folder):
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)


def assert_close(folder, other, iteration, columns, rel):
    row = read_metrics(folder)[iteration]
    expected = read_metrics(other)[iteration]
    for name in columns:
        assert row[name] == pytest.approx(expected[name], rel=rel, abs=1e-3), name


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", SCRIPTS)
def test_default_precision(name, lora_rank, tmp_path):
    """fp16 is what a GPU gets; training repeats the batches of sampling to the last bit."""
    folder = on_gpu(name, tmp_path, lora_rank=lora_rank)
    metadata = read_args(folder)
    assert metadata["args"]["precision"] == "fp16"
    assert metadata["gpu"] == torch.cuda.get_device_name()

    _, row, last = read_metrics(folder)
    assert all(map(math.isfinite, [*row.values(), *last.values()]))
    assert row["skipped"] == 0
    assert last["grad_norm"] > 0
    assert 0.01 < last["peak_mem_gb"] < 1  # of the GPU; the process has more than 1 GB
    assert row.get("ratio_err", 0) == 0
    assert last.get("ratio_err", 0) == 0


def test_fp32_agrees_with_the_cpu(tmp_path):
    """Prompts and noise are drawn on the CPU, so both draw the same pictures to rounding."""
    options = {"precision": "fp32", "iterations": 1, "num_steps": 10, "lr": 1e-5}
    expected = on_gpu("ddpo_iskl", tmp_path, device="cpu", **options)
    actual = on_gpu("ddpo_iskl", tmp_path, **options)
    assert_close(actual, expected, 0, ["eval_reward", "eval_align", "eval_diversity"], rel=1e-3)
    assert_close(actual, expected, 1, TRAINED, rel=1e-2)
    assert read_metrics(actual)[1]["ratio_err"] < 1e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_draws_nearly_the_same_pictures(precision, tmp_path):
    options = {"iterations": 1, "num_steps": 10}
    expected = on_gpu("ddpo_is", tmp_path, precision="fp32", **options)
    actual = on_gpu("ddpo_is", tmp_path, precision=precision, **options)
    assert_close(actual, expected, 0, ["eval_reward", "eval_align"], rel=0.05)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["ddpo_is", "rwr"])
def test_a_run_goes_on_as_if_never_stopped_also_on_the_cpu(name, device, tmp_path):
    """The moments, too. Gradients may differ in the last digits, and AdamW divides by them."""
    script = importlib.import_module(name)
    options = {"precision": "fp32", "save_every": 3}
    whole = on_gpu(name, tmp_path / "whole", iterations=4, **options)
    part = on_gpu(name, tmp_path / "part", iterations=3, **options)
    script.main(script.Args(resume=str(part), iterations=4, device=device))
    assert read_args(part)["args"]["device"] == device
    assert [row["iteration"] for row in read_metrics(part)] == [0, 1, 2, 3, 4]
    lr = script.Args().lr
    expected = load_state(whole)
    actual = load_state(part)
    for weight, value in zip(actual["weights"], expected["weights"], strict=True):
        difference = (weight - value).abs().mean()
        assert difference < lr / 10  # AdamW moves a weight by about lr
    moments = actual["optimizer"]["state"]
    for number, moment in expected["optimizer"]["state"].items():
        moment = moment["exp_avg_sq"]
        found = moments[number]["exp_avg_sq"]
        atol = moment.mean().item() / 10
        torch.testing.assert_close(found, moment, rtol=0.1, atol=atol)


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "compile"])
def test_flags_that_only_change_memory_and_speed(flag, tmp_path):
    options = {"lora_rank": 4, "precision": "fp32", "iterations": 1}
    expected = on_gpu("ddpo_is", tmp_path, **options)
    options[flag] = True
    actual = on_gpu("ddpo_is", tmp_path, **options)
    assert_close(actual, expected, 1, TRAINED, rel=2e-2)
    assert read_metrics(actual)[1]["ratio_err"] < 1e-5


def test_layers_are_channels_last_and_half():
    script = importlib.import_module("ddpo_is")
    policy = load_policy(script, EMOJI, device="cuda", precision="fp16", lora_rank=4)
    kernel = policy.unet.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert kernel.dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in policy.params)


def test_a_group_of_nccl_with_one_process_equals_none(tmp_path):
    options = {"precision": "fp32", "lr": 1e-5}
    expected = on_gpu("ddpo_is", tmp_path, **options)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    actual = on_gpu("ddpo_is", tmp_path, **options)
    assert_close(actual, expected, 1, TRAINED, rel=1e-2)
