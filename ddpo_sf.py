"""
DDPO-SF: policy gradients over denoising steps, by the score function: REINFORCE (Algorithm 3).

A denoising step is an action, x_{t-1} ~ N(mu_theta(x_t, c, t), sigma_t^2 I). The reward r(x_0, c)
of the finished picture is the return of every step. With A the normalised reward, the loss of one
(sample, step) pair is

    loss = -A * log_prob

Its gradient is only unbiased in the first update of an iteration: the samples of a later one were
drawn before the weights moved. Hence one update by default, and a small step; Table 1's four
updates at lr 3e-4 destroy the pictures of models/emoji. Importance sampling corrects later updates:
diff ddpo_sf.py ddpo_is.py

    python ddpo_sf.py --reward compress
    ... --iterations 20 --num-steps 20      # a quick look
    ... --resume runs/NAME                  # continue a run

Measured on models/emoji, 100 iterations, n = 3: JPEG size 2.500 -> 2.145 +- 0.194 kB.
The algorithms are from "Guiding the training of diffusion models: a replication of DDPO" (Gao, Shi,
Zhang), after DDPO (Black et al., https://arxiv.org/abs/2305.13301).
"""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import chain, count
from pathlib import Path
from types import MethodType
from typing import Literal

# OpenMP's threads spin while they wait, which stalls a run beside any other busy process
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
import tyro
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tqdm import tqdm

from rewards import load_metrics, load_reward

SCRIPT = Path(__file__).resolve()


@dataclass
class Args:
    # run
    reward: str = "compress"
    """a name of `rewards.py --list`, a sum like "aesthetic + 0.5*clip", or FILE.py:FUNCTION"""
    prompts: str = "animals"
    """a list in prompts/ (animals, imagenet_animals), or a text file with one prompt per line"""
    seed: int = 1
    """seeds prompts, noise and LoRA weights; the noise of evaluations does not depend on it"""
    iterations: int = 200
    """rounds of sampling and training; 0 evaluates the pretrained model"""
    out: str = "runs"
    """folder in which the run's folder is made"""
    resume: str | None = None
    """run folder to continue; flags that are not given are taken from its args.json"""
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
    """classifier-free guidance weight, in sampling and in training (W_c); up to 1: no guidance"""
    # optimisation
    lr: float = 1e-4  # Table 1: 3e-4, too large a step for this estimator on models/emoji
    """AdamW learning rate (eta)"""
    weight_decay: float = 1e-4
    """AdamW weight decay (lambda)"""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW (beta_1, beta_2)"""
    adam_eps: float = 1e-8
    """AdamW epsilon"""
    max_grad_norm: float = 1.0
    """the gradient norm is clipped to this (C_clip)"""
    num_updates: int = 1  # Table 1: 4, of which three are off-policy
    """gradient steps per iteration (N_updates), each on an equal share of the samples"""
    micro_batch: int = 0
    """(sample, step) pairs per forward pass, at most: only memory and speed; 0 = choose"""
    # this algorithm
    adv_clip: float = 5.0
    """advantages are clipped to +- this; those of 16 peers are at most sqrt(15)"""


# ---- the sampler: a diffusion model as a policy --------------------------------------------------


def make_schedule(pipe, args):
    """The model's DDPM chain: a diffusers scheduler with `tables` (5, T), sigma last."""
    # as StableDiffusionPipeline runs it, whatever class and offset are in the model's config
    schedule = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1, clip_sample=False)
    schedule.set_timesteps(args.num_steps, device=args.device)
    abar = schedule.alphas_cumprod.double()[schedule.timesteps.cpu()]
    abar_prev = torch.cat([abar[1:], schedule.final_alpha_cumprod.double().view(1)])
    alpha = abar / abar_prev
    beta = 1 - alpha
    sigma = (beta * (1 - abar_prev) / (1 - abar)).sqrt()  # DDIM with eta = 1, as in ddpm_step
    schedule.tables = torch.stack([abar, abar_prev, alpha, beta, sigma]).float().to(args.device)
    schedule.noisy_steps = torch.nonzero(schedule.tables[-1] > 0).flatten()
    height, width = np.broadcast_to(pipe.unet.config.sample_size, 2).tolist()
    schedule.latent_shape = (pipe.unet.config.in_channels, height, width)
    # refuse(condition, message): what would run here, but not as the model was trained
    config = schedule.config
    target = config.prediction_type
    total = config.num_train_timesteps
    first = schedule.timesteps[0].item()  # with 400 steps t = 799, where x_t is not yet all noise
    refuse(first < 0.9 * total - total / args.num_steps, f"--num-steps: starts at t = {first}")
    refuse("beta_schedule" in config.get("_use_default_values", []), "the scheduler has no betas")
    refuse(config.thresholding, "the scheduler thresholds x_0, so a step is not Gaussian")
    refuse(target not in ("epsilon", "v_prediction"), f"it predicts {target}, not epsilon or v")
    refuse(abar[0] == 0 and target == "epsilon", "epsilon is undefined at zero terminal SNR")
    refuse(pipe.unet.config.time_cond_proj_dim, "the UNet embeds the guidance scale (LCM)")
    return schedule


def predict_noise(unet, latents, t, embeds, guidance_scale):
    """The UNet's prediction with classifier-free guidance (Algorithm 4, lines 13-15).

    latents (N, C, H, W), t (N,) timesteps, embeds (2, N, L, E): unconditional, conditional.
    Returns float32 (N, C, H, W): epsilon, or v where the model has prediction_type v_prediction.
    """
    if guidance_scale <= 1:  # the prompt alone, as in diffusers
        return unet(latents, t, embeds[1]).sample.float()
    output = unet(torch.cat([latents, latents]), t.repeat(2), embeds.flatten(0, 1)).sample
    noise_pred_uncond, noise_pred_text = output.float().chunk(2)
    return noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)


def ddpm_step(unet, latents, step, embeds, schedule, args, next_latents=None, noise=None):
    """One action: draws x_{t-1} with `noise`, or scores `next_latents` (Algorithm 4, lines 13-18).

    latents, next_latents, noise (N, C, H, W) float32; step (N,) from 0 to T - 1.
    Returns next_latents, log_prob (N,) and the mean of x_{t-1}. log_prob is the *mean* over
    dimensions: a clip range of 1e-4 only makes sense for the mean, and the sum over the 16,384 of
    Stable Diffusion overflows exp. Where sigma = 0 it is not finite: see noisy_steps.
    """
    t = schedule.timesteps[step]
    noise_pred = predict_noise(unet, latents, t, embeds, args.guidance_scale)
    abar, abar_prev, alpha, beta, sigma = schedule.tables[:, step, None, None, None]  # (N, 1, 1, 1)
    if schedule.config.prediction_type == "epsilon":
        # Algorithms 4 and 5 print sqrt(1 - alpha_t); Algorithm 3's sqrt(1 - abar_t) is right
        mean = (latents - beta / (1 - abar).sqrt() * noise_pred) / alpha.sqrt()
    else:
        # the same with eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t, finite at abar_t = 0 too
        mean = alpha.sqrt() * latents - beta * (abar_prev / (1 - abar)).sqrt() * noise_pred
    if next_latents is None:
        next_latents = mean + sigma * noise

    log_density = -0.5 * ((next_latents - mean) / sigma) ** 2 - sigma.log()
    log_prob = (log_density - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
    return next_latents, log_prob, mean


@torch.no_grad()
def sample_trajectories(pipe, prompts, generators, schedule, args):
    """Run the policy on N prompts (Algorithm 4, lines 8-19), each with the noise of its generator.

    Returns latents (N, T + 1, C, H, W), x_T to x_0, log_probs (N, T), text embeds (2, N, L, E).
    """
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(
        prompts, args.device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    embeds = torch.stack([negative_prompt_embeds, prompt_embeds])
    # [:, 0] is x_T, [:, i + 1] the noise of step i until x_{t-1} replaces it; drawn on the CPU
    shape = (len(prompts), args.num_steps + 1, *schedule.latent_shape)
    latents = randn_tensor(shape, generator=generators).to(args.device)
    log_probs = torch.zeros(len(prompts), args.num_steps, device=args.device)
    for index in torch.arange(len(prompts), device=args.device).split(args.micro_batch):
        for i in range(args.num_steps):
            step = torch.full_like(index, i)
            inputs = (latents[index, i], step, embeds[:, index], schedule, args)
            # half precision: with gradients, or PyTorch runs other kernels here than in training
            with torch.set_grad_enabled(args.precision != "fp32"):
                x, log_prob, _ = ddpm_step(pipe.unet, *inputs, noise=latents[index, i + 1])
            latents[index, i + 1] = x
            log_probs[index, i] = log_prob
            del x, log_prob, _  # and their graph, before the next step makes its own
    return {"latents": latents, "log_probs": log_probs, "embeds": embeds}


@torch.no_grad()
def decode(vae, latents):
    """Latents (N, C, H, W) -> pictures, uint8 (N, H, W, 3), or FloatingPointError if not finite."""
    chunks = (latents / vae.config.scaling_factor).split(4)  # a decoder needs a lot of memory
    images = torch.cat([vae.decode(chunk).sample for chunk in chunks])
    if not images.isfinite().all():  # would be scored as black pictures
        raise FloatingPointError("pictures are not finite: use --precision fp32 or a lower --lr")
    images = (images / 2 + 0.5).clamp(0, 1) * 255
    return images.round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---- the algorithm -------------------------------------------------------------------------------


def compute_advantages(rewards, prompts, history, adv_clip):
    """Normalise by the prompt's 16 newest rewards, these included; by the batch while it has fewer.

    rewards (N,), prompts list of N, history {prompt: last rewards}, updated in place -> (N,)
    """
    for prompt, reward in zip(prompts, rewards):
        history[prompt] = (history.get(prompt, []) + [float(reward)])[-16:]

    advantages = np.zeros(len(rewards))
    for i, prompt in enumerate(prompts):
        peers = np.array(history[prompt]) if len(history[prompt]) == 16 else rewards
        if np.ptp(peers) > 0:  # equal rewards have no advantage
            advantages[i] = (rewards[i] - peers.mean()) / (peers.std() + 1e-6)
    return advantages.clip(-adv_clip, adv_clip)


def compute_loss(log_prob, batch):
    """Score-function policy gradient (lines 24-26) of n pairs.

    log_prob (n,) of the current policy; batch: log_prob_old, advantages, (n,) each.
    Returns the loss (n,) and metrics (n,).
    """
    log_ratio = log_prob - batch["log_prob_old"]
    metrics = {
        "ratio_err": (torch.exp(log_ratio) - 1).abs(),
        "approx_kl": 0.5 * log_ratio**2,  # of the mean log-prob, not in nats
    }
    return -batch["advantages"] * log_prob, metrics


def accumulate_gradients(unet, rollout, samples, schedule, scaler, args):
    """Gradient of the mean loss over all (sample, step) pairs of `samples`, in microbatches.

    rollout: latents (N, T + 1, C, H, W), embeds (2, N, L, E), log_probs (N, T), advantages (N,);
    samples (n,): indices into them. Returns metrics: means, but the maximum of ratio_err.
    """
    unet.zero_grad()
    # step by step, as in sampling: batches of other rows round differently in half precision
    pairs = torch.cartesian_prod(schedule.noisy_steps, samples)  # (num_pairs, 2)
    infos = []
    for chunk in pairs.split(args.micro_batch):
        step, index = chunk.unbind(1)
        latents = rollout["latents"][index, step]
        next_latents = rollout["latents"][index, step + 1]
        embeds = rollout["embeds"][:, index]
        batch = {
            "log_prob_old": rollout["log_probs"][index, step],
            "advantages": rollout["advantages"][index],
        }
        _, log_prob, _ = ddpm_step(unet, latents, step, embeds, schedule, args, next_latents)
        loss, info = compute_loss(log_prob, batch)
        scaler.scale(loss.sum() / len(pairs)).backward()
        infos.append({name: x.detach() for name, x in {"loss": loss, **info}.items()})

    metrics = {name: torch.cat([info[name] for info in infos]) for name in infos[0]}
    summary = {name: x.mean().item() for name, x in metrics.items()}
    return summary | {"ratio_err": metrics["ratio_err"].max().item()}


# ---- plumbing, the same in all five scripts ------------------------------------------------------


def refuse(wrong, message):
    """End with one line, for what would otherwise be silently wrong."""
    if wrong:
        sys.exit(f"error: {message}")


def say(text):
    """Print a line at once. If its reader has gone (tee, head, a terminal), the run goes on."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except (OSError, AttributeError):  # a closed stdout is None
        sys.stdout = open(os.devnull, "w")


def load_args(run):
    """The arguments of a run of this script, from its args.json."""
    metadata = json.loads(Path(run, "args.json").read_text())
    refuse(metadata["script"] != SCRIPT.stem, f"{run} is a run of {metadata['script']}.py")
    saved = Args(**metadata["args"])
    saved.adam_betas = tuple(saved.adam_betas)  # a list in JSON
    saved.resume = str(run)
    saved.prompts = str(Path(run, "prompts.txt"))
    return saved


def parse_args(command_line=None):
    """The flags; with --resume those of the run, but for the flags that are given."""
    args = tyro.cli(Args, description=__doc__, args=command_line)
    if args.resume is None:
        return args
    return tyro.cli(Args, description=__doc__, args=command_line, default=load_args(args.resume))


def load_prompts(source):
    """The prompts of a list in prompts/, or of a text file with one prompt per line."""
    path = SCRIPT.parent / f"prompts/{source}.txt"
    if not path.exists():
        path = Path(source)
    text = path.read_text(encoding="utf-8-sig")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    is_table = source.lower().endswith((".csv", ".tsv", ".json", ".jsonl"))
    refuse(is_table or not prompts, f"--prompts {source}: write one prompt per line")
    return prompts


def load_model(args):
    """The pipeline, and its UNet's trainable parameters, float32. Sets rank and microbatch."""
    kind = StableDiffusionPipeline.load_config(args.model)["_class_name"]
    refuse(kind != "StableDiffusionPipeline", f"--model {args.model}: it is a {kind}")
    pipe = StableDiffusionPipeline.from_pretrained(
        args.model, use_safetensors=True, safety_checker=None, dtype=torch.float32
    )
    pipe.to(args.device)
    unet = pipe.unet
    is_large = unet.num_parameters() >= 50e6
    if args.lora_rank is None:
        args.lora_rank = 4 if is_large else 0
    if args.micro_batch == 0:  # of Stable Diffusion 8 pairs fit in 24 GB; a CPU gains up to 80
        large = 4 if args.precision == "fp32" else 8
        args.micro_batch = large if is_large else 80
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if args.lora_rank:
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
    # half precision: the layers, and with LoRA the frozen weights; predict_noise returns float32
    device_type = torch.device(args.device).type
    autocast = torch.autocast(device_type, dtype, enabled=args.precision != "fp32")
    unet.forward = MethodType(autocast(type(unet).forward), unet)  # survives copy.deepcopy(unet)
    if device_type == "cuda":
        unet.to(memory_format=torch.channels_last)
    if args.compile:
        unet.compile()
    return pipe, [p for p in unet.parameters() if p.requires_grad]


def gather(value):
    """[value of process 0, value of process 1, ...], in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def open_run(args, prompts, score):
    """Make the run's folder, or update that of --resume; print how to resume. Returns the path."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # microseconds tell parallel runs apart
    name = f"{SCRIPT.stem}__{score.label}__s{args.seed}__{now}"
    run = Path(args.resume or Path(args.out, name)).resolve()
    run.mkdir(parents=True, exist_ok=True)
    for path in (*score.files, SCRIPT, SCRIPT.with_name("rewards.py")):
        (run / path.name).write_bytes(path.read_bytes())
    (run / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    commands = [shlex.join(["python", *sys.argv])]
    if args.resume:
        commands = json.loads((run / "args.json").read_text())["commands"] + commands
    metadata = {
        "script": SCRIPT.stem,
        "args": asdict(args),
        "commands": commands,
        "git": subprocess.getoutput(f"git -C '{SCRIPT.parent}' rev-parse HEAD"),
        "versions": {lib.__name__: lib.__version__ for lib in (torch, diffusers, transformers)},
        "gpu": torch.cuda.get_device_name(args.device) if "cuda" in args.device else "",
    }
    (run / "args.json").write_text(json.dumps(metadata, indent=2))
    say(f"to resume: {shlex.join(['python', sys.argv[0], '--resume', str(run)])}")
    return run


def load(run, params, optimizer, scaler):
    """Restore a checkpoint, on any device. Returns the state: rows and, in DDPO, history."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    for p, weight in zip(params, state["weights"], strict=True):
        p.data.copy_(weight)
    # keep the saved moments, in the weights' memory format; lr and fused are those of args
    state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(state["optimizer"])
    for p, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(p).copy_(moments[name])
    if state["scaler"]:  # {}: it was not saved in fp16
        scaler.load_state_dict(state["scaler"])
    return state


def make_generator(*key):
    """The generator of a key (seed, iteration, sample, purpose), on the CPU for any device."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def evaluate(pipe, run, iteration, prompts, score, measure, schedule, args):
    """Metrics and a grid of up to 32 fixed prompts, two noises each; "elephant" step by step."""
    spread = np.linspace(0, len(prompts) - 1, min(32, len(prompts))).astype(int)
    chosen = [prompts[i] for i in spread] * 2
    generators = [make_generator(0, 0, i, 1) for i in range(len(chosen) + 1)]  # same in all runs
    rollout = sample_trajectories(pipe, [*chosen, "elephant"], generators, schedule, args)
    images = decode(pipe.vae, rollout["latents"][:-1, -1])
    # x after 1, 10, 20, 30, 40 and 50 of 50 steps, which Figure 4 counts from 0
    strip_steps = np.linspace(0, args.num_steps, 6).astype(int).clip(1)
    strip = decode(pipe.vae, rollout["latents"][-1, strip_steps])
    for folder, pictures, rows in (("images", images, 2), ("trajectory", strip, 1)):
        cells = [Image.fromarray(picture) for picture in pictures]
        grid = make_image_grid(cells, rows=rows, cols=len(cells) // rows)
        grid.thumbnail((4096, 4096))
        (run / folder).mkdir(exist_ok=True)
        grid.save(run / folder / f"{iteration:04d}.png")
    rewards, _ = score(images, chosen)
    return measure(rewards, images, chosen, prompts)


def catch_signals():
    """A list that receives the first signal to stop; a second one exits at once."""
    received = []

    def receive(number, frame):
        if received:
            sys.exit(128 + number)
        received.append(number)
        with suppress(OSError):  # its reader may have gone
            os.write(2, b"\nfinishing the iteration; again to stop now\n")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, receive)
    return received


# ---- main ----------------------------------------------------------------------------------------


def main(args, from_command_line=False):
    """Train, to the last iteration or until a signal to stop. Returns the run's folder."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    # resumed: parse_args took the saved values; from Python they replace values left at defaults
    saved = asdict(load_args(args.resume)) if args.resume else {}
    for name, value in saved.items():
        if not from_command_line and getattr(args, name) == getattr(Args, name):
            setattr(args, name, value)
        if getattr(args, name) != value:
            say(f"{name}: {value} -> {getattr(args, name)}")

    # torchrun starts a process per GPU; each draws and trains its share of the samples
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device.startswith("cuda")
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(hours=2))  # rank 0 evaluates, the others wait
        if rank > 0:
            sys.stdout = open(os.devnull, "w")

    # settle the arguments
    if args.model == "auto":
        args.model = "CompVis/stable-diffusion-v1-4" if on_gpu else f"{SCRIPT.parent}/models/emoji"
    if args.precision == "auto":
        args.precision = "fp16" if on_gpu else "fp32"
    for name in ("lr", "max_grad_norm", "adv_clip"):
        refuse(not getattr(args, name) > 0, f"{name} must be greater than 0")
    share, rest = divmod(args.num_samples, world_size * args.num_updates)
    refuse(rest, "--num-samples must be a multiple of updates x processes")

    # load everything
    prompts = load_prompts(args.prompts)
    score = load_reward(args.reward, args.device, f"{args.model}/clip")
    measure = load_metrics(args.reward, args.device, f"{args.model}/clip")
    pipe, params = load_model(args)
    schedule = make_schedule(pipe, args)
    optimizer = torch.optim.AdamW(
        params, args.lr, args.adam_betas, args.adam_eps, args.weight_decay, fused=on_gpu
    )
    scaler = torch.amp.GradScaler("cuda" if on_gpu else "cpu", enabled=args.precision == "fp16")
    if args.precision != "fp32":  # so each pass of training repeats one of sampling
        args.micro_batch = math.gcd(args.micro_batch, share)
    say(f"{args.model} on {world_size} x {args.device} in {args.precision}")
    say(f"LoRA rank {args.lora_rank} (0: all weights), {args.micro_batch} pairs per forward pass")
    limit = pipe.tokenizer.model_max_length
    num_cut = sum(len(ids) > limit for ids in pipe.tokenizer(prompts).input_ids)
    say(f"{len(prompts)} prompts ({num_cut} cut at {limit} tokens): {', '.join(prompts[:5])}, ...")

    # start a run, or go on with one
    state = {"rows": [{"iteration": 0, "samples": 0}], "history": {}}
    if saved and Path(args.resume, "checkpoint.pt").exists():
        state = load(Path(args.resume), params, optimizer, scaler)
    run = open_run(args, prompts, score) if rank == 0 else None
    run = gather(run)[0]
    rows = state["rows"]  # the same list, which the checkpoint saves
    if args.track and rank == 0:
        import wandb

        wandb.init(project="ddpo", name=run.name, id=run.name, config=asdict(args), resume="allow")
    signals = catch_signals() if from_command_line else []
    hide = rank > 0 or None  # None: if the output is not a terminal
    done = len(rows) - 1
    for iteration in tqdm(count(done), initial=done, total=args.iterations, disable=hide):
        # pass i evaluates and saves iteration i, then trains i + 1; row 0 is the pretrained model
        stopped_by = max(gather(max(signals, default=0)))  # the same in all processes
        is_last = stopped_by or iteration >= args.iterations
        is_due = is_last or iteration % args.save_every == 0
        if rank == 0 and is_due and "eval_reward" not in rows[-1]:
            rows[-1] |= evaluate(pipe, run, iteration, prompts, score, measure, schedule, args)
            if args.lora_rank:
                pipe.save_lora_weights(run / "lora", get_peft_model_state_dict(pipe.unet))
            else:
                pipe.unet.save_pretrained(run / "unet")
            state["weights"] = [p.detach() for p in params]
            state["optimizer"] = optimizer.state_dict()
            state["scaler"] = scaler.state_dict()
            torch.save(state, run / "checkpoint.tmp")
            os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")  # never half-written
        if rank == 0:
            with open(run / "metrics.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, dict.fromkeys(chain(*rows)))
                writer.writeheader()
                writer.writerows(rows)
            if args.track:
                wandb.log(rows[-1], step=iteration)
        if is_last:
            break

        # sample: process r draws the samples r, r + world_size, ...
        start = time.perf_counter()
        iteration += 1
        generators = [make_generator(args.seed, iteration, i, 0) for i in range(args.num_samples)]
        all_prompts = [prompts[torch.randint(len(prompts), (), generator=g)] for g in generators]
        own = slice(rank, None, world_size)
        rollout = sample_trajectories(pipe, all_prompts[own], generators[own], schedule, args)
        images = decode(pipe.vae, rollout["latents"][:, -1])
        sampled = time.perf_counter()

        # reward
        rewards, reward_parts = score(images, all_prompts[own])
        rewards = np.stack(gather(rewards), 1).flatten()  # in the order of all_prompts
        rewarded = time.perf_counter()

        # train: each update takes an equal share of the samples, which are independent
        history = state["history"].setdefault(args.reward, {})  # --resume may change the reward
        advantages = compute_advantages(rewards, all_prompts, history, args.adv_clip)
        rollout["advantages"] = torch.tensor(advantages[own]).to(rollout["log_probs"])
        updates = []
        for samples in torch.arange(len(images), device=args.device).split(share):
            info = accumulate_gradients(pipe.unet, rollout, samples, schedule, scaler, args)
            if world_size > 1:
                for p in params:
                    p.grad /= world_size
                    dist.all_reduce(p.grad)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm).item()
            is_finite = math.isfinite(grad_norm)  # in all processes or in none
            if is_finite:
                scaler.step(optimizer)
            scaler.update()
            info["grad_norm"] = grad_norm if is_finite else math.nan
            info["skipped"] = float(not is_finite)
            updates.append(info)
        trained = time.perf_counter()

        # log: means over the updates of all processes
        row = {
            "iteration": iteration,
            "samples": rows[-1]["samples"] + args.num_samples,
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "sample_s": sampled - start,
            "reward_s": rewarded - sampled,
            "train_s": trained - rewarded,
            "images_per_s": args.num_samples / (sampled - start),
            "peak_mem_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
        if len(reward_parts) > 1:
            row |= {f"reward_{name}": float(np.mean(gather(x))) for name, x in reward_parts.items()}
        all_updates = sum(gather(updates), [])
        for name in updates[0]:
            row[name] = float(np.nanmean([info[name] for info in all_updates]))
        # not the mean: in the first update no weight has moved, so it is rounding, or a mistake
        row["ratio_err"] = max(gather(updates[0]["ratio_err"]))
        rows.append(row)
        text = f"reward {rewards.mean():.3f} +- {rewards.std():.3f}"
        if not advantages.any():
            text += " (all equal: nothing to learn)"
        seconds = trained - start
        say(f"iteration {iteration}: {text}, ratio_err {row['ratio_err']:.0e}, {seconds:.1f} s")

    if rank == 0:
        change = f"{rows[0]['eval_reward']:.3f} -> {rows[-1]['eval_reward']:.3f}"
        say(f"{args.reward}: {change} on fixed prompts and noise; see {run}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by and not rank:  # torchrun ends process 0 if another fails while it still saves
        sys.exit(128 + stopped_by)
    return run


if __name__ == "__main__":
    main(parse_args(), from_command_line=True)
