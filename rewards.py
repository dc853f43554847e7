"""
Reward models, the only module that the training scripts share.

A reward is a function (images, prompts) -> rewards. images is a uint8 array (N, H, W, 3) in RGB,
prompts a list of N strings, rewards N numbers. More is better. `--reward` takes

    compress                          a name of `python rewards.py --list`
    my_reward.py:redness              a function of your own file, or a class to make one
    "aesthetic + 0.5*clip - compress" a weighted sum of these

Your own file needs two lines. It can import modules that lie beside it, and use a process pool.

    def redness(images, prompts):
        return images[..., 0].mean(axis=(1, 2))

The rewards of pictures that you have:

    python rewards.py --reward my_reward.py:redness cat.png dog.png
    python rewards.py --reward clip --clip-folder models/emoji/clip --prompt "a cat" cat.png

To add a reward for good, write a factory (device) -> reward and add it to the table REWARDS.
"""

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

# torch, open_clip and the like are imported where they are needed, so `--list` is quick.


class RewardError(ValueError):
    """A mistake that one line explains: what is wrong, and what to do."""


# ---- weights: downloaded once, then read from the disk ----

CLIP_L = ("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
LAION = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/",
    "sac+logos+ava1-l14-linearMSE.pth",
)
LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
HPS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
HPS_SHA256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
PICKSCORE = "yuvalkirstain/PickScore_v1"


def fetch(source, file, sha256=None):
    """Local path of a file of weights, downloaded if it is not there.

    source: a repository of the Hugging Face hub, or a URL that ends in "/". sha256 pins the content
    of a file that is not in safetensors format. Raises RewardError for no network or a wrong file.
    """
    import huggingface_hub as hub
    import torch

    from_url = source.startswith("http")
    place = torch.hub.get_dir() if from_url else hub.constants.HF_HUB_CACHE
    try:
        if from_url:
            path = Path(place, "checkpoints", file)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(source + quote(file), path)
        else:
            path = hub.hf_hub_download(source, file)
    except OSError as error:
        problem = f"{file} of {source} is not in {place} and cannot be downloaded ({error!r:.200})"
        advice = "use this reward once on a connected machine, then copy that folder"
        raise RewardError(f"{problem}: {advice}") from error

    if sha256 is not None:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
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
    """A model of open_clip as two functions: images -> (N, D) and prompts -> (N, D).

    Both embeddings are L2-normalised. `weights` is a path; "local-dir:FOLDER" brings its own.
    """
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
    if not is_folder(folder):
        # OpenAI trained with QuickGELU: the plain "ViT-L-14" takes the same weights without
        # complaint and computes other embeddings
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
    """Human Preference Score v2.1, a cosine of about 0.2 to 0.35 (ViT-H-14, 1.97 GB).

    https://github.com/tgxs002/HPSv2
    """
    weights = fetch(*HPS, HPS_SHA256)
    # its authors pad the picture to a square
    embed_images, embed_texts = load_open_clip(str(device), "ViT-H-14", weights, "longest")
    return lambda images, prompts: (embed_images(images) * embed_texts(prompts)).sum(-1)


def aesthetic(device):
    """LAION's aesthetics predictor on CLIP ViT-L-14, about 1 to 10 (1.71 GB + 3.7 MB).

    https://github.com/christophschuhmann/improved-aesthetic-predictor
    """
    import torch

    head = torch.nn.Sequential(  # LAION trained it without activations between the layers
        torch.nn.Linear(768, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
    # the file holds CUDA tensors
    weights = torch.load(fetch(*LAION, LAION_SHA256), map_location="cpu", weights_only=True)
    head.load_state_dict({key.removeprefix("layers."): x for key, x in weights.items()})
    head.to(device).eval()
    embed_images, _ = load_clip(device)
    return lambda images, prompts: head(embed_images(images))[:, 0]


def pickscore(device):
    """PickScore v1, a logit of about 15 to 25 (ViT-H-14, 3.94 GB).

    https://github.com/yuvalkirstain/PickScore
    """
    fetch(PICKSCORE, "config.json")
    folder = Path(fetch(PICKSCORE, "model.safetensors")).parent

    import open_clip  # its preprocessing and its tokens are those of PickScore's own processor
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
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


# ---- the text of --reward ----

SIGN = r"([+-]?)\s*"
WEIGHT = r"(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*)?\s*"  # 2*  2.*  .5*  1e-3 *
NAME = rf"({'|'.join(REWARDS)}|.+?\.py:\w+)\s*"
TERM = SIGN + WEIGHT + NAME + r"(?=[+-]|$)"  # a term ends where a sign follows, or nothing


def parse(spec):
    """Split the text of --reward into [(weight, reward), ...].

    "aesthetic - 0.5*my.py:f" gives [(1.0, "aesthetic"), (-0.5, "my.py:f")]. Spaces do not matter.
    FILE may contain spaces and signs. If it begins like another term (clip-art/my.py), write ./ in
    front. Raises RewardError for anything else; the file itself is not looked up.
    """
    terms = []
    rest = spec.strip()
    while rest or not terms:
        match = re.match(TERM, rest)
        if match is None:
            choice = f"choose from {', '.join(REWARDS)} or FILE.py:FUNCTION"
            example = "or a sum such as 'aesthetic + 0.5*clip'"
            raise RewardError(f"cannot read {rest!r} in reward {spec!r}: {choice}, {example}")
        sign, weight, name = match.groups()
        terms.append((float(sign + (weight or "1")), name))
        rest = rest[match.end() :]
    return terms


def make_label(terms):
    """A name for the folder of a run: "aesthetic + 0.5*dir/my.py:f" -> "aesthetic+0.5f"."""
    label = ""
    for weight, name in terms:
        label += "-" if weight < 0 else "+"
        if abs(weight) != 1:
            label += f"{abs(weight):g}"
        label += name.rpartition(":")[2]
    return label.removeprefix("+")


# ---- a user's own reward ----


def load_user_reward(file, attribute):
    """A function of a user's file, or an instance of a class of it."""
    guard_forks()
    path = Path(file).resolve()
    with unchanged_process():
        reward = getattr(import_file(path, path.stat().st_mtime_ns), attribute)
        return reward() if isinstance(reward, type) else reward


@cache
def import_file(path, mtime):
    """Import a Python file, once for each version. Its folder joins the end of sys.path.

    The module has the name that `import` would give it, so that the processes of a pool find its
    functions. If that name is taken (json.py, rewards.py), it gets another one.
    """
    sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    name = path.stem
    if name in sys.modules or "." in name or importlib.util.find_spec(name).origin != str(path):
        name = f"user_reward_{hashlib.sha256(bytes(path)).hexdigest()[:16]}"

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def unchanged_process():
    """Leave torch's modes and the working folder as they were: a reward may forget to."""
    import torch

    folder = os.getcwd()
    dtype = torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    depth = torch.autocast_increment_nesting()
    try:
        with (
            torch.set_grad_enabled(torch.is_grad_enabled()),
            torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu")),
            torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda")),
        ):
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

    A script only takes note of SIGTERM. A worker that did so would survive Pool.terminate(), and
    join() would wait for ever. The signals are blocked during a fork, so that none comes too early.
    SIGINT and SIGUSR1 also reach the workers when a terminal or Slurm sends them to the job, but
    the iteration is finished first, with these workers.
    """
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    saved = threading.local()  # any thread may fork

    def before():
        saved.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def after_in_parent():
        signal.pthread_sigmask(signal.SIG_SETMASK, saved.mask)

    def after_in_child():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, saved.mask)

    os.register_at_fork(before=before)
    os.register_at_fork(after_in_parent=after_in_parent, after_in_child=after_in_child)


# ---- scoring ----


def load_reward(spec, device="cpu", clip_folder=None):
    """The text of --reward -> score(images, prompts) -> (rewards, parts).

    rewards is float64 (N,); parts is {column: rewards of that term, float64 (N,)}. score.names
    lists the columns, score.label is a short text for the name of a folder, score.files lists the
    users' files. `clip` uses the model in clip_folder, if there is such a folder.

    score raises RewardError for pictures that do not fit, a reward that fails, and values that are
    not N finite numbers. What a user's file raises as it loads is passed on.
    """
    terms = parse(spec)
    parts = {}  # column: (name, weight, fn)
    files = []
    for weight, name in terms:
        file, _, attribute = name.rpartition(":")
        if file:
            fn = load_user_reward(file, attribute)
            files.append(Path(file))
        elif name == "clip":
            fn = clip(device, clip_folder)
        else:
            fn = REWARDS[name](device)
        parts[new_column(attribute, parts)] = (name, weight, fn)

    def score(images, prompts):
        if images.dtype != np.uint8 or images.shape != (len(prompts), *images.shape[1:3], 3):
            given = f"{images.dtype} {images.shape} and {len(prompts)}"
            raise RewardError(f"a reward takes uint8 (N, H, W, 3) and N prompts, not {given}")
        total = np.zeros(len(images))
        values = {}
        for column, (name, weight, fn) in parts.items():
            values[column] = evaluate(name, fn, images, prompts)
            total += weight * values[column]
        check_finite(spec, total, prompts)
        return total, values

    score.names = list(parts)
    score.label = make_label(terms)
    score.files = list(dict.fromkeys(files))
    return score


def is_folder(path):
    return bool(path) and os.path.isdir(path)


def new_column(name, taken):
    """A name for the column of a term, with a number if there is one already."""
    column = name
    number = 2
    # metrics.csv has reward_<column> beside reward_mean, reward_std and reward_s (seconds)
    while column in taken or column in ("mean", "std", "s"):
        column = f"{name}_{number}"
        number += 1
    return column


def evaluate(name, fn, images, prompts):
    """The rewards of one term as float64 (N,)."""
    try:
        with unchanged_process():
            values = to_numpy(fn(images.copy(), list(prompts)))  # a reward cannot spoil our copy
        if values.shape != (len(images),):
            raise ValueError(f"it returned shape {values.shape}, not ({len(images)},)")
    except Exception as error:
        samples = f"{len(images)} pictures from sample 0 (prompt {prompts[0]!r:.90}) on"
        raise RewardError(f"reward {name!r} failed for {samples}: {error!r:.200}") from error
    check_finite(name, values, prompts)
    return values


def to_numpy(values):
    """Numbers in an array, a tensor with or without gradient, or a list of these -> float64."""
    if isinstance(values, (list, tuple)):
        values = [to_numpy(value) for value in values]
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def check_finite(name, values, prompts):
    """Raise RewardError for the first value (N,) that is NaN or infinite."""
    for i, value in enumerate(values):
        if not np.isfinite(value):
            raise RewardError(f"reward {name!r} is {value} for sample {i} (prompt {prompts[i]!r})")


def load_alignment(spec, device="cpu", clip_folder=None):
    """CLIP score as an evaluation metric: fn(images, prompts, names) -> (scores, is_top1).

    scores is 100 x the cosine of picture and prompt, (N,). is_top1 is bool (N,): whether the prompt
    has the largest cosine of all `names`, a list that contains every prompt. The CLIP comes from
    clip_folder, or else from the rewards in `spec`. None without these: it never downloads.
    """
    if not is_folder(clip_folder):
        import huggingface_hub as hub

        uses_clip = {name for _, name in parse(spec)} & {"clip", "aesthetic"}
        if not uses_clip or not isinstance(hub.try_to_load_from_cache(*CLIP_L), str):
            return None
    embed_images, embed_texts = load_clip(device, clip_folder)

    embed_names = cache(embed_texts)  # the names of a run stay the same

    def align(images, prompts, names):
        names = list(dict.fromkeys(names))  # a name that is listed twice has no rival in itself
        position = {name: i for i, name in enumerate(names)}
        own = np.array([position[prompt] for prompt in prompts])
        cosines = embed_images(images) @ embed_names(tuple(names)).T  # (N, names)
        cosines = cosines.double().cpu().numpy()
        scores = 100 * cosines[np.arange(len(own)), own]
        return scores, cosines.argmax(axis=1) == own

    return align


# ---- the command line ----


def read_picture(file):
    """A picture file as uint8 (H, W, 3)."""
    with Image.open(file) as picture:
        if picture.mode == "F" or picture.mode.startswith("I"):  # convert() would clip at 255
            raise RewardError(f"{file} has more than 8 bits per pixel and channel: convert it")
        return np.asarray(picture.convert("RGB"))


def main(
    images: tuple[str, ...],
    /,
    reward: str = "compress",
    prompt: str = "",
    clip_folder: str = "",
    list: bool = False,
):
    """Score pictures with a reward.

    Args:
        images: picture files
        reward: a reward or a sum of rewards, as in the training scripts
        prompt: the prompt of all the pictures
        clip_folder: a small CLIP for `clip`, such as models/emoji/clip
        list: show all rewards, their units and downloads
    """
    if list or not images:
        for name, factory in REWARDS.items():
            print(f"{name:12}{factory.__doc__.splitlines()[0]}")
        return
    if clip_folder and not is_folder(clip_folder):
        raise RewardError(f"--clip-folder {clip_folder} is not a folder")

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    score = load_reward(reward, device, clip_folder)
    header = [f"{column:>12}" for column in ["reward", *score.names]]
    print(*header, " picture")
    for file in images:
        total, parts = score(read_picture(file)[None], [prompt])
        numbers = [f"{values[0]:12.4f}" for values in [total, *parts.values()]]
        print(*numbers, f" {file}")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except RewardError as error:
        sys.exit(f"rewards.py: {error}")
