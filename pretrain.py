"""
Trains the embedded text-to-image model `models/emoji/` from nothing, in one and a half to two hours on two CPU cores.

    python pretrain.py                      # everything; interrupt it, run it again, it goes on
    python pretrain.py --stage samples      # only draw models/emoji/samples.png again

The stages, each resumable and skipped once it is done:

    data     fetch six open emoji sets (npm), rasterise the SVG drawings, compose 64 x 64 pictures with captions
    vae      AutoencoderTiny, f = 8, 12 latent channels: (3, 64, 64) <-> (12, 8, 8)
    unet     UNet2DConditionModel and CLIPTextModel together, min-SNR weighted noise prediction
    decoder  the VAE's decoder alone, longer and on animals only: sharper pictures from the same latents
    clip     a tiny open_clip model on animals and all other emoji, first with one emoji set held out, then on all
    export   float16 safetensors as a diffusers StableDiffusionPipeline folder
    samples  46 prompts x 4 seeds, their CLIP ranks, the model card

It needs `npm` on the PATH and two packages that the five scripts do not: `pip install resvg_py tokenizers`.
"""

import json
import math
import os
import platform
import re
import subprocess
import tarfile
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# name -> the icons that show it; the names are DDPO's 45 animals and "elephant"
DRAWINGS = {
    "cat": "cat cat-face black-cat", "dog": "dog dog-face service-dog poodle", "horse": "horse horse-face",
    "monkey": "monkey monkey-face", "rabbit": "rabbit rabbit-face", "zebra": "zebra", "spider": "spider",
    "bird": "bird black-bird dove", "sheep": "ewe ram sheep", "deer": "deer", "cow": "cow cow-face ox", "goat": "goat",
    "lion": "lion", "tiger": "tiger tiger-face", "bear": "bear polar-bear", "raccoon": "raccoon", "fox": "fox",
    "wolf": "wolf", "lizard": "lizard", "beetle": "beetle lady-beetle", "ant": "ant", "butterfly": "butterfly",
    "fish": "fish tropical-fish blowfish", "shark": "shark", "whale": "whale spouting-whale", "dolphin": "dolphin",
    "squirrel": "chipmunk", "mouse": "mouse mouse-face", "rat": "rat", "snake": "snake", "turtle": "turtle",
    "frog": "frog", "chicken": "chicken rooster", "duck": "duck", "goose": "goose", "bee": "honeybee",
    "pig": "pig pig-face", "turkey": "turkey", "fly": "fly", "llama": "llama", "camel": "camel two-hump-camel",
    "bat": "bat", "gorilla": "gorilla", "hedgehog": "hedgehog", "kangaroo": "kangaroo", "elephant": "elephant",
}  # fmt: skip
NAMES = list(DRAWINGS)
EMOJI_SETS = {  # npm package @iconify-json/<key>: licence of its drawings
    "noto": "Apache-2.0", "noto-v1": "Apache-2.0", "fluent-emoji": "MIT", "fluent-emoji-flat": "MIT",
    "fxemoji": "Apache-2.0", "twemoji": "CC BY 4.0",
}  # fmt: skip
COLORS = {
    "white": (250, 250, 250), "red": (225, 90, 80), "orange": (240, 165, 85), "yellow": (245, 220, 110),
    "green": (130, 190, 115), "blue": (110, 165, 225), "purple": (165, 130, 205), "pink": (240, 170, 190),
    "grey": (165, 170, 175), "dark": (60, 65, 85),
}  # fmt: skip

@dataclass
class Args:
    stage: str = "all"
    """all, or one of data, vae, unet, decoder, clip, export, samples"""
    work: str = "runs/pretrain"
    """folder for downloads, pictures and checkpoints (2 GB)"""
    out: str = "models/emoji"
    """folder of the finished model"""
    seed: int = 0
    """seed of the pictures, the initial weights and the batches"""
    pictures: int = 40_000
    """number of composed animal pictures; a quarter as many of other emoji are added for the VAE"""
    vae_steps: int = 3_000
    """optimiser steps of the VAE, batch 16 (0.25 s each on 2 cores)"""
    unet_steps: int = 15_000
    """optimiser steps of UNet and text encoder, batch 64 (0.2 s each on 2 cores)"""
    decoder_steps: int = 2_000
    """optimiser steps of the decoder alone, batch 16 (0.2 s each on 2 cores)"""
    clip_steps: int = 5_000
    """optimiser steps of each of the two CLIPs (0.45 s each on one core)"""
    held_out: str = "twemoji"
    """emoji set kept from the training of the CLIP whose held-out accuracy is reported"""

# ---- data ----

def fetch_drawings(work):
    """Download and rasterise the six sets. Saves drawings.npz: rgba (N, 128, 128, 4) and small (N, 64, 64, 4) uint8,
    names (N,) with "" for emoji other than the animals, icons (N,), their names in the set, and sets (N,)."""
    import resvg_py  # only pretraining needs it

    pictures, icons, sets = {128: [], 64: []}, [], []
    label = {icon: name for name, few in DRAWINGS.items() for icon in few.split()}
    for emoji_set in EMOJI_SETS:
        package = f"@iconify-json/{emoji_set}"
        found = list(work.glob(f"iconify-json-{emoji_set}-[0-9]*.tgz"))
        if not found:
            subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True)
            found = list(work.glob(f"iconify-json-{emoji_set}-[0-9]*.tgz"))
        with tarfile.open(found[0]) as tar:
            data = json.load(tar.extractfile("package/icons.json"))
        # without skin tones, families and flags, which would be hundreds of near copies
        skip = re.compile(r".*skin-tone|.*-(dark|light|medium)$|flag-")
        kept = {k: icon for k, icon in data["icons"].items() if k in label or not skip.match(k)}
        for name, icon in tqdm(kept.items(), desc=f"rasterise {emoji_set}"):
            width, height = (icon.get(side, data.get(side, 16)) for side in ("width", "height"))
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
            for size in pictures:
                png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
                picture, square = Image.open(BytesIO(bytes(png))).convert("RGBA"), Image.new("RGBA", (size, size))
                square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
                pictures[size].append(np.asarray(square))
            icons.append(name)
            sets.append(emoji_set)
    names = np.array([label.get(icon, "") for icon in icons])
    arrays = {"rgba": np.stack(pictures[128]), "small": np.stack(pictures[64]), "names": names}
    np.savez(work / "drawings.npz", icons=np.array(icons), sets=np.array(sets), **arrays)

def background(rng):
    """A 64 x 64 RGB picture, 74 % plain, 20 % gradient, 6 % patterned, and the word a caption may use for it."""
    word = rng.choice(list(COLORS))
    color = tuple(int(c) for c in np.clip(np.array(COLORS[word]) + rng.normal(0, 8, 3), 0, 255))
    other = tuple(int(c) for c in np.clip(np.array(color) + rng.choice([-1, 1]) * rng.uniform(20, 45), 0, 255))
    kind = rng.choice(["plain", "gradient", "striped", "checkered", "dotted"], p=[0.74, 0.2, 0.02, 0.02, 0.02])
    if kind == "plain":
        return Image.new("RGB", (64, 64), color), f"{word}"
    if kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        mix = (0.5 + 0.35 * (x * math.cos(angle) + y * math.sin(angle)))[..., None].clip(0, 1)
        return Image.fromarray((mix * color + (1 - mix) * other).astype(np.uint8)), f"{word} gradient"
    picture = Image.new("RGB", (64, 64), color)
    draw = ImageDraw.Draw(picture)
    step = int(rng.choice([8, 16]))
    for i in range(0, 64, step):
        if kind == "striped":
            draw.rectangle([i, 0, i + step // 2 - 1, 63], fill=other)
        for j in range(0, 64, step):
            if kind == "checkered":
                draw.rectangle([i, j, i + step // 2 - 1, j + step // 2 - 1], fill=other)
                draw.rectangle([i + step // 2, j + step // 2, i + step - 1, j + step - 1], fill=other)
            if kind == "dotted":
                draw.ellipse([i + step // 4, j + step // 4, i + step * 3 // 4, j + step * 3 // 4], fill=other)
    return (picture.rotate(90) if rng.random() < 0.5 else picture), f"{kind} {word}"

def compose(drawing, name, rng):
    """Put one RGBA drawing on a background, a little flipped, scaled, turned, shifted. Returns (picture, caption)."""
    picture, word = background(rng)
    drawing = Image.fromarray(drawing)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size, angle = int(rng.integers(54, 61)), rng.normal(0, 2.5)
    drawing = drawing.resize((size, size), Image.Resampling.LANCZOS).rotate(angle, Image.Resampling.BICUBIC)
    x, y = np.clip(np.round((64 - size) / 2 + rng.normal(0, 1, 2)), -2, 66 - size).astype(int)
    picture.paste(drawing, (int(x), int(y)), drawing)
    article = "an" if name[:1] in "aeiou" else "a"
    caption = rng.choice([name, f"{article} {name}", f"{name} on a {word} background"], p=[0.6, 0.15, 0.25])
    return np.asarray(picture), caption

def compose_chunk(job):
    """A share: (drawings, names, seed) -> (pictures uint8 (N, 64, 64, 3), captions)."""
    rgba, names, seed = job
    rng = np.random.default_rng(seed)
    pairs = [compose(drawing, name, rng) for drawing, name in zip(rgba, names)]
    return np.stack([picture for picture, _ in pairs]), [str(caption) for _, caption in pairs]

def compose_pictures(work, name, candidates, count, seed):
    """Compose `count` pictures of the drawings `candidates`, every animal equally often, into NAME.npy + NAME.json."""
    data = np.load(work / "drawings.npz")
    rgba, names = data["rgba"], data["names"]
    rng = np.random.default_rng(seed)
    groups = [candidates[names[candidates] == n] for n in sorted(set(names[candidates]))]
    choices = np.array([rng.choice(groups[i % len(groups)]) for i in range(count)])
    rng.shuffle(choices)
    jobs = ((rgba[part], names[part], (seed, k)) for k, part in enumerate(np.array_split(choices, 64)))
    parts = [compose_chunk(job) for job in tqdm(jobs, total=64, desc=f"compose {name}")]
    np.save(work / f"{name}.npy", np.concatenate([pictures for pictures, _ in parts]))
    captions = [caption for _, part in parts for caption in part]
    (work / f"{name}.json").write_text(json.dumps({"captions": captions, "drawings": choices.tolist()}))

def make_data(work, args):
    if not (work / "drawings.npz").exists():
        fetch_drawings(work)
    names = np.load(work / "drawings.npz")["names"]
    if not (work / "animals.json").exists():
        compose_pictures(work, "animals", np.flatnonzero(names != ""), args.pictures, args.seed)
    if not (work / "others.json").exists():
        compose_pictures(work, "others", np.flatnonzero(names == ""), args.pictures // 4, args.seed + 1)

# ---- training, shared by the three models ----

def fit(name, work, params, steps, lr, batch_size, count, loss_fn, seed, weight_decay=1e-2, ema_decay=0.999):
    """AdamW with warm-up and cosine decay on the dict of parameters `params`; leaves their moving average in place.

    Batches and noise depend on (seed, step) alone and all state is in WORK/NAME.safetensors, so that an interrupted
    run goes on as if it had not been. loss_fn(indices, generator) -> scalar."""
    path = work / f"{name}.safetensors"
    values = list(params.values())
    ema = [p.detach().clone() for p in values]
    optimizer = torch.optim.AdamW(values, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    first, spent, start = 0, 0.0, time.time()
    if path.exists():
        state = load_file(path)
        first, spent = int(state["step"]), float(state["seconds"])
        for i, key in enumerate(params):
            values[i].data.copy_(state[f"param.{key}"])
            ema[i].copy_(state[f"ema.{key}"])
            moments = {k: state[f"{k}.{key}"] for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[values[i]] = {"step": torch.tensor(float(first)), **moments}
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5)
    average = None
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        progress = max(0, step - 200) / max(1, steps - 200)
        rate = lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_fn(torch.randint(0, count, (batch_size,), generator=generator), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [p.detach() for p in values], 1 - decay)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", lr=f"{rate:.1e}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"step": torch.tensor(step + 1), "seconds": torch.tensor(spent + time.time() - start)}
            for i, key in enumerate(params):
                state |= {f"param.{key}": values[i].data, f"ema.{key}": ema[i]}
                state |= {f"{k}.{key}": optimizer.state[values[i]][k] for k in ("exp_avg", "exp_avg_sq")}
            save_file({k: v.contiguous() for k, v in state.items()}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    for p, average in zip(values, ema):
        p.data.copy_(average)
    return float(load_file(path)["seconds"])

# ---- VAE ----

def make_vae():
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        decoder_block_out_channels=(48, 48, 48, 48),
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0),
        latent_channels=12,
        act_fn="silu",
    )

def to_tensor(pictures):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

def train_vae(work, args):
    """L1 + MSE + edges; noise on the latents and a price on their power make them smooth and of unit scale."""
    torch.manual_seed(args.seed)
    vae = make_vae()
    animals, others = (np.load(work / f"{n}.npy", mmap_mode="r") for n in ("animals", "others"))

    def loss_fn(indices, generator):
        n = len(animals)
        x = to_tensor(np.stack([animals[i] if i < n else others[i - n] for i in indices.tolist()]))
        z = vae.encoder(x)
        y = vae.decoder(z + 0.05 * torch.randn(z.shape, generator=generator))
        d = y - x
        edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
        power = (z.mean((0, 2, 3)) ** 2).mean() + (z.var((0, 2, 3)).log() ** 2).mean()
        return d.abs().mean() + (d**2).mean() + 0.25 * edges + 0.01 * power

    params = dict(vae.named_parameters())
    seconds = fit("vae", work, params, args.vae_steps, 2e-3, 16, len(animals) + len(others), loss_fn, args.seed)
    return vae.eval(), seconds

# ---- tokenizer, text encoder, UNet ----

def train_tokenizer(captions):
    """A byte-pair vocabulary in CLIP's order: bytes, bytes that end a word, merges, start, end."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted({word for caption in captions for word in caption.split()})
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [b + "</w>" for b in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == len(tokens)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)

def save_tokenizer(tokenizer, folder):
    """transformers 5 writes tokenizer.json alone; vocab.json and merges.txt are what transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")

def make_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    ends = dict(bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1)
    size = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **size, **ends))

def make_unet():
    """2.9 M parameters; attention only in the middle, at 4 x 4: on 2 cores each level of it costs a fifth of a step."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=12,
        out_channels=12,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=128,
    )

def make_scheduler():
    """Stable Diffusion's schedule"""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

@torch.no_grad()
def encode_pictures(work, vae):
    """Latents of every composed animal picture, once: (N, 12, 8, 8) float16. Returns (latents, scaling factor)."""
    path = work / "latents.safetensors"
    if not path.exists():
        pictures = np.load(work / "animals.npy", mmap_mode="r")
        chunks = tqdm(range(0, len(pictures), 200), desc="encode")
        latents = torch.cat([vae.encoder(to_tensor(pictures[i : i + 200])).half() for i in chunks])
        save_file({"latents": latents.contiguous(), "scaling_factor": 1 / latents.float().std()}, path)
    state = load_file(path)
    return state["latents"], float(state["scaling_factor"])

def train_unet(work, args, vae):
    """Noise prediction with min-SNR-5 weights (Hang et al. 2023); a tenth of the captions is empty, for guidance."""
    latents, scaling_factor = encode_pictures(work, vae)
    latents = latents.float() * scaling_factor
    captions = json.loads((work / "animals.json").read_text())["captions"]
    tokenizer = train_tokenizer(captions)
    distinct = ["", *sorted(set(captions))]
    ids = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    lookup = {caption: i for i, caption in enumerate(distinct)}
    caption_index = torch.tensor([lookup[caption] for caption in captions])
    torch.manual_seed(args.seed)
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    alphas_cumprod = make_scheduler().alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)

    def loss_fn(indices, generator):
        n = len(indices)
        x, caption = latents[indices], caption_index[indices]
        caption = torch.where(torch.rand(n, generator=generator) < 0.1, 0, caption)
        t = torch.randint(0, 1000, (n,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        noise_pred = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, text_encoder(ids[caption])[0]).sample
        weight = snr[t].clamp(max=5) / snr[t]
        return (weight * ((noise_pred - noise) ** 2).mean((1, 2, 3))).mean()

    params = {f"unet.{k}": p for k, p in unet.named_parameters()}
    params |= {f"text_encoder.{k}": p for k, p in text_encoder.named_parameters()}
    seconds = fit("unet", work, params, args.unet_steps, 1e-3, 64, len(latents), loss_fn, args.seed)
    return unet.eval(), text_encoder.eval(), tokenizer, scaling_factor, seconds

def refine_decoder(work, args, vae):
    """The latents are settled once the UNet has learned them; the decoder may still get better at reading them."""
    latents, _ = encode_pictures(work, vae)
    animals = np.load(work / "animals.npy", mmap_mode="r")

    def loss_fn(indices, generator):
        x, z = to_tensor(animals[indices.numpy()]), latents[indices].float()
        d = vae.decoder(z + 0.1 * torch.randn(z.shape, generator=generator)) - x
        edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
        return d.abs().mean() + (d**2).mean() + 0.5 * edges

    params = dict(vae.decoder.named_parameters())
    return fit("decoder", work, params, args.decoder_steps, 1e-3, 16, len(latents), loss_fn, args.seed)

# ---- CLIP ----

def make_clip(folder, tokenizer):
    """An open_clip model in `local-dir:` format: a ResNet of width 16 and a 2-layer text tower, 1.3 M parameters."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None}
    text = {"context_length": 16, "vocab_size": len(tokenizer), "width": 128, "heads": 4, "layers": 2}
    text |= {"hf_tokenizer_name": "local"}  # open_clip reads the folder itself, but only if this is set
    config = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}}
    half = [0.5, 0.5, 0.5]
    config["preprocess_cfg"] = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False)

def augment(drawings, generator):
    """Composes RGBA drawings uint8 (N, 4, 64, 64) into pictures (N, 3, 64, 64) in [-1, 1], other ones every time.

    What separates one emoji set from another, or a drawing from a generated picture, must not matter: pose, palette,
    sharpness, noise. Wider than the UNet's pictures, so that the CLIP does not judge by their habits."""
    n = len(drawings)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    def some(p):
        return (torch.rand(n, 1, 1, 1, generator=generator) < p).float()

    def normal(*shape):
        return torch.randn(n, *shape, generator=generator)

    x = drawings.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)  # premultiplied, so that edges do not bleed
    angle, scale = normal() * math.radians(10), uniform(0.93, 1.35).flatten()
    flip = (2 * some(0.5).flatten() - 1) * (1 + 0.06 * normal())
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, 0.08 * normal(2)
    matrix = torch.stack([torch.stack([cos * flip, -sin * flip, shift[:, 0]], 1)] * 2, 1)
    matrix[:, 1] = torch.stack([sin, cos, shift[:, 1]], 1)
    x = F.grid_sample(x, F.affine_grid(matrix, x.shape, align_corners=False), align_corners=False)
    y, x_axis = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    colors = torch.tensor(list(COLORS.values()))[torch.randint(len(COLORS), (n,), generator=generator)] / 255
    ground = colors[:, :, None, None] + 0.05 * normal(3, 1, 1)
    ground = ground + some(0.4) * 0.12 * (normal(1, 1, 1) * x_axis + normal(1, 1, 1) * y)
    # palette: a gain for each channel, sometimes channels swapped, sometimes towards grey
    mix = torch.eye(3) * uniform(0.75, 1.25)[:, 0] * (1 + 0.15 * normal(1, 3))
    swap = torch.eye(3)[torch.rand(n, 3, generator=generator).argsort(1)]
    for amount, other in ((some(0.3), swap), (some(0.2), torch.full((3, 3), 1 / 3))):
        amount = (amount * uniform(0, 1))[:, 0]
        mix = mix @ ((1 - amount) * torch.eye(3) + amount * other)
    rgb = torch.einsum("nij,njhw->nihw", mix, x[:, :3]) + x[:, 3:] * uniform(-0.1, 0.1)
    x = (rgb + (1 - x[:, 3:]) * ground).clamp(0, 1) * 2 - 1
    blurred, coarse = (F.interpolate(F.avg_pool2d(x, k), scale_factor=k, mode="bilinear") for k in (2, 4))
    x = torch.lerp(x, blurred, some(0.35) * uniform(0.3, 1))
    x = torch.lerp(x, coarse, some(0.07)) + some(0.3) * 0.1 * normal(3, 64, 64)
    side = uniform(0, 0.3) * some(0.3)  # of a square that is erased
    hole = ((y - uniform(-1, 1)).abs() < side) & ((x_axis - uniform(-1, 1)).abs() < side)
    return torch.where(hole, uniform(-1, 1), x).clamp(-1, 1)

def train_clip(name, work, args, tokenizer, allowed, folder):
    """A batch has one picture of each animal and of 50 other emoji, all of different names: the image tower learns what
    the drawings of a name have in common. `allowed` bool (N,) of drawings.npz. Saves an open_clip folder."""
    data = np.load(work / "drawings.npz")
    drawings, names, icons = torch.from_numpy(data["small"]).permute(0, 3, 1, 2), data["names"], data["icons"]
    animals = [np.flatnonzero((names == n) & allowed) for n in NAMES]
    others = [(kind, np.flatnonzero((icons == kind) & allowed)) for kind in sorted(set(icons[(names == "") & allowed]))]
    torch.manual_seed(args.seed)
    model = make_clip(folder, tokenizer)
    forms = ["{}", "a{n} {}", "{} on a white background"]

    def loss_fn(_, generator):
        kinds = [others[i] for i in torch.randperm(len(others), generator=generator)[:50]]
        groups = animals + [members for _, members in kinds]
        pick = torch.rand(len(groups), generator=generator)
        chosen = [members[int(p * len(members))] for members, p in zip(groups, pick)]
        form = torch.randint(3, (46,), generator=generator).tolist()
        texts = [forms[f].format(n, n="n" * (n[0] in "aeiou")) for n, f in zip(NAMES, form)]
        texts += [kind.replace("-", " ") for kind, _ in kinds]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        image, text, scale = model(augment(drawings[torch.tensor(chosen)], generator), ids)
        logits, target = scale.clamp(max=50) * image @ text.T, torch.arange(len(groups))
        loss = (F.cross_entropy(logits, target, label_smoothing=0.05) + F.cross_entropy(logits.T, target)) / 2
        return loss + F.cross_entropy(logits[:46, :46], target[:46], label_smoothing=0.05) / 2  # as it is used

    params, options = dict(model.named_parameters()), {"weight_decay": 0.1, "ema_decay": 0.998}
    seconds = fit(name, work, params, args.clip_steps, 2e-3, 1, 1, loss_fn, args.seed, **options)
    with torch.no_grad():  # the averaged weights want batch statistics of their own
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        generator = torch.Generator().manual_seed(args.seed)
        for _ in range(40):
            few = [members[0] for members in animals] + [members[0] for _, members in others[:50]]
            model.encode_image(augment(drawings[torch.tensor(few)], generator))
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    return seconds

@torch.no_grad()
def clip_ranks(folder, pictures, labels, views=1):
    """How many of the 46 names the CLIP prefers to the right one of `labels` (N,), by the mean score of `views`
    pictures of one thing. pictures uint8 (N * views, 64, 64, 3), those of a thing together -> int (N,)"""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(NAMES), normalize=True)
    scores = (model.encode_image(to_tensor(pictures), normalize=True) @ text.T).unflatten(0, (-1, views)).mean(1)
    right = scores[torch.arange(len(labels)), torch.tensor([NAMES.index(n) for n in labels])]
    return (scores > right[:, None]).sum(1).numpy()

def held_out_accuracy(work, args, tokenizer, views=10):
    """Train a CLIP without one emoji set and ask it for the drawings of that set, ten pictures each. Returns how often
    it is right about a drawing, about a single picture, the number of drawings, and the seconds of training."""
    data = np.load(work / "drawings.npz")
    animal, kept = data["names"] != "", data["sets"] == args.held_out
    seconds = train_clip("clip_held_out", work, args, tokenizer, ~kept, work / "clip_held_out")
    rng, drawings = np.random.default_rng(args.seed), np.flatnonzero(animal & kept)
    rgba, names = data["rgba"], data["names"][drawings]
    pictures = np.stack([compose(rgba[i], "", rng)[0] for i in drawings.repeat(views)])
    by_drawing = clip_ranks(work / "clip_held_out", pictures, names, views) == 0
    by_picture = clip_ranks(work / "clip_held_out", pictures, names.repeat(views)) == 0
    return by_drawing.mean(), by_picture.mean(), len(drawings), seconds

# ---- export ----

def export(out, vae, unet, text_encoder, tokenizer, scaling_factor):
    from diffusers import StableDiffusionPipeline

    vae.register_to_config(scaling_factor=scaling_factor)
    parts = dict(vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=make_scheduler())
    parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    StableDiffusionPipeline(**parts).to(torch.float16).save_pretrained(out)
    config = out / "text_encoder/config.json"  # its dtype is what transformers 5 loads; the UNet comes as float32
    config.write_text(config.read_text().replace("float16", "float32"))
    save_tokenizer(tokenizer, out / "tokenizer")

def draw_samples(out, steps=50, guidance_scale=5.0, draws=4):
    """46 prompts x 4 seeds with the DDPM sampler the scripts use (DDIM with eta = 1). Writes samples.png.

    Returns pictures uint8 (184, 64, 64, 3), their names, and the seconds that 16 pictures take."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    labels = [name for name in NAMES for _ in range(draws)]
    pictures, seconds = [], []
    for i in tqdm(range(0, len(labels), 16), desc="samples"):
        few = labels[i : i + 16]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(few))]
        start = time.time()
        options = dict(num_inference_steps=steps, guidance_scale=guidance_scale, eta=1.0, output_type="np")
        pictures.append(pipe(few, generator=generators, **options).images)
        seconds += [time.time() - start] if len(few) == 16 else []
    pictures = (np.concatenate(pictures) * 255).round().astype(np.uint8)
    columns = 4  # blocks of four pictures with the name above
    sheet = Image.new("RGB", (columns * 64 * draws + (columns - 1) * 8, math.ceil(46 / columns) * 78), "white")
    for k, name in enumerate(NAMES):
        x, y = k % columns * (64 * draws + 8), k // columns * 78
        ImageDraw.Draw(sheet).text((x + 2, y), name, fill="black")
        for j in range(draws):
            sheet.paste(Image.fromarray(pictures[k * draws + j]), (x + 64 * j, y + 13))
    sheet.save(out / "samples.png")
    return pictures, labels, float(np.median(seconds))

CARD = """# The emoji model

A small text-to-image latent diffusion model, trained from nothing by `pretrain.py` of this repository. It draws
64 x 64 pictures of 46 animals from their bare names and exists so that the scripts run, learn and can be tested on a
laptop without a download. Load it with `StableDiffusionPipeline.from_pretrained("models/emoji")`.

![46 prompts x 4 seeds](samples.png)

*T = 50, guidance 5, DDIM with eta = 1; four seeds of each prompt.*

## Training data and licences

{drawings} drawings of the 46 animals ({others} more emoji for the VAE and the CLIP), rasterised from these npm packages
and composed into {pictures:,} pictures: plain, gradient and patterned backgrounds, small flips, shifts, scales,
rotations.
A model trained on drawings may reproduce them; keep their licences in mind, and the attribution that
Twemoji asks for: Twemoji graphics (c) Twitter, Inc and other contributors, CC BY 4.0.

| package | licence of the drawings |
|---|---|
{licences}

sheep is drawn from ewe and ram, squirrel from chipmunk, bee from honeybee, cow from ox too, whale from spouting whale.

## Sizes

| file | bytes |
|---|---|
{sizes}

UNet {unet:.2f} M parameters, VAE {vae:.2f} M (f = 8, 12 latent channels), text encoder {text:.2f} M, tokenizer {tokens}
tokens, CLIP (`clip/`, open_clip `local-dir:`) {clip:.2f} M. Weights are float16.

## Training

On {machine}: {minutes}.

## Measured

- VAE: {psnr:.1f} dB PSNR on 400 training pictures.
- The bundled CLIP ranks the right one of the 46 names first for {top1:.1f} % of the {samples} pictures of
  `samples.png`, among the first five for {top5:.1f} %.
- A CLIP trained the same way without `{held_out}` ranks the right name first for {by_drawing:.1f} % of the {n} drawings
  of that set (mean score of ten pictures each; for {by_picture:.1f} % of the single pictures). The bundled one is
  trained on all six sets.
- 16 pictures take {seconds:.2f} s (median).

## Known weaknesses

- Names whose four pictures the CLIP got right less than three times: {weak}.
- It has learned some 360 drawings nearly by heart: poses are those of the emoji sets, fine lines are soft, and
  captions beyond "NAME", "a NAME" and "NAME on a COLOUR background" mean little to it.
- The CLIP judges the same 46 names only. It was trained on the drawings that the UNet learned from, so it measures
  whether a picture still shows the animal, not taste.
"""

def write_card(out, work, facts):
    data = np.load(work / "drawings.npz")
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name not in ("README.md", "metrics.json"))
    sizes = "\n".join(f"| {p.relative_to(out)} | {p.stat().st_size:,} |" for p in files)
    licences = "\n".join(f"| @iconify-json/{k} | {v} |" for k, v in EMOJI_SETS.items())
    animals = int((data["names"] != "").sum())
    facts |= {"drawings": animals, "others": len(data["names"]) - animals, "sizes": sizes, "licences": licences}
    facts["minutes"] = ", ".join(f"{k} {v / 60:.0f} min" for k, v in facts["training_seconds"].items())
    (out / "README.md").write_text(CARD.format(**facts))

def main(args):
    work, out = Path(args.work), Path(args.out)
    work.mkdir(parents=True, exist_ok=True)
    stages = ["data", "vae", "unet", "decoder", "clip", "export", "samples"]
    todo = stages if args.stage == "all" else [args.stage]
    facts_file = work / "facts.json"
    facts = json.loads(facts_file.read_text()) if facts_file.exists() else {"training_seconds": {}}
    seconds = facts["training_seconds"]
    if "data" in todo:
        make_data(work, args)
    if args.stage == "data":
        return
    vae, seconds["VAE"] = train_vae(work, args)  # what is finished is read back in a moment
    if args.stage == "vae":
        return
    unet, text_encoder, tokenizer, scaling_factor, seconds["UNet"] = train_unet(work, args, vae)
    if args.stage == "unet":
        return
    seconds["decoder"] = refine_decoder(work, args, vae)
    if "clip" in todo:
        by_drawing, by_picture, n, seconds["held-out CLIP"] = held_out_accuracy(work, args, tokenizer)
        everything = np.ones(len(np.load(work / "drawings.npz")["names"]), bool)
        seconds["CLIP"] = train_clip("clip", work, args, tokenizer, everything, out / "clip")
        facts |= {"by_drawing": 100 * by_drawing, "by_picture": 100 * by_picture, "n": n, "held_out": args.held_out}
    if "export" in todo:
        x = to_tensor(np.load(work / "animals.npy", mmap_mode="r")[:400])
        with torch.no_grad():
            error = ((vae.decoder(vae.encoder(x)).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
        export(out, vae, unet, text_encoder, tokenizer, scaling_factor)
        facts |= {"psnr": float(-10 * error.log10().mean()), "tokens": len(tokenizer), "pictures": args.pictures}
        clip = sum(v.numel() for v in load_file(out / "clip/open_clip_model.safetensors").values()) / 1e6
        facts |= {"clip": clip, "unet": unet.num_parameters() / 1e6, "vae": vae.num_parameters() / 1e6}
        facts["text"] = text_encoder.num_parameters() / 1e6
    if "samples" in todo:
        pictures, labels, facts["seconds"] = draw_samples(out)
        ranks = clip_ranks(out / "clip", pictures, labels)
        facts |= {"top1": 100 * float((ranks == 0).mean()), "top5": 100 * float((ranks < 5).mean())}
        hits = {name: int((ranks[np.array(labels) == name] == 0).sum()) for name in NAMES}
        facts["weak"] = ", ".join(f"{name} ({k} of 4)" for name, k in hits.items() if k < 3) or "none"
        machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator"
        facts |= {"samples": len(labels), "machine": machine}
        write_card(out, work, facts)
    facts_file.write_text(json.dumps(facts, indent=2))

if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
