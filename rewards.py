"""
Reward models, the only module that the training scripts share.

A reward is a function (images, prompts) -> rewards. images is a uint8 array (N, H, W, 3) in RGB,
prompts a list of N strings, rewards N numbers. More is better. `--reward` takes

    compress                          a name of `python rewards.py --list`
    my_reward.py:redness              a function of your own file, or a class to make one
    "aesthetic + 0.5*clip - compress" a weighted sum of these

Your own file needs two lines, and may import modules beside it or use a process pool:

    def redness(images, prompts):
        return images[..., 0].mean(axis=(1, 2))

To score pictures that you have:

    python rewards.py --reward my_reward.py:redness cat.png dog.png
    python rewards.py --reward clip --clip-folder models/emoji/clip --prompt "a cat" cat.png

To add one for good, write a factory (device) -> reward and add it to the table REWARDS.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

# torch and open_clip are imported where they are needed, so `--list` is quick


class RewardError(ValueError):
    """A mistake that one line explains: what is wrong, and what to do."""


# ---- weights: downloaded once, then read from the disk ----

CLIP_L = ("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
LAION_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
LAION = (LAION_URL, "sac+logos+ava1-l14-linearMSE.pth")
LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
HPS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
HPS_SHA256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
PICKSCORE = "yuvalkirstain/PickScore_v1"


def fetch(source, file, sha256=None):
    """Local path of a file of weights from a repository of the hub or a URL, downloaded once.

    sha256 pins the content of a file that is not in safetensors format.
    """
    import huggingface_hub
    import torch

    try:
        if source.startswith("http"):
            path = Path(torch.hub.get_dir(), "checkpoints", file)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(source + quote(file), path)
        else:
            path = huggingface_hub.hf_hub_download(source, file)
    except OSError as error:
        problem = f"{file} of {source} is not here and cannot be downloaded ({error!r:.200})"
        advice = "use this reward on a connected machine, then copy its HF_HOME and TORCH_HOME"
        raise RewardError(f"{problem}: {advice} (in ~/.cache)") from error

    if sha256 is not None:
        with open(path, "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        if digest != sha256:
            raise RewardError(f"{path} is damaged or another file: its sha256 is not {sha256}")
    return path


# ---- the rewards: each factory takes a device and returns fn(images, prompts) -> (N,) ----


def incompress(device):
    """The size of the picture as a JPEG of quality 95, in kB (1000 bytes)."""

    def size(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        return buffer.getbuffer().nbytes / 1000

    pool = ThreadPoolExecutor()  # threads help: Pillow encodes without holding Python's lock
    return lambda images, prompts: np.array(list(pool.map(size, images)))


def compress(device):
    """Minus the size of the picture as a JPEG of quality 95, in kB (1000 bytes)."""
    size = incompress(device)
    return lambda images, prompts: -size(images, prompts)


def in_batches(fn, *lists):
    """fn of 16 entries of each list at a time, which bounds the memory, as one tensor (N, ...)."""
    import torch

    values = []
    with torch.no_grad():
        for i in range(0, len(lists[0]), 16):
            values.append(fn(*[entries[i : i + 16] for entries in lists]))
    return torch.cat(values)


@cache  # `aesthetic`, `clip` and the alignment metric of the scripts share one model
def load_open_clip(device, name, weights=None, resize_mode=None):
    """A model of open_clip as two functions: images and prompts -> L2-normalised (N, D)."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=weights, device=device, image_resize_mode=resize_mode
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)

    def embed_images(images):
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        return model.encode_image(pixels.to(device), normalize=True)

    def embed_texts(prompts):
        return model.encode_text(tokenizer(list(prompts)).to(device), normalize=True)

    return partial(in_batches, embed_images), partial(in_batches, embed_texts)


def load_clip(device, folder=None):
    """The CLIP of a folder in open_clip's format, if there is one, or else OpenAI's ViT-L-14."""
    if not os.path.isdir(folder or ""):
        # the plain "ViT-L-14" takes the same weights and computes other embeddings, without a word
        return load_open_clip(str(device), "ViT-L-14-quickgelu", fetch(*CLIP_L))
    if not Path(folder, "open_clip_model.safetensors").is_file():
        # without this check open_clip takes random weights
        raise RewardError(f"{folder} is not a CLIP folder: it has no open_clip_model.safetensors")
    return load_open_clip(str(device), f"local-dir:{folder}")


def clip(device, folder=None):
    """100 x the cosine of CLIP's embeddings of picture and prompt (ViT-L-14, 1.71 GB)."""
    embed_images, embed_texts = load_clip(device, folder)
    return lambda images, prompts: 100 * (embed_images(images) * embed_texts(prompts)).sum(-1)


def hps(device):
    """Human Preference Score v2.1, a cosine of about 0.2 to 0.35 (ViT-H-14, 1.97 GB)."""
    weights = fetch(*HPS, HPS_SHA256)  # its authors pad the picture to a square ("longest")
    embed_images, embed_texts = load_open_clip(str(device), "ViT-H-14", weights, "longest")
    return lambda images, prompts: (embed_images(images) * embed_texts(prompts)).sum(-1)


def aesthetic(device):
    """LAION's aesthetics predictor on CLIP ViT-L-14, about 1 to 10 (1.71 GB + 3.7 MB)."""
    import torch

    weights = torch.load(fetch(*LAION, LAION_SHA256), map_location=device, weights_only=True)
    embed_images, _ = load_clip(device)

    def reward(images, prompts):
        x = embed_images(images)
        for layer in (0, 2, 4, 6, 7):  # LAION trained without activations between the layers
            x = x @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
        return x[:, 0]

    return reward


def pickscore(device):
    """PickScore v1, a logit of about 15 to 25 (ViT-H-14, 3.94 GB)."""
    import open_clip  # its preprocessing and its tokens are those of PickScore's own processor
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(PICKSCORE, use_safetensors=True).to(device).eval()
    preprocess = open_clip.image_transform(model.config.vision_config.image_size, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def score(images, prompts):
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        outputs = model(tokenizer(prompts).to(device), pixels.to(device))
        return outputs.logits_per_image.diagonal()

    return partial(in_batches, score)


REWARDS = {
    "compress": compress,
    "incompress": incompress,
    "aesthetic": aesthetic,
    "clip": clip,
    "pickscore": pickscore,
    "hps": hps,
}


# ---- a user's own reward ----


@cache
def import_file(path, mtime):
    """Import a Python file, once for each version, and put its folder at the end of sys.path.

    It has the name that `import` would give it, by which a pool's processes find its functions,
    unless that is taken (json.py, rewards.py).
    """
    sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    name = path.stem
    if name in sys.modules or "." in name or importlib.util.find_spec(name).origin != str(path):
        name = f"user_reward_{len(sys.modules)}"

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_user_reward(path, attribute):
    """A function of a user's file, or an instance of a class of it."""
    guard_forks()
    with unchanged_process():
        reward = getattr(import_file(path, path.stat().st_mtime_ns), attribute)
        return reward() if isinstance(reward, type) else reward


@contextmanager
def unchanged_process():
    """Leave torch's modes and the working folder as they were: a reward may forget to."""
    import torch

    folder = os.getcwd()
    dtype = torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    grad = torch.set_grad_enabled(torch.is_grad_enabled())
    depth = torch.autocast_increment_nesting()
    try:
        with grad, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        while torch.autocast_decrement_nesting() >= depth:
            continue  # autocast that was entered and not left
        torch.clear_autocast_cache()
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        os.chdir(folder)


@cache
def guard_forks():
    """Keep the signal handlers of this process out of those that it forks. Once is enough.

    A script only takes note of SIGTERM; a worker like that survives Pool.terminate(). Workers
    ignore SIGINT and SIGUSR1, as the script needs them to finish the iteration. Forks block all.
    """
    saved = threading.local()  # any thread may fork

    def block():
        numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
        saved.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def restore():
        signal.pthread_sigmask(signal.SIG_SETMASK, saved.mask)

    def reset():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=reset)


# ---- the text of --reward, and what it computes ----

WEIGHT = r"(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*)?\s*"  # 2*  2.*  .5*  1e-3 *
TERM = rf"([+-]?)\s*{WEIGHT}({'|'.join(REWARDS)}|.+?\.py:\w+)\s*(?=[+-]|$)"


def parse(spec):
    """Split "aesthetic - 0.5*my.py:f" into [(1.0, "aesthetic"), (-0.5, "my.py:f")].

    FILE may contain spaces and signs; if it begins like a term (clip-art/my.py), put ./ in front.
    """
    terms = []
    rest = spec.strip()
    while rest or not terms:
        match = re.match(TERM, rest)
        if match is None:
            known = f"one of {', '.join(REWARDS)}, FILE.py:FUNCTION, or a sum like 'hps + 0.5*clip'"
            raise RewardError(f"cannot read {rest!r} in reward {spec!r}: it takes {known}")
        sign, weight, name = match.groups()
        terms.append((float(sign + (weight or "1")), name))
        rest = rest[match.end() :]
    return terms


def load_reward(spec, device="cpu", clip_folder=None):
    """The text of --reward -> score(images, prompts) -> (rewards, parts).

    rewards is float64 (N,); parts is {column: rewards of that term, float64 (N,)}. score.names
    lists the columns, score.label is a short text for the name of a folder, score.files lists the
    users' files. `clip` uses the model in clip_folder, if there is such a folder.
    """
    parts = {}  # column: (name, weight, fn)
    label = ""  # "aesthetic + 0.5*dir/my.py:f" -> "+aesthetic+0.5f"
    files = []
    for weight, name in parse(spec):
        file, _, attribute = name.rpartition(":")
        if file:
            files.append(Path(file).resolve())
            fn = load_user_reward(files[-1], attribute)
        elif name == "clip":
            fn = clip(device, clip_folder)
        else:
            fn = REWARDS[name](device)

        label += "-" if weight < 0 else "+"
        if abs(weight) != 1:
            label += f"{abs(weight):g}"
        label += attribute
        column = attribute
        if column in parts or column in ("mean", "std", "s"):  # reward_mean is the script's column
            column = f"{attribute}_{len(parts) + 1}"
        parts[column] = (name, weight, fn)

    def score(images, prompts):
        if images.dtype != np.uint8 or images.shape != (len(prompts), *images.shape[1:3], 3):
            given = f"{images.dtype} {images.shape} and {len(prompts)}"
            raise RewardError(f"a reward takes uint8 (N, H, W, 3) and N prompts, not {given}")
        total = np.zeros(len(images))
        values = {}
        for column, (name, weight, fn) in parts.items():
            values[column] = evaluate(name, fn, images, prompts)
            total += weight * values[column]
        return total, values

    score.names = list(parts)
    score.label = label.removeprefix("+")
    score.files = list(dict.fromkeys(files))
    return score


def evaluate(name, fn, images, prompts):
    """The rewards of one term as float64 (N,)."""
    try:
        with unchanged_process():
            values = fn(images.copy(), list(prompts))  # copies, which a reward may change
        if hasattr(values, "detach"):  # a tensor, with or without gradient, on any device
            values = values.detach().cpu().double().numpy()
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (len(images),):
            raise ValueError(f"it returned shape {values.shape}, not ({len(images)},)")
    except Exception as error:
        samples = f"{len(images)} pictures from sample 0 (prompt {prompts[0]!r:.90}) on"
        raise RewardError(f"reward {name!r} failed for {samples}: {error!r:.200}") from error

    for i, value in enumerate(values):
        if not np.isfinite(value):
            raise RewardError(f"reward {name!r} is {value} for sample {i} (prompt {prompts[i]!r})")
    return values


def load_metrics(spec, device="cpu", clip_folder=None):
    """Evaluation metrics: measure(rewards, images, prompts, names) -> {column: float}.

    eval_reward, its standard error; eval_diversity, the mean distance between the halves of images,
    which have the same prompts; eval_align, 100 x the cosine of picture and prompt, and eval_top1,
    how often it is the largest of all names, with the CLIP of clip_folder or of `spec`, if here.
    """
    has_clip = os.path.isdir(clip_folder or "")
    if not has_clip and {name for _, name in parse(spec)} & {"clip", "aesthetic"}:
        from huggingface_hub import try_to_load_from_cache

        has_clip = isinstance(try_to_load_from_cache(*CLIP_L), str)
    if has_clip:
        embed_images, embed_texts = load_clip(device, clip_folder)
        embed_names = cache(embed_texts)  # the names of a run stay the same

    def measure(rewards, images, prompts, names):
        first, second = np.split(images / 255, 2)
        metrics = {
            "eval_reward": rewards.mean(),
            "eval_reward_se": rewards.std(ddof=1) / np.sqrt(len(rewards)),
            "eval_diversity": np.sqrt(((first - second) ** 2).mean(axis=(1, 2, 3))).mean(),
        }
        if has_clip:
            names = list(dict.fromkeys(names))  # a name that is listed twice has no rival in itself
            own = np.array([names.index(prompt) for prompt in prompts])
            cosines = (embed_images(images) @ embed_names(tuple(names)).T).cpu().double().numpy()
            metrics["eval_align"] = 100 * cosines[np.arange(len(own)), own].mean()
            metrics["eval_top1"] = (cosines.argmax(axis=1) == own).mean()
        return {name: float(value) for name, value in metrics.items()}

    return measure


# ---- the command line ----


def read_picture(file):
    """A picture file as uint8 (H, W, 3)."""
    with Image.open(file) as picture:
        if picture.mode == "F" or picture.mode.startswith("I"):  # convert() would clip at 255
            raise RewardError(f"{file} has more than 8 bits per pixel and channel: convert it")
        return np.asarray(picture.convert("RGB"))


def main():
    parser = argparse.ArgumentParser(description="Score pictures with a reward.")
    parser.add_argument("images", nargs="*", help="picture files")
    parser.add_argument("--reward", default="compress", help="a reward or a sum of rewards")
    parser.add_argument("--prompt", default="", help="the prompt of all the pictures")
    parser.add_argument("--clip-folder", help="a CLIP for `clip`, such as models/emoji/clip")
    parser.add_argument("--list", action="store_true", help="show all rewards and their units")
    args = parser.parse_args()
    if args.list or not args.images:
        for name, factory in REWARDS.items():
            print(f"{name:12}{factory.__doc__}")
        return
    if args.clip_folder and not os.path.isdir(args.clip_folder):
        parser.error(f"--clip-folder {args.clip_folder} is not a folder")
    score = load_reward(args.reward, clip_folder=args.clip_folder)
    print(*[f"{column:>12}" for column in ["reward", *score.names]], " picture")
    for file in args.images:
        total, parts = score(read_picture(file)[None], [args.prompt])
        numbers = [f"{values[0]:12.4f}" for values in [total, *parts.values()]]
        print(*numbers, f" {file}")


if __name__ == "__main__":
    try:
        main()
    except RewardError as error:
        sys.exit(f"rewards.py: {error}")
