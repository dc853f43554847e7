"""
Speed and memory of one script on one machine.

    python bench.py
    python bench.py --script ddpo_iskl --micro-batch 25 --compile
    python bench.py --arch random-sd --precision bf16 --micro-batch 16

Sampling is the script's `sample_trajectories` and `decode`, training is all updates of an
iteration, with a learning rate of 0. MFU is the share of --peak-tflops that matrix products,
convolutions and attention reach, without the second forward pass of checkpointing.
"""

import importlib
import math
import os
import resource
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# OpenMP's threads spin while they wait, which stalls a run beside any other busy process
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import diffusers
import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class BenchArgs:
    script: Literal["ddpo_sf", "ddpo_is", "ddpo_iskl"] = "ddpo_is"
    """whose functions are measured; a pair of the RWR scripts costs what one of ddpo_sf.py does"""
    model: str = str(HERE / "models/emoji")
    """diffusers folder or hub name"""
    arch: Literal["random-sd"] | None = None
    """instead of --model: random weights in the shapes of Stable Diffusion v1.4, saved in runs/"""
    precision: Literal["fp32", "fp16", "bf16"] = "fp16" if DEVICE == "cuda" else "fp32"
    """as in the scripts, as the next six"""
    micro_batch: int = 0
    lora_rank: int | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    num_samples: int = 16
    num_steps: int = 50
    repeats: int = 3
    """timed repetitions after one that warms up; their median is printed. 0 times the first"""
    peak_tflops: float = 990.0
    """10^12 operations per second of which MFU is a share; default: H100 and H200 in fp16"""


def make_random_sd():
    """A pipeline in the shapes of Stable Diffusion v1.4, float16, untrained. Returns its folder."""
    folder = HERE / "runs/random-sd"
    if not folder.exists():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        pipe = StableDiffusionPipeline.from_pretrained(HERE / "models/emoji", safety_checker=None)
        pipe.tokenizer.model_max_length = 77  # the tokens of Stable Diffusion's prompts
        pipe.register_modules(
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            vae=vae,
            text_encoder=CLIPTextModel(config),
        )
        pipe.to(torch.float16).save_pretrained(f"{folder}.tmp")
        os.rename(f"{folder}.tmp", folder)  # whole if it is there
    return str(folder)


def load_policy(script, **options):
    """What `main` of a script (a module) loads before its loop, in one process."""
    args = script.Args(device=DEVICE, **options)
    pipe, params = script.load_model(args)
    if args.precision != "fp32":
        args.micro_batch = math.gcd(args.micro_batch, args.num_samples // args.num_updates)
    schedule = script.make_schedule(pipe, args)
    unets = [pipe.unet]
    if script.__name__ == "ddpo_iskl":  # the reference, with LoRA the policy without its adapter
        full = args.lora_rank == 0
        unets.append(script.load_model(args)[0].unet.requires_grad_(False) if full else None)
    return SimpleNamespace(
        script=script,
        args=args,
        pipe=pipe,
        params=params,
        unets=unets,
        schedule=schedule,
        num_pairs=args.num_samples * len(schedule.noisy_steps),
        optimizer=torch.optim.AdamW(params, lr=0.0, fused=DEVICE == "cuda"),
        scaler=torch.amp.GradScaler(DEVICE, enabled=args.precision == "fp16"),
    )


def sample(policy):
    """One iteration's trajectories, with advantages of 1."""
    args = policy.args
    generators = [torch.Generator().manual_seed(i) for i in range(args.num_samples)]
    rollout = policy.script.sample_trajectories(
        policy.pipe, ["cat"] * args.num_samples, generators, policy.schedule, args
    )
    rollout["advantages"] = torch.ones(args.num_samples, device=DEVICE)
    return rollout


def train(policy, rollout):
    """All updates of one iteration. Returns the metrics of the last."""
    args = policy.args
    for samples in torch.arange(args.num_samples, device=DEVICE).chunk(args.num_updates):
        info = policy.script.accumulate_gradients(
            *policy.unets, rollout, samples, policy.schedule, policy.scaler, args
        )
        policy.scaler.unscale_(policy.optimizer)
        torch.nn.utils.clip_grad_norm_(policy.params, args.max_grad_norm)
        policy.scaler.step(policy.optimizer)
        policy.scaler.update()
    return info


def measure(function, repeats):
    """Median seconds of calls after one that warms up, and peak GB (on a CPU the process's)."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return statistics.median(seconds[-repeats:]), peak / 1e9


def count_operations(policy):
    """Operations to sample one step of one picture, to decode one, and to train on one pair."""
    rollout = sample(policy)
    x_t = rollout["latents"][:1, 0]
    inputs = (policy.pipe.unet, x_t, policy.schedule.timesteps[:1], rollout["embeds"][:, :1])
    counts = []
    for function in (
        lambda: policy.script.predict_noise(*inputs, policy.args.guidance_scale),
        lambda: policy.script.decode(policy.pipe.vae, x_t),
        lambda: train(policy, rollout),
    ):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1], counts[2] / policy.num_pairs


def main(bench):
    diffusers.utils.logging.disable_progress_bar()
    script = importlib.import_module(bench.script)
    names = ("precision", "micro_batch", "lora_rank", "compile", "gradient_checkpointing")
    options = {name: getattr(bench, name) for name in (*names, "num_samples", "num_steps")}
    options["model"] = make_random_sd() if bench.arch == "random-sd" else bench.model
    plain = {"compile": False, "gradient_checkpointing": False, "num_steps": 2}
    forward, decoder, training = count_operations(load_policy(script, **(options | plain)))

    policy = load_policy(script, **options)
    args = policy.args
    rollout = sample(policy)
    sampling_s, sampling_gb = measure(
        lambda: script.decode(policy.pipe.vae, sample(policy)["latents"][:, -1]), bench.repeats
    )
    training_s, training_gb = measure(lambda: train(policy, rollout), bench.repeats)
    sampling_flops = args.num_samples * (args.num_steps * forward + decoder)
    sampling_mfu = sampling_flops / sampling_s / bench.peak_tflops / 1e12
    training_mfu = policy.num_pairs * training / training_s / bench.peak_tflops / 1e12
    images_per_s = args.num_samples / sampling_s
    pairs_per_s = policy.num_pairs / training_s
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    commit = subprocess.getoutput(f"git -C '{HERE}' describe --always --dirty")
    print(f"{machine}; torch {torch.__version__}; commit {commit}")
    print(f"{bench.script}.py, {options}, rank {args.lora_rank}, microbatch {args.micro_batch}")
    print(f"sampling {images_per_s:.2f} images/s, {sampling_gb:.2f} GB, MFU {sampling_mfu:.1%}")
    print(f"training {pairs_per_s:.1f} pairs/s, {training_gb:.2f} GB, MFU {training_mfu:.1%}")
    print(f"{sampling_s:.2f} + {training_s:.2f} s per iteration")


if __name__ == "__main__":
    main(tyro.cli(BenchArgs, description=__doc__))
