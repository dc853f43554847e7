"""
DDPO-IS: denoising diffusion policy optimisation with importance sampling (Algorithm 4, equation 2).

A denoising step is an action, x_{t-1} ~ N(mu_theta(x_t, c, t), sigma_t^2 I); the reward r(x_0, c) of the finished
picture is the return of all of them. For every (sample, step) pair, with A the normalised reward:

    ratio = exp(log_prob - log_prob_beh)          the current policy against the one that drew the sample
    loss  = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))

To REINFORCE it adds the ratio, which reweighs the updates that are off-policy (all but the first of an iteration), and
the clip, which bounds how far they go: `diff ddpo_sf.py ddpo_is.py`.

    python ddpo_is.py --reward compress --lr 3e-4                 2.185 -> 0.891 +- 0.219 kB, 20 min on 2 cores, n = 3
    ... --iterations 20 --num-steps 20    a quick look;  ... --resume runs/NAME    go on where a run stopped
    ... --model FOLDER_OR_NAME            without it Stable Diffusion v1.4 on a GPU, the 64 px models/emoji on a CPU
"""

import csv, json, os, re, shlex, shutil, signal, subprocess, sys, time  # noqa: I001
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np, peft, psutil, torch, tyro, wandb
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models import ResNet50_Weights

from rewards import load_alignment, load_reward

HERE = Path(__file__).resolve().parent
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly
llama camel bat gorilla hedgehog kangaroo""".split()

@dataclass
class Args:
    # run
    reward: str = "compress"  # a name of `rewards.py --list`, a sum like "aesthetic + 0.5*clip", or FILE.py:FUNCTION
    prompts: str = "animals"  # p(c): animals (45 names), imagenet (398 animals), or a text file with one prompt a line
    seed: int = 1  # every random number is a function of (seed, iteration, sample)
    iterations: int = 200  # rounds of sampling and training
    out: str = "runs"  # folder in which the run's folder is made
    resume: str | None = None  # run folder to go on with; the other arguments must be those it was started with
    save_every: int = 10  # iterations between checkpoints, evaluations and picture grids
    track: bool = False  # log to Weights & Biases too (project "ddpo")
    device: str = "auto"  # auto (cuda where there is one, else cpu), or a torch device
    # model
    model: str = "auto"  # diffusers folder or hub name; auto: CompVis/stable-diffusion-v1-4 on a GPU, else models/emoji
    lora_rank: int | None = None  # LoRA rank on attention, 0 = full fine-tuning; unset: 4 from 50 M weights on, else 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: fp32 on a CPU, else bf16, or fp16 on old GPUs
    # sampling
    num_samples: int = 16  # trajectories per iteration (N_samples)
    num_steps: int = 50  # denoising steps (T)
    guidance_scale: float = 5.0  # classifier-free guidance, in sampling and in training (W_c)
    # optimisation
    lr: float = 3e-4  # AdamW learning rate (eta)
    weight_decay: float = 1e-4  # AdamW weight decay (lambda)
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW (beta_1, beta_2)
    adam_eps: float = 1e-8  # AdamW epsilon
    max_grad_norm: float = 1.0  # global gradient norm is clipped to this (C_clip)
    num_updates: int = 2  # gradient steps per iteration (N_updates), each on an equal share of the samples; RWR: on all
    micro_batch: int = 0  # (sample, step) pairs per forward: memory and speed, not the gradient; 0 = choose
    # this algorithm
    adv_clip: float = 5.0  # advantages are clipped to +- this
    clip_range: float = 1e-4  # trust region: the ratio is clipped to 1 +- this

def make_schedule(scheduler, num_steps, device):
    """The respaced DDPM chain of a diffusers scheduler: tables (T,), first step to last, float32 on the device; and
    alphas_cumprod of all its timesteps. Raises ValueError for a prediction type other than epsilon and v_prediction."""
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"the model predicts {prediction_type}; only epsilon and v_prediction work")
    scheduler.set_timesteps(num_steps)
    abar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    abar_prev = torch.cat([abar[1:], scheduler.final_alpha_cumprod.double().view(1)])
    alphas = abar / abar_prev
    sigmas = ((1 - alphas) * (1 - abar_prev) / (1 - abar)).sqrt()
    tables = torch.stack([abar, alphas, 1 - alphas, sigmas]).float().to(device)  # (4, T)
    tables = {"tables": tables, "sigmas": tables[3], "alphas_cumprod": scheduler.alphas_cumprod.float().to(device)}
    return SimpleNamespace(**tables, timesteps=scheduler.timesteps.to(device), prediction_type=prediction_type)

def predict_noise(unet, latents, t, embeds, schedule, guidance_scale):
    """eps_hat with classifier-free guidance, uncond and cond in one forward (lines 13-15).
    latents (N, C, H, W), t (N,) timesteps from 0 to 999, embeds (2, N, L, D) -> (N, C, H, W) float32"""
    output = unet(torch.cat([latents, latents]), t.repeat(2), embeds.flatten(0, 1)).sample
    noise_pred_uncond, noise_pred_text = output.float().chunk(2)
    noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
    if schedule.prediction_type == "v_prediction":
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise_pred = abar.sqrt() * noise_pred + (1 - abar).sqrt() * latents
    return noise_pred

def ddpm_step(noise_pred, latents, step, schedule, next_latents=None, noise=None):
    """One step of the chain (lines 16-18): scores a given x_{t-1}, `next_latents`, or draws one with `noise`.
    noise_pred, latents, next_latents, noise (N, C, H, W) float32, step (N,) -> next_latents, log_prob (N,), mean.
    log_prob is the *mean* over dimensions: a clip range of 1e-4 only makes sense for that (a sum over 16,384 dimensions
    overflows exp); and 0 where sigma = 0: that step is deterministic and has no density."""
    abar, alpha, beta, sigma = schedule.tables[:, step, None, None, None]
    # Algorithms 4 and 5 print sqrt(1 - alpha_t) here; Algorithm 3's sqrt(1 - abar_t) is the DDPM mean
    mean = (latents - beta / (1 - abar).sqrt() * noise_pred) / alpha.sqrt()
    next_latents = mean + sigma * noise if next_latents is None else next_latents
    scale = torch.where(sigma > 0, sigma, 1.0)
    log_density = -0.5 * ((next_latents - mean) / scale) ** 2 - scale.log() - 0.5 * np.log(2 * np.pi)
    return next_latents, torch.where(sigma > 0, log_density, 0.0).mean((1, 2, 3)), mean

@torch.no_grad()
def sample_trajectories(unet, embeds, noise, schedule, args):
    """Run the policy (lines 9-19; RWR: 8). embeds (2, N, L, D), noise (N, T + 1, C, H, W): first the initial latent's.
    Returns latents (N, T + 1, C, H, W) float32, x_T first and x_0 last, and log_probs (N, T)."""
    latents, log_probs, n = [noise[:, 0]], [], args.micro_batch  # as in training: another batch size rounds otherwise
    for i in range(args.num_steps):
        step = torch.full((len(noise),), i, device=args.device)
        parts = zip(latents[-1].split(n), schedule.timesteps[step].split(n), embeds.split(n, 1))
        noise_pred = torch.cat([predict_noise(unet, *part, schedule, args.guidance_scale) for part in parts])
        next_latents, log_prob, _ = ddpm_step(noise_pred, latents[-1], step, schedule, noise=noise[:, i + 1])
        latents.append(next_latents)
        log_probs.append(log_prob)
    return torch.stack(latents, 1), torch.stack(log_probs, 1)

@torch.no_grad()
def decode(vae, latents):
    """Latents (N, C, H, W) -> the pictures that are scored and shown, uint8 ndarray (N, H, W, 3)."""
    images = torch.cat([vae.decode(few / vae.config.scaling_factor).sample for few in latents.split(4)])
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

def make_generator(*key):
    """Generator for a key (seed, iteration, sample, purpose); on the CPU, for the same numbers on every device."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

def compute_advantages(rewards, prompts, history, adv_clip):
    """Normalise by the prompt's last 16 rewards once there are 16, by the batch until then (DDPO's tracker).
    rewards (N,), prompts list of N, history {prompt: last rewards}, updated in place -> (N,) float64 in +-adv_clip"""
    rewards = np.asarray(rewards, dtype=np.float64)
    for prompt, reward in zip(prompts, rewards.tolist()):
        history[prompt] = (history.get(prompt, []) + [reward])[-16:]
    peers = [np.array(history[prompt]) if len(history[prompt]) == 16 else rewards for prompt in prompts]
    spreads = [x.std() + 1e-6 if np.ptp(x) else np.inf for x in peers]  # equal rewards: 0, not rounding / 1e-6
    return np.clip([(r - x.mean()) / s for r, x, s in zip(rewards, peers, spreads)], -adv_clip, adv_clip)

def compute_loss(log_prob, mean, pairs, schedule, args):
    """Clipped importance-sampled policy gradient (lines 29-31; the trajectory's weight factorises over its steps).
    log_prob (n,), mean (n, C, H, W) of the current policy; pairs: step, log_prob_beh, advantages, (n,) each.
    Returns the loss (n,) and info, a dict of (n,)."""
    log_ratio = log_prob - pairs["log_prob_beh"]
    ratio = torch.exp(log_ratio)
    unclipped_loss = -pairs["advantages"] * ratio
    clipped_loss = -pairs["advantages"] * ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
    info = {"ratio_err": (ratio - 1).abs(), "approx_kl": 0.5 * log_ratio**2}
    info["clipfrac"] = (info["ratio_err"] > args.clip_range).float()
    return torch.maximum(unclipped_loss, clipped_loss), info

def accumulate_gradients(unet, data, samples, schedule, args):
    """Sets the gradient of the mean loss over all (sample, step) pairs of `samples`, micro_batch pairs at a time.
    data: the stored trajectories, latents (N, T + 1, C, H, W), embeds (2, N, L, D), and what else compute_loss needs,
    (N, T, ...); samples (n,) indices into them. Steps with sigma = 0 are left out.
    Returns the loss and compute_loss's info, means over the pairs but for the maximum of ratio_err."""
    steps = torch.nonzero(schedule.sigmas > 0).flatten()
    indices, infos = torch.cartesian_prod(samples, steps), []  # (pairs, 2)
    scale = 2.0**16 if args.precision == "fp16" else 1.0  # fp16 would lose small gradients
    unet.zero_grad()
    for i, s in (few.T for few in indices.split(args.micro_batch)):
        t, latents, next_latents = schedule.timesteps[s], data["latents"][i, s], data["latents"][i, s + 1]
        pairs = {"step": s} | {name: x[i, s] for name, x in data.items() if name not in ("latents", "embeds")}
        noise_pred = predict_noise(unet, latents, t, data["embeds"][:, i], schedule, args.guidance_scale)
        _, log_prob, mean = ddpm_step(noise_pred, latents, s, schedule, next_latents)
        loss, info = compute_loss(log_prob, mean, pairs, schedule, args)
        (loss.sum() * scale / len(indices)).backward()
        infos.append({name: x.detach() for name, x in {"loss": loss, **info}.items()})
    for p in unet.parameters():
        p.grad = None if p.grad is None else p.grad / scale
    totals = {name: torch.cat([info[name] for info in infos]) for name in infos[0]}
    return {name: float(x.max() if name == "ratio_err" else x.mean()) for name, x in totals.items()}

def save_checkpoint(run, unet, params, optimizer, state, args):
    """state.safetensors for --resume (weights, AdamW's moments, the JSON-able `state`), renamed once whole; and the
    result, lora/ or unet/, for diffusers. Raises FloatingPointError rather than save weights that are not finite."""
    if not all(p.isfinite().all() for p in params.values()):
        raise FloatingPointError(f"the weights are not finite; {run}/checkpoint holds the last good ones")
    kinds = {name: {"param": p, **optimizer.state.get(p, {})} for name, p in params.items()}
    tensors = {f"{kind}.{name}": x.detach().contiguous() for name in kinds for kind, x in kinds[name].items()}
    save_file(tensors, run / "checkpoint/state.tmp", metadata={"state": json.dumps(state)})
    os.replace(run / "checkpoint/state.tmp", run / "checkpoint/state.safetensors")
    if args.lora_rank:
        StableDiffusionPipeline.save_lora_weights(run / "lora", peft.get_peft_model_state_dict(unet))
    else:
        unet.save_pretrained(run / "unet")

def load_checkpoint(run, params, optimizer):
    """Restores in place what save_checkpoint wrote; returns its `state`."""
    with safe_open(run / "checkpoint/state.safetensors", "pt") as file:
        for key in file.keys():
            kind, name = key.split(".", 1)
            device = "cpu" if kind == "step" else params[name].device  # as AdamW keeps them
            optimizer.state[params[name]][kind] = file.get_tensor(key).to(device)
        for p in params.values():
            p.data.copy_(optimizer.state[p].pop("param"))
        return json.loads(file.metadata()["state"])

def evaluate(pipe, run, iteration, prompts, score, alignment, schedule, shape, args):
    """Up to 16 fixed prompts, two fixed noises each: writes the grid and the trajectory strip, returns the metrics."""
    few = [prompts[i] for i in np.linspace(0, len(prompts) - 1, min(16, len(prompts))).astype(int)] * 2 + ["elephant"]
    noise = [torch.randn((args.num_steps + 1, *shape), generator=make_generator(0, 0, i, 1)) for i in range(len(few))]
    embeds = torch.stack(pipe.encode_prompt(few, args.device, 1, True)[::-1])
    latents, _ = sample_trajectories(pipe.unet, embeds, torch.stack(noise).to(args.device), schedule, args)
    marks = [1] + [max(1, k * args.num_steps // 5) for k in range(1, 6)]  # steps 0 9 19 29 39 49 of 50, as in Figure 4
    strip, images, few = decode(pipe.vae, latents[-1, marks]), decode(pipe.vae, latents[:-1, -1]), few[:-1]
    for name, pictures, lines in (("trajectory", strip, 1), ("images", images, 2)):
        grid = Image.fromarray(np.concatenate([np.concatenate(line, 1) for line in np.split(pictures, lines)]))
        grid.thumbnail((2048, 2048))
        (run / name).mkdir(exist_ok=True)
        grid.save(run / name / f"{iteration:04d}.png")
    diversity = np.sqrt((np.subtract(*np.split(images / 255, 2)) ** 2).mean((1, 2, 3))).mean()
    metrics = {"eval_reward": float(score(images, few)[0].mean()), "eval_diversity": float(diversity)}
    return metrics | ({"eval_align": float(np.mean(alignment(images, few)))} if alignment else {})

def resolve(args):
    """Check the arguments and settle those that depend on machine and model, in place; no weights are loaded yet.
    Returns the prompts, the schedule and the shape of a latent, (C, H, W). Raises ValueError, or diffusers' OSError."""
    zero = "seed lora_rank guidance_scale weight_decay adam_eps micro_batch kl_coef beta quantile".split()  # may be 0
    for name, x in vars(args).items():
        if type(x) in (int, float) and name != "threshold" and not (x > 0 or (x == 0 and name in zero)):
            raise ValueError(f"--{name.replace('_', '-')} {x}: must be greater than 0{' or 0' * (name in zero)}")
    if args.num_samples % args.num_updates:
        raise ValueError(f"--num-samples {args.num_samples}: not {args.num_updates} equal shares (--num-updates)")
    named = {"animals": ANIMALS, "imagenet": ResNet50_Weights.DEFAULT.meta["categories"][:398]}
    lines = named.get(args.prompts) or Path(args.prompts).read_text(encoding="utf-8").splitlines()
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"--prompts {args.prompts}: the file is empty; write one prompt a line")
    args.device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.optim.AdamW([torch.zeros(1, device=args.device)], args.lr, args.adam_betas)  # raises: bad device or betas
    on_gpu, why = args.device.startswith("cuda"), "as asked for"
    if args.model == "auto":
        why = "there is a GPU" if on_gpu else "Stable Diffusion on a CPU takes hours an iteration"
        args.model = "CompVis/stable-diffusion-v1-4" if on_gpu else os.path.relpath(HERE / "models/emoji")
    if args.precision == "auto":  # emulated bf16 is slower than fp16
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if bf16 else "fp16" if on_gpu else "fp32"
    if (kind := StableDiffusionPipeline.load_config(args.model)["_class_name"]) != "StableDiffusionPipeline":
        raise ValueError(f"--model {args.model}: a {kind}; only StableDiffusionPipeline (1.x and 2.x) works")
    scheduler = DDIMScheduler.from_pretrained(args.model, subfolder="scheduler")
    if args.num_steps > (limit := scheduler.config.num_train_timesteps - scheduler.config.steps_offset):
        raise ValueError(f"--num-steps {args.num_steps}: the scheduler has {limit}")
    config = UNet2DConditionModel.load_config(args.model, subfolder="unet")
    with torch.device("meta"):
        size = UNet2DConditionModel.from_config(config).num_parameters()
    args.lora_rank = 4 * (size >= 50e6) if args.lora_rank is None else args.lora_rank
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    args.micro_batch = args.micro_batch or max(1, min(64, 2**17 // int(np.prod(shape))))  # 8 for Stable Diffusion
    print(f"{args.model} on {args.device} in {args.precision} ({why}); UNet of {size / 1e6:.1f} M,", end=" ")
    print(f"LoRA rank {args.lora_rank} on attention" if args.lora_rank else "full fine-tuning")
    pairs = args.num_samples // args.num_updates * args.num_steps
    print(f"{args.num_samples} samples; {args.num_updates} updates of {pairs} pairs, {args.micro_batch} at a time")
    return prompts, make_schedule(scheduler, args.num_steps, args.device), shape

def open_run(args):
    """Make the run folder, or check the one of --resume; returns its path. Raises ValueError or OSError."""
    about = {"script": Path(__file__).stem, "args": asdict(args), "command": shlex.join(sys.argv)}
    if args.resume:
        run, free = Path(args.resume), {"resume", "iterations", "out", "save_every", "track", "device", "micro_batch"}
        files = (run / "args.json").read_text(), json.dumps(about)
        old, new = ({"script": x["script"], **x["args"]} for x in map(json.loads, files))
        if wrong := [name for name in new if name not in free and old.get(name) != new[name]]:
            raise ValueError(f"--resume {run}: was started with {wrong[0]} {old.get(wrong[0])}, not {new[wrong[0]]}")
        return run
    reward, now = re.sub(r"[^\w.+-]+", "_", Path(args.reward).name), time.strftime("%Y%m%d-%H%M%S")
    run = Path(args.out) / f"{about['script']}__{reward}__s{args.seed}__{now}"
    (run / "checkpoint").mkdir(parents=True)
    about["git"] = subprocess.getoutput(f'git -C "{HERE}" rev-parse HEAD')
    about["versions"] = {name: version(name) for name in "torch diffusers transformers peft numpy".split()}
    about["gpu"] = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    (run / "args.json").write_text(json.dumps(about, indent=2))
    for file in (__file__, HERE / "rewards.py"):
        shutil.copy(file, run)
    return run

def load_model(args):
    """The pipeline, and the trainable parameters of its UNet by name, float32."""
    pipe = StableDiffusionPipeline.from_pretrained(args.model, use_safetensors=True, safety_checker=None)
    pipe.text_encoder.requires_grad_(False)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    unet, rank = pipe.to(args.device, torch.float32).unet.requires_grad_(not args.lora_rank), args.lora_rank
    if rank:
        torch.manual_seed(args.seed)
        lora = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian"}
        unet.to(dtype).add_adapter(peft.LoraConfig(**lora, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    params = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    for p in params.values():
        p.data = p.data.float()
    unet.forward = torch.autocast(torch.device(args.device).type, dtype, args.precision != "fp32")(unet.forward)
    return pipe, params

def main(args):
    try:
        prompts, schedule, shape = resolve(args)
        score = load_reward(args.reward, args.device, f"{args.model}/clip")
        alignment = load_alignment(args.reward, args.device, f"{args.model}/clip")
        run = open_run(args)
        pipe, params = load_model(args)
        optimizer = torch.optim.AdamW(params.values(), args.lr, args.adam_betas, args.adam_eps, args.weight_decay)
        state = load_checkpoint(run, params, optimizer) if args.resume else {"rows": [], "history": {}, "skipped": 0}
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # what a user can mend: no traceback
        print("error:", str(error).strip().splitlines()[0], file=sys.stderr)
        sys.exit(2)
    rows, stop = state["rows"], []
    if not rows:  # row 0 is the pretrained model
        metrics = evaluate(pipe, run, 0, prompts, score, alignment, schedule, shape, args)
        rows.append({"iteration": 0, "samples": 0, **metrics})
    done = rows[-1]["iteration"]
    if args.track:
        wandb.init(project="ddpo", name=run.name, id=run.name, resume="allow", config=asdict(args))
        wandb.log(rows[-1], step=done)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    for iteration in range(done + 1, args.iterations + 1):
        # ---- sample ----
        clock = [time.time()]
        generators = [make_generator(args.seed, iteration, i, 0) for i in range(args.num_samples)]
        batch_prompts = [prompts[torch.randint(len(prompts), (), generator=g)] for g in generators]
        noise = torch.stack([torch.randn((args.num_steps + 1, *shape), generator=g) for g in generators])
        embeds = torch.stack(pipe.encode_prompt(batch_prompts, args.device, 1, True)[::-1])  # (2, N, L, D)
        latents, log_probs = sample_trajectories(pipe.unet, embeds, noise.to(args.device), schedule, args)
        images = decode(pipe.vae, latents[:, -1])
        clock.append(time.time())
        # ---- reward ----
        rewards, parts = score(images, batch_prompts)
        clock.append(time.time())
        # ---- train ----
        advantages = compute_advantages(rewards, batch_prompts, state["history"], args.adv_clip)
        data = {"latents": latents, "embeds": embeds, "log_prob_beh": log_probs}
        data["advantages"] = torch.tensor(advantages).to(log_probs).view(-1, 1).expand_as(log_probs)
        updates = []  # the samples are independent, so that equal shares need no shuffle
        for samples in torch.arange(args.num_samples, device=args.device).chunk(args.num_updates):
            info = accumulate_gradients(pipe.unet, data, samples, schedule, args)
            info["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(params.values(), args.max_grad_norm))
            finite = bool(np.isfinite(info["loss"] + info["grad_norm"]))
            state["skipped"] = 0 if finite else state["skipped"] + 1
            if finite:
                optimizer.step()
            elif state["skipped"] == 10:
                sys.exit("10 updates in a row had a loss or gradient that is not finite: lower --lr or use fp32")
            updates.append(info | {"skipped": int(not finite)})
        metrics = {name: float(np.mean([info[name] for info in updates])) for name in updates[0]}
        metrics["ratio_err"] = updates[0]["ratio_err"]  # of the first update, where the ratio is 1 but for rounding
        if metrics["ratio_err"] > args.clip_range / 10 >= max(row.get("ratio_err", 0) for row in rows):  # said once
            print("ratio_err is over a tenth of the clip range: use --precision fp32")
        clock.append(time.time())
        # ---- log ----
        row = {"iteration": iteration, "samples": iteration * args.num_samples}
        row |= {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
        row |= {f"reward_{name}": float(part.mean()) for name, part in parts.items() if len(parts) > 1}
        row |= metrics | dict(zip(("sample_s", "reward_s", "train_s"), np.diff(clock).tolist()))
        row["images_per_s"] = args.num_samples / row["sample_s"]
        row["peak_mem_gb"] = (torch.cuda.max_memory_allocated() or psutil.Process().memory_info().rss) / 1e9
        rows.append(row)
        last = iteration == args.iterations or bool(stop)
        if last or iteration % args.save_every == 0:
            row |= evaluate(pipe, run, iteration, prompts, score, alignment, schedule, shape, args)
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(run / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerows([names, *([row.get(name) for name in names] for row in rows)])
        if "eval_reward" in row:
            save_checkpoint(run, pipe.unet, params, optimizer, state, args)
        if args.track:
            wandb.log(row, step=iteration)
        text = f"iteration {iteration}/{args.iterations}: reward {row['reward_mean']:.3f} +- {row['reward_std']:.3f}"
        left = (time.time() - clock[0]) * (args.iterations - iteration) / 60
        print(f"{text}, {clock[-1] - clock[0]:.1f} s, {left:.0f} min left", flush=True)
        if last:  # not `stop`, which may have come after the saving
            break
    # ---- end ----
    done = rows[-1]["iteration"]
    grids = [np.asarray(Image.open(run / f"images/{iteration:04d}.png")) for iteration in (0, done)]
    Image.fromarray(np.concatenate([grid[: len(grid) // 2] for grid in grids])).save(run / "before_after.png")
    before, after = (row["eval_reward"] for row in (rows[0], rows[-1]))
    print(f"{args.reward}: {before:.3f} -> {after:.3f} on fixed prompts and noise, {done} iterations; see {run}")
    if done < args.iterations:
        print("go on with: python", shlex.join(sys.argv + ["--resume", str(run)] * (not args.resume)))
    return run

if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
