"""
Throughput and memory of the policy gradients: images/s, (sample, step) pairs/s, peak memory, and MFU.

    python bench.py                                          the model and precision that `--model auto` chooses
    python bench.py --micro-batch 4 8 16 --lora-rank 4       training, for several microbatches
    python bench.py --model random-sd --num-steps 5          Stable Diffusion v1.4 with random weights, no download

It times ddpo_is.py's own functions, sampling without the decoder; ddpo_iskl.py adds a forward of the reference a pair.
MFU is the UNet's operations, counted by torch (FlopCounterMode: matrix products, convolutions, attention), per second
over the device's peak: --peak-tflops from its data sheet, else what one large operation reaches here.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import ddpo_is


@dataclass
class BenchArgs:
    model: str = "auto"
    """as in the scripts; or random-sd: random weights in the shape of Stable Diffusion v1.4, under runs/ (4.3 GB)"""
    device: str = "auto"
    """as in the scripts"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """as in the scripts"""
    lora_rank: int | None = None
    """as in the scripts"""
    num_samples: int = 16
    """pictures that are sampled, and trained on in one update"""
    num_steps: int = 50
    """denoising steps"""
    micro_batch: tuple[int, ...] = (0,)
    """pairs per forward, one row of the table each; 0 = what the scripts choose"""
    repeats: int = 3
    """timed repetitions, after one that warms up; the table has their median, lowest and highest"""
    peak_tflops: float | None = None
    """peak of the device in this precision, in 10^12 operations per second; unset: measured"""

def random_stable_diffusion(tokenizer):
    """UNet (860 M parameters, 64 x 64 latents), VAE, text encoder in the shapes of Stable Diffusion v1.4, untrained."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return {"unet": unet, "vae": AutoencoderKL(**blocks), "text_encoder": CLIPTextModel(CLIPTextConfig(**text))}

def measure(fn, args):
    """Median, lowest and highest seconds of `args.repeats` calls after a first one, and the peak memory in GB: on a GPU
    of the timed calls, on a CPU the memory of the process at the end."""
    seconds, on_gpu = [], args.device.startswith("cuda")
    for i in range(args.repeats + 1):
        if on_gpu and i == 1:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        fn()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return statistics.median(seconds[1:]), min(seconds[1:]), max(seconds[1:]), peak / 1e9

def measured_peak(args):
    """10^12 operations per second that the better of a large matrix product and a 3 x 3 convolution reaches here."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    n, batch = (8192, 256) if args.device.startswith("cuda") else (2048, 16)
    a, x = torch.ones(n, n), torch.ones(batch, 512, 16, 16).to(memory_format=torch.channels_last)
    a, x, kernel = (y.to(args.device, dtype) for y in (a, x, torch.ones(512, 512, 3, 3)))
    product = 2 * n**3 / measure(lambda: a @ a, args)[1]
    conv = 2 * batch * 512 * 512 * 9 * 16 * 16 / measure(lambda: F.conv2d(x, kernel, padding=1), args)[1]
    return max(product, conv) / 1e12

def count_flops(fn):
    """Floating-point operations of fn(); a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()

def main(bench):
    """Prints the operations of a pair, and a row of the table for each stage and microbatch."""
    if bench.model == "random-sd":
        bench.model = str(ddpo_is.HERE / "runs/random-sd")
        if not os.path.exists(bench.model):
            pipe = StableDiffusionPipeline.from_pretrained(ddpo_is.HERE / "models/emoji", safety_checker=None)
            pipe.register_modules(**random_stable_diffusion(pipe.tokenizer))
            pipe.save_pretrained(bench.model + ".tmp")
            os.rename(bench.model + ".tmp", bench.model)
    shared = ddpo_is.Args.__dataclass_fields__.keys() & vars(bench).keys() - {"micro_batch"}
    args = ddpo_is.Args(**{name: getattr(bench, name) for name in shared}, num_updates=1)
    try:
        _, schedule, shape = ddpo_is.resolve(args)
        pipe, params = ddpo_is.load_model(args)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        print("error:", str(error).strip().splitlines()[0], file=sys.stderr)
        sys.exit(2)
    args.repeats, n, auto = bench.repeats, args.num_samples, args.micro_batch  # measure reads args.repeats
    peak = bench.peak_tflops or measured_peak(args)
    embeds = torch.stack(pipe.encode_prompt(["cat"] * n, args.device, 1, True)[::-1])
    noise = torch.randn((n, args.num_steps + 1, *shape), generator=torch.Generator().manual_seed(0)).to(args.device)
    optimizer, data = torch.optim.AdamW(params.values(), args.lr), {"embeds": embeds}

    def sample():
        data["latents"], data["log_prob_beh"] = ddpo_is.sample_trajectories(pipe.unet, embeds, noise, schedule, args)
        data["advantages"] = torch.ones_like(data["log_prob_beh"])

    def train(samples=n):
        samples = torch.arange(samples, device=args.device)
        ddpo_is.accumulate_gradients(pipe.unet, data, samples, schedule, args)

    def update():
        train()
        optimizer.step()

    sample()
    first = noise[:1, 0], schedule.timesteps[:1], embeds[:, :1], schedule, args.guidance_scale
    with torch.no_grad():
        forward = count_flops(lambda: ddpo_is.predict_noise(pipe.unet, *first))
    backward = count_flops(lambda: train(1)) / int((schedule.sigmas > 0).sum())  # of a pair, its forward included
    print(f"{forward / 1e9:.4g} GFLOP a pair to sample, {backward / 1e9:.4g} to train; peak {peak:.3g} TFLOPS")
    print("stage    microbatch      per second   seconds (lowest-highest)     GB    MFU")
    pairs = n * args.num_steps
    for args.micro_batch in (size or auto for size in bench.micro_batch):
        stages = ("sample", sample, n, "images", pairs * forward), ("train", update, pairs, "pairs", pairs * backward)
        for stage, fn, count, unit, flops in stages:
            seconds, low, high, memory = measure(fn, args)
            rate, mfu = count / seconds, flops / seconds / peak / 1e12
            line = f"{stage:8} {args.micro_batch:10} {rate:9.2f} {unit:6} {seconds:9.3f} ({low:.3f}-{high:.3f})"
            print(f"{line:60} {memory:6.2f} {mfu:6.1%}", flush=True)

if __name__ == "__main__":
    main(tyro.cli(BenchArgs, description=__doc__))
