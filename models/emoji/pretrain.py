"""
Trains the emoji model, the folder around this script, from nothing on two CPU cores in two hours.

    python models/emoji/pretrain.py

Run from the root of the repository. If you interrupt it, run it again: it goes on where it was.

    data     fetch six open emoji sets (npm), rasterise the drawings, compose 64 x 64 pictures
    vae      AutoencoderTiny, f = 8, 12 latent channels: (3, 64, 64) <-> (12, 8, 8)
    unet     UNet2DConditionModel and CLIPTextModel together: noise prediction, min-SNR weights
    decoder  only the VAE's decoder, only on animals: sharper pictures from the same latents
    clip     a tiny open_clip model, which learns the names of the drawings
    export   a StableDiffusionPipeline folder in float16, and samples.png (46 prompts x 4 seeds)

Needs `npm` on the PATH and `pip install resvg_py`. The emoji sets have fixed versions and every
random number follows from --seed, so a second run on the same machine with the same number of
threads writes the same weights, byte for byte.
"""

import json
import math
import os
import re
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

# for OpenMP in torch: threads that spin as they wait stall a run beside any other busy process
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# DDPO's 45 animals and "elephant"
NAMES = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon "
    "fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake "
    "turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo "
    "elephant"
).split()

# the icons that show a name, where it is not only the icon of that name
ICONS = {
    "cat": "cat cat-face",
    "dog": "dog dog-face",
    "horse": "horse horse-face",
    "monkey": "monkey monkey-face",
    "rabbit": "rabbit rabbit-face",
    "bird": "bird black-bird",
    "sheep": "ewe sheep",
    "cow": "cow cow-face",
    "tiger": "tiger tiger-face",
    "bear": "bear polar-bear",
    "beetle": "beetle lady-beetle",
    "fish": "fish tropical-fish",
    "whale": "whale spouting-whale",
    "squirrel": "chipmunk",
    "mouse": "mouse-face",
    "chicken": "chicken rooster",
    "bee": "honeybee",
    "pig": "pig pig-face",
    "camel": "camel two-hump-camel",
}

# other looks of the same animals, which are not used; from the side a mouse is drawn like a rat
LEFT_OUT = ["service-dog", "poodle", "black-cat", "dove", "ox", "ram", "blowfish", "mouse"]

# npm package @iconify-json/KEY: its version; the licences are in README.md
EMOJI_SETS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fxemoji": "1.2.2",
    "twemoji": "1.2.5",
}

# background colours, with the words that captions use for them
COLORS = {
    "white": (250, 250, 250),
    "red": (235, 140, 130),
    "orange": (245, 190, 125),
    "yellow": (250, 230, 150),
    "green": (160, 210, 150),
    "blue": (150, 195, 240),
    "purple": (190, 165, 225),
    "pink": (245, 195, 210),
    "grey": (190, 194, 198),
    "dark": (70, 75, 95),
}


@dataclass
class Args:
    work: str = "runs/pretrain"
    """downloads, pictures and checkpoints (1.5 GB); with other flags than before take a new one"""
    out: str = "models/emoji"
    """folder of the finished model"""
    seed: int = 0
    """seed of the pictures, the initial weights and the batches"""
    pictures: int = 40_000
    """number of composed animal pictures; the VAE sees a quarter as many of other emoji too"""
    vae_steps: int = 7_000
    """optimiser steps of the VAE, batch 16"""
    unet_steps: int = 24_000
    """optimiser steps of UNet and text encoder, batch 64"""
    decoder_steps: int = 4_000
    """optimiser steps of the decoder on its own, batch 16"""
    clip_steps: int = 8_000
    """optimiser steps of the CLIP, batch 96"""
    sample_steps: int = 50
    """denoising steps of the pictures in samples.png"""


# ---- data ----------------------------------------------------------------------------------------


def center(drawing, size, margin):
    """Crops a drawing to what is visible and centres that in a square of `size` pixels."""
    drawing = drawing.crop(drawing.getbbox())
    scale = (size - 2 * margin) / max(drawing.size)
    width = max(1, round(drawing.width * scale))
    height = max(1, round(drawing.height * scale))
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)

    square = Image.new("RGBA", (size, size))
    x = (size - width) // 2
    y = (size - height) // 2
    square.paste(drawing, (x, y))
    return np.asarray(square)


def read_icons(work):
    """Downloads the six sets, unless they are there. Yields (set, icon, svg) for every emoji."""
    for emoji_set, version in EMOJI_SETS.items():
        path = work / f"iconify-json-{emoji_set}-{version}.tgz"
        if not path.exists():
            package = f"@iconify-json/{emoji_set}@{version}"
            subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True)
        with tarfile.open(path) as tar:
            data = json.load(tar.extractfile("package/icons.json"))

        for icon, entry in tqdm(data["icons"].items(), desc=emoji_set):
            width = entry.get("width", data.get("width", 16))
            height = entry.get("height", data.get("height", 16))
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{entry["body"]}</svg>'
            )
            yield emoji_set, icon, svg


def rasterise(svg):
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
    return Image.open(BytesIO(bytes(png))).convert("RGBA")


def name_icons():
    """{icon: name} of the animals' icons."""
    return {icon: name for name in NAMES for icon in ICONS.get(name, name).split()}


def fetch_drawings(work):
    """Rasterises the six sets into drawings.npz.

    Its arrays: rgba (N, 128, 128, 4) and small (N, 64, 64, 4), uint8; names (N,), "" for emoji
    other than the animals; icons (N,), their names in the set.
    """
    label_of = name_icons()
    # skin tones, families and flags would be hundreds of near copies
    skipped = re.compile(r".*skin-tone|.*-(dark|light|medium)$|flag-")

    arrays = {"rgba": [], "small": [], "names": [], "icons": []}
    for _, icon, svg in read_icons(work):
        if icon in LEFT_OUT or (skipped.match(icon) and icon not in label_of):
            continue
        drawing = rasterise(svg)
        if drawing.getbbox() is None:  # nothing is visible
            continue
        arrays["rgba"].append(center(drawing, size=128, margin=0))
        arrays["small"].append(center(drawing, size=64, margin=3))
        arrays["names"].append(label_of.get(icon, ""))
        arrays["icons"].append(icon)

    np.savez(work / "part.npz", **{key: np.array(values) for key, values in arrays.items()})
    (work / "part.npz").rename(work / "drawings.npz")  # never half-written


def compose(drawing, name, rng):
    """Puts a drawing on a background, a little scaled, turned and shifted.

    drawing: uint8 (128, 128, 4). Returns (picture, caption): uint8 (64, 64, 3) and a string.
    """
    # a background colour that the drawing stands out from: plain, or (one in six) a gradient
    alpha = drawing[..., 3:] / 255
    mean = (drawing[..., :3] * alpha).sum((0, 1)) / alpha.sum()
    names = [name for name, color in COLORS.items() if np.linalg.norm(mean - color) > 80]
    color_name = rng.choice(names)
    color = (np.array(COLORS[color_name]) + rng.normal(0, 6, 3)).clip(0, 255)
    background = np.broadcast_to(color, (64, 64, 3))
    if rng.random() < 1 / 6:
        other = (color + rng.choice([-1, 1]) * rng.uniform(20, 45)).clip(0, 255)
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        mix = (0.5 + 0.35 * (x * math.cos(angle) + y * math.sin(angle))).clip(0, 1)
        background = mix[..., None] * color + (1 - mix[..., None]) * other
    picture = Image.fromarray(background.round().astype(np.uint8))

    drawing = Image.fromarray(drawing)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = int(rng.integers(54, 60))
    drawing = drawing.resize((size, size), Image.Resampling.LANCZOS)
    drawing = drawing.rotate(rng.normal(0, 1.5), Image.Resampling.BICUBIC)
    corner = (64 - size) / 2 + rng.normal(0, 0.7, 2)
    x, y = np.round(corner).astype(int).tolist()
    picture.paste(drawing, (x, y), drawing)

    article = "an" if name[:1] in "aeiou" else "a"
    captions = [name, f"{article} {name}", f"{name} on a {color_name} background"]
    caption = rng.choice(captions, p=[0.75, 0.1, 0.15])
    return np.asarray(picture), str(caption)


def compose_pictures(work, name, candidates, count, seed):
    """Composes `count` pictures into NAME.npy, with their captions in NAME.json.

    candidates: indices of the drawings. Every animal is shown equally often.
    """
    data = np.load(work / "drawings.npz")
    rgba = data["rgba"]
    names = data["names"]

    rng = np.random.default_rng(seed)
    groups = [candidates[names[candidates] == n] for n in sorted(set(names[candidates]))]
    choices = []
    for i in range(count):
        group = groups[i % len(groups)]
        choices.append(rng.choice(group))
    choices = np.array(choices)
    rng.shuffle(choices)

    pictures = []
    captions = []
    for i in tqdm(choices, desc=f"compose {name}"):
        picture, caption = compose(rgba[i], names[i], rng)
        pictures.append(picture)
        captions.append(caption)

    np.save(work / f"{name}.npy", np.stack(pictures))
    (work / f"{name}.json").write_text(json.dumps(captions))


def to_tensor(pictures):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1], channels last in memory"""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- training, shared by all models --------------------------------------------------------------


def fit(name, work, params, steps, lr, compute_loss, seed, weight_decay=1e-2, ema_decay=0.999):
    """AdamW with warm-up and cosine decay; leaves the moving average of the weights in place.

    params: dict of parameters. compute_loss(generator) -> scalar; all its randomness must come
    from the generator, which depends only on (seed, step). The state is saved every 250 steps
    in WORK/NAME.pt, and a run that was interrupted goes on as if it had not been.
    """
    path = work / f"{name}.pt"
    values = list(params.values())
    ema = [value.detach().clone() for value in values]
    optimizer = torch.optim.AdamW(values, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)

    first_step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        first_step = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for key, value, average in zip(params, values, ema):
                value.copy_(state["params"][key])
                average.copy_(state["ema"][key])

    bar = tqdm(range(first_step, steps), initial=first_step, total=steps, desc=name, mininterval=5)
    for step in bar:
        # linear warm-up, then half a cosine down to 2 %
        warmup = min(1, (step + 1) / 200)
        progress = max(0, step - 200) / max(1, steps - 200)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        decay = 0.02 + 0.98 * cosine
        optimizer.param_groups[0]["lr"] = lr * warmup * decay

        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = compute_loss(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0, error_if_nonfinite=True)
        optimizer.step()

        # an average of the last thousand weights, of fewer at the beginning
        kept = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(ema, values, 1 - kept)

        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "params": {key: value.detach() for key, value in params.items()},
                "ema": dict(zip(params, ema)),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)  # a whole checkpoint is always there

    with torch.no_grad():
        for value, average in zip(values, ema):
            value.copy_(average)


# ---- VAE -----------------------------------------------------------------------------------------


def make_vae():
    """1.2 M parameters. The decoder is the wider half: RL decodes once per picture."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        decoder_block_out_channels=(64, 64, 64, 64),
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0),
        latent_channels=12,
        act_fn="silu",
    )
    return vae.to(memory_format=torch.channels_last)  # a fifth faster on a CPU


def reconstruction_loss(decoded, pictures):
    """L1 for sharpness, MSE for PSNR, and L1 of the differences of neighbours for edges."""
    error = decoded - pictures
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 4 * (error**2).mean() + 0.5 * (across + down)


def train_vae(work, args):
    """Noise on the latents makes them smooth; a penalty keeps each channel near N(0, 1)."""
    torch.manual_seed(args.seed)
    vae = make_vae()
    animals = np.load(work / "animals.npy", mmap_mode="r")
    others = np.load(work / "others.npy", mmap_mode="r")
    num_pictures = len(animals) + len(others)

    def compute_loss(generator):
        pictures = []
        for i in torch.randint(0, num_pictures, (16,), generator=generator).tolist():
            pictures.append(animals[i] if i < len(animals) else others[i - len(animals)])
        x = to_tensor(pictures)
        noise = torch.randn(len(x), 12, 8, 8, generator=generator)
        z = vae.encoder(x)
        y = vae.decoder(z + 0.05 * noise)
        mean = z.mean((0, 2, 3))
        var = z.var((0, 2, 3))
        penalty = (mean**2).mean() + (var.log() ** 2).mean()
        return reconstruction_loss(y, x) + 0.01 * penalty

    params = dict(vae.named_parameters())
    fit("vae", work, params, args.vae_steps, 2e-3, compute_loss, args.seed)
    return vae.eval()


@torch.no_grad()
def encode_pictures(work, vae):
    """Latents of every animal picture, (N, 12, 8, 8) of unit scale, and the scaling factor."""
    pictures = np.load(work / "animals.npy", mmap_mode="r")
    chunks = []
    for i in tqdm(range(0, len(pictures), 200), desc="encode"):
        chunks.append(vae.encoder(to_tensor(pictures[i : i + 200])))
    latents = torch.cat(chunks).contiguous()
    scaling_factor = float(1 / latents.std())
    return latents.half().float() * scaling_factor, scaling_factor


def refine_decoder(work, args, vae, latents, scaling_factor):
    """Trains only the decoder, on the animals. The latents stay as the UNet learns them.

    The noise is what the UNet's errors look like to the decoder.
    """
    animals = np.load(work / "animals.npy", mmap_mode="r")

    def compute_loss(generator):
        indices = torch.randint(0, len(latents), (16,), generator=generator)
        x = to_tensor(animals[indices.numpy()])
        z = latents[indices] / scaling_factor
        noise = torch.randn(z.shape, generator=generator)
        return reconstruction_loss(vae.decoder(z + 0.1 * noise), x)

    params = dict(vae.decoder.named_parameters())
    fit("decoder", work, params, args.decoder_steps, 1e-3, compute_loss, args.seed)


# ---- tokenizer, text encoder, UNet ---------------------------------------------------------------


def merge_pair(word, pair):
    """("e", "l", "k") and the pair ("e", "l") -> ("el", "k")"""
    merged = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def train_tokenizer(captions):
    """A byte-pair vocabulary that merges until every word of the captions is one token.

    Not with `tokenizers`' trainer, whose merges differ from run to run where pairs are equally
    frequent.
    """
    words = set(" ".join(captions).split())
    words = [(*word[:-1], word[-1] + "</w>") for word in sorted(words)]
    merges = []
    while True:
        counts = Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
        if not counts:
            break
        # the most frequent pair, of several the last in the alphabet
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        words = [merge_pair(word, pair) for word in words]

    # CLIP's order: bytes, bytes that end a word, merges, start, end
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def save_tokenizer(tokenizer, folder):
    """transformers 5 writes tokenizer.json; vocab.json and merges.txt are for transformers 4."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def make_text_encoder(tokenizer):
    """0.5 M parameters"""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    return CLIPTextModel(config)


def make_unet():
    """2.9 M parameters. Attention only at 4 x 4: each level of it costs a fifth of a step."""
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


def train_unet(work, args, latents, captions, tokenizer):
    """Noise prediction with min-SNR-5 weights (Hang et al. 2023).

    A tenth of the captions is empty, for classifier-free guidance.
    """
    # the token ids of every distinct caption, the empty one first
    distinct = ["", *sorted(set(captions))]
    ids = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    position = {caption: i for i, caption in enumerate(distinct)}
    caption_index = torch.tensor([position[caption] for caption in captions])

    torch.manual_seed(args.seed)
    unet = make_unet()
    text_encoder = make_text_encoder(tokenizer)
    scheduler = make_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    min_snr_weight = snr.clamp(max=5) / snr

    def compute_loss(generator):
        indices = torch.randint(0, len(latents), (64,), generator=generator)
        x = latents[indices]
        empty = torch.rand(64, generator=generator) < 0.1
        caption = torch.where(empty, 0, caption_index[indices])
        t = torch.randint(0, 1000, (64,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)

        noisy = scheduler.add_noise(x, noise, t)
        noise_pred = unet(noisy, t, text_encoder(ids[caption])[0]).sample
        error = ((noise_pred - noise) ** 2).mean((1, 2, 3))
        return (min_snr_weight[t] * error).mean()

    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    params = dict(both.named_parameters())
    fit("unet", work, params, args.unet_steps, 1e-3, compute_loss, args.seed)
    return unet.eval(), text_encoder.eval()


# ---- CLIP ----------------------------------------------------------------------------------------


def make_clip(folder, tokenizer):
    """An open_clip model in `local-dir:` format: a ResNet of width 16 and a 2-layer text tower."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    config = {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 64,
                "layers": [1, 1, 1, 1],
                "width": 16,
                "head_width": 64,
                "patch_size": None,
            },
            "text_cfg": {
                "context_length": 16,
                "vocab_size": len(tokenizer),
                "width": 128,
                "heads": 4,
                "layers": 2,
                "hf_tokenizer_name": "local",  # open_clip reads the folder only if this is set
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False)


def uniform(n, low, high, generator):
    """One number per picture, (n, 1, 1, 1)"""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


def happens(n, probability, generator):
    """1.0 for some of the pictures, 0.0 for the others, (n, 1, 1, 1)"""
    return (torch.rand(n, 1, 1, 1, generator=generator) < probability).float()


def move(drawings, generator):
    """Turns, scales, stretches, flips and shifts drawings (N, 4, 64, 64)."""
    n = len(drawings)
    angle = math.radians(10) * torch.randn(n, generator=generator)
    scale = uniform(n, 0.9, 1.3, generator).flatten()
    flip = 2 * happens(n, 0.5, generator).flatten() - 1
    stretch = 1 + 0.06 * torch.randn(n, generator=generator)
    shift = 0.08 * torch.randn(n, 2, generator=generator)

    # the matrix maps a place in the new picture to one in the drawing
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    row_x = torch.stack([flip * stretch * cos, -flip * stretch * sin, shift[:, 0]], 1)
    row_y = torch.stack([sin, cos, shift[:, 1]], 1)
    matrix = torch.stack([row_x, row_y], 1)
    grid = F.affine_grid(matrix, drawings.shape, align_corners=False)
    return F.grid_sample(drawings, grid, align_corners=False)


def recolor(rgb, generator):
    """Gives drawings (N, 3, 64, 64) another palette."""
    n = len(rgb)
    gain = uniform(n, 0.6, 1.25, generator)[:, 0]
    channel_gain = 1 + 0.15 * torch.randn(n, 1, 3, generator=generator)
    matrix = torch.eye(3) * gain * channel_gain  # (N, 3, 3)

    # sometimes towards swapped channels, sometimes towards grey
    swapped = torch.eye(3)[torch.rand(n, 3, generator=generator).argsort(1)]
    amount = happens(n, 0.3, generator) * uniform(n, 0, 1, generator)
    matrix = matrix @ torch.lerp(torch.eye(3), swapped, amount[:, 0])
    grey = torch.full((3, 3), 1 / 3)
    amount = happens(n, 0.2, generator) * uniform(n, 0, 1, generator)
    matrix = matrix @ torch.lerp(torch.eye(3), grey, amount[:, 0])
    return torch.einsum("nij,njhw->nihw", matrix, rgb)


def augment(drawings, generator):
    """Composes drawings uint8 (N, 4, 64, 64) into pictures (N, 3, 64, 64) in [-1, 1].

    What separates one emoji set from another, or a drawing from a generated picture, must not
    matter: pose, palette, sharpness, noise. It varies more here than in the UNet's pictures, so
    that the CLIP does not judge by their habits.
    """
    n = len(drawings)
    drawings = drawings.float() / 255
    alpha = drawings[:, 3:]
    # colour times alpha, so that the colour of invisible pixels does not bleed into the edges
    drawings = move(torch.cat([drawings[:, :3] * alpha, alpha], 1), generator)
    alpha = drawings[:, 3:]
    rgb = recolor(drawings[:, :3], generator)
    rgb = rgb + alpha * uniform(n, -0.1, 0.1, generator)

    # a background: a colour, sometimes a gradient
    line = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    choice = torch.randint(len(COLORS), (n,), generator=generator)
    color = torch.tensor(list(COLORS.values()))[choice] / 255
    ground = color[:, :, None, None] + 0.05 * torch.randn(n, 3, 1, 1, generator=generator)
    slope = 0.12 * happens(n, 0.4, generator) * torch.randn(n, 2, 1, 1, generator=generator)
    slope_x, slope_y = slope.split(1, dim=1)
    ground = ground + slope_x * x + slope_y * y
    pictures = (rgb + (1 - alpha) * ground).clamp(0, 1) * 2 - 1

    # sometimes a little blurred, seldom very much, sometimes noisy
    blurred = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
    coarse = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4, mode="bilinear")
    amount = happens(n, 0.35, generator) * uniform(n, 0.3, 1, generator)
    pictures = torch.lerp(pictures, blurred, amount)
    pictures = torch.lerp(pictures, coarse, happens(n, 0.07, generator))
    noise = torch.randn(pictures.shape, generator=generator)
    pictures = pictures + 0.1 * happens(n, 0.3, generator) * noise

    # sometimes a square is erased
    side = uniform(n, 0, 0.3, generator) * happens(n, 0.3, generator)
    distance_y = (y - uniform(n, -1, 1, generator)).abs()
    distance_x = (x - uniform(n, -1, 1, generator)).abs()
    erased = (distance_y < side) & (distance_x < side)
    pictures = torch.where(erased, uniform(n, -1, 1, generator), pictures)
    return pictures.clamp(-1, 1)


def train_clip(work, args, tokenizer, folder):
    """Trains an open_clip model and saves it in `folder`.

    A batch has one picture of each animal and of 50 other emoji, all of different names, so the
    image tower learns what the drawings of a name have in common.
    """
    data = np.load(work / "drawings.npz")
    drawings = torch.from_numpy(data["small"]).permute(0, 3, 1, 2)
    names = data["names"]
    icons = data["icons"]

    # the drawings of each animal, then of each other emoji
    animals = [np.flatnonzero(names == n) for n in NAMES]
    other_icons = sorted(set(icons[names == ""]))
    others = [np.flatnonzero((names == "") & (icons == icon)) for icon in other_icons]

    torch.manual_seed(args.seed)
    model = make_clip(folder, tokenizer)

    def compute_loss(generator):
        chosen = torch.randperm(len(others), generator=generator)[:50].tolist()
        groups = animals + [others[i] for i in chosen]
        luck = torch.rand(len(groups), generator=generator).tolist()
        picked = [group[int(u * len(group))] for group, u in zip(groups, luck)]

        forms = torch.randint(3, (len(NAMES),), generator=generator).tolist()
        texts = []
        for name, form in zip(NAMES, forms):
            article = "an" if name[0] in "aeiou" else "a"
            captions = [name, f"{article} {name}", f"{name} on a white background"]
            texts.append(captions[form])
        texts += [other_icons[i].replace("-", " ") for i in chosen]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")

        pictures = augment(drawings[torch.tensor(picked)], generator)
        image, text, scale = model(pictures, tokens.input_ids)
        logits = scale.clamp(max=50) * image @ text.T
        target = torch.arange(len(groups))
        image_loss = F.cross_entropy(logits, target, label_smoothing=0.05)
        text_loss = F.cross_entropy(logits.T, target)
        # among the animals alone, as the model is used
        n = len(NAMES)
        animal_loss = F.cross_entropy(logits[:n, :n], target[:n], label_smoothing=0.05)
        return (image_loss + text_loss + animal_loss) / 2

    fit(
        "clip",
        work,
        dict(model.named_parameters()),
        args.clip_steps,
        2e-3,
        compute_loss,
        args.seed,
        weight_decay=0.1,
        ema_decay=0.998,
    )

    # the averaged weights need batch statistics of their own
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    generator = torch.Generator().manual_seed(args.seed)
    firsts = torch.tensor([group[0] for group in animals + others[:50]])
    with torch.no_grad():
        for _ in range(40):
            model.encode_image(augment(drawings[firsts], generator))

    weights = {}
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value = value.half()
        weights[key] = value.contiguous()
    save_file(weights, folder / "open_clip_model.safetensors")


# ---- export and samples --------------------------------------------------------------------------


def export(out, vae, unet, text_encoder, tokenizer, scaling_factor):
    """Writes the pipeline's folder in float16. The models are float16 afterwards."""
    vae.register_to_config(scaling_factor=scaling_factor)
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out)
    save_tokenizer(tokenizer, out / "tokenizer")

    # transformers 5 loads this dtype; diffusers loads the other models as float32
    path = out / "text_encoder/config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # AutoencoderTiny writes an attribute that it then reports as unexpected
    path = out / "vae/config.json"
    config = json.loads(path.read_text())
    del config["block_out_channels"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def draw_samples(out, num_steps):
    """Draws 46 prompts x 4 seeds with the scripts' sampler (DDIM with eta = 1).

    Returns pictures, uint8 (184, 64, 64, 3).
    """
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    labels = np.repeat(NAMES, 4).tolist()

    chunks = []
    for i in tqdm(range(0, len(labels), 16), desc="samples"):
        prompts = labels[i : i + 16]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(prompts))]
        result = pipe(
            prompts,
            num_inference_steps=num_steps,
            guidance_scale=5.0,
            eta=1.0,
            generator=generators,
            output_type="np",
        )
        chunks.append(result.images)
    pictures = np.concatenate(chunks) * 255
    return pictures.round().astype(np.uint8)


def make_sheet(pictures):
    """samples.png: four columns of names, each above its four pictures."""
    rows = math.ceil(len(NAMES) / 4)
    width = 4 * 256 + 3 * 8
    sheet = Image.new("RGB", (width, rows * 78), "white")
    draw = ImageDraw.Draw(sheet)
    for k, name in enumerate(NAMES):
        x = k % 4 * (256 + 8)
        y = k // 4 * 78
        draw.text((x + 2, y), name, fill="black")
        for j in range(4):
            picture = Image.fromarray(pictures[4 * k + j])
            sheet.paste(picture, (x + 64 * j, y + 13))
    return sheet


def main(args):
    diffusers.utils.logging.set_verbosity_error()
    work = Path(args.work)
    out = Path(args.out)
    work.mkdir(parents=True, exist_ok=True)

    # what the models learn from
    if not (work / "drawings.npz").exists():
        fetch_drawings(work)
    is_animal = np.load(work / "drawings.npz")["names"] != ""
    animals = np.flatnonzero(is_animal)
    others = np.flatnonzero(~is_animal)
    if not (work / "animals.json").exists():
        compose_pictures(work, "animals", animals, args.pictures, args.seed)
    if not (work / "others.json").exists():
        compose_pictures(work, "others", others, args.pictures // 4, args.seed + 1)
    captions = json.loads((work / "animals.json").read_text())

    vae = train_vae(work, args)
    latents, scaling_factor = encode_pictures(work, vae)
    tokenizer = train_tokenizer(captions)
    unet, text_encoder = train_unet(work, args, latents, captions, tokenizer)
    refine_decoder(work, args, vae, latents, scaling_factor)
    train_clip(work, args, tokenizer, out / "clip")

    export(out, vae, unet, text_encoder, tokenizer, scaling_factor)
    pictures = draw_samples(out, args.sample_steps)
    make_sheet(pictures).save(out / "samples.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
