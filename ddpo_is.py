"""
DDPO-IS: policy gradients over denoising steps, with importance sampling and a clip (Algorithm 4).

A denoising step is an action, x_{t-1} ~ N(mu_theta(x_t, c, t), sigma_t^2 I). The reward r(x_0, c)
of the finished picture is the return of every step. With A the normalised reward, the loss of one
(sample, step) pair is

    ratio = exp(log_prob - log_prob_old)      the policy now / the policy that drew the sample
    loss  = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))

To DDPO-SF it adds the ratio, which corrects the updates that are off-policy (all but the first of
an iteration), and the clip, which bounds them: diff ddpo_sf.py ddpo_is.py

    python ddpo_is.py --reward compress --lr 3e-4
    ... --iterations 20 --num-steps 20      # a quick look
    ... --resume runs/NAME                  # continue a run

Measured on models/emoji, 190 iterations, n = 5: JPEG size 2.500 -> 2.145 +- 0.170 kB.

The algorithms are from "Guiding the training of diffusion models: a replication of DDPO" (Gao, Shi,
Zhang; https://github.com/kevin-zhang-1/Fall-2025-Reinforcement-Learning-Final-Project), after DDPO:
Black et al., "Training Diffusion Models with Reinforcement Learning", arxiv.org/abs/2305.13301.
"""

import csv
import ctypes
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Literal

# OpenMP's threads spin while they wait, which stalls a run beside any other busy process.
# A short spin costs nothing when the run is alone. It must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# glibc gives freed memory back to the system and fetches it again in every forward pass, which
# costs a few percent on a CPU. Let it keep up to 2 GiB.
if platform.libc_ver()[0] == "glibc":
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest

import diffusers
import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
import tyro
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from rewards import RewardError, load_alignment, load_reward, save_user_files

HERE = Path(__file__).resolve().parent
ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon "
    "fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle "
    "frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"
)


@dataclass
class Args:
    # run
    reward: str = "compress"
    """a name of `rewards.py --list`, a sum like "aesthetic + 0.5*clip", or FILE.py:FUNCTION"""
    prompts: str = "animals"
    """animals (45 names), imagenet (398 animals), or a text file with one prompt per line"""
    seed: int = 1
    """seeds prompts, noise and LoRA weights; the noise of evaluations does not depend on it"""
    iterations: int = 200
    """rounds of sampling and training"""
    out: str = "runs"
    """folder in which the run's folder is made"""
    resume: str | None = None
    """run folder to continue; needs no other flag, its arguments are read from its args.json"""
    save_every: int = 10
    """iterations between checkpoints, evaluations and picture grids"""
    track: bool = False
    """also log to Weights & Biases"""
    device: str = "auto"
    """auto (cuda if there is a GPU, else cpu), or a torch device"""
    # model
    model: str = "auto"
    """diffusers folder or hub name; auto: Stable Diffusion v1.4 on a GPU, else models/emoji"""
    lora_rank: int | None = None
    """LoRA rank on attention, 0 = full fine-tuning; default: 4 from 50 M parameters on, else 0"""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: fp16 on a GPU, else fp32; bf16 rounds log-probs by more than the default clip range"""
    gradient_checkpointing: bool = False
    """less memory in training, for about a third more time"""
    compile: bool = False
    """torch.compile the UNet: slow to start, then faster"""
    # sampling
    num_samples: int = 16
    """trajectories per iteration (N_samples), over all processes"""
    num_steps: int = 50
    """denoising steps (T)"""
    guidance_scale: float = 5.0
    """classifier-free guidance weight, in sampling and in training (W_c)"""
    # optimisation
    lr: float = 3e-4
    """AdamW learning rate (eta)"""
    weight_decay: float = 1e-4
    """AdamW weight decay (lambda)"""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW (beta_1, beta_2)"""
    adam_eps: float = 1e-8
    """AdamW epsilon"""
    max_grad_norm: float = 1.0
    """the gradient norm is clipped to this (C_clip)"""
    num_updates: int = 2
    """gradient steps per iteration (N_updates), each on an equal share of the samples"""
    micro_batch: int = 0
    """at most so many (sample, step) pairs per forward pass: memory and speed only; 0 = choose"""
    # this algorithm
    adv_clip: float = 5.0
    """advantages are clipped to +- this"""
    clip_range: float = 1e-4
    """trust region: the ratio is clipped to 1 +- this"""


# --------------------------------------------------------------------------------------------------
# the sampler: a diffusion model as a policy


def make_schedule(scheduler, num_steps, device):
    """The DDPM chain over `num_steps` timesteps of a diffusers scheduler, first step to last.

    tables (5, T): abar_t, abar_{t-1}, alpha_t, beta_t, sigma_t; sigma (T,): its last row;
    noisy_steps: the steps with sigma > 0; alphas_cumprod: abar of all training timesteps (RWR).
    """
    scheduler.set_timesteps(num_steps)
    alphas_cumprod = scheduler.alphas_cumprod.double()
    abar = alphas_cumprod[scheduler.timesteps]
    abar_prev = torch.cat([abar[1:], scheduler.final_alpha_cumprod.double().view(1)])
    alpha = abar / abar_prev
    beta = 1 - alpha
    sigma = (beta * (1 - abar_prev) / (1 - abar)).sqrt()  # eta = 1; so is the mean in ddpm_step
    tables = torch.stack([abar, abar_prev, alpha, beta, sigma]).float().to(device)
    return SimpleNamespace(
        tables=tables,
        sigma=tables[4],
        noisy_steps=torch.nonzero(tables[4] > 0).flatten(),
        timesteps=scheduler.timesteps.to(device),
        alphas_cumprod=alphas_cumprod.float().to(device),
        prediction_type=scheduler.config.prediction_type,
    )


def predict_noise(unet, latents, t, embeds, guidance_scale):
    """The UNet's prediction with classifier-free guidance (Algorithm 4, lines 13-15).

    latents (N, C, H, W), t (N,) timesteps, embeds (2, N, L, D): unconditional, conditional.
    Returns float32 (N, C, H, W): epsilon, or v where the model has prediction_type v_prediction.
    """
    output = unet(torch.cat([latents, latents]), t.repeat(2), embeds.flatten(0, 1)).sample
    noise_pred_uncond, noise_pred_text = output.float().chunk(2)
    return noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)


def ddpm_step(noise_pred, latents, step, schedule, next_latents=None, noise=None):
    """One action: draws x_{t-1} with `noise`, or scores `next_latents` (Algorithm 4, lines 16-18).

    noise_pred, latents, next_latents, noise (N, C, H, W) float32; step (N,) from 0 to T - 1.
    Returns next_latents, log_prob (N,) and the mean of x_{t-1}. log_prob is the *mean* over
    dimensions: only for that does a clip range of 1e-4 make sense, and the sum over the 16,384
    dimensions of Stable Diffusion overflows exp. It is 0 for a deterministic step (sigma = 0).
    """
    # (N, 1, 1, 1) each
    abar, abar_prev, alpha, beta, sigma = schedule.tables[:, step, None, None, None]

    if schedule.prediction_type == "epsilon":
        # Algorithms 4 and 5 print sqrt(1 - alpha_t); Algorithm 3's sqrt(1 - abar_t) is right
        mean = (latents - beta / (1 - abar).sqrt() * noise_pred) / alpha.sqrt()
    else:
        # the same with eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t, finite at abar_t = 0 too
        mean = alpha.sqrt() * latents - beta * (abar_prev / (1 - abar)).sqrt() * noise_pred
    if next_latents is None:
        next_latents = mean + sigma * noise

    scale = torch.where(sigma > 0, sigma, 1.0)  # a deterministic step would divide 0 by 0
    log_density = (
        -0.5 * ((next_latents - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    )
    log_prob = torch.where(sigma > 0, log_density, 0.0).mean(dim=(1, 2, 3))
    return next_latents, log_prob, mean


@torch.no_grad()
def sample_trajectories(unet, embeds, noise, schedule, args):
    """Run the policy (Algorithm 4, lines 8-19). embeds (2, N, L, D), noise (N, T + 1, C, H, W).

    Returns latents (N, T + 1, C, H, W), x_T first and x_0 last, and log_probs (N, T), float32.
    Raises FloatingPointError where they are not finite.
    """
    latents = noise[:, 0]
    trajectory = [latents]
    log_probs = []
    for i in range(args.num_steps):
        step = torch.full((len(latents),), i, device=args.device)
        t = schedule.timesteps[step]

        # in microbatches as in training, see choose_micro_batch
        noise_preds = []
        for start in range(0, len(latents), args.micro_batch):
            rows = slice(start, start + args.micro_batch)
            noise_preds.append(
                predict_noise(unet, latents[rows], t[rows], embeds[:, rows], args.guidance_scale)
            )
        noise_pred = torch.cat(noise_preds)

        latents, log_prob, _ = ddpm_step(noise_pred, latents, step, schedule, noise=noise[:, i + 1])
        trajectory.append(latents)
        log_probs.append(log_prob)

    trajectory = torch.stack(trajectory, dim=1)
    log_probs = torch.stack(log_probs, dim=1)
    is_finite = trajectory[:, 1:].flatten(2).isfinite().all(dim=2) & log_probs.isfinite()  # (N, T)
    if not is_finite.all():
        step = (~is_finite).any(dim=0).nonzero()[0].item()
        sample = (~is_finite[:, step]).nonzero()[0].item()
        where = f"from step {step + 1} of {args.num_steps} on (sample {sample})"
        raise FloatingPointError(f"latents are not finite {where}")
    return trajectory, log_probs


@torch.no_grad()
def decode(vae, latents):
    """Latents (N, C, H, W) -> the pictures that are scored and shown, uint8 array (N, H, W, 3).

    Raises FloatingPointError for a picture that is not finite: it would be scored as a black one.
    """
    pictures = []
    for chunk in latents.split(4):  # a decoder needs more memory per row than a UNet
        pictures.append(vae.decode(chunk / vae.config.scaling_factor).sample)
    images = torch.cat(pictures)
    if not images.isfinite().all():
        raise FloatingPointError("the VAE's pictures of finite latents are not finite")
    images = (images / 2 + 0.5).clamp(0, 1) * 255
    return images.round().byte().permute(0, 2, 3, 1).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# the algorithm


def check_algorithm(args, world_size):
    """Refuse what this algorithm cannot use."""
    if not args.adv_clip > 0:
        fail(f"--adv-clip {args.adv_clip}: must be greater than 0")
    if not args.clip_range > 0:
        fail(f"--clip-range {args.clip_range}: must be greater than 0")
    shares = args.num_updates * world_size
    if args.num_samples % shares > 0:
        fail(f"--num-samples {args.num_samples}: not a multiple of {shares} (updates x processes)")
    if args.precision == "bf16":
        print("bf16 rounds log-probs by about 4e-4, more than the default --clip-range: use fp16")


def compute_advantages(rewards, prompts, history, adv_clip):
    """Normalise by the 16 newest rewards of the prompt, or by the batch until it has 16.

    rewards (N,), prompts list of N, history {prompt: last rewards}, updated in place -> (N,)
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    for prompt, reward in zip(prompts, rewards):
        history[prompt] = (history.get(prompt, []) + [float(reward)])[-16:]

    advantages = np.zeros(len(rewards))
    for i, prompt in enumerate(prompts):
        peers = np.array(history[prompt]) if len(history[prompt]) == 16 else rewards
        if np.ptp(peers) > 0:  # equal rewards have no advantage
            advantages[i] = (rewards[i] - peers.mean()) / (peers.std() + 1e-6)
    return advantages.clip(-adv_clip, adv_clip)


def compute_loss(log_prob, batch, args):
    """Clipped policy gradient (lines 29-31) of n pairs. The ratio is per step (equation 2).

    log_prob (n,) of the current policy; batch: log_prob_old (n,), advantages (n,).
    Returns the loss (n,) and a dict of metrics (n,).
    """
    log_ratio = log_prob - batch["log_prob_old"]
    ratio = torch.exp(log_ratio)
    unclipped_loss = -batch["advantages"] * ratio
    clipped_loss = -batch["advantages"] * ratio.clamp(1 - args.clip_range, 1 + args.clip_range)

    metrics = {
        "ratio_err": (ratio - 1).abs(),
        "approx_kl": 0.5 * log_ratio**2,
        "clipfrac": ((ratio - 1).abs() > args.clip_range).float(),
    }
    return torch.maximum(unclipped_loss, clipped_loss), metrics


def accumulate_gradients(unet, rollout, samples, schedule, scaler, args):
    """Gradient of the mean loss over all (sample, step) pairs of `samples`, in microbatches.

    rollout: latents (N, T + 1, C, H, W), embeds (2, N, L, D), log_probs (N, T), advantages (N,);
    samples (n,): indices into them. Deterministic steps have no density and are left out.
    Returns a dict of metrics: means over the pairs, but the maximum of ratio_err.
    """
    unet.zero_grad()
    # step by step as in sampling: half precision needs its batches, see choose_micro_batch
    pairs = torch.cartesian_prod(schedule.noisy_steps, samples)  # (num_pairs, 2)
    metrics = defaultdict(list)
    for chunk in pairs.split(args.micro_batch):
        step, index = chunk.unbind(dim=1)
        latents = rollout["latents"][index, step]
        next_latents = rollout["latents"][index, step + 1]
        embeds = rollout["embeds"][:, index]
        batch = {
            "log_prob_old": rollout["log_probs"][index, step],
            "advantages": rollout["advantages"][index],
        }

        t = schedule.timesteps[step]
        noise_pred = predict_noise(unet, latents, t, embeds, args.guidance_scale)
        _, log_prob, _ = ddpm_step(noise_pred, latents, step, schedule, next_latents)
        loss, info = compute_loss(log_prob, batch, args)
        scaler.scale(loss.sum() / len(pairs)).backward()

        for name, value in {"loss": loss, **info}.items():
            metrics[name].append(value.detach())

    average_gradients(unet)
    summary = {name: torch.cat(values).mean().item() for name, values in metrics.items()}
    summary["ratio_err"] = torch.cat(metrics["ratio_err"]).max().item()
    return summary


# --------------------------------------------------------------------------------------------------
# plumbing, the same in all five scripts


def fail(message):
    """End with one line and exit code 2: for errors that the user can fix."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(command_line=None):
    """The flags; with --resume those of that run, of which only a few can be changed."""
    args = tyro.cli(Args, description=__doc__, args=command_line)
    if args.resume is None:
        return args
    try:
        metadata = json.loads(Path(args.resume, "args.json").read_text())
        if metadata["script"] != Path(__file__).stem:
            fail(f"--resume {args.resume}: it is a run of {metadata['script']}.py")
        saved = Args(**metadata["args"])
        saved.adam_betas = tuple(saved.adam_betas)
        saved.resume = args.resume
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--resume {args.resume}: it has no args.json of this script ({error})")

    args = tyro.cli(Args, description=__doc__, args=command_line, default=saved)
    may_change = ("iterations", "save_every", "track", "device", "micro_batch", "model")
    for name, value in asdict(saved).items():
        if name not in may_change and getattr(args, name) != value:
            fail(f"--resume {args.resume}: --{name.replace('_', '-')} was {value} and must stay")
    return args


def init_processes(args):
    """Resolve --device. Returns (rank, world_size): torchrun has a process per GPU, else (0, 1)."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_torchelastic_launched():
        return 0, 1
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group(timeout=timedelta(hours=2))  # rank 0 evaluates, the others wait
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def gather(value):
    """[value of process 0, value of process 1, ...], in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def average_gradients(unet):
    """Replace each process's gradient by the mean over the processes."""
    if not dist.is_initialized():
        return
    for p in unet.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad / dist.get_world_size()
            dist.all_reduce(p.grad)


def check_args(args):
    """Refuse what no script can use, and resolve --model and --precision."""
    positive = ["iterations", "save_every", "num_samples", "num_steps", "num_updates"]
    positive += ["lr", "max_grad_norm"]
    not_negative = ["seed", "guidance_scale", "weight_decay", "adam_eps", "micro_batch"]
    if args.lora_rank is not None:
        not_negative.append("lora_rank")
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in positive and not 0 < value < 1e30:
            fail(f"{flag}: must be a finite number greater than 0")
        if name in not_negative and not 0 <= value < 2**63:
            fail(f"{flag}: must be a finite number, 0 or greater")

    if not all(0 <= beta < 1 for beta in args.adam_betas):
        fail(f"--adam-betas {args.adam_betas}: both must be at least 0 and below 1")

    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0][:200]}")
    if args.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        fail("--compile: needs a C++ compiler, such as g++")

    on_gpu = args.device.startswith("cuda")
    if args.precision == "auto":
        args.precision = "fp16" if on_gpu else "fp32"
    if args.model == "auto":
        args.model = "CompVis/stable-diffusion-v1-4" if on_gpu else "models/emoji"
    for folder in (Path(args.model), HERE / args.model):
        if folder.is_dir():
            args.model = str(folder.resolve())
            break


def load_prompts(args):
    """The list of prompts; a resumed run reads the copy in its own folder."""
    source = str(Path(args.resume, "prompts.txt")) if args.resume else args.prompts
    if source == "animals":
        return ANIMALS.split()
    if source == "imagenet":
        from torchvision.models import ResNet50_Weights

        return ResNet50_Weights.DEFAULT.meta["categories"][:398]
    path = Path(source)
    if path.suffix in (".csv", ".json", ".jsonl"):
        fail(f"--prompts {path}: write a text file with one prompt per line")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompts {path}: animals, imagenet, or a UTF-8 text file is needed ({error})")
    lines = [line.strip() for line in text.split("\n")]  # splitlines would split at U+2028 too
    prompts = [line for line in lines if line]
    if not prompts:
        fail(f"--prompts {path}: the file is empty; write one prompt per line")
    return prompts


def read_json(args, path):
    """One of the model's JSON files, from its folder or from the Hugging Face hub."""
    try:
        local = os.path.isdir(args.model)
        file = Path(args.model, path) if local else hf_hub_download(args.model, path)
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = f"in this folder, here or in {HERE}, or on the hub"
        fail(f"--model {args.model}: cannot read {path} {where}: {reason}")


def check_model(args):
    """Refuse, by its JSON files alone, a model whose parts do not work as Stable Diffusion's do.

    Returns its scheduler and the shape of a latent, (C, H, W).
    """

    def refuse(condition, problem):
        if condition:
            fail(f"--model {args.model}: {problem}")

    kind = read_json(args, "model_index.json").get("_class_name")
    refuse(kind != "StableDiffusionPipeline", f"its pipeline is {kind}, not Stable Diffusion")
    unet = read_json(args, "unet/config.json")
    vae = read_json(args, "vae/config.json")
    text_encoder = read_json(args, "text_encoder/config.json")
    config = read_json(args, "scheduler/scheduler_config.json")
    read_json(args, "tokenizer/tokenizer_config.json")

    # the parts fit each other, and a prompt is all that the UNet is conditioned on
    channels = vae.get("latent_channels", 4)
    refuse(unet.get("in_channels", 4) != channels, f"its UNet does not take {channels} channels")
    refuse(unet.get("out_channels", 4) != channels, f"its UNet does not return {channels} channels")
    features = text_encoder.get("hidden_size", 512)
    attended = unet.get("cross_attention_dim", 1280)
    refuse(attended != features, f"its UNet attends to {attended} text features, not {features}")
    refuse(vae.get("out_channels", 3) != 3, "its VAE does not decode to RGB")
    conditions = ("class_embed_type", "num_class_embeds", "time_cond_proj_dim")
    for name in (*conditions, "addition_embed_type", "encoder_hid_dim"):
        refuse(unet.get(name) is not None, f"its UNet needs more than a prompt ({name})")
    size = unet.get("sample_size")
    refuse(size is None, "its UNet's config has no sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    if os.path.isdir(args.model):
        files = [
            "unet/diffusion_pytorch_model",
            "vae/diffusion_pytorch_model",
            "text_encoder/model",
        ]
        for file in files:
            found = list(Path(args.model).glob(f"{file}.safetensors*"))  # or an index of shards
            refuse(not found, f"no {file}.safetensors (.bin and fp16 files are not supported)")

    # the scheduler defines a DDPM chain
    refuse("beta_schedule" not in config, f"{config.get('_class_name')} has no DDPM chain (betas)")
    target = config.get("prediction_type", "epsilon")
    refuse(target not in ("epsilon", "v_prediction"), f"it predicts {target}, not epsilon or v")
    refuse(config.get("thresholding"), "its scheduler thresholds x_0: a step is not Gaussian")
    zero_snr = config.get("rescale_betas_zero_snr")
    refuse(zero_snr and target == "epsilon", "epsilon is undefined at zero terminal SNR, abar = 0")

    # as StableDiffusionPipeline treats them, whatever the file says
    total = config.get("num_train_timesteps", 1000)
    if args.num_steps >= total:
        fail(f"--num-steps {args.num_steps}: at most {total - 1}")
    scheduler = DDIMScheduler.from_config(config, steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(args.num_steps)
    first = scheduler.timesteps[0].item()
    if first < 0.9 * total - total / args.num_steps:  # at 400 of 1000 steps it begins at 799
        fail(f"--num-steps {args.num_steps}: the chain would begin at timestep {first} of {total}")
    return scheduler, (channels, height, width)


def choose_micro_batch(args, latent_shape, num_samples, num_pairs):
    """Resolve --micro-batch: the most pairs per forward pass that fit and divide `num_pairs`.

    A number that was given is lowered to the next divisor. Otherwise it is the fastest on a CPU (no
    gain beyond 100), and on a GPU what fits: 2.5 GiB per pair of Stable Diffusion, 2**14 numbers.
    In half precision it divides an update's samples: then training has the batches of sampling, row
    by row. Others are rounded otherwise, and the ratio of the first update would not be 1. In fp32
    that changes a log-prob by 1e-6 at the most.
    """
    if num_pairs == 0:
        fail(f"--num-steps {args.num_steps}: no step of this scheduler has noise")

    limit = args.micro_batch
    if limit == 0:
        limit = min(100, 2**17 // math.prod(latent_shape))  # 8 pairs of Stable Diffusion
        if args.device.startswith("cuda"):
            memory = torch.cuda.get_device_properties(args.device).total_memory / 2**30
            if args.lora_rank == 0:  # weights, gradients, AdamW and ISKL's reference: 17 GiB
                memory = max(memory - 18, memory / 4)
            limit = int(memory / 2.5 * 2**14 / math.prod(latent_shape))  # at 24 GiB: 9

    common = num_pairs
    if args.precision != "fp32":
        common = math.gcd(num_samples // args.num_updates, num_pairs)
    limit = min(max(limit, 1), common)
    args.micro_batch = max(n for n in range(1, limit + 1) if common % n == 0)


def load_model(args):
    """The pipeline, and the trainable parameters of its UNet by name, float32."""
    pipe = StableDiffusionPipeline.from_pretrained(
        args.model, use_safetensors=True, safety_checker=None, dtype=torch.float32
    )
    pipe.to(args.device)
    pipe.text_encoder.requires_grad_(False)
    unet = pipe.unet
    if args.lora_rank is None:
        args.lora_rank = 4 if unet.num_parameters() >= 50e6 else 0

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[args.precision]
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if args.lora_rank > 0:
        torch.manual_seed(args.seed)
        unet.requires_grad_(False)
        unet.to(dtype)
        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_rank,
            init_lora_weights="gaussian",
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
        unet.add_adapter(config)
        cast_training_params(unet, torch.float32)
        for module in unet.modules():
            module.cast_input_dtype_enabled = False  # PEFT would copy every input to float32

    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    # the layers in half precision; predict_noise makes the output float32 again
    device_type = torch.device(args.device).type
    if device_type == "cuda":
        unet.to(memory_format=torch.channels_last)
    autocast = torch.autocast(device_type, dtype, enabled=args.precision != "fp32")
    unet.forward = MethodType(autocast(type(unet).forward), unet)  # survives copy.deepcopy(unet)
    if args.compile:
        unet.compile()
    return pipe, {name: p for name, p in unet.named_parameters() if p.requires_grad}


def open_run(args, pipe, prompts, score):
    """Make the run folder, or check the one of --resume. Returns its path."""
    fingerprint = hashlib.sha256()  # of the first numbers of each pretrained tensor
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for name, tensor in part.state_dict().items():
            if "lora_" not in name:
                fingerprint.update(tensor.flatten()[:1000].float().cpu().numpy().tobytes())
    if args.resume:
        metadata = json.loads(Path(args.resume, "args.json").read_text())
        if metadata["weights"] != fingerprint.hexdigest():
            fail(f"--resume {args.resume}: it started from other weights than {args.model}")
        copy = Path(args.resume, Path(__file__).name)
        if copy.exists() and copy.read_bytes() != Path(__file__).read_bytes():
            print(f"{Path(__file__).name} has changed since this run began, see its copy {copy}")
        return Path(args.resume)

    script = Path(__file__).stem
    name = f"{script}__{score.label}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run = Path(args.out, name)
    number = 1
    while True:
        try:
            run.mkdir(parents=True)
            break
        except OSError as error:
            if not os.path.exists(run):
                fail(f"--out {args.out}: {error}")
            number += 1  # another run was started in the same second
            run = Path(args.out, f"{name}-{number}")

    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = ""  # outside a checkout, or without git
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    metadata = {
        "script": script,
        "args": asdict(args),
        "command": shlex.join(sys.argv),
        "git": commit,
        "versions": {lib.__name__: lib.__version__ for lib in (torch, diffusers, transformers)},
        "gpu": torch.cuda.get_device_name(args.device) if "cuda" in args.device else "",
        "weights": fingerprint.hexdigest(),
    }
    if Path(args.model).is_relative_to(HERE):  # found again where the checkout was moved
        metadata["args"]["model"] = str(Path(args.model).relative_to(HERE))
    with writing_to(run):
        (run / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        save_user_files(score, run / "reward")
        shutil.copy(__file__, run)
        shutil.copy(HERE / "rewards.py", run)
        (run / "args.json").write_text(json.dumps(metadata, indent=2))  # last: all is there
    return run


def resume_command(run):
    return shlex.join(["python", sys.argv[0], "--resume", str(run)])


@contextmanager
def writing_to(run):
    """A disk that is full or read-only ends the run in one line; the last checkpoint is whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot write to {run}: {reason}. Make room, then {resume_command(run)}")


def save_checkpoint(run, pipe, params, optimizer, state, args):
    """lora/ or unet/ for diffusers, then checkpoint/state.pt for --resume, renamed when whole."""
    if not all(p.isfinite().all() for p in params.values()):
        fail("the weights are not finite and are not saved: start a new run with a lower --lr")
    if args.lora_rank > 0:
        pipe.save_lora_weights(run / "lora", get_peft_model_state_dict(pipe.unet))
    else:
        pipe.unet.save_pretrained(run / "unet")

    checkpoint = {
        "weights": {name: p.detach() for name, p in params.items()},
        "optimizer": optimizer.state_dict(),
        "state": state,
    }
    (run / "checkpoint").mkdir(exist_ok=True)
    try:
        torch.save(checkpoint, run / "checkpoint/state.tmp")
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(error) from error
    os.replace(run / "checkpoint/state.tmp", run / "checkpoint/state.pt")


def load_checkpoint(run, params, optimizer):
    """Restore weights and optimizer in place. Returns the state, None where nothing was saved."""
    path = run / "checkpoint/state.pt"
    if not path.exists():
        print(f"{run} has no checkpoint: starting from the beginning")
        return None
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch does not compare checksums
            raise ValueError("wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        fail(f"{path} is damaged: put back a copy or start a new run ({type(error).__name__})")
    for name, p in params.items():
        p.data.copy_(checkpoint["weights"][name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["state"]


def write_metrics(run, rows):
    """metrics.csv: a row per iteration, with blanks where a row lacks a column."""
    columns = {}
    for row in rows:
        columns |= row  # in the order in which they first appear
    with open(run / "metrics.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(run / "metrics.tmp", run / "metrics.csv")


def make_generator(*key):
    """The generator of a key (seed, iteration, sample, purpose), on the CPU for any device."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def run_policy(pipe, prompts, generators, latent_shape, schedule, args):
    """One trajectory for each of N prompts, with the noise of its generator.

    Returns latents (N, T + 1, C, H, W), log_probs (N, T), and the text embeddings (2, N, L, D).
    """
    shape = (len(prompts), args.num_steps + 1, *latent_shape)
    noise = randn_tensor(shape, generator=generators)  # on the CPU: the same on every device
    if args.device.startswith("cuda"):
        noise = noise.pin_memory()
    noise = noise.to(args.device, non_blocking=True)
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(
        prompts, args.device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    embeds = torch.stack([negative_prompt_embeds, prompt_embeds])
    latents, log_probs = sample_trajectories(pipe.unet, embeds, noise, schedule, args)
    return latents, log_probs, embeds


def score_pictures(score, images, prompts, run):
    """score(images, prompts). Where the reward fails, prints how to resume once it works."""
    try:
        return score(images, prompts)
    except RewardError:
        fix = f"fix the reward (your own file: its copy in {run}/reward)"
        print(f"{fix}, then resume with: {resume_command(run)}", file=sys.stderr)
        raise


def evaluate(pipe, run, iteration, prompts, score, alignment, schedule, latent_shape, args):
    """Reward, diversity and CLIP score of up to 32 fixed prompts, with two fixed noises each.

    Writes their grid to images/ and the denoising of an elephant to trajectory/.
    """
    num_prompts = min(32, len(prompts))
    chosen = [prompts[i] for i in np.linspace(0, len(prompts) - 1, num_prompts).astype(int)] * 2
    eval_prompts = [*chosen, "elephant"]
    # the same noise in all evaluations of all runs
    generators = [make_generator(0, 0, i, 1) for i in range(len(eval_prompts))]
    latents, _, _ = run_policy(pipe, eval_prompts, generators, latent_shape, schedule, args)
    images = decode(pipe.vae, latents[:-1, -1])
    # x after 1, 10, 20, 30, 40 and 50 of 50 steps, which Figure 4 counts from 0
    strip_steps = [1] + [max(1, k * args.num_steps // 5) for k in range(1, 6)]
    strip = decode(pipe.vae, latents[-1, strip_steps])

    with writing_to(run):
        for folder, pictures, rows in (("images", images, 2), ("trajectory", strip, 1)):
            cells = [Image.fromarray(picture) for picture in pictures]
            grid = make_image_grid(cells, rows=rows, cols=len(cells) // rows)
            grid.thumbnail((4096, 4096))
            (run / folder).mkdir(exist_ok=True)
            grid.save(run / folder / f"{iteration:04d}.png")

    rewards, _ = score_pictures(score, images, chosen, run)
    squared_difference = (images[:num_prompts] / 255 - images[num_prompts:] / 255) ** 2
    metrics = {
        "eval_reward": float(rewards.mean()),
        "eval_reward_se": float(rewards.std(ddof=1) / math.sqrt(len(rewards))),
        "eval_diversity": float(np.sqrt(squared_difference.mean(axis=(1, 2, 3))).mean()),
    }
    if alignment is not None:
        metrics["eval_align"] = float(np.mean(alignment(images, chosen)))
    return metrics


def save_before_after(run, last):
    """before_after.png: the first line of the first grid above that of the last grid."""
    paths = [run / "images/0000.png", run / f"images/{last:04d}.png"]
    if all(path.exists() for path in paths):
        grids = [Image.open(path) for path in paths]
        lines = [grid.crop((0, 0, grid.width, grid.height // 2)) for grid in grids]
        with writing_to(run):
            make_image_grid(lines, rows=2, cols=1).save(run / "before_after.png")


def init_tracking(run, args):
    """Start Weights & Biases, offline where it cannot be reached: it never stops a run."""
    import wandb

    options = {"project": "ddpo", "name": run.name, "id": run.name, "config": asdict(args)}
    try:
        wandb.init(**options, resume="allow")
    except Exception as error:  # not logged in, no network, a service that is down
        print(f"wandb: {error}; logging offline, for `wandb sync`")
        wandb.teardown()  # the run that failed would still hold its id
        wandb.init(**options, mode="offline")
    return wandb


def stop_signals():
    """A list that Ctrl-C, SIGTERM or SIGHUP fills, to end after the iteration; a second exits."""
    received = []

    def receive(number, frame):
        if received:
            sys.exit(128 + number)
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so do we
            signal.signal(number, receive)
    return received


# --------------------------------------------------------------------------------------------------
# main


def main(args):
    # quiet libraries
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

    # settle the arguments, before weights are loaded
    rank, world_size = init_processes(args)
    check_args(args)
    check_algorithm(args, world_size)
    prompts = load_prompts(args)
    scheduler, latent_shape = check_model(args)
    schedule = make_schedule(scheduler, args.num_steps, args.device)
    local_samples = args.num_samples // world_size  # of this process
    num_pairs = local_samples // args.num_updates * len(schedule.noisy_steps)
    choose_micro_batch(args, latent_shape, local_samples, num_pairs)
    device_type = torch.device(args.device).type
    print(f"{args.model} on {world_size} x {device_type} in {args.precision}")
    print(
        f"{args.num_samples} samples of {args.num_steps} steps; {args.num_updates} updates of "
        f"{num_pairs * world_size} pairs, {args.micro_batch} per forward pass"
    )

    # load the reward and the model
    clip_folder = f"{args.model}/clip"
    user_files = Path(args.resume, "reward") if args.resume else None
    try:
        score = load_reward(args.reward, args.device, clip_folder, user_files)
        alignment = load_alignment(args.reward, args.device, clip_folder)
    except RewardError as error:
        fail(f"--reward {args.reward}: {error}")
    pipe, params = load_model(args)
    method = f"LoRA of rank {args.lora_rank}" if args.lora_rank else "full fine-tuning"
    trained = sum(p.numel() for p in params.values())
    print(f"{method}: {trained / 1e6:.2f} M of {pipe.unet.num_parameters() / 1e6:.1f} M parameters")
    max_tokens = pipe.tokenizer.model_max_length
    num_long = sum(len(ids) > max_tokens for ids in pipe.tokenizer(prompts).input_ids)
    if num_long > 0:
        print(f"{num_long} of {len(prompts)} prompts are cut after {max_tokens} tokens")
    optimizer = torch.optim.AdamW(
        params.values(),
        lr=args.lr,
        betas=args.adam_betas,
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
        fused=args.device.startswith("cuda"),
    )
    scaler = torch.amp.GradScaler(device_type, enabled=args.precision == "fp16")
    scaler.scale(torch.zeros((), device=args.device))  # sets it up, also where RWR leaves no pairs

    # open the run; row 0 of its metrics is the pretrained model
    run = open_run(args, pipe, prompts, score) if rank == 0 else None
    run = gather(run)[0]
    state = load_checkpoint(run, params, optimizer) if args.resume else None
    if state is None:
        row = {"iteration": 0, "samples": 0}
        if rank == 0:
            metrics = evaluate(
                pipe, run, 0, prompts, score, alignment, schedule, latent_shape, args
            )
            row.update(metrics)
        state = {"rows": [row], "history": {}, "skipped": 0}
        state["scaler"] = scaler.state_dict()
    scaler.load_state_dict(state["scaler"])
    rows = state["rows"]
    done = rows[-1]["iteration"]
    tracker = init_tracking(run, args) if args.track and rank == 0 else None
    if tracker is not None:
        tracker.log(rows[-1], step=done)
    signals = stop_signals()

    # no bar where the output is not a terminal (None), nor in the other processes (True)
    progress = tqdm(initial=done, total=args.iterations, disable=None if rank == 0 else True)
    for iteration in range(done + 1, args.iterations + 1):
        # sample: process r draws the samples r, r + world_size, ...
        start_time = time.time()
        generators = [make_generator(args.seed, iteration, i, 0) for i in range(args.num_samples)]
        all_prompts = [prompts[torch.randint(len(prompts), (), generator=g)] for g in generators]
        generators = generators[rank::world_size]
        batch_prompts = all_prompts[rank::world_size]
        latents, log_probs, embeds = run_policy(
            pipe, batch_prompts, generators, latent_shape, schedule, args
        )
        images = decode(pipe.vae, latents[:, -1])
        sample_time = time.time()

        # reward
        rewards, reward_parts = score_pictures(score, images, batch_prompts, run)
        rewards = np.stack(gather(rewards), axis=1).flatten()  # in the order of all_prompts
        reward_time = time.time()

        # train: each update takes an equal share of the samples, which are independent
        advantages = compute_advantages(rewards, all_prompts, state["history"], args.adv_clip)
        rollout = {
            "latents": latents,
            "embeds": embeds,
            "log_probs": log_probs,
            "advantages": torch.tensor(advantages[rank::world_size]).to(log_probs),
        }
        updates = []
        for samples in torch.arange(local_samples, device=args.device).chunk(args.num_updates):
            info = accumulate_gradients(pipe.unet, rollout, samples, schedule, scaler, args)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(params.values(), args.max_grad_norm).item()
            is_finite = math.isfinite(grad_norm)  # in all processes or in none
            if is_finite:
                scaler.step(optimizer)
            scaler.update()
            state["skipped"] = 0 if is_finite else state["skipped"] + 1
            if state["skipped"] == 10:
                fail("10 updates in a row were not finite: start a new run with a lower --lr")
            updates.append({**info, "grad_norm": grad_norm, "skipped": float(not is_finite)})
        train_time = time.time()

        # log
        row = {
            "iteration": iteration,
            "samples": iteration * args.num_samples,
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std()),
        }
        if len(reward_parts) > 1:
            for name, values in reward_parts.items():
                row[f"reward_{name}"] = float(np.mean(gather(values)))
        all_updates = sum(gather(updates), [])  # of all processes
        for name in updates[0]:
            row[name] = float(np.mean([update[name] for update in all_updates]))
        # in the first update no weight has moved yet: what is left is rounding, or a mistake
        row["ratio_err"] = max(gather(updates[0]["ratio_err"]))
        noted = any(earlier.get("ratio_err", 0) > args.clip_range / 10 for earlier in rows)
        if row["ratio_err"] > args.clip_range / 10 and not noted:
            tqdm.write("ratio_err is high: use fp32, or, if it is in use, read docs/metrics.md")
        row["sample_s"] = sample_time - start_time
        row["reward_s"] = reward_time - sample_time
        row["train_s"] = train_time - reward_time
        row["images_per_s"] = args.num_samples / row["sample_s"]
        row["peak_mem_gb"] = psutil.Process().memory_info().rss / 1e9
        if args.device.startswith("cuda"):
            row["peak_mem_gb"] = torch.cuda.max_memory_allocated(args.device) / 1e9
        rows.append(row)
        seconds = train_time - start_time
        left = seconds * (args.iterations - iteration) / 60
        text = f"reward {row['reward_mean']:.3f} +- {row['reward_std']:.3f}"
        tqdm.write(f"iteration {iteration}: {text}, {seconds:.1f} s, {left:.0f} min left")
        progress.set_postfix_str(text, refresh=False)
        progress.update()

        # evaluate and save
        stopped = any(gather(bool(signals)))  # the same in all processes
        save = stopped or iteration == args.iterations or iteration % args.save_every == 0
        if rank == 0 and save:
            metrics = evaluate(
                pipe, run, iteration, prompts, score, alignment, schedule, latent_shape, args
            )
            row.update(metrics)
        if rank == 0:
            with writing_to(run):
                write_metrics(run, rows)
                if save:
                    state["scaler"] = scaler.state_dict()
                    save_checkpoint(run, pipe, params, optimizer, state, args)
        if tracker is not None:
            tracker.log(row, step=iteration)
            if save:
                grid = tracker.Image(str(run / f"images/{iteration:04d}.png"))
                tracker.log({"images": grid}, step=iteration)
        if stopped:
            break

    progress.close()
    if rank == 0:
        save_before_after(run, rows[-1]["iteration"])
        before, after = rows[0]["eval_reward"], rows[-1]["eval_reward"]
        print(f"{args.reward}: {before:.3f} -> {after:.3f} on fixed prompts and noise; see {run}")
        if rows[-1]["iteration"] < args.iterations:
            print(f"resume with: {resume_command(run)}")
        elif done >= args.iterations:
            print(f"already finished; to train longer: {resume_command(run)} --iterations N")
    if dist.is_initialized():
        dist.destroy_process_group()
    return run


if __name__ == "__main__":
    try:
        main(parse_args())
    except FloatingPointError as error:
        fail(f"{error}. Start a new run with --precision fp32 or a lower --lr")
    except torch.OutOfMemoryError:
        fail("out of GPU memory: take a smaller --micro-batch, or --gradient-checkpointing")
