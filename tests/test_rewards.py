"""rewards.py: every reward against a straight-line reference on small random weights, sums, and what bad input gets."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import tyro
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import rewards
from rewards import REWARDS, RewardError, load_alignment, load_reward

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/emoji"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # CLIP's own, of OpenAI
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["cat", "a dog", "two foxes", "a whale on the moon"]


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    """No weights at all, whatever this machine has downloaded before, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("AESTHETIC_HEAD", raising=False)
    rewards.load_clip.cache_clear()


def pictures(n, height=128, width=64, seed=0):
    """Smooth random RGB pictures, uint8 (n, height, width, 3): resizing them is not all rounding."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 6, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC)) for p in small])


def put_in_hub(source, *files):
    """Where the Hugging Face cache would hold these files of a repository."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
    return [folder / "snapshots" / ("0" * 40) / file for file in files]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def small_open_clip(monkeypatch):
    """Shrinks open_clip's architectures of these names and leaves the rest of their configs, such as the activation."""
    for name in ("ViT-L-14", "ViT-L-14-quickgelu", "ViT-H-14"):
        config = open_clip.get_model_config(name)
        config["vision_cfg"] |= {"layers": 2, "width": 64, "head_width": 32, "patch_size": 56}
        config["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    torch.manual_seed(0)


def strong(model):
    """Random weights large enough that activations and pictures make a difference."""
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        if "visual.conv1" in name or "patch_embedding" in name:
            parameter.data *= 10
    return model.eval().requires_grad_(False)


@pytest.fixture
def clip_l(small_open_clip):
    """A random OpenAI-like model in the hub cache, built by hand with QuickGELU."""
    config = open_clip.get_model_config("ViT-L-14")
    model = strong(open_clip.CLIP(**config, quick_gelu=True))
    (path,) = put_in_hub(rewards.CLIP_L[0], rewards.CLIP_L[1])
    save_file(model.state_dict(), path)
    return model


@pytest.fixture
def head(monkeypatch):
    """A random aesthetic head in torch's hub cache, with its own sha256 pinned: numpy weights [(W, b)]."""
    path = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", rewards.LAION[1])
    path.parent.mkdir(parents=True)
    sizes, names, state = (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7), {}
    for i, name in enumerate(names):
        state[f"layers.{name}.weight"] = torch.randn(sizes[i + 1], sizes[i]) * 2 / sizes[i] ** 0.5
        state[f"layers.{name}.bias"] = torch.randn(sizes[i + 1]) / 10
    torch.save(state, path)
    monkeypatch.setattr(rewards, "LAION", (*rewards.LAION[:3], sha256(path)))
    return [(state[f"layers.{name}.weight"].numpy(), state[f"layers.{name}.bias"].numpy()) for name in names]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP like the one of models/emoji: a small ResNet, its own tokenizer, open_clip's local-dir format."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(b + "</w>" for b in alphabet), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16).save_pretrained(folder)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 514, "width": 32, "heads": 2, "layers": 1, "hf_tokenizer_name": "local"}
    model_config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).train()
    with torch.no_grad():
        model.encode_image(torch.randn(64, 3, 64, 64))  # gives the batch norms statistics
    save_file(strong(model).state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def reference_pixels(images, pad=False):
    """CLIP's preprocessing by hand: bicubic resize to 224, centre crop (or black padding), normalise."""
    pixels = []
    for image in images:
        height, width = image.shape[:2]
        scale = 224 / (max if pad else min)(height, width)
        picture = Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        left, top = round((picture.width - 224) / 2), round((picture.height - 224) / 2)
        square = np.asarray(picture.crop((left, top, left + 224, top + 224)))  # crop pads with black
        pixels.append(((square / 255 - MEAN) / STD).transpose(2, 0, 1))
    return torch.tensor(np.stack(pixels), dtype=torch.float32)


def reference_cosine(model, images, prompts, pad=False):
    image = model.visual(reference_pixels(images, pad)).double()
    text = model.encode_text(open_clip.SimpleTokenizer()(prompts)).double()
    return ((image * text).sum(-1) / image.norm(dim=-1) / text.norm(dim=-1)).numpy()


# --------------------------------------------------------------------------------------------------------------------
# values


def test_jpeg_size_is_that_of_a_file_on_disk(tmp_path):
    images = pictures(5, 64, 64)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=95)
    expected = [os.path.getsize(tmp_path / f"{i}.jpg") / 1000 for i in range(5)]
    assert len(set(expected)) > 1
    values, parts = load_reward("incompress")(images, ["x"] * 5)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(load_reward("compress")(images, ["x"] * 5)[0], -values)
    assert values.dtype == np.float32 and list(parts) == ["incompress"]


def test_aesthetic_agrees_with_a_straight_line_reference(clip_l, head):
    images = pictures(4)
    x = clip_l.visual(reference_pixels(images)).double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for weight, bias in head:  # LAION's head has no activations
        x = x @ weight.T + bias
    assert x.std() > 0.03
    score = load_reward("aesthetic")
    np.testing.assert_allclose(score(images, PROMPTS)[0], x[:, 0], atol=2e-4)
    np.testing.assert_array_equal(score(images, PROMPTS)[0], score(images, PROMPTS)[0])  # dropout is off
    assert np.abs(score(images[..., ::-1], PROMPTS)[0] - x[:, 0]).min() > 1e-3  # red is not blue


def test_aesthetic_takes_the_file_that_its_variable_names(clip_l, head, monkeypatch, tmp_path):
    expected = load_reward("aesthetic")(pictures(2), PROMPTS[:2])[0]
    path = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", rewards.LAION[1])
    monkeypatch.setenv("AESTHETIC_HEAD", str(path.rename(tmp_path / "mine.pth")))
    np.testing.assert_array_equal(load_reward("aesthetic")(pictures(2), PROMPTS[:2])[0], expected)


def test_clip_agrees_with_a_straight_line_reference(clip_l):
    expected = 100 * reference_cosine(clip_l, pictures(4), PROMPTS)
    assert expected.std() > 1
    np.testing.assert_allclose(load_reward("clip")(pictures(4), PROMPTS)[0], expected, atol=2e-3)
    # a script passes MODEL/clip whether or not the model has one
    score = load_reward("clip", clip_folder="no/such/folder")
    np.testing.assert_allclose(score(pictures(4), PROMPTS)[0], expected, atol=2e-3)


def test_hps_agrees_with_a_straight_line_reference(small_open_clip, monkeypatch):
    model = strong(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")))
    (path,) = put_in_hub(*rewards.HPS[:2])
    torch.save({"state_dict": model.half().state_dict()}, path)  # the published file is in half precision
    monkeypatch.setattr(rewards, "HPS", (*rewards.HPS[:3], sha256(path)))
    expected = reference_cosine(model.float(), pictures(4), PROMPTS, pad=True)
    np.testing.assert_allclose(load_reward("hps")(pictures(4), PROMPTS)[0], expected, atol=2e-5)


def test_pickscore_agrees_with_a_straight_line_reference():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=size | {"patch_size": 56}, projection_dim=16)
    model = strong(CLIPModel(config))
    (path,) = put_in_hub(rewards.PICKSCORE[0], "model.safetensors")
    model.save_pretrained(path.parent)
    tokens = open_clip.SimpleTokenizer()(PROMPTS)
    image = model.visual_projection(model.vision_model(reference_pixels(pictures(4))).pooler_output)
    states = model.text_model(tokens).last_hidden_state
    text = model.text_projection(torch.stack([s[row.tolist().index(49407)] for s, row in zip(states, tokens)]))
    expected = model.logit_scale.exp() * F.cosine_similarity(image, text)
    np.testing.assert_allclose(load_reward("pickscore")(pictures(4), PROMPTS)[0], expected, atol=1e-3)


def test_local_clip_one_at_a_time_equals_a_batch(clip_folder):
    images, prompts = pictures(19, 64, 64), [f"animal {i}" for i in range(19)]  # more than one batch of 16
    score = load_reward("clip", clip_folder=clip_folder)
    values = score(images, prompts)[0]
    single = [score(images[i : i + 1], prompts[i : i + 1])[0][0] for i in range(19)]
    assert values.std() > 1e-2
    np.testing.assert_allclose(values, single, atol=1e-3)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(values, score(images, prompts[::-1])[0], atol=1e-3)


@pytest.mark.skipif(not (ROOT / "models/emoji/clip").exists(), reason="models/emoji/clip is not there")
def test_bundled_clip_ranks_the_right_prompt_first_as_its_model_card_says():
    """On the published sheet of samples: 46 names in 4 columns, blocks of 4 pictures of 64 px under a line of text."""
    import pretrain

    promised = re.search(r"ranks the right one of the 46 names first for ([\d.]+) %", (MODEL / "README.md").read_text())
    sheet = Image.open(MODEL / "samples.png").convert("RGB")
    corners = [(k % 4 * 264 + 64 * j, k // 4 * 78 + 13) for k in range(46) for j in range(4)]
    tiles = [sheet.crop((x, y, x + 64, y + 64)) for x, y in corners]
    embed_images, embed_texts = rewards.load_clip("cpu", f"local-dir:{MODEL / 'clip'}", None)
    with torch.inference_mode():
        cosines = embed_images(tiles) @ embed_texts(pretrain.NAMES).T  # (184, 46)
    rate = 100 * (cosines.argmax(1) == torch.arange(46).repeat_interleave(4)).double().mean().item()
    assert rate > 80 and abs(rate - float(promised[1])) < 1
    images = np.stack([np.asarray(tile) for tile in tiles[:8]])
    values, _ = load_reward("clip", clip_folder=str(MODEL / "clip"))(images, ["cat"] * 8)
    np.testing.assert_allclose(values, 100 * cosines[:8, pretrain.NAMES.index("cat")], atol=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# sums, a user's own rewards, the alignment metric


def test_a_sum_equals_the_sum_of_its_parts(clip_folder, brightness):
    images, prompts = pictures(4), PROMPTS
    score = load_reward(f"incompress - 0.5*clip + 2e-1 * {brightness} - clip", clip_folder=clip_folder)
    values, parts = score(images, prompts)
    assert score.names == list(parts) == ["incompress", "clip", "brightness", "clip_4"]
    alone = [load_reward(s, clip_folder=clip_folder)(images, prompts)[0] for s in ("incompress", "clip", brightness)]
    for part, value in zip(parts.values(), alone):
        np.testing.assert_array_equal(part, value)
    np.testing.assert_allclose(values, alone[0] - 1.5 * alone[1] + 0.2 * alone[2], rtol=1e-5)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(load_reward("-compress")(images, prompts)[0], alone[0])


USER_FILE = """
from __future__ import annotations  # dataclasses then look for their module
from dataclasses import dataclass
import numpy as np
import torch

def prompt_length(images, prompts):
    images[:] = 0  # its own copy
    return [len(prompt) for prompt in prompts]

class Red:
    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(()))
    def __call__(self, images, prompts):
        return torch.from_numpy(images[..., 0]).double().mean((1, 2)) * self.weight

@dataclass
class Plain:
    scale: float = 2.0
    def __call__(self, images, prompts):
        return np.full(len(images), self.scale)

def none(images, prompts): return None
def short(images, prompts): return np.zeros(len(images) - 1)
def column(images, prompts): return np.zeros((len(images), 1))
def nan(images, prompts): return [float("nan") if p == "two foxes" else 1.0 for p in prompts]
def huge(images, prompts): return [1e300 if p == "two foxes" else 1.0 for p in prompts]
def fails(images, prompts): return [1 / (p != "two foxes") for p in prompts]
def at_once(images, prompts):
    if len(images) > 1:
        raise RuntimeError("too\\nmany")
    return [0.0]
def words(images, prompts): return prompts
class Uncalled: pass
number = 3
"""


@pytest.fixture
def user_file(tmp_path):
    folder = tmp_path / "my-rewards"
    folder.mkdir()
    (folder / "user-file.py").write_text(USER_FILE)
    (folder / "broken.py").write_text("import a_module_that_is_not_there")
    return folder / "user-file.py"


def test_a_users_function_and_class(user_file):
    images = pictures(4)
    before = images.copy()
    values, parts = load_reward(f"{user_file}:prompt_length + {user_file}:Red+0.5*{user_file}:Plain")(images, PROMPTS)
    np.testing.assert_array_equal(parts["prompt_length"], [3, 5, 9, 19])
    np.testing.assert_allclose(parts["Red"], before[..., 0].mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(values, parts["prompt_length"] + parts["Red"] + 1, rtol=1e-6)
    np.testing.assert_array_equal(images, before)  # a reward cannot spoil the pictures of the next


def test_alignment_shares_the_model_of_the_reward(clip_folder):
    images = pictures(4)
    score = load_reward("clip", clip_folder=clip_folder)
    align = load_alignment("compress", "cpu", clip_folder)
    np.testing.assert_array_equal(align(images, PROMPTS), score(images, PROMPTS)[0])
    assert rewards.load_clip.cache_info().misses == 1


@pytest.mark.parametrize("spec", ["clip", "compress + aesthetic"])
def test_alignment_uses_the_clip_of_the_reward_and_never_downloads(spec, request):
    assert load_alignment(spec) is None  # fetch would raise, offline
    assert load_alignment(spec, "cpu", "no/such/folder") is None
    request.getfixturevalue("clip_l")
    assert load_alignment("compress") is None
    assert load_alignment(spec)(pictures(2), PROMPTS[:2]).shape == (2,)


# --------------------------------------------------------------------------------------------------------------------
# what bad input gets


@pytest.mark.parametrize(
    "spec, message",
    [
        ("beauty", "unknown reward 'beauty': choose from compress, incompress, aesthetic, clip, pickscore, hps or"),
        ("compress + beauty", "unknown reward 'beauty'"),
        ("", "unexpected 'end' in reward ''"),
        ("compress +", r"unexpected 'end' in reward 'compress \+'"),
        ("compress + * clip", r"unexpected '\* clip' in reward 'compress \+ \* clip': write a sum such as"),
        ("compress + + clip", r"unexpected '\+ clip' in"),
        ("compress clip", "unexpected 'clip' in"),
        ("0.5 clip", "unexpected '0.5 clip' in"),
        ("0.5*", "unexpected 'end' in"),
        ("2 * 3 * clip", r"unexpected '3 \* clip' in"),
        ("compress; clip", "unexpected '; clip' in"),
        ("missing.py:f", "reward 'missing.py:f' does not load: FileNotFoundError"),
        ("missing.py", "unknown reward 'missing'.*or FILE.py:FUNCTION"),
        ("{folder}/user-file.py:g", "user-file.py:g' does not load: AttributeError.*has no attribute 'g'"),
        ("{folder}/user-file.py:number", "user-file.py:number' does not load: TypeError.*number is no function"),
        ("{folder}/user-file.py:Uncalled", "user-file.py:Uncalled' does not load: TypeError.*Uncalled is no function"),
        ("{folder}/broken.py:f", "broken.py:f' does not load: ModuleNotFoundError.*a_module_that_is_not_there"),
    ],
)
def test_a_spec_that_is_wrong(spec, message, user_file):
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(spec.format(folder=user_file.parent))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", r"reward 'none' returned shape \(\), not \(4,\)"),
        ("short", r"reward 'short' returned shape \(3,\), not \(4,\): look at sample 3 \(prompt 'a whale on"),
        ("column", r"reward 'column' returned shape \(4, 1\), not \(4,\)"),
        ("nan", r"reward 'nan' is nan for sample 2 \(prompt 'two foxes'\)"),
        ("huge", r"reward 'huge' is inf for sample 2 \(prompt 'two foxes'\)"),
        ("fails", r"reward 'fails' failed for sample 2 \(prompt 'two foxes'\): ZeroDivisionError"),
        ("at_once", r"'at_once' failed for all 4 at once, sample 0 \(prompt 'cat'\) .*RuntimeError\('too\\nmany'\)"),
        ("words", r"reward 'words' failed for sample 0 \(prompt 'cat'\): ValueError"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")  # of 1e300 in float32, which is then the error
def test_a_reward_that_misbehaves(name, message, user_file):
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(f"compress + {user_file}:{name}")(pictures(4), PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "images, prompts",
    [
        (pictures(4) / 255, PROMPTS),
        (pictures(4).astype(np.int64), PROMPTS),
        (pictures(4)[0], PROMPTS),
        (pictures(4)[..., :1], PROMPTS),
        (pictures(4).transpose(0, 3, 1, 2), PROMPTS),
        (torch.from_numpy(pictures(4)), PROMPTS),
        (pictures(4), PROMPTS[:3]),
        (pictures(4)[:0], []),
    ],
)
def test_images_and_prompts_that_do_not_fit(images, prompts):
    with pytest.raises(RewardError, match=r"images must be a uint8 array \(N, H, W, 3\).*are "):
        load_reward("compress")(images, prompts)


@pytest.mark.parametrize(
    "name, weights, how",
    [
        ("clip", rewards.CLIP_L, "run `hf download timm/vit_large_patch14_clip_224.openai open_clip_model.safeten"),
        ("aesthetic", rewards.LAION, "download https://github.com/christophschuhmann/improved-aesthetic-predictor/"),
        ("pickscore", rewards.PICKSCORE, "run `hf download yuvalkirstain/PickScore_v1 config.json model.safetensors`"),
        ("hps", rewards.HPS, "run `hf download xswu/HPSv2 HPS_v2.1_compressed.pt`"),
    ],
)
def test_missing_weights_name_the_file_its_size_the_place_and_the_way(name, weights, how, tmp_path):
    with pytest.raises(RewardError) as caught:
        load_reward(f"compress + {name}")
    _, file, size, _ = weights
    place = tmp_path / "torch/hub/checkpoints" / file if name == "aesthetic" else tmp_path / "hub"
    assert f"{file} ({size}) is not in {place} and" in str(caught.value)
    assert "HF_HUB_OFFLINE is set" in str(caught.value)  # it has not even tried
    assert f"on a connected machine {how}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clip_folder_without_safetensors_is_refused(clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes(Path(clip_folder, "open_clip_config.json").read_bytes())
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(RewardError, match="is not a CLIP folder: it has no open_clip_model.safetensors"):
        load_reward("clip", clip_folder=str(tmp_path))


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def test_no_pickle_runs_code(small_open_clip, monkeypatch, tmp_path):
    path = tmp_path / "attack.pth"
    monkeypatch.setenv("ATTACK", str(tmp_path / "executed"))
    torch.save({"state_dict": Attack()}, path)
    monkeypatch.setenv("AESTHETIC_HEAD", str(path))
    with pytest.raises(RewardError, match="attack.pth is damaged or another file: its sha256 is not 21dd590f3ccd"):
        load_reward("aesthetic")
    (hps,) = put_in_hub(*rewards.HPS[:2])
    hps.write_bytes(path.read_bytes())
    with pytest.raises(RewardError, match="HPS_v2.1_compressed.pt is damaged or another file: its sha256 is not c57a"):
        load_reward("hps")
    # and if such a file were the pinned one
    monkeypatch.setattr(rewards, "LAION", (*rewards.LAION[:3], sha256(path)))
    monkeypatch.setattr(rewards, "HPS", (*rewards.HPS[:3], sha256(path)))
    for name in ("aesthetic", "hps"):
        with pytest.raises(RewardError, match=f"reward '{name}' does not load: .*UnpicklingError"):
            load_reward(name)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # the file does attack


# --------------------------------------------------------------------------------------------------------------------
# the command line


def test_table(tmp_path, capsys, user_file):
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file, mode, seed in zip(files, ("RGB", "RGBA"), (0, 1)):
        Image.fromarray(pictures(1, 32 + 8 * seed, 32, seed)[0]).convert(mode).save(file)
    reward = f"incompress - 2*compress + 0*{user_file}:prompt_length"
    tyro.cli(rewards.main, args=["--reward", reward, "--prompt", "a cat", *files])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["reward", "incompress", "compress", "prompt_length", "picture"]
    for file, row in zip(files, rows, strict=True):
        size = REWARDS["incompress"]("cpu")(np.asarray(Image.open(file).convert("RGB"))[None], [""])[0]
        assert row.split()[-1] == file
        np.testing.assert_allclose([float(x) for x in row.split()[:4]], [3 * size, size, -size, 5], atol=1e-3)


def test_list_has_unit_download_and_source_of_all(capsys):
    tyro.cli(rewards.main, args=["--list"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == list(REWARDS) == ["compress", "incompress", "aesthetic", "clip", "pickscore", "hps"]
    for name, parts in {"compress": ("kB", "nothing", "JPEG"), "clip": ("cosine", "1.71 GB", "ViT-L-14")}.items():
        assert all(part in lines[name] for part in parts)


def test_without_a_network_it_ends_soon_with_one_line_and_code_2(tmp_path):
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    # an address where nothing listens, and not offline mode: the connection itself has to fail
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(ROOT / "rewards.py"), "--reward", "clip", str(tmp_path / "a.png")]
    start = time.time()
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert "cannot be downloaded (Connect" in line
    assert time.time() - start < 20  # hf_hub_download alone would try for 23 s, after the imports


@pytest.mark.parametrize("picture", ["missing.png", "text.png"])
def test_a_picture_that_cannot_be_read_is_named(picture, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match=picture):
        rewards.main((str(tmp_path / picture),))
