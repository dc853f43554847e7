"""
Reward models, the only module that the training scripts share.

A reward is fn(images, prompts) -> rewards: images uint8 (N, H, W, 3) in RGB, prompts a list of N strings, rewards N
floats, more is better. `--reward` takes a name of REWARDS, your own function or class, or a weighted sum of these:

    python ddpo_is.py --reward "aesthetic + 0.5*clip - 0.1*incompress"
    python ddpo_is.py --reward my_reward.py:redness
    python rewards.py --reward clip --clip-folder models/emoji/clip --prompt "a cat" cat.png dog.png

To add one for good, write a factory (device) -> fn whose docstring is `unit | download | source`, add it to REWARDS.
"""

import hashlib, importlib.util, io, os, re, sys, urllib.request  # noqa: I001
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import torch
import tyro
from huggingface_hub import constants
from PIL import Image

# Weights: (repository or URL, file, size, sha256). Safetensors, or pickles of pinned content, loaded as tensors only.
URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
LAION = (URL, "sac+logos+ava1-l14-linearMSE.pth", "3.7 MB", LAION_SHA256)
CLIP_L = ("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors", "1.71 GB", None)
PICKSCORE = ("yuvalkirstain/PickScore_v1", "config.json model.safetensors", "3.94 GB", None)
HPS_SHA256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
HPS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt", "1.97 GB", HPS_SHA256)

class RewardError(ValueError):
    """What a user can mend, in one line."""

def fetch(source, file, size, sha256):
    """Local path of a weight file (of the last one of several), which is downloaded once and not looked up again."""
    if source.startswith("https:"):
        path = place = os.environ.get("AESTHETIC_HEAD") or os.path.join(torch.hub.get_dir(), "checkpoints", file)
        advice = f"download {source}, then put it there or set AESTHETIC_HEAD to its path"
    else:
        path, place = str(hub.try_to_load_from_cache(source, file.split()[-1])), constants.HF_HUB_CACHE
        advice = f"run `hf download {source} {file}`, then copy its models--{source.replace('/', '--')} to that folder"
    try:
        if not os.path.isfile(path) and constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        elif not os.path.isfile(path) and source.startswith("https:"):
            data = urllib.request.urlopen(source, timeout=20).read()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(f"{path}.{os.getpid()}").write_bytes(data)  # a name per process, so that ranks do not collide
            os.replace(f"{path}.{os.getpid()}", path)
        elif not os.path.isfile(path):  # without a network the first call fails at once, the second in half a minute
            hub.get_hf_file_metadata(hub.hf_hub_url(source, file.split()[-1]), timeout=10)
            path = [hub.hf_hub_download(source, name) for name in file.split()][-1]
    except Exception as error:
        problem = f"{file} ({size}) is not in {place} and cannot be downloaded ({error!r:.200})"
        raise RewardError(f"{problem}: on a connected machine {advice}") from error
    if sha256 and hashlib.sha256(Path(path).read_bytes()).hexdigest() != sha256:
        raise RewardError(f"{path} is damaged or another file: its sha256 is not {sha256}. Delete it and run again")
    return path

# ---- rewards ----

def incompress(device):
    """kB (1000 bytes) | nothing | JPEG size, Pillow, quality 95"""

    def size(image):
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=95)
        return file.getbuffer().nbytes / 1000

    pool = ThreadPoolExecutor()  # it helps: Pillow encodes without holding Python's lock
    return lambda images, prompts: np.array(list(pool.map(size, images)))

def compress(device):
    """kB (1000 bytes) | nothing | minus the JPEG size, Pillow, quality 95"""
    size = incompress(device)
    return lambda images, prompts: -size(images, prompts)

def batched(fn):
    """A reward from fn(list of PIL pictures, prompts) -> tensor (n,), given 16 at a time to bound the memory."""

    @torch.inference_mode()
    def reward(images, prompts):
        pictures = [Image.fromarray(image) for image in images]
        batches = [fn(pictures[i : i + 16], prompts[i : i + 16]) for i in range(0, len(pictures), 16)]
        return torch.cat(batches).float().cpu().numpy()

    return reward

@cache  # `aesthetic`, `clip` and the scripts' alignment metric share one model
def load_clip(device, name="ViT-L-14-quickgelu", weights=CLIP_L, resize_mode=None):
    """An open_clip model as (embed_images, embed_texts), both to L2-normalised (n, D). OpenAI trained with QuickGELU:
    the plain "ViT-L-14" takes the same weights without complaint and computes other embeddings."""
    import open_clip

    options = {"pretrained": fetch(*weights) if weights else None, "image_resize_mode": resize_mode}
    model, _, preprocess = open_clip.create_model_and_transforms(name, device=device, **options)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    return (
        lambda pictures: model.encode_image(torch.stack([preprocess(p) for p in pictures]).to(device), normalize=True),
        lambda prompts: model.encode_text(tokenizer(prompts).to(device), normalize=True),
    )

def clip(device, folder=None):
    """100 x cosine | 1.71 GB | OpenAI's CLIP ViT-L-14, or the small one that comes with models/emoji"""
    if folder and not Path(folder, "open_clip_model.safetensors").is_file():  # open_clip would take random weights
        raise RewardError(f"{folder} is not a CLIP folder: it has no open_clip_model.safetensors")
    embed_images, embed_texts = load_clip(str(device), *((f"local-dir:{folder}", None) if folder else ()))
    return batched(lambda pictures, prompts: 100 * (embed_images(pictures) * embed_texts(prompts)).sum(-1))

def aesthetic(device):
    """about 1-10 | 1.71 GB + 3.7 MB | LAION's sac+logos+ava1-l14-linearMSE on OpenAI's CLIP ViT-L-14"""
    weights = torch.load(fetch(*LAION), map_location="cpu", weights_only=True)  # they are CUDA tensors
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    head = [linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)]
    head = torch.nn.Sequential(*head, linear(64, 16), linear(16, 1)).to(device).eval()
    head.load_state_dict({key.removeprefix("layers."): value for key, value in weights.items()})
    embed_images, _ = load_clip(str(device))
    return batched(lambda pictures, prompts: head(embed_images(pictures)).squeeze(-1))

def hps(device):
    """cosine, about 0.2-0.35 | 1.97 GB | Human Preference Score v2.1, ViT-H-14"""
    embed_images, embed_texts = load_clip(str(device), "ViT-H-14", HPS, "longest")  # its authors pad to a square
    return batched(lambda pictures, prompts: (embed_images(pictures) * embed_texts(prompts)).sum(-1))

def pickscore(device):
    """logit, about 15-25 | 3.94 GB | PickScore v1, CLIP-H"""
    import open_clip  # its preprocessing and tokens are those of PickScore's own processor
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(Path(fetch(*PICKSCORE)).parent, use_safetensors=True).to(device).eval()
    preprocess = open_clip.image_transform(model.config.vision_config.image_size, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def reward(pictures, prompts):
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        return model(tokenizer(prompts).to(device), pixels.to(device)).logits_per_image.diagonal()

    return batched(reward)

REWARDS = {factory.__name__: factory for factory in (compress, incompress, aesthetic, clip, pickscore, hps)}

# ---- from the text of --reward to score(images, prompts) ----

NUMBER, NAME = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", r"[^\s*+-][^\s*+]*\.py:\w+|[A-Za-z_]\w*"
TERM = re.compile(rf"\s*([+-]?)\s*(?:({NUMBER})\s*\*)?\s*(?:({NAME})|(\S.*|$))")

def parse(spec):
    """The text of --reward as (weight, name) pairs: "aesthetic - 0.5*clip" -> [(1.0, "aesthetic"), (-0.5, "clip")]."""
    terms = []
    for sign, number, name, wrong in TERM.findall(spec):
        if terms and not (sign or number or name or wrong):
            break  # the end
        if not name or (terms and not sign):
            wrong = wrong or name or "end"
            raise RewardError(f"unexpected {wrong!r} in reward {spec!r}: write a sum such as 'aesthetic + 0.5*clip'")
        if name not in REWARDS and ":" not in name:
            raise RewardError(f"unknown reward {name!r}: choose from {', '.join(REWARDS)} or FILE.py:FUNCTION")
        terms.append((float(f"{sign}{number or 1}"), name))
    return terms

def user_reward(text):
    """FILE.py:NAME -> that function, or an instance of that class."""
    path, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, name)
    reward = reward() if isinstance(reward, type) else reward
    if not callable(reward):
        raise TypeError(f"{name} is no function, and no class with __call__")
    return reward

def evaluate(name, fn, images, prompts, first=0):
    """fn's rewards as float32 (N,). Whatever is wrong is told with its sample; `first` is the index of images[0]."""
    samples = [f"sample {first + i} (prompt {prompt!r:.90})" for i, prompt in enumerate(prompts)]
    try:
        values = fn(images.copy(), list(prompts))
        values = np.asarray(values.detach().float().cpu() if torch.is_tensor(values) else values, dtype=np.float32)
    except Exception as error:
        for i in range(len(images) if len(images) > 1 else 0):  # which of them is it?
            evaluate(name, fn, images[i : i + 1], prompts[i : i + 1], i)
        what = samples[0] if len(images) == 1 else f"all {len(images)} at once, {samples[0]} and so on"
        raise RewardError(f"reward {name!r} failed for {what}: {error!r:.200}") from error
    if values.shape != (len(images),):
        sample = samples[min(values.size, len(images) - 1)]
        raise RewardError(f"reward {name!r} returned shape {values.shape}, not ({len(images)},): look at {sample}")
    for i in np.flatnonzero(~np.isfinite(values)):
        raise RewardError(f"reward {name!r} is {values[i]} for {samples[i]}")
    return values

def load_reward(spec, device="cpu", clip_folder=None):
    """The text of --reward -> score(images, prompts) -> (rewards (N,), {column: that term's own reward (N,)}).
    score.names lists the columns. `clip` uses clip_folder where that exists. Raises RewardError, and so does score."""
    parts = {}
    for weight, name in parse(spec):
        options = {"folder": clip_folder} if name == "clip" and os.path.isdir(clip_folder or "") else {}
        try:
            fn = REWARDS[name](device, **options) if name in REWARDS else user_reward(name)
        except Exception as error:
            problem = error if isinstance(error, RewardError) else f"reward {name!r} does not load: {error!r:.200}"
            raise RewardError(problem) from error
        column = name.rpartition(":")[2]
        parts[column if column not in parts else f"{column}_{len(parts) + 1}"] = (weight, fn)

    def score(images, prompts):
        got = f"{getattr(images, 'dtype', type(images).__name__)} {np.shape(images)} and {len(prompts)} prompts"
        if not re.fullmatch(rf"uint8 \({len(prompts)}, \d+, \d+, 3\) and [1-9]\d* prompts", got):
            raise RewardError(f"images must be a uint8 array (N, H, W, 3), with N > 0 prompts, and are {got}")
        values = {column: evaluate(column, fn, images, prompts) for column, (_, fn) in parts.items()}
        return sum(np.float32(weight) * values[column] for column, (weight, _) in parts.items()), values

    score.names = list(parts)
    return score

def load_alignment(spec, device="cpu", clip_folder=None):
    """CLIP score for the eval metric, fn(images, prompts) -> (N,), or None where it would need a download."""
    if os.path.isdir(clip_folder or ""):
        return clip(device, clip_folder)
    uses_clip = {"clip", "aesthetic"} & {name for _, name in parse(spec)}
    return clip(device) if uses_clip and os.path.isfile(str(hub.try_to_load_from_cache(*CLIP_L[:2]))) else None

def main(images: tyro.conf.Positional[tuple[str, ...]] = (), reward="compress", prompt="", clip_folder="", list=False):
    """Score pictures with a reward.

    Args:
        images: picture files
        reward: a reward or a sum of them, as in the training scripts
        prompt: the prompt of all the pictures
        clip_folder: small CLIP for `clip`, such as models/emoji/clip
        list: show all rewards with unit, download and source
    """
    for name, factory in REWARDS.items() if list or not images else ():
        print("{:12}{:25}{:20}{}".format(name, *factory.__doc__.split(" | ")))
    score = load_reward(reward, "cuda" if torch.cuda.is_available() else "cpu", clip_folder) if images else None
    for i, file in enumerate(images):
        total, parts = score(np.asarray(Image.open(file).convert("RGB"))[None], [prompt])
        if i == 0:
            print(*(f"{column:>12}" for column in ["reward", *parts]), " picture")
        print(*(f"{value[0]:12.4f}" for value in [total, *parts.values()]), f" {file}")

if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (RewardError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
