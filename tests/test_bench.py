"""bench.py and bench_gpu.py on small models: what they count and write, never how fast it is."""

import json

import pytest
import torch

import bench
import bench_gpu
import ddpo_is
import ddpo_iskl
import ddpo_sf


def load(script, model, **options):
    options = {"precision": "fp32", "num_samples": 4, "num_steps": 2} | options
    return bench.load_policy(script, model=model, **options)


def test_training_costs_what_its_passes_cost(tiny_sd):
    """In forward passes: full fine-tuning about 3, the reference 1 more, LoRA less."""

    def relative_cost(script, **options):
        forward, _, training = bench.count_operations(load(script, tiny_sd, **options))
        return training / forward

    full = relative_cost(ddpo_is)
    assert 2.6 < full < 3.1  # backward: to the inputs and to the weights
    assert relative_cost(ddpo_is, micro_batch=1) == full
    assert relative_cost(ddpo_sf) == full
    assert relative_cost(ddpo_iskl) == pytest.approx(full + 1)
    assert 1.5 < relative_cost(ddpo_is, lora_rank=2) < 2.6  # backward: only to the inputs


def test_training_is_the_scripts_and_leaves_the_weights(tiny_sd):
    policy = load(ddpo_is, tiny_sd, precision="fp16", lora_rank=2)
    assert policy.args.micro_batch == 2  # samples of an update
    before = [p.detach().clone() for p in policy.params]
    info = bench.train(policy, bench.sample(policy))
    assert info["ratio_err"] == 0
    assert info["loss"] == pytest.approx(-1)  # advantage 1, ratio 1
    assert all(map(torch.equal, policy.params, before))
    assert any(p.grad.abs().max() > 0 for p in policy.params)


def test_the_first_call_can_be_all_that_is_timed(tiny_sd, capsys):
    options = {"num_samples": 2, "num_steps": 2, "lora_rank": 0, "peak_tflops": 1e-9}
    bench.main(bench.BenchArgs(model=tiny_sd, repeats=0, **options))
    text = capsys.readouterr().out
    assert "images/s" in text
    assert "MFU 0.0%" not in text


def test_gpu_steps_are_written_also_if_they_crash_and_not_repeated(tmp_path):
    """A CUDA graph is an error on a CPU. The other steps already have a line."""
    path = tmp_path / "results.jsonl"
    steps = [name for _, names, _ in bench_gpu.GROUPS.values() for name in names.split()]
    done = [name for name in steps if name not in ("kernels", "cuda_graph")]
    path.write_text("".join(json.dumps({"step": name}) + "\n" for name in done))
    for _ in range(2):
        bench_gpu.main(bench_gpu.GpuArgs(results=str(path), tiny=True))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kernels, crashed = lines[len(done) :]
        assert (kernels["step"], crashed["step"]) == ("kernels", "cuda_graph")
        assert "conv" in kernels["result"][0]
        assert "CUDA" in crashed["result"]["error"]
