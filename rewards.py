"""
Reward models, the only module that the training scripts share.

A reward is a function (images, prompts) -> rewards. images is a uint8 array (N, H, W, 3) in RGB,
prompts a list of N strings, rewards N numbers. More is better. `--reward` takes

    compress                          a name of `python rewards.py --list`
    my_reward.py:redness              a function of your own file, or a class to make one
    "aesthetic + 0.5*clip - compress" a weighted sum of these

Your own file needs two lines. It can import modules that lie beside it; import them at its top.

    def redness(images, prompts):
        return images[..., 0].mean(axis=(1, 2))

The rewards of pictures that you have:

    python rewards.py --reward my_reward.py:redness cat.png dog.png
    python rewards.py --reward clip --clip-folder models/emoji/clip --prompt "a cat" cat.png

To add a reward for good, write a factory (device) -> reward and add it to the table BUILT_IN.
"""

import hashlib
import importlib.util
import io
import os
import pkgutil
import re
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# torch, open_clip and the like are imported where they are needed: `--list` takes no time.


class RewardError(ValueError):
    """A mistake that one line explains: what is wrong, and what to do."""


# ---- weights: downloaded once, then read from the disk ----


@dataclass(frozen=True)
class Checkpoint:
    """Files of a pretrained model: safetensors, or a pickle of pinned content."""

    source: str
    """a URL, or a repository of the Hugging Face hub"""
    files: tuple[str, ...]
    """names of the files; the last one holds the weights"""
    size: str
    """of the download"""
    sha256: str | None = None
    """of the last file; a pickle needs one"""


CLIP_L = Checkpoint(
    source="timm/vit_large_patch14_clip_224.openai",
    files=("open_clip_model.safetensors",),
    size="1.71 GB",
)
LAION = Checkpoint(
    source="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    files=("sac+logos+ava1-l14-linearMSE.pth",),
    size="3.7 MB",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
PICKSCORE = Checkpoint(
    source="yuvalkirstain/PickScore_v1",
    files=("config.json", "model.safetensors"),
    size="3.94 GB",
)
HPS = Checkpoint(
    source="xswu/HPSv2",
    files=("HPS_v2.1_compressed.pt",),
    size="1.97 GB",
    sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
)


def fetch_url(checkpoint):
    """Path of a file that comes from a URL: AESTHETIC_HEAD, or a file in torch's own folder.

    Raises RewardError if it is not there and cannot be downloaded, or has another sha256.
    """
    import torch
    from huggingface_hub import constants

    path = Path(torch.hub.get_dir(), "checkpoints", checkpoint.files[-1])
    if os.environ.get("AESTHETIC_HEAD"):
        path = Path(os.environ["AESTHETIC_HEAD"])
    if not path.is_file():
        try:
            if constants.HF_HUB_OFFLINE:
                raise ConnectionError("HF_HUB_OFFLINE is set")
            data = urllib.request.urlopen(checkpoint.source, timeout=20).read()
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(f"{path}.{os.getpid()}")  # of this process, so that ranks do not collide
            partial.write_bytes(data)
            partial.replace(path)
        except Exception as error:
            target = "put it there or set AESTHETIC_HEAD to its path"
            advice = f"download {checkpoint.source}, then {target}"
            raise missing_checkpoint(checkpoint, path, advice, error) from error

    check_sha256(path, checkpoint.sha256)
    return path


def fetch_from_hub(checkpoint):
    """Local path of the last file of a repository, in the cache of huggingface_hub.

    Raises RewardError if a file is not there and cannot be downloaded, or has another sha256.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    path = cached_path(checkpoint)
    if path is None:
        try:
            if constants.HF_HUB_OFFLINE:
                raise ConnectionError("HF_HUB_OFFLINE is set")
            # without a network this fails at once, hf_hub_download only after half a minute
            url = hub.hf_hub_url(checkpoint.source, checkpoint.files[-1])
            hub.get_hf_file_metadata(url, timeout=10)
            for file in checkpoint.files:
                path = hub.hf_hub_download(checkpoint.source, file)
        except Exception as error:
            folder = f"models--{checkpoint.source.replace('/', '--')}"
            command = f"hf download {checkpoint.source} {' '.join(checkpoint.files)}"
            advice = f"run `{command}`, then copy its {folder} to that folder"
            raise missing_checkpoint(checkpoint, constants.HF_HUB_CACHE, advice, error) from error

    check_sha256(path, checkpoint.sha256)
    return path


def cached_path(checkpoint):
    """Local path of the last file of a repository. None if one of its files is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = None
    for file in checkpoint.files:
        path = try_to_load_from_cache(checkpoint.source, file)
        if not isinstance(path, str) or not os.path.isfile(path):
            return None
    return path


def missing_checkpoint(checkpoint, place, advice, error):
    """The RewardError of a download that failed."""
    files = " ".join(checkpoint.files)
    problem = f"{files} ({checkpoint.size}) is not in {place} and cannot be downloaded"
    return RewardError(f"{problem} ({error!r:.200}): on a connected machine {advice}")


def check_sha256(path, sha256):
    """Raise RewardError if the file has another content than the pinned one."""
    if sha256 is None:
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        problem = f"{path} is damaged or another file: its sha256 is not {sha256}"
        raise RewardError(f"{problem}. Delete it and run again")


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


def batched(fn):
    """Turn fn(list of PIL pictures, list of prompts) -> tensor (n,) into a reward.

    fn gets 16 pictures at a time, which bounds the memory.
    """
    import torch

    @torch.inference_mode()
    def reward(images, prompts):
        values = []
        for i in range(0, len(images), 16):
            pictures = [Image.fromarray(image) for image in images[i : i + 16]]
            values.append(fn(pictures, prompts[i : i + 16]))
        return torch.cat(values).float().cpu().numpy()

    return reward


@cache  # `aesthetic`, `clip` and the alignment metric of the scripts share one model
def load_clip(device, name="ViT-L-14-quickgelu", checkpoint=CLIP_L, resize_mode=None):
    """An open_clip model as two functions: PIL pictures -> (n, D) and prompts -> (n, D).

    Both embeddings are L2-normalised. `name` is open_clip's; "local-dir:FOLDER" comes with its own
    weights (checkpoint=None). OpenAI trained with QuickGELU: the plain "ViT-L-14" takes the same
    weights without complaint and computes other embeddings.
    """
    # first, so that missing weights are told before the slow imports
    pretrained = fetch_from_hub(checkpoint) if checkpoint else None

    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=pretrained, device=device, image_resize_mode=resize_mode
    )
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    def embed_images(pictures):
        pixels = torch.stack([preprocess(picture) for picture in pictures])  # (n, 3, H, W)
        return model.encode_image(pixels.to(device), normalize=True)

    def embed_texts(prompts):
        return model.encode_text(tokenizer(prompts).to(device), normalize=True)

    return embed_images, embed_texts


def clip(device, folder=None):
    """100 x the cosine of the CLIP embeddings of picture and prompt.

    The model is OpenAI's ViT-L-14, or that of a folder in open_clip's format, such as
    models/emoji/clip. Raises RewardError if the folder has no safetensors.
    """
    if folder is None:
        embed_images, embed_texts = load_clip(str(device))
    else:
        if not Path(folder, "open_clip_model.safetensors").is_file():
            # without this check open_clip takes random weights
            raise RewardError(
                f"{folder} is not a CLIP folder: it has no open_clip_model.safetensors"
            )
        embed_images, embed_texts = load_clip(str(device), f"local-dir:{folder}", None)

    def reward(pictures, prompts):
        return 100 * (embed_images(pictures) * embed_texts(prompts)).sum(-1)

    return batched(reward)


def aesthetic(device):
    """LAION's aesthetics predictor, about 1 to 10: a small head on OpenAI's CLIP ViT-L-14.

    https://github.com/christophschuhmann/improved-aesthetic-predictor
    """
    import torch

    head = torch.nn.Sequential(  # no activations between the layers: so it was trained
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
    state_dict = torch.load(fetch_url(LAION), map_location="cpu", weights_only=True)
    head.load_state_dict({key.removeprefix("layers."): x for key, x in state_dict.items()})
    head.to(device).eval()
    embed_images, _ = load_clip(str(device))
    return batched(lambda pictures, prompts: head(embed_images(pictures)).squeeze(-1))


def hps(device):
    """Human Preference Score v2.1: the cosine of a fine-tuned CLIP ViT-H-14, about 0.2 to 0.35.

    https://github.com/tgxs002/HPSv2
    """
    embed_images, embed_texts = load_clip(
        str(device),
        name="ViT-H-14",
        checkpoint=HPS,
        resize_mode="longest",  # its authors pad the picture to a square
    )

    def reward(pictures, prompts):
        return (embed_images(pictures) * embed_texts(prompts)).sum(-1)

    return batched(reward)


def pickscore(device):
    """PickScore v1: the logit of a fine-tuned CLIP ViT-H-14, about 15 to 25.

    https://github.com/yuvalkirstain/PickScore
    """
    folder = Path(fetch_from_hub(PICKSCORE)).parent

    import open_clip  # its preprocessing and its tokens are those of PickScore's own processor
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
    preprocess = open_clip.image_transform(model.config.vision_config.image_size, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def reward(pictures, prompts):
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        outputs = model(tokenizer(prompts).to(device), pixels.to(device))
        return outputs.logits_per_image.diagonal()

    return batched(reward)


@dataclass(frozen=True)
class BuiltIn:
    """A row of the table of rewards, which `python rewards.py --list` prints."""

    factory: Callable
    unit: str
    download: str
    source: str


BUILT_IN = {
    "compress": BuiltIn(
        compress, "kB (1000 bytes)", "nothing", "minus the JPEG size, Pillow, quality 95"
    ),
    "incompress": BuiltIn(
        incompress, "kB (1000 bytes)", "nothing", "JPEG size, Pillow, quality 95"
    ),
    "aesthetic": BuiltIn(
        aesthetic,
        "about 1-10",
        f"{CLIP_L.size} + {LAION.size}",
        "LAION's sac+logos+ava1-l14-linearMSE on OpenAI's CLIP ViT-L-14",
    ),
    "clip": BuiltIn(
        clip,
        "100 x cosine",
        CLIP_L.size,
        "OpenAI's CLIP ViT-L-14, or the small one that comes with models/emoji",
    ),
    "pickscore": BuiltIn(
        pickscore, "logit, about 15-25", PICKSCORE.size, "PickScore v1, CLIP ViT-H-14"
    ),
    "hps": BuiltIn(
        hps, "cosine, about 0.2-0.35", HPS.size, "Human Preference Score v2.1, CLIP ViT-H-14"
    ),
}
REWARDS = {name: row.factory for name, row in BUILT_IN.items()}


# ---- the text of --reward ----

WEIGHT = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*\*"  # 2*  2.*  .5*  1e-3 *
END = r"(?=\s*([+-]|$))"  # a reward ends where a sign follows, or nothing
NAME = r"[A-Za-z_]\w*" + END
USER_REWARD = r".+?\.py:\w+" + END
CHOICE = f"choose from {', '.join(REWARDS)} or FILE.py:FUNCTION"


def parse(spec):
    """Split the text of --reward into [(weight, reward), ...].

    "aesthetic - 0.5*my.py:f" gives [(1.0, "aesthetic"), (-0.5, "my.py:f")]. The grammar:

        sum    = [sign] term, then any number of: sign term
        term   = [number "*"] reward
        sign   = "+" or "-"
        number = 2 or 2. or .5 or 0.5 or 1e-3
        reward = a name of REWARDS, or FILE.py:FUNCTION

    Spaces between these do not matter. FILE may contain spaces, signs and stars. If it begins like
    something else (-x/my.py, 2*3/my.py, clip-art/my.py), write ./ in front. Raises RewardError for
    anything else; whether a file is there is not looked up.
    """
    terms = []
    rest = spec.strip()
    while rest or not terms:
        sign, rest = take(r"[+-]", rest)  # from the second term on there is one: see END
        factor, rest = take(WEIGHT, rest)
        weight = float(factor.removesuffix("*") or 1)
        if sign == "-":
            weight = -weight

        name, after = take(NAME, rest)
        if name not in REWARDS:
            name, after = take(USER_REWARD, rest)
        if not name:
            raise unreadable(rest, spec)
        terms.append((weight, name))
        rest = after

    return terms


def take(pattern, text):
    """Split a text into the start that matches, "" if none does, and the rest."""
    match = re.match(pattern, text)
    start = match.group() if match else ""
    return start, text[len(start) :].lstrip()


def unreadable(rest, spec):
    """The RewardError of a sum that cannot be read from `rest` on."""
    name, _ = take(NAME, rest)
    if name and name not in REWARDS:
        return RewardError(f"unknown reward {name!r}: {CHOICE}")
    example = "write FILE.py:FUNCTION or a sum such as 'aesthetic + 0.5*clip'"
    return RewardError(f"unexpected {rest or 'end'!r} in reward {spec!r}: {example}")


def make_label(terms):
    """A name for the folder of a run: "aesthetic + 0.5*dir/my.py:f" -> "aesthetic+0.5f".

    At most 80 characters out of A-Z a-z 0-9 _ . + -
    """
    label = ""
    for weight, name in terms:
        sign = "-" if weight < 0 else "+"
        factor = repr(abs(weight)).removesuffix(".0")  # all digits, so that labels differ
        label += sign
        if factor != "1":
            label += factor
        label += name.rpartition(":")[2]
    label = re.sub(r"[^A-Za-z0-9_.+-]", "_", label.removeprefix("+"))
    if len(label) > 80:
        digest = hashlib.sha256(label.encode()).hexdigest()
        label = f"{label[:71]}-{digest[:8]}"
    return label


# ---- a user's own reward ----


def load_user_reward(name, index, user_files=None):
    """FILE.py:NAME -> that function (or an instance of that class) and the sources it consists of.

    index: of the term in the sum. The file is read from user_files/index/ where that is given.
    The sources are {path relative to the folder of the file: bytes}, of the file and of the modules
    beside it that it imported. Raises RewardError if there is no such file or function; what the
    file itself raises keeps its traceback.
    """
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if user_files is not None:
        path = Path(user_files, str(index), path.name)
    if not path.is_file():
        raise RewardError(f"there is no file {str(path)!r} for reward {name!r}: {CHOICE}")

    source = path.read_bytes()
    module_spec = importlib.util.spec_from_file_location(f"user_reward_{index}", path.resolve())
    module = importlib.util.module_from_spec(module_spec)
    with modules_beside(path.resolve().parent) as sources:
        sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
        module_spec.loader.exec_module(module)
        if not hasattr(module, attribute):
            raise RewardError(f"{path} has no function or class {attribute!r}")
        reward = getattr(module, attribute)
        if isinstance(reward, type):
            reward = reward()

    if not callable(reward):
        raise RewardError(f"{attribute!r} of {path} is no function, and no class with __call__")
    sources[path.name] = source
    return reward, sources


@contextmanager
def modules_beside(folder):
    """Within this block, `import helper` finds folder/helper.py, whatever else is called helper.

    Afterwards sys.path and sys.modules are as before, so that the next file gets its own helper.
    Yields a dict, which in the end holds {relative path: bytes} of the modules found there.
    """
    # set aside loaded modules of the same names; `from rewards import clip` still gets this one
    beside = {module.name for module in pkgutil.iter_modules([str(folder)])}
    if folder == Path(__file__).resolve().parent:
        beside.discard(Path(__file__).stem)
    set_aside = {}
    for name in list(sys.modules):
        if name.partition(".")[0] in beside:
            set_aside[name] = sys.modules.pop(name)

    # no .pyc: Python tells versions apart by size and second, too coarse for a file just edited
    writes_no_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    known = set(sys.modules)
    sources = {}
    try:
        yield sources
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes_no_bytecode

        # a module is from this folder if its path there follows from its name (a library may lie
        # below the folder too, in a virtual environment)
        packages = set()
        for name in set(sys.modules) - known:
            place = folder.joinpath(*name.split("."))
            file = getattr(sys.modules[name], "__file__", None)
            if file in (f"{place}.py", str(place / "__init__.py")):
                sources[os.path.relpath(file, folder)] = Path(file).read_bytes()
                packages.add(name.partition(".")[0])
        for name in set(sys.modules) - known:
            if name.partition(".")[0] in packages:
                del sys.modules[name]
        sys.modules.update(set_aside)


def save_user_files(score, folder):
    """Write the users' reward files of a score, as they were read, into a folder.

    load_reward(..., user_files=folder) reads them. Term 0 of the sum goes to folder/0/ and so on,
    with the modules beside the file that it imported. Without a user's reward nothing is written.
    Data files that a reward opens are not copied: name them by an absolute path.
    """
    for name, source in score.user_files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)


# ---- scoring ----


def load_reward(spec, device="cpu", clip_folder=None, user_files=None):
    """The text of --reward -> score(images, prompts) -> (rewards, parts).

    rewards is float32 (N,); parts is {column: rewards of that term alone, float32 (N,)}.
    score.names lists the columns, score.label is a short text for the name of a folder.

    clip_folder: where `clip` takes its model from, if there is such a folder.
    user_files: a folder that save_user_files wrote; users' files are read from there.

    Raises RewardError for what is wrong with `spec` or not on this machine, and so does score for
    pictures that do not fit, a reward that fails, and values that are not N finite numbers. An
    exception in a user's file as it loads is passed on.
    """
    terms = parse(spec)
    parts = {}  # column: (name, weight, fn)
    sources = {}
    for index, (weight, name) in enumerate(terms):
        if name == "clip" and has_folder(clip_folder):
            fn = REWARDS[name](device, clip_folder)
        elif name in REWARDS:
            fn = REWARDS[name](device)
        else:
            fn, files = load_user_reward(name, index, user_files)
            for file, source in files.items():
                sources[f"{index}/{file}"] = source
        parts[new_column(name, parts)] = (name, weight, fn)

    def score(images, prompts):
        check_images(images, prompts)
        total = np.zeros(len(images), dtype=np.float32)
        values = {}
        for column, (name, weight, fn) in parts.items():
            values[column] = evaluate(name, fn, images, prompts)
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                total += np.float32(weight) * values[column]
        check_finite(spec, total, prompts)
        return total, values

    score.names = list(parts)
    score.label = make_label(terms)
    score.user_files = sources
    return score


def new_column(name, taken):
    """The column of a term: its name, with a number if it is taken.

    metrics.csv has reward_<column> beside reward_mean, reward_std and reward_s (seconds).
    """
    name = name.rpartition(":")[2]
    column = name
    number = 2
    while column in taken or column in ("mean", "std", "s"):
        column = f"{name}_{number}"
        number += 1
    return column


def has_folder(path):
    return bool(path) and os.path.isdir(path)


def check_images(images, prompts):
    """Raise RewardError unless images is uint8 (N, H, W, 3), with N > 0 prompts."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise RewardError(f"images must be a numpy array of uint8, not {kind}")
    if images.ndim != 4 or images.shape[3] != 3:
        raise RewardError(f"images must have the shape (N, H, W, 3), not {images.shape}")
    if len(images) == 0 or len(images) != len(prompts):
        raise RewardError(f"every image needs its prompt: {len(images)} and {len(prompts)} given")


def evaluate(name, fn, images, prompts):
    """The rewards of one term as float32 (N,). Raises RewardError with its name and the sample."""
    first = describe(0, prompts)
    try:
        values = to_numpy(fn(images.copy(), list(prompts)))  # copies: a reward cannot spoil them
    except Exception as error:
        problem = f"reward {name!r} failed for {len(images)} pictures from {first} on"
        raise RewardError(f"{problem}: {error!r:.200}") from error
    if values.shape != (len(images),):
        problem = f"reward {name!r} returned shape {values.shape}, not ({len(images)},)"
        raise RewardError(f"{problem}, for {len(images)} pictures from {first} on")
    check_finite(name, values, prompts)
    return values


def to_numpy(values):
    """Numbers in an array, a tensor with or without gradient, or a list of these -> float32."""
    if isinstance(values, (list, tuple)):
        values = [to_numpy(value) for value in values]
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):  # 1e300 becomes inf, which check_finite tells
        return np.asarray(values, dtype=np.float32)


def check_finite(name, values, prompts):
    """Raise RewardError for the first value (N,) that is NaN or infinite."""
    for i, value in enumerate(values):
        if not np.isfinite(value):
            raise RewardError(f"reward {name!r} is {value} for {describe(i, prompts)}")


def describe(i, prompts):
    return f"sample {i} (prompt {prompts[i]!r:.90})"


def load_alignment(spec, device="cpu", clip_folder=None):
    """CLIP score as an evaluation metric, fn(images, prompts) -> (N,). It never downloads.

    It comes from clip_folder, or else from the CLIP of the rewards in `spec`. None without these.
    """
    if has_folder(clip_folder):
        return clip(device, clip_folder)
    names = [name for _, name in parse(spec)]
    uses_clip = "clip" in names or "aesthetic" in names
    if uses_clip and cached_path(CLIP_L) is not None:
        return clip(device)
    return None


# ---- the command line ----


@dataclass
class Args:
    """Score pictures with a reward."""

    images: tuple[str, ...]
    """picture files"""
    reward: str = "compress"
    """a reward or a sum of rewards, as in the training scripts"""
    prompt: str = ""
    """the prompt of all the pictures"""
    clip_folder: str = ""
    """a small CLIP for `clip`, such as models/emoji/clip"""
    list: bool = False
    """show all rewards with unit, download and source"""


def read_picture(file):
    """A picture file as uint8 (H, W, 3). Raises RewardError, which names the file."""
    try:
        with Image.open(file) as picture:
            if picture.mode == "F" or picture.mode.startswith("I"):
                levels = np.asarray(picture)  # 16-bit grey, which convert() would clip at 255
                if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
                    raise ValueError("it has more than 16 bits per pixel and channel")
                grey = np.rint(levels / 257).astype(np.uint8)
                return np.stack([grey, grey, grey], axis=-1)
            if picture.mode == "P":
                picture = picture.convert("RGBA")  # Pillow warns of the direct way
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # of many kinds, if a file is damaged
        raise RewardError(f"cannot read the picture {file}: {error}") from error


def main(args):
    """Print the table of rewards, or score pictures."""
    if args.list or not args.images:
        for name, row in BUILT_IN.items():
            print(f"{name:12}{row.unit:25}{row.download:20}{row.source}")
    if not args.images:
        return
    if args.clip_folder and not has_folder(args.clip_folder):
        raise RewardError(f"--clip-folder {args.clip_folder} is not a folder")

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    score = load_reward(args.reward, device, args.clip_folder)
    header = [f"{column:>12}" for column in ["reward", *score.names]]
    print(*header, " picture")
    for file in args.images:
        image = read_picture(file)
        total, parts = score(image[None], [args.prompt])
        numbers = [f"{values[0]:12.4f}" for values in [total, *parts.values()]]
        print(*numbers, f" {file}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, config=(tyro.conf.PositionalRequiredArgs,)))
    except RewardError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
