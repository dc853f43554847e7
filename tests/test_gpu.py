"""
The five scripts on a CUDA GPU. Without one, all of this file is skipped.

Which of these tests have run on a GPU is in results/README.md, Speed.
"""

import importlib
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, load_policy, read_args, read_metrics, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

EMOJI = ROOT / "models/emoji"
SCRIPTS = ["ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse"]
DDPO = SCRIPTS[:3]


def on_gpu(name, out, model=EMOJI, **changes):
    """A short run of a script on the GPU. Returns its folder."""
    options = {"device": "cuda", "num_samples": 8} | changes
    return run(importlib.import_module(name), out, model, **options)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", SCRIPTS)
def test_default_precision(name, lora_rank, tmp_path):
    """fp16 is what a GPU gets; its log-probs must not depend on the forward pass."""
    folder = on_gpu(name, tmp_path, lora_rank=lora_rank)
    metadata = read_args(folder)
    assert metadata["args"]["precision"] == "fp16"
    assert metadata["gpu"] == torch.cuda.get_device_name()

    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    assert rows[-1]["skipped"] == 0 < rows[-1]["grad_norm"]
    # the memory of the GPU, not that of the process, which is more than 1 GB
    assert 0.01 < rows[-1]["peak_mem_gb"] < 1
    if name in DDPO:
        clip_range = metadata["args"].get("clip_range", 1e-4)
        assert max(row["ratio_err"] for row in rows[1:]) < clip_range / 10


def test_fp32_agrees_with_the_cpu(tmp_path):
    """Prompts and noise are drawn on the CPU, so both draw the same pictures to rounding."""
    options = {"precision": "fp32", "iterations": 1, "num_steps": 10, "lr": 1e-5}
    expected = read_metrics(on_gpu("ddpo_iskl", tmp_path, device="cpu", **options))
    actual = read_metrics(on_gpu("ddpo_iskl", tmp_path, **options))
    for name in ("eval_reward", "eval_align", "eval_diversity"):
        assert actual[0][name] == pytest.approx(expected[0][name], rel=1e-3)
    for name in ("reward_mean", "reward_std", "loss"):
        assert actual[1][name] == pytest.approx(expected[1][name], rel=1e-2, abs=1e-3)
    assert actual[1]["ratio_err"] < 1e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_draws_nearly_the_same_pictures(precision, tmp_path):
    options = {"iterations": 1, "num_steps": 10}
    expected = read_metrics(on_gpu("ddpo_is", tmp_path, precision="fp32", **options))
    actual = read_metrics(on_gpu("ddpo_is", tmp_path, precision=precision, **options))
    assert actual[0]["eval_reward"] == pytest.approx(expected[0]["eval_reward"], rel=0.05)
    assert actual[0]["eval_align"] == pytest.approx(expected[0]["eval_align"], abs=5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_goes_on_as_if_never_stopped(name, tmp_path):
    """The loss scale of fp16 included. cuDNN's gradients may differ in the last digits."""
    script = importlib.import_module(name)
    whole = on_gpu(name, tmp_path / "whole", iterations=4)
    part = on_gpu(name, tmp_path / "part", iterations=2)
    words = ["--resume", str(part), "--iterations", "4"]
    script.main(script.parse_args(words))

    states = []
    for folder in (whole, part):
        path = Path(folder, "checkpoint/state.pt")
        states.append(torch.load(path, map_location="cpu", weights_only=True))
    expected, actual = states
    assert actual["state"]["scaler"] == expected["state"]["scaler"]
    assert [row["iteration"] for row in read_metrics(part)] == [0, 1, 2, 3, 4]
    for key, value in expected["weights"].items():
        difference = (actual["weights"][key] - value).abs().mean().item()
        assert difference < script.Args().lr / 10  # AdamW moves a weight by about lr


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "compile"])
def test_flags_that_change_memory_and_speed_alone(flag, tmp_path):
    options = {"lora_rank": 4, "precision": "fp32", "iterations": 1}
    expected = read_metrics(on_gpu("ddpo_is", tmp_path, **options))
    actual = read_metrics(on_gpu("ddpo_is", tmp_path, **options, **{flag: True}))
    for name in ("reward_mean", "loss", "grad_norm"):
        assert actual[1][name] == pytest.approx(expected[1][name], rel=2e-2, abs=1e-4)
    assert actual[1]["ratio_err"] < 1e-5


def test_a_large_microbatch_is_chosen_by_the_memory():
    """Stable Diffusion's latents: at most 2.5 GiB per pair, and a divisor of its samples."""
    script = importlib.import_module("ddpo_is")
    args = script.Args(device="cuda", precision="fp16", lora_rank=4)
    script.choose_micro_batch(args, (4, 64, 64), 16, 400)
    memory = torch.cuda.get_device_properties("cuda").total_memory / 2**30
    assert 8 % args.micro_batch == 0
    assert args.micro_batch <= max(memory / 2.5, 1)


def test_layers_are_channels_last_and_half(tmp_path):
    script = importlib.import_module("ddpo_is")
    policy = load_policy(script, EMOJI, device="cuda", lora_rank=4)
    weights = dict(policy.unet.named_parameters())
    kernel = next(p for p in weights.values() if p.ndim == 4)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert kernel.dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in policy.params.values())


def test_torchrun_with_one_process_per_gpu_equals_a_plain_run(tmp_path):
    """NCCL's group: with one GPU, a group of one."""
    flags = ["--model", EMOJI, "--device", "cuda", "--num-samples", 8, "--num-steps", 5]
    flags += ["--iterations", 2, "--save-every", 2, "--precision", "fp32"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=1"]
    plain = command("ddpo_is.py", *flags, "--out", tmp_path / "plain")
    grouped = command(*launcher, ROOT / "ddpo_is.py", *flags, "--out", tmp_path / "grouped")
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert grouped.returncode == 0, grouped.stderr[-2000:]
    rows = []
    for name in ("plain", "grouped"):
        (folder,) = (tmp_path / name).iterdir()
        rows.append(read_metrics(folder)[1])
    for name in ("reward_mean", "loss", "grad_norm"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-2, abs=1e-4)


def test_too_little_memory_ends_in_one_line(tmp_path):
    """The GPU's own error, provoked by leaving this process 60 MB of it."""
    program = f"""
import runpy, sys, torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(60e6 / total)
sys.argv = {["ddpo_is.py", "--model", str(EMOJI), "--out", str(tmp_path), "--precision", "fp32"]}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "ddpo_is.py")!r}, run_name="__main__")
"""
    done = command("-c", program)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "error: out of GPU memory: take a smaller --micro-batch, or --gradient-checkpointing"
    )


def test_the_main_command_runs_as_a_user_types_it(tmp_path):
    done = command(
        *("ddpo_sf.py", "--model", "models/emoji", "--reward", "incompress"),
        *("--iterations", 1, "--num-steps", 5, "--save-every", 1, "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 1 x cuda in fp16" in done.stdout
    (folder,) = tmp_path.iterdir()
    assert (folder / "before_after.png").exists()
    assert os.path.getsize(folder / "before_after.png") > 10_000
