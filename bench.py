"""
Speed and memory of one script on one machine, as a Markdown table with a row per setting.

    python bench.py                                    # what `python ddpo_is.py` chooses here
    python bench.py --script ddpo_iskl --micro-batch 25 50 --compile False True
    python bench.py --arch random-sd --precision fp16 bf16 --micro-batch 4 8 16 \\
        --gradient-checkpointing False True            # the shapes of Stable Diffusion v1.4

A row is measured on the script's own functions. Sampling is its `run_policy` and `decode`, which
is what `images_per_s` of metrics.csv counts. Training is all updates of one iteration, with what
the script adds to them, such as the reference's forward pass in ddpo_iskl.py. The learning rate is
0, so that every repetition does the same work.

MFU is the share of the device's peak that the operations of UNet and decoder reach. They are
counted by torch (matrix products, convolutions, attention) without checkpointing, whose second
forward pass is overhead. The peak is --peak-tflops, from a data sheet, or else what one large
operation reaches here.
"""

import importlib
import itertools
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# as in the scripts; it must be set before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import diffusers
import psutil
import torch
import torch.nn.functional as F
import transformers
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COLUMNS = (
    "precision",
    "microbatch",
    "compile",
    "checkpointing",
    "images/s",
    "train pairs/s",
    "s per iteration",
    "GB sampling",
    "GB training",
    "MFU sampling",
    "MFU training",
)


@dataclass
class BenchArgs:
    # what is measured
    script: Literal["ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse"] = "ddpo_is"
    """the script whose functions are measured"""
    model: str = "auto"
    """as in the scripts"""
    arch: Literal["random-sd"] | None = None
    """random-sd: instead of --model, random weights in the shapes of Stable Diffusion v1.4,
    made once under runs/ (2.1 GB) without a download"""
    device: str = "auto"
    """as in the scripts"""
    lora_rank: int | None = None
    """as in the scripts"""
    num_samples: int = 16
    """pictures per iteration"""
    num_steps: int = 50
    """denoising steps"""
    # a row of the table for every combination of these
    precision: tuple[Literal["auto", "fp32", "fp16", "bf16"], ...] = ("auto",)
    """as in the scripts, one or more"""
    micro_batch: tuple[int, ...] = (0,)
    """pairs per forward pass, one or more; 0 = what the script chooses"""
    compile: tuple[bool, ...] = (False,)
    """with or without torch.compile, False or True or both"""
    gradient_checkpointing: tuple[bool, ...] = (False,)
    """with or without gradient checkpointing, False or True or both"""
    # how it is measured
    repeats: int = 3
    """timed repetitions after one that warms up; the table has median (lowest-highest)"""
    peak_tflops: float | None = None
    """the device's peak in 10^12 operations per second; default: measured"""


def random_stable_diffusion(tokenizer):
    """UNet, VAE and text encoder in the shapes of Stable Diffusion v1.4, untrained."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text_config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text_config)}


def save_random_stable_diffusion(folder):
    """A pipeline of the above in float16, with the scheduler and the tokenizer of models/emoji."""
    pipe = StableDiffusionPipeline.from_pretrained(HERE / "models/emoji", safety_checker=None)
    pipe.tokenizer.model_max_length = 77  # the tokens of Stable Diffusion's prompts
    pipe.register_modules(**random_stable_diffusion(pipe.tokenizer))
    pipe.to(torch.float16)

    # renamed when it is whole
    unfinished = f"{folder}.tmp"
    pipe.save_pretrained(unfinished)
    os.rename(unfinished, folder)


def load_policy(script, **options):
    """What `main` of a script (a module) sets up before its loop, for one process."""
    args = script.Args(**options)
    script.init_processes(args)
    script.check_args(args)
    script.check_algorithm(args, 1)
    scheduler, latent_shape = script.check_model(args)
    schedule = script.make_schedule(scheduler, args.num_steps, args.device)

    # RWR: every update is on all samples, with as many draws of noise as there are steps
    regression = script.__name__.startswith("rwr")
    if regression:
        num_pairs = args.num_samples * args.num_steps
    else:
        num_pairs = args.num_samples // args.num_updates * len(schedule.noisy_steps)
    script.choose_micro_batch(args, latent_shape, args.num_samples, num_pairs)

    pipe, params = script.load_model(args)
    reference = None
    if script.__name__ == "ddpo_iskl" and args.lora_rank == 0:
        reference = script.load_model(args)[0].unet.requires_grad_(False)
    fused = args.device.startswith("cuda")
    return SimpleNamespace(
        script=script,
        args=args,
        pipe=pipe,
        params=params,
        reference=reference,
        optimizer=torch.optim.AdamW(params.values(), lr=0.0, fused=fused),
        scaler=torch.amp.GradScaler(args.device, enabled=args.precision == "fp16"),
        schedule=schedule,
        latent_shape=latent_shape,
        regression=regression,
        num_pairs=num_pairs,
    )


def sample(policy):
    """One iteration's trajectories and pictures. Returns what the script trains on, see there."""
    script = policy.script
    args = policy.args
    generators = [script.make_generator(1, 1, i, 0) for i in range(args.num_samples)]
    latents, log_probs, embeds = script.run_policy(
        policy.pipe,
        ["cat"] * args.num_samples,
        generators,
        policy.latent_shape,
        policy.schedule,
        args,
    )
    script.decode(policy.pipe.vae, latents[:, -1])

    ones = torch.ones(args.num_samples, device=args.device)
    if not policy.regression:
        return {"latents": latents, "embeds": embeds, "log_probs": log_probs, "advantages": ones}
    noise = latents[:, :-1]  # any numbers of this shape
    timesteps = policy.schedule.timesteps.expand(args.num_samples, -1)
    return {
        "latents": latents[:, -1],
        "embeds": embeds,
        "weights": ones,
        "noise": noise,
        "timesteps": timesteps,
    }


def train(policy, rollout):
    """All updates of one iteration."""
    args = policy.args
    gradients = policy.script.accumulate_gradients
    last = (policy.schedule, policy.scaler, args)
    indices = torch.arange(args.num_samples, device=args.device)
    for samples in indices.chunk(args.num_updates):
        if policy.regression:
            gradients(policy.pipe.unet, rollout, *last)
        elif policy.script.__name__ == "ddpo_iskl":
            gradients(policy.pipe.unet, policy.reference, rollout, samples, *last)
        else:
            gradients(policy.pipe.unet, rollout, samples, *last)

        policy.scaler.unscale_(policy.optimizer)
        torch.nn.utils.clip_grad_norm_(policy.params.values(), args.max_grad_norm)
        policy.scaler.step(policy.optimizer)
        policy.scaler.update()


def measure(function, device, repeats):
    """Seconds of each of `repeats` calls, after one that warms up, and the peak memory in GB.

    The memory is that of the timed calls on a GPU, and of the whole process on a CPU.
    """
    on_gpu = device.startswith("cuda")
    function()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return seconds, peak / 1e9


def measure_peak(device, precision, repeats):
    """10^12 operations per second that the better of two large operations reaches.

    They are a matrix product, and a 3 x 3 convolution of 512 channels.
    """
    size, batch = (8192, 256) if device.startswith("cuda") else (2048, 16)
    options = {"device": device, "dtype": DTYPES[precision]}
    matrix = torch.ones(size, size, **options)
    images = torch.ones(batch, 512, 16, 16, **options).to(memory_format=torch.channels_last)
    kernel = torch.ones(512, 512, 3, 3, **options)

    product, _ = measure(lambda: matrix @ matrix, device, repeats)
    product_rate = 2 * size**3 / min(product)
    convolution, _ = measure(lambda: F.conv2d(images, kernel, padding=1), device, repeats)
    convolution_rate = 2 * images.numel() * 512 * 9 / min(convolution)
    return max(product_rate, convolution_rate) / 1e12


def count_flops(function):
    """Floating-point operations of a call; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def count_operations(policy):
    """Operations to sample one step of one picture, to decode one, and to train on one pair.

    A pair is a (sample, step) pair; both rows of its guidance are in it.
    """
    rollout = sample(policy)
    one = {
        "latents": torch.zeros(1, *policy.latent_shape, device=policy.args.device),
        "t": policy.schedule.timesteps[:1],
        "embeds": rollout["embeds"][:, :1],
        "guidance_scale": policy.args.guidance_scale,
    }
    with torch.no_grad():
        forward = count_flops(lambda: policy.script.predict_noise(policy.pipe.unet, **one))
    decoder = count_flops(lambda: policy.script.decode(policy.pipe.vae, one["latents"]))
    training = count_flops(lambda: train(policy, rollout))
    return forward, decoder, training / (policy.args.num_updates * policy.num_pairs)


def format_rate(count, seconds, decimals=2):
    """`count` per second: median (lowest-highest) of the repetitions."""
    rates = [count / second for second in seconds]
    numbers = (statistics.median(rates), min(rates), max(rates))
    median, lowest, highest = [f"{number:.{decimals}f}" for number in numbers]
    return f"{median} ({lowest}-{highest})"


def measure_policy(policy, operations, peak, repeats):
    """The cells of a row after its settings. `peak` in 10^12 operations per second."""
    args = policy.args
    forward, decoder, training = operations
    sampling_flops = args.num_samples * (args.num_steps * forward + decoder)
    num_pairs = args.num_updates * policy.num_pairs  # of an iteration
    training_flops = num_pairs * training

    sampling_s, sampling_gb = measure(lambda: sample(policy), args.device, repeats)
    rollout = sample(policy)
    training_s, training_gb = measure(lambda: train(policy, rollout), args.device, repeats)

    sampling_median = statistics.median(sampling_s)
    training_median = statistics.median(training_s)
    return [
        format_rate(args.num_samples, sampling_s),
        format_rate(num_pairs, training_s, decimals=1),
        f"{sampling_median + training_median:.2f}",
        f"{sampling_gb:.2f}",
        f"{training_gb:.2f}",
        f"{sampling_flops / sampling_median / peak / 1e12:.1%}",
        f"{training_flops / training_median / peak / 1e12:.1%}",
    ]


def describe_machine(device):
    """One line: hardware, versions, commit."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        if models:
            name = f"{models[0]}, {torch.get_num_threads()} threads"
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{name}; {versions}; commit {commit or 'unknown'}"


def print_header(bench, policy, operations):
    """Everything that the table's numbers depend on, and the head of the table."""
    forward, decoder, training = operations
    rank = policy.args.lora_rank
    kind = f"LoRA of rank {rank}" if rank else "full fine-tuning"
    command = shlex.join(["python", *sys.argv])
    print(f"`{command}`\n")
    print(f"{describe_machine(policy.args.device)}\n")
    print(f"{bench.script}.py, {kind}, {bench.num_samples} samples of {bench.num_steps} steps\n")
    print(
        f"GFLOP: {forward / 1e9:.4g} per pair to sample, {training / 1e9:.4g} per pair to train, "
        f"{decoder / 1e9:.4g} per picture to decode\n"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|", flush=True)


def main(bench):
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    script = importlib.import_module(bench.script)
    options = {
        "model": bench.model,
        "device": bench.device,
        "lora_rank": bench.lora_rank,
        "num_samples": bench.num_samples,
    }
    if bench.arch is not None:
        folder = HERE / "runs" / bench.arch
        if not folder.exists():
            save_random_stable_diffusion(folder)
        options["model"] = str(folder)

    # two steps are enough to count the operations
    policy = load_policy(script, num_steps=2, precision=bench.precision[0], **options)
    operations = count_operations(policy)
    print_header(bench, policy, operations)
    del policy  # before the next one is loaded

    peaks = {}  # by precision
    settings = itertools.product(
        bench.precision, bench.micro_batch, bench.compile, bench.gradient_checkpointing
    )
    for precision, micro_batch, compile, checkpointing in settings:
        torch.compiler.reset()  # it stops compiling after eight models
        policy = load_policy(
            script,
            num_steps=bench.num_steps,
            precision=precision,
            micro_batch=micro_batch,
            compile=compile,
            gradient_checkpointing=checkpointing,
            **options,
        )
        args = policy.args
        if args.precision not in peaks:
            measured = bench.peak_tflops or measure_peak(args.device, args.precision, bench.repeats)
            peaks[args.precision] = measured

        cells = [args.precision, args.micro_batch, args.compile, args.gradient_checkpointing]
        try:
            cells += measure_policy(policy, operations, peaks[args.precision], bench.repeats)
        except torch.OutOfMemoryError:
            cells += ["out of memory"] + [""] * (len(COLUMNS) - 5)
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

        del policy
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()

    for precision, peak in peaks.items():
        print(f"\npeak in {precision}: {peak:.3g} TFLOPS")


if __name__ == "__main__":
    main(tyro.cli(BenchArgs, description=__doc__))
