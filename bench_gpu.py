"""
What is not known yet about the speed on a GPU, measured in one go of about 12 minutes.

    python bench_gpu.py             # Stable Diffusion's shapes with random weights, fp16, LoRA
    python bench_gpu.py --tiny      # the same steps on the emoji model and a CPU: a rehearsal

Each step appends a line to --results, and is skipped if its line is there: to go on after a stop,
run the same command again. If a step crashes or hangs, its line says so and the next one starts.
"""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import tyro
from torch.profiler import profile

import bench

# a group: its seconds at most, its steps, what its model is loaded with
GROUPS = {
    "is": (100, "iteration decode", {"num_samples": 16, "num_steps": 25}),
    "sampling": (200, "kernels no_autocast cuda_graph no_grad_sampling guidance_1 contiguous", {}),
    "training": (200, "micro_batch_16 micro_batch_32 cudnn_benchmark no_cudnn_attention", {}),
    "compile": (240, "compile_blocks compile", {}),
    "checks": (200, "checks test_gpu", {}),
    "iskl": (100, "iteration_iskl", {"num_samples": 16, "num_steps": 25}),
    "full": (90, "iteration_full checkpointing", {"lora_rank": 0}),
    "fp32": (60, "iteration_fp32", {"precision": "fp32", "micro_batch": 4}),
}


@dataclass
class GpuArgs:
    results: str = "bench_gpu.jsonl"
    """file with a line of JSON per step"""
    minutes: float = 12.0
    """time for all steps; what has not ended by then is left for the next call"""
    tiny: bool = False
    """the emoji model in a few short steps"""
    group: str | None = None
    """run only this group, in this process"""


def time_iteration(policy):
    """Milliseconds per (sample, step) pair, peak GB, and ratio_err where no weight has moved."""
    rollout = {}
    info = {}
    policy.script.predict_noise = policy.draw
    sample_s, sample_gb = bench.measure(lambda: rollout.update(bench.sample(policy)), repeats=0)
    policy.script.predict_noise = policy.predict_noise
    train_s, train_gb = bench.measure(lambda: info.update(bench.train(policy, rollout)), repeats=0)
    return {
        "sample_ms": 1000 * sample_s / policy.num_pairs,
        "train_ms": 1000 * train_s / policy.num_pairs,
        "gb": [sample_gb, train_gb],
        "ratio_err": info["ratio_err"],
    }


def switch(policy, name, on):
    """Turn a candidate on or off."""
    unet = policy.pipe.unet
    if name == "no_autocast":  # the UNet in half precision but for the float32 adapter
        dtype = unet.conv_in.weight.dtype
        forward = type(unet).forward
        unet.forward = policy.forward
        if on:
            unet.forward = lambda x, t, embeds: forward(unet, x.to(dtype), t, embeds.to(dtype))
        for module in unet.modules():
            module.cast_input_dtype_enabled = on  # PEFT casts the input of its adapter
    elif name == "cuda_graph":
        policy.draw = capture(policy) if on else policy.predict_noise
    elif name == "no_grad_sampling":
        policy.draw = torch.no_grad()(policy.predict_noise) if on else policy.predict_noise
    elif name in ("compile", "compile_blocks"):
        for module in unet.modules():
            module._compiled_call_impl = None
        torch._dynamo.config.recompile_limit = 64  # the blocks have one code and many shapes
        backend = "inductor" if bench.DEVICE == "cuda" else "eager"  # a CPU takes minutes
        if on and name == "compile":
            unet.compile(backend=backend)
        elif on:
            unet.compile_repeated_blocks(dynamic=False, backend=backend)
    elif name == "contiguous":
        unet.to(memory_format=torch.contiguous_format if on else torch.channels_last)
    elif name == "cudnn_benchmark":
        torch.backends.cudnn.benchmark = on
    elif name == "no_cudnn_attention":
        torch.backends.cuda.enable_cudnn_sdp(not on)
    elif name == "guidance_1":
        policy.args.guidance_scale = 1.0 if on else 5.0
    elif name == "checkpointing":
        unet.disable_gradient_checkpointing()
        if on:
            unet.enable_gradient_checkpointing()
    else:
        policy.args.micro_batch = int(name.removeprefix("micro_batch_")) if on else 8


def capture(policy):
    """predict_noise as a CUDA graph: all kernels of a sampling step in one launch."""
    rollout = bench.sample(policy)
    latents = rollout["latents"][: policy.args.micro_batch, 0].clone()
    embeds = rollout["embeds"][:, : len(latents)].clone()
    buffers = [latents, policy.schedule.timesteps[:1].repeat(len(latents)), embeds]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # gradients are on: the kernels are those of training
        captured = policy.predict_noise(policy.pipe.unet, *buffers, policy.args.guidance_scale)

    def replay(unet, *inputs):
        for buffer, value in zip(buffers, inputs):
            buffer.copy_(value)
        graph.replay()
        return captured.detach().clone()

    return replay


def kernels(policy):
    """The 25 kernels that take longest in sampling, and in training."""
    rollout = bench.sample(policy)
    bench.train(policy, rollout)  # warms up
    tables = []
    for function in (lambda: bench.sample(policy), lambda: bench.train(policy, rollout)):
        with profile() as profiler:
            function()
        sort_by = f"self_{bench.DEVICE}_time_total"
        tables.append(profiler.key_averages().table(sort_by=sort_by, row_limit=25))
    return tables


def decode(policy):
    """Seconds to decode 4 pictures, and peak GB."""
    vae = policy.pipe.vae
    latents = bench.sample(policy)["latents"][:4, -1]
    rows = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast(bench.DEVICE, dtype, enabled=dtype != torch.float32):
            rows[str(dtype)] = bench.measure(lambda: policy.script.decode(vae, latents), repeats=1)
    return rows


def checks(policy):
    """The largest change of a weight by an update that overflows, the scale; a group of one."""
    policy.optimizer.param_groups[0]["lr"] = 1e-3
    policy.scaler = torch.amp.GradScaler(bench.DEVICE, init_scale=2.0**100)
    before = [p.detach().clone() for p in policy.params]
    bench.train(policy, bench.sample(policy))
    moved = max((p - old).abs().max().item() for p, old in zip(policy.params, before))
    dist.init_process_group(init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    dist.all_reduce(before[0])
    return [moved, policy.scaler.get_scale(), policy.script.gather("gathered")]


def get_missing(args, group):
    """The steps of a group that have no line yet."""
    with open(args.results, "a+") as file:
        file.seek(0)
        done = [json.loads(line)["step"] for line in file]
    return [name for name in GROUPS[group][1].split() if name not in done]


def write_line(args, name, start, result):
    line = {"step": name, "seconds": time.perf_counter() - start, "result": result}
    with open(args.results, "a") as file:
        print(json.dumps(line), file=file)
    print(name, line["seconds"], "s", flush=True)


def run_group(args):
    """Run the steps of args.group that have no line yet."""
    script = importlib.import_module("ddpo_iskl" if args.group == "iskl" else "ddpo_is")
    options = {"num_samples": 32, "num_steps": 3, "num_updates": 1, "micro_batch": 8}
    options |= {"lora_rank": 4, "precision": "fp16"} | GROUPS[args.group][2]
    options["model"] = bench.BenchArgs.model if args.tiny else bench.make_random_sd()
    if args.tiny:
        options |= {"num_samples": 2, "num_steps": 2}
    policy = bench.load_policy(script, **options)
    policy.forward = policy.pipe.unet.forward
    policy.draw = script.predict_noise  # in sampling
    policy.predict_noise = script.predict_noise
    own = {"kernels": kernels, "decode": decode, "checks": checks}
    for name in get_missing(args, args.group):
        start = time.perf_counter()
        if name in own:
            result = own[name](policy)
        elif name == "test_gpu":
            words = [sys.executable, "-m", "pytest", "-q", str(bench.HERE / "tests/test_gpu.py")]
            result = subprocess.run(words, capture_output=True, text=True).stdout[-2000:]
        elif name.startswith("iteration"):
            result = [time_iteration(policy), time_iteration(policy)]  # the first warms up
        else:
            result = {"off": [], "on": []}
            for key in ("off", "on", "off", "on", "off", "on"):  # the first of each warms up
                switch(policy, name, key == "on")
                result[key].append(time_iteration(policy))
            switch(policy, name, False)
        write_line(args, name, start, result)


def main(args):
    if args.group is not None:
        return run_group(args)
    deadline = time.perf_counter() + 60 * args.minutes
    for group, (seconds, _, _) in GROUPS.items():
        while get_missing(args, group) and time.perf_counter() < deadline - 20:
            start = time.perf_counter()
            timeout = min(seconds, deadline - start)
            words = [sys.executable, __file__, "--results", args.results, "--group", group]
            if args.tiny:
                words.append("--tiny")
            try:
                process = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=timeout)
                error = process.stderr[-300:]
            except subprocess.TimeoutExpired:
                if timeout < seconds:  # not its fault
                    return
                error = f"stopped after {timeout:.0f} s"
            for name in get_missing(args, group)[:1]:
                write_line(args, name, start, {"error": error})


if __name__ == "__main__":
    main(tyro.cli(GpuArgs, description=__doc__))
