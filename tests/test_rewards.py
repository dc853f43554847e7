"""rewards.py: values against straight-line references, sums, users' files, and bad input.

The references run on small random weights: nothing is downloaded.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
import traceback
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import rewards
from rewards import REWARDS, RewardError, load_alignment, load_reward, save_user_files

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/emoji"
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # of OpenAI's training pictures
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["cat", "a dog", "two foxes", "a whale on the moon"]


@pytest.fixture(autouse=True)
def no_weights_and_no_network(monkeypatch, tmp_path):
    """Whatever this machine has downloaded before, the caches are empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("AESTHETIC_HEAD", raising=False)
    rewards.load_clip.cache_clear()


def make_images(n, height=128, width=64, seed=0):
    """Smooth random RGB pictures, uint8 (n, height, width, 3): resizing is not all rounding."""
    generator = np.random.default_rng(seed)
    images = []
    for small in generator.integers(0, 256, (n, 6, 4, 3), dtype=np.uint8):
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        images.append(np.asarray(picture))
    return np.stack(images)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def values_of(spec, **options):
    """The rewards of four pictures."""
    return load_reward(spec, **options)(make_images(4), PROMPTS)[0].tolist()


# ---- small random models ----


def hub_path(checkpoint, file=None):
    """Where the cache of the Hugging Face hub has a file of a repository."""
    folder = Path(constants.HF_HUB_CACHE, f"models--{checkpoint.source.replace('/', '--')}")
    revision = "0" * 40
    write(folder / "refs" / "main", revision)
    path = folder / "snapshots" / revision / (file or checkpoint.files[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def torch_hub_path(checkpoint):
    path = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", checkpoint.files[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def pin(monkeypatch, name, path):
    """Make the content of this file the pinned one."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    pinned = dataclasses.replace(getattr(rewards, name), sha256=digest)
    monkeypatch.setattr(rewards, name, pinned)


def strong(model):
    """Random weights large enough that activations and pictures make a difference."""
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        if "visual.conv1" in name or "patch_embedding" in name:
            parameter.data *= 10
    return model.eval().requires_grad_(False)


@pytest.fixture
def small_open_clip(monkeypatch):
    """Shrink open_clip's architectures. Their other settings, such as the activation, stay."""
    for name in ("ViT-L-14", "ViT-L-14-quickgelu", "ViT-H-14"):
        config = open_clip.get_model_config(name)
        config["vision_cfg"] |= {"layers": 2, "width": 64, "head_width": 32, "patch_size": 56}
        config["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    torch.manual_seed(0)


@pytest.fixture
def clip_l(small_open_clip):
    """A random model like OpenAI's in the hub's cache, built by hand with QuickGELU."""
    config = open_clip.get_model_config("ViT-L-14")
    model = strong(open_clip.CLIP(**config, quick_gelu=True))
    save_file(model.state_dict(), hub_path(rewards.CLIP_L))
    return model


@pytest.fixture
def head(monkeypatch):
    """A random aesthetic head in torch's cache, its sha256 pinned: numpy layers [(W, b)]."""
    sizes = (768, 1024, 128, 64, 16, 1)
    state, layers = {}, []
    for i, name in enumerate((0, 2, 4, 6, 7)):
        weight = torch.randn(sizes[i + 1], sizes[i]) * 2 / sizes[i] ** 0.5
        bias = torch.randn(sizes[i + 1]) / 10
        state[f"layers.{name}.weight"] = weight
        state[f"layers.{name}.bias"] = bias
        layers.append((weight.numpy(), bias.numpy()))
    path = torch_hub_path(rewards.LAION)
    torch.save(state, path)
    pin(monkeypatch, "LAION", path)
    return layers


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP in the format of models/emoji/clip: a small ResNet and its own tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(b + "</w>" for b in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16).save_pretrained(folder)
    text = {"context_length": 16, "vocab_size": 514, "width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32},
        "text_cfg": text | {"hf_tokenizer_name": "local"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).train()
    with torch.no_grad():
        model.encode_image(torch.randn(64, 3, 64, 64))  # gives the batch norms statistics
    save_file(strong(model).state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def reference_pixels(images, pad=False):
    """CLIP's preprocessing by hand: bicubic resize to 224, centre crop or black bars, normalise."""
    pixels = []
    for image in images:
        height, width = image.shape[:2]
        scale = 224 / (max if pad else min)(height, width)
        size = (round(width * scale), round(height * scale))
        picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left = round((picture.width - 224) / 2)
        top = round((picture.height - 224) / 2)
        square = np.asarray(picture.crop((left, top, left + 224, top + 224)))  # pads with black
        pixels.append(((square / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1))
    return torch.tensor(np.stack(pixels), dtype=torch.float32)


def reference_cosine(model, images, prompts, pad=False):
    image = model.visual(reference_pixels(images, pad)).double()
    text = model.encode_text(open_clip.SimpleTokenizer()(prompts)).double()
    return ((image * text).sum(-1) / image.norm(dim=-1) / text.norm(dim=-1)).numpy()


# ---- values ----


def test_jpeg_size_is_that_of_a_file_on_disk(tmp_path):
    images = make_images(5, 64, 64)
    expected = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=95)
        expected.append(os.path.getsize(tmp_path / f"{i}.jpg") / 1000)
    assert len(set(expected)) > 1
    values, parts = load_reward("incompress")(images, ["x"] * 5)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(load_reward("compress")(images, ["x"] * 5)[0], -values)
    assert values.dtype == np.float32
    assert list(parts) == ["incompress"]


def test_aesthetic_agrees_with_a_straight_line_reference(clip_l, head):
    images = make_images(4)
    x = clip_l.visual(reference_pixels(images)).double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for weight, bias in head:  # LAION's head has no activations
        x = x @ weight.T + bias
    assert x.std() > 0.03
    score = load_reward("aesthetic")
    values = score(images, PROMPTS)[0]
    np.testing.assert_allclose(values, x[:, 0], atol=2e-4)
    np.testing.assert_array_equal(values, score(images, PROMPTS)[0])  # dropout is off
    blue_for_red = score(images[..., ::-1], PROMPTS)[0]
    assert np.abs(blue_for_red - x[:, 0]).min() > 1e-3


def test_aesthetic_takes_the_file_that_its_variable_names(clip_l, head, monkeypatch, tmp_path):
    expected = values_of("aesthetic")
    path = torch_hub_path(rewards.LAION).rename(tmp_path / "mine.pth")
    monkeypatch.setenv("AESTHETIC_HEAD", str(path))
    assert values_of("aesthetic") == expected


def test_clip_agrees_with_a_straight_line_reference(clip_l):
    expected = 100 * reference_cosine(clip_l, make_images(4), PROMPTS)
    assert expected.std() > 1
    np.testing.assert_allclose(values_of("clip"), expected, atol=2e-3)
    # a script passes MODEL/clip whether or not the model has one
    values = values_of("clip", clip_folder="no/such/folder")
    np.testing.assert_allclose(values, expected, atol=2e-3)


def test_hps_agrees_with_a_straight_line_reference(small_open_clip, monkeypatch):
    model = strong(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")))
    path = hub_path(rewards.HPS)
    torch.save({"state_dict": model.half().state_dict()}, path)  # published in half precision
    pin(monkeypatch, "HPS", path)
    expected = reference_cosine(model.float(), make_images(4), PROMPTS, pad=True)
    np.testing.assert_allclose(values_of("hps"), expected, atol=2e-5)


def test_pickscore_agrees_with_a_straight_line_reference():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = size | {"patch_size": 56}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    strong(model).save_pretrained(hub_path(rewards.PICKSCORE).parent)

    tokens = open_clip.SimpleTokenizer()(PROMPTS)
    states = model.text_model(tokens).last_hidden_state
    ends = [row.tolist().index(49407) for row in tokens]
    text = model.text_projection(states[torch.arange(4), ends])
    image = model.vision_model(reference_pixels(make_images(4))).pooler_output
    image = model.visual_projection(image)
    expected = model.logit_scale.exp() * F.cosine_similarity(image, text)
    np.testing.assert_allclose(values_of("pickscore"), expected, atol=1e-3)


def test_local_clip_one_at_a_time_equals_a_batch(clip_folder):
    images = make_images(19, 64, 64)  # more than one batch of 16
    prompts = [f"animal {i}" for i in range(19)]
    score = load_reward("clip", clip_folder=clip_folder)
    values = score(images, prompts)[0]
    single = [score(images[i : i + 1], prompts[i : i + 1])[0][0] for i in range(19)]
    assert values.std() > 1e-2
    np.testing.assert_allclose(values, single, atol=1e-3)
    assert np.abs(values - score(images, prompts[::-1])[0]).max() > 1e-2


@pytest.mark.skipif(not (MODEL / "clip").exists(), reason="models/emoji/clip is not there")
def test_bundled_clip_ranks_the_right_prompt_first_as_its_model_card_says():
    """The published sheet: 46 names in 4 columns, each 4 pictures of 64 px under a line of text."""
    import pretrain

    card = (MODEL / "README.md").read_text()
    promised = re.search(r"ranks the right one of the 46 names first for ([\d.]+) %", card)
    sheet = Image.open(MODEL / "samples.png").convert("RGB")
    tiles = []
    for k in range(46):
        for j in range(4):
            x, y = k % 4 * 264 + 64 * j, k // 4 * 78 + 13
            tiles.append(sheet.crop((x, y, x + 64, y + 64)))
    embed_images, embed_texts = rewards.load_clip("cpu", f"local-dir:{MODEL / 'clip'}", None)
    with torch.inference_mode():
        cosines = embed_images(tiles) @ embed_texts(pretrain.NAMES).T  # (184, 46)
    right = cosines.argmax(1) == torch.arange(46).repeat_interleave(4)
    rate = 100 * right.double().mean().item()
    assert rate > 80
    assert abs(rate - float(promised[1])) < 1
    images = np.stack([np.asarray(tile) for tile in tiles[:8]])
    values, _ = load_reward("clip", clip_folder=str(MODEL / "clip"))(images, ["cat"] * 8)
    expected = 100 * cosines[:8, pretrain.NAMES.index("cat")]
    np.testing.assert_allclose(values, expected, atol=1e-3)


def test_alignment_shares_the_model_of_the_reward(clip_folder):
    images = make_images(4)
    score = load_reward("clip", clip_folder=clip_folder)
    align = load_alignment("compress", "cpu", clip_folder)
    np.testing.assert_array_equal(align(images, PROMPTS), score(images, PROMPTS)[0])
    assert rewards.load_clip.cache_info().misses == 1


@pytest.mark.parametrize("spec", ["clip", "compress + aesthetic"])
def test_alignment_uses_the_clip_of_the_reward_and_never_downloads(spec, request):
    assert load_alignment(spec) is None  # a download would raise, offline
    assert load_alignment(spec, "cpu", "no/such/folder") is None
    request.getfixturevalue("clip_l")
    assert load_alignment("compress") is None
    assert load_alignment(spec)(make_images(2), PROMPTS[:2]).shape == (2,)


def test_alignment_does_not_look_for_a_users_file():
    assert load_alignment("moved away.py:f + clip") is None


# ---- the text of --reward ----


@pytest.mark.parametrize(
    "spec, terms",
    [
        ("compress", [(1, "compress")]),
        ("-compress", [(-1, "compress")]),
        ("+ compress", [(1, "compress")]),
        ("aesthetic+0.5*clip-hps", [(1, "aesthetic"), (0.5, "clip"), (-1, "hps")]),
        (" 2.*clip - 1e-3 * hps ", [(2, "clip"), (-1e-3, "hps")]),
        (".5*clip + 1E+2*hps", [(0.5, "clip"), (100, "hps")]),
        ("my rewards+more/r.py:f", [(1, "my rewards+more/r.py:f")]),
        ("0.5*my dir/r.py:f - compress", [(0.5, "my dir/r.py:f"), (-1, "compress")]),
        ("clip - a*b - c/r-2.py:f+g.py:h", [(1, "clip"), (-1, "a*b - c/r-2.py:f"), (1, "g.py:h")]),
        ("-2*/a b/my.reward.py:f", [(-2, "/a b/my.reward.py:f")]),
        ("clip art/r.py:f", [(1, "clip art/r.py:f")]),
        ("./clip-art/r.py:f", [(1, "./clip-art/r.py:f")]),
        ("./2*3/r.py:f", [(1, "./2*3/r.py:f")]),
        ("2 a/r.py:f", [(1, "2 a/r.py:f")]),
    ],
)
def test_what_a_sum_means(spec, terms):
    assert rewards.parse(spec) == terms


numbers = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
folders = st.text("ab +-*._", max_size=8)
user_rewards = folders.map(lambda folder: f"./{folder}/r.py:f")
terms_of_a_sum = st.tuples(
    st.sampled_from("+-"), numbers, st.sampled_from([*REWARDS]) | user_rewards
)


@given(st.lists(terms_of_a_sum, min_size=1, max_size=4), st.sampled_from(["", " ", "  "]))
def test_any_sum_is_read_as_it_was_written(terms, space):
    written, expected = [], []
    for sign, number, name in terms:
        written += [sign, repr(number), "*", name]
        expected.append((float(sign + repr(number)), name))
    assert rewards.parse(space.join(written)) == expected


@given(st.text("clip .*+-:py1e/", max_size=20))
def test_any_text_is_read_or_refused_in_one_line(spec):
    try:
        terms = rewards.parse(spec)
    except RewardError as error:
        assert "\n" not in str(error)
    else:
        assert len(terms) > 0


@pytest.mark.parametrize(
    "spec, label",
    [
        ("compress", "compress"),
        ("- compress", "-compress"),
        ("incompress + 0.5*compress", "incompress+0.5compress"),
        ("2.0*compress - 1e-7*incompress", "2compress-1e-07incompress"),
        ("0.123456789012345*compress", "0.123456789012345compress"),
        ("{folder}/a b/my_reward.py:redness", "redness"),
        ("compress - .25*{folder}/a b/my_reward.py:größe", "compress-0.25gr__e"),
    ],
)
def test_the_label_is_the_whole_sum_without_folders(spec, label, tmp_path):
    text = "def redness(images, prompts): pass\ngröße = redness"
    write(tmp_path / "a b" / "my_reward.py", text)
    assert load_reward(spec.format(folder=tmp_path)).label == label


@given(st.lists(terms_of_a_sum, min_size=1, max_size=30), st.integers(0, 29), numbers)
def test_labels_are_short_safe_and_differ_with_the_weights(terms, i, number):
    terms = [(float(sign + repr(number)), name) for sign, number, name in terms]
    label = rewards.make_label(terms)
    assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,80}", label)
    i %= len(terms)
    other = terms.copy()
    other[i] = (number, terms[i][1])
    assert (rewards.make_label(other) == label) == (other == terms)


def test_a_sum_equals_the_sum_of_its_parts(clip_folder, tmp_path):
    path = write(tmp_path / "my.py", "def mean(images, prompts): return images.mean((1, 2, 3))")
    images = make_images(4)
    spec = f"incompress - 0.5*clip + 2e-1 * {path}:mean - clip"
    score = load_reward(spec, clip_folder=clip_folder)
    values, parts = score(images, PROMPTS)
    assert score.names == list(parts) == ["incompress", "clip", "mean_2", "clip_2"]

    alone = []
    for name in ("incompress", "clip", f"{path}:mean"):
        alone.append(load_reward(name, clip_folder=clip_folder)(images, PROMPTS)[0])
    for part, value in zip(parts.values(), [*alone, alone[1]], strict=True):
        np.testing.assert_array_equal(part, value)
    np.testing.assert_allclose(values, alone[0] - 1.5 * alone[1] + 0.2 * alone[2], rtol=1e-5)
    assert values.dtype == np.float32


def test_columns_do_not_overwrite_each_other_or_those_of_the_run(tmp_path):
    path = write(tmp_path / "my.py", "def mean(images, prompts): return [1.0] * len(images)")
    write(path, f"{path.read_text()}\nstd = s = mean_2 = mean")
    names = ["mean_2", "mean", "mean", "std", "s", "s"]
    score = load_reward(" + ".join(f"{path}:{name}" for name in names))
    assert score.names == ["mean_2", "mean_3", "mean_4", "std_2", "s_2", "s_3"]
    values, parts = score(make_images(2), PROMPTS[:2])
    assert list(parts) == score.names
    assert values.tolist() == [6, 6]


# ---- a user's own file ----


USER_FILE = """
from __future__ import annotations  # dataclasses then look for their module
from dataclasses import dataclass
import numpy as np
import torch

def prompt_length(images, prompts):
    images[:] = 0  # its own copy
    lengths = [len(prompt) for prompt in prompts]
    prompts.clear()
    return lengths

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

class Uncalled: pass
number = 3
"""


@pytest.fixture
def user_file(tmp_path):
    return write(tmp_path / "my-rewards" / "user-file.py", USER_FILE)


def test_a_users_function_and_classes(user_file):
    images = make_images(4)
    before = images.copy()
    prompts = PROMPTS.copy()
    spec = f"{user_file}:prompt_length + {user_file}:Red+0.5*{user_file}:Plain"
    values, parts = load_reward(spec)(images, prompts)
    np.testing.assert_array_equal(parts["prompt_length"], [3, 5, 9, 19])
    np.testing.assert_allclose(parts["Red"], before[..., 0].mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(values, parts["prompt_length"] + parts["Red"] + 1, rtol=1e-6)
    np.testing.assert_array_equal(images, before)  # a reward cannot spoil what the next one gets
    assert prompts == PROMPTS


@pytest.mark.parametrize(
    "folder", ["a b", "a+b", "a-b", "a*b", "my rewards + 0.5*more", "clip-art"]
)
def test_a_users_file_in_a_folder_of_any_name(folder, tmp_path, monkeypatch):
    write(tmp_path / folder / "r.py", "def f(images, prompts): return [3.0] * len(images)")
    path = tmp_path / folder / "r.py"
    compress = np.array(values_of("compress"))
    np.testing.assert_allclose(values_of(f"0.5*{path}:f - compress"), 1.5 - compress)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_allclose(values_of(f"compress + ./{folder}/r.py:f"), compress + 3)


HELPED = """
from helper import VALUE
def f(images, prompts): return [VALUE] * len(images)
"""


def test_modules_beside_the_file_are_found(tmp_path):
    text = "from helper import A\nfrom package.inner import B\nfrom plain.folder import C\n"
    text += "def f(images, prompts): return [A + B + C] * len(images)\n"
    path = write(tmp_path / "r.py", text)
    write(tmp_path / "helper.py", "A = 1")
    write(tmp_path / "package" / "__init__.py", "")
    write(tmp_path / "package" / "inner.py", "from .other import B")
    write(tmp_path / "package" / "other.py", "B = 20")
    write(tmp_path / "plain" / "folder.py", "C = 300")
    score = load_reward(f"{path}:f")
    assert score(make_images(1), ["x"])[0] == [321]
    save_user_files(score, tmp_path / "saved")
    modules = ["helper.py", "package/__init__.py", "package/inner.py", "package/other.py"]
    assert files_below(tmp_path / "saved/0") == [*modules, "plain/folder.py", "r.py"]
    assert load_reward("r.py:f", user_files=tmp_path / "saved")(make_images(1), ["x"])[0] == [321]


LAZY = """
class F:
    def __init__(self):
        import helper
        self.value = helper.VALUE
    def __call__(self, images, prompts): return [self.value] * len(images)
"""


def test_a_module_that_a_class_imports_when_it_is_made_is_found_and_kept(tmp_path):
    path = write(tmp_path / "r.py", LAZY)
    write(tmp_path / "helper.py", "VALUE = 7")
    score = load_reward(f"{path}:F")
    assert score(make_images(1), ["x"])[0] == [7]
    save_user_files(score, tmp_path / "saved")
    assert files_below(tmp_path / "saved") == ["0/helper.py", "0/r.py"]


def test_helpers_of_one_name_are_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for folder, value in (("a", 1), ("b", 20)):
        write(tmp_path / folder / "r.py", HELPED)
        write(tmp_path / folder / "helper.py", f"VALUE = {value}")
        write(tmp_path / folder / "g.py", HELPED.replace("helper", "lib.helper"))
        write(tmp_path / folder / "lib" / "helper.py", f"VALUE = {100 * value}")
    both = f"{tmp_path}/a/r.py:f + {tmp_path}/b/r.py:f"
    assert values_of(both) == [21] * 4
    assert values_of(f"{tmp_path}/a/r.py:f") == [1] * 4
    assert values_of(f"{tmp_path}/b/g.py:f + {tmp_path}/a/g.py:f") == [2100] * 4
    # edited within a second, of the same length: Python's .pyc could not tell
    write(tmp_path / "a" / "helper.py", "VALUE = 2")
    assert values_of(both) == [22] * 4


def test_a_loaded_module_of_the_name_of_a_helper_is_not_taken_and_stays(tmp_path, monkeypatch):
    mine = write(tmp_path / "elsewhere" / "helper.py", "VALUE = 5")
    monkeypatch.syspath_prepend(mine.parent)
    import helper

    path = write(tmp_path / "a" / "r.py", HELPED)
    write(tmp_path / "a" / "helper.py", "VALUE = 1")
    assert values_of(f"{path}:f") == [1] * 4
    assert sys.modules["helper"] is helper
    del sys.modules["helper"]


@pytest.mark.parametrize("end", ["", "1 / 0"])
def test_loading_leaves_no_trace_in_python_or_the_folder(end, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write(tmp_path / "r.py", f"{HELPED}\n{end}")
    write(tmp_path / "helper.py", "VALUE = 1")
    before = (sys.path.copy(), set(sys.modules) - {"user_reward_0"}, sys.dont_write_bytecode)
    try:
        load_reward(f"{path}:f")
    except ZeroDivisionError:
        assert end
    after = (sys.path.copy(), set(sys.modules) - {"user_reward_0"}, sys.dont_write_bytecode)
    assert before == after
    assert files_below(tmp_path) == ["helper.py", "r.py"]


def test_a_library_below_the_folder_is_no_helper(tmp_path, monkeypatch):
    """Such as a virtual environment in the user's project: it is neither copied nor unloaded."""
    monkeypatch.syspath_prepend(tmp_path / "venv/site-packages")
    write(tmp_path / "venv/site-packages/some_library.py", "VALUE = 4")
    path = write(tmp_path / "r.py", HELPED.replace("helper", "some_library"))
    score = load_reward(f"{path}:f")
    save_user_files(score, tmp_path / "saved")
    assert files_below(tmp_path / "saved") == ["0/r.py"]
    assert sys.modules.pop("some_library").VALUE == 4


def test_a_users_file_beside_rewards_py_shares_its_module(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "__file__", str(write(tmp_path / "rewards.py", "1 / 0")))
    text = "import rewards\nsize = rewards.compress('cpu')\nERROR = rewards.RewardError\n"
    path = write(tmp_path / "r.py", f"{text}def f(images, prompts): return size(images, prompts)")
    score = load_reward(f"{path}:f")
    assert sys.modules["user_reward_0"].ERROR is RewardError
    np.testing.assert_array_equal(score(make_images(4), PROMPTS)[0], values_of("compress"))
    save_user_files(score, tmp_path / "saved")
    assert files_below(tmp_path / "saved") == ["0/r.py"]


def test_a_users_function_can_be_pickled_for_other_processes(user_file):
    load_reward(f"{user_file}:Plain")
    plain = sys.modules["user_reward_0"].Plain(3.0)
    assert pickle.loads(pickle.dumps(plain)) == plain


@pytest.mark.parametrize("fate", ["edited", "moved", "deleted"])
def test_a_saved_reward_outlives_its_files(fate, tmp_path, monkeypatch):
    for folder, value in (("a", 1), ("b", 20)):
        write(tmp_path / folder / "r.py", HELPED)
        write(tmp_path / folder / "helper.py", f"VALUE = {value}")
    monkeypatch.chdir(tmp_path)
    spec = "a/r.py:f + compress - 2*b/r.py:f"
    score = load_reward(spec)
    expected = score(make_images(4), PROMPTS)[0].tolist()

    for folder in ("a", "b"):  # before they are saved: what counts is what was loaded
        for name in ("r.py", "helper.py"):
            path = tmp_path / folder / name
            if fate == "edited":
                path.write_text("1 / 0")
            elif fate == "moved":
                path.rename(path.with_suffix(".old"))
            else:
                path.unlink()
    save_user_files(score, tmp_path / "run" / "reward")
    saved = ["0/helper.py", "0/r.py", "2/helper.py", "2/r.py"]
    assert files_below(tmp_path / "run" / "reward") == saved

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_reward(spec, user_files="../run/reward")
    assert again(make_images(4), PROMPTS)[0].tolist() == expected
    assert (again.names, again.label) == (score.names, score.label)
    save_user_files(again, tmp_path / "third")
    for name in saved:
        copies = [
            (folder / name).read_bytes() for folder in (tmp_path / "third", tmp_path / "run/reward")
        ]
        assert copies[0] == copies[1]


def test_a_file_is_kept_byte_for_byte(tmp_path):
    content = "# größe\r\ndef f(images, prompts): return [1.0] * len(images)\r\n".encode()
    (tmp_path / "r.py").write_bytes(content)
    save_user_files(load_reward(f"{tmp_path}/r.py:f"), tmp_path / "saved")
    assert (tmp_path / "saved/0/r.py").read_bytes() == content


def test_a_file_behind_a_link_finds_the_modules_of_its_real_folder(tmp_path):
    write(tmp_path / "real" / "original.py", HELPED)
    write(tmp_path / "real" / "helper.py", "VALUE = 8")
    (tmp_path / "link.py").symlink_to(tmp_path / "real/original.py")
    score = load_reward(f"{tmp_path}/link.py:f")
    save_user_files(score, tmp_path / "saved")
    assert files_below(tmp_path / "saved") == ["0/helper.py", "0/link.py"]
    assert values_of(f"{tmp_path}/link.py:f", user_files=tmp_path / "saved") == [8] * 4


def test_nothing_is_saved_for_rewards_of_ours(tmp_path):
    save_user_files(load_reward("compress - incompress"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "text, name, kind",
    [
        ("x = 1\nimport a_module_that_is_not_there", "f", ModuleNotFoundError),
        ("x = 1\nx /= 0", "f", ZeroDivisionError),
        ("x = 1\nraise ValueError", "f", ValueError),
        ("class F:\n    def __init__(self, size): pass", "F", TypeError),
        ("class F:\n    def __init__(self):\n        open('no such file')", "F", FileNotFoundError),
    ],
)
def test_what_a_users_file_raises_keeps_its_traceback(text, name, kind, tmp_path):
    path = write(tmp_path / "broken.py", text)
    with pytest.raises(kind) as caught:
        load_reward(f"compress + {path}:{name}")
    assert type(caught.value) is kind
    if kind is not TypeError:  # that one is raised by the call
        frame = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert (frame.filename, frame.line) == (str(path), text.splitlines()[-1].strip())


def test_a_syntax_error_names_its_file_and_line(tmp_path):
    path = write(tmp_path / "broken.py", "x = 1\ndef f(:")
    with pytest.raises(SyntaxError) as caught:
        load_reward(f"{path}:f")
    assert (caught.value.filename, caught.value.lineno) == (str(path), 2)


# ---- what bad input gets ----


NAMES = "compress, incompress, aesthetic, clip, pickscore, hps"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("beauty", f"unknown reward 'beauty': choose from {NAMES} or FILE.py:FUNCTION"),
        ("compress + beauty", "unknown reward 'beauty'"),
        ("beauty + compress", "unknown reward 'beauty'"),
        ("", "unexpected 'end' in reward ''"),
        ("compress +", "unexpected 'end' in reward 'compress +'"),
        (
            "compress + * clip",
            "unexpected '* clip' in reward 'compress + * clip': "
            "write FILE.py:FUNCTION or a sum such as 'aesthetic + 0.5*clip'",
        ),
        ("compress + + clip", "unexpected '+ clip' in"),
        ("compress clip", "unexpected 'compress clip' in"),
        ("0.5 clip", "unexpected '0.5 clip' in"),
        ("0.5*", "unexpected 'end' in"),
        ("2 * 3 * clip", "unexpected '3 * clip' in"),
        ("compress; clip", "unexpected 'compress; clip' in"),
        ("1e*clip", "unexpected '1e*clip' in"),
        ("missing.py", "unexpected 'missing.py' in reward 'missing.py': write FILE.py:FUNCTION"),
        ("clip + missing.py:f - clip", "there is no file 'missing.py' for reward 'missing.py:f'"),
        ("compres - missing.py:f", f"no file 'compres - missing.py' for .* choose from {NAMES}"),
        ("{folder}:f", "unexpected '{folder}:f' in"),
        ("{file}:g", "{file} has no function or class 'g'"),
        ("{file}:number", "'number' of {file} is no function, and no class with __call__"),
        ("{file}:Uncalled", "'Uncalled' of {file} is no function, and no class with __call__"),
    ],
)
def test_a_spec_that_is_wrong(spec, message, user_file, clip_folder):
    places = {"file": user_file, "folder": user_file.parent}
    pattern = re.escape(message.format(**places)).replace(re.escape(".*"), ".*")
    with pytest.raises(RewardError, match=pattern) as caught:
        load_reward(spec.format(**places), clip_folder=clip_folder)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "r.py").mkdir()
    with pytest.raises(RewardError, match="there is no file '.*r.py'"):
        load_reward(f"{tmp_path}/r.py:f")


def test_a_copy_that_is_missing_is_named_and_the_original_not_taken(user_file, tmp_path):
    with pytest.raises(RewardError, match="there is no file '.*run/reward/1/user-file.py'"):
        load_reward(f"compress + {user_file}:Plain", user_files=tmp_path / "run/reward")


MISBEHAVING = """
import numpy as np
import torch

def none(images, prompts): return None
def short(images, prompts): return np.zeros(len(images) - 1)
def column(images, prompts): return np.zeros((len(images), 1))
def row(images, prompts): return torch.zeros(1, len(images))
def one_each(images, prompts): return [torch.zeros(1) for _ in images]
def a_none(images, prompts): return [1.0, 1.0, None, 1.0]
def nan(images, prompts): return [float("nan") if p == "two foxes" else 1.0 for p in prompts]
def minus_inf(images, prompts): return torch.tensor([0, 0, 0, -torch.inf])
def huge(images, prompts): return [1e300 if p == "two foxes" else 1.0 for p in prompts]
def words(images, prompts): return prompts
def fails(images, prompts): raise RuntimeError("too\\nmany")
def hundred(images, prompts): return [0.0, 100.0, 0.0, 0.0]
"""


@pytest.fixture
def misbehaving(tmp_path):
    return write(tmp_path / "misbehaving.py", MISBEHAVING)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", r"returned shape \(\), not \(4,\), for 4 pictures from sample 0 \(prompt 'cat'\)"),
        ("short", r"returned shape \(3,\), not \(4,\)"),
        ("column", r"returned shape \(4, 1\), not \(4,\)"),
        ("row", r"returned shape \(1, 4\), not \(4,\)"),
        ("one_each", r"returned shape \(4, 1\), not \(4,\)"),
        ("a_none", r"is nan for sample 2 \(prompt 'two foxes'\)"),
        ("nan", r"is nan for sample 2 \(prompt 'two foxes'\)"),
        ("minus_inf", r"is -inf for sample 3 \(prompt 'a whale on the moon'\)"),
        ("huge", r"is inf for sample 2 \(prompt 'two foxes'\)"),
        ("fails", r"failed for 4 pictures from sample 0 \(prompt 'cat'\) on: Runtime.*too\\nmany"),
        ("words", r"failed for 4 pictures from sample 0 \(prompt 'cat'\) on: ValueError"),
    ],
)
def test_a_reward_that_misbehaves(name, message, misbehaving):
    score = load_reward(f"compress + {misbehaving}:{name}")
    with pytest.raises(RewardError, match=f"^reward '{misbehaving}:{name}' {message}") as caught:
        score(make_images(4), PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "factors, number",
    [
        (("1e38", "1"), "inf"),
        (("-1e38", "1"), "-inf"),
        (("1e39", "0"), "nan"),
        (("1e400", "0"), "nan"),
        (("1e38", "-1e38"), "nan"),
        (("3e36", "3e36"), "inf"),
    ],
)
def test_a_total_that_is_not_finite_is_refused(factors, number, misbehaving):
    reward = f"{misbehaving}:hundred"
    spec = f"{factors[0]}*{reward} + {factors[1]}*{reward}".replace("+ -", "- ")
    sample = r"sample 1 \(prompt 'a dog'\)"
    if number == "nan" and factors[1] == "0":  # inf * 0 of the first sample
        sample = r"sample 0 \(prompt 'cat'\)"
    with pytest.raises(RewardError, match=f"reward '{re.escape(spec)}' is {number} for {sample}"):
        load_reward(spec)(make_images(4), PROMPTS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("term", ["{file}:huge", "1e38*{file}:hundred", "1e39*{file}:hundred"])
def test_overflow_is_told_by_us_and_not_by_a_warning(term, misbehaving):
    with pytest.raises(RewardError, match="is (inf|nan) for sample"):
        load_reward(term.format(file=misbehaving))(make_images(4), PROMPTS)


def test_a_reward_that_raises_is_called_once_and_its_error_is_the_cause(tmp_path):
    text = "calls = []\ndef f(images, prompts):\n    calls.append(prompts)\n    raise KeyError('x')"
    score = load_reward(f"{write(tmp_path / 'r.py', text)}:f")
    with pytest.raises(RewardError, match="KeyError") as caught:
        score(make_images(4), PROMPTS)
    assert sys.modules["user_reward_0"].calls == [PROMPTS]
    assert isinstance(caught.value.__cause__, KeyError)
    frame = traceback.extract_tb(caught.value.__cause__.__traceback__)[-1]
    assert frame.filename == str(tmp_path / "r.py")


@pytest.mark.parametrize(
    "expression",
    [
        "[1.0, 2.0, 3.0, 4.5]",
        "(1, 2, 3, 4.5)",
        "np.array([1.0, 2, 3, 4.5])",
        "np.array([1.0, 2, 3, 4.5]).astype(np.float16)",
        "list(np.array([1.0, 2, 3, 4.5]))",
        "torch.tensor([1.0, 2, 3, 4.5])",
        "torch.tensor([1.0, 2, 3, 4.5], requires_grad=True)",
        "torch.tensor([1.0, 2, 3, 4.5], dtype=torch.bfloat16)",
        "list(torch.tensor([1.0, 2, 3, 4.5], requires_grad=True) * 1)",
        "[1, np.float64(2), torch.tensor(3.0, requires_grad=True), 4.5]",
        pytest.param(
            "list(torch.tensor([1.0, 2, 3, 4.5], device='cuda', requires_grad=True))",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
        ),
    ],
)
def test_numbers_of_any_kind_are_taken(expression, tmp_path):
    text = f"import numpy as np\nimport torch\ndef f(images, prompts): return {expression}"
    path = write(tmp_path / "r.py", text)
    values, parts = load_reward(f"2*{path}:f")(make_images(4), PROMPTS)
    assert values.tolist() == [2, 4, 6, 9]
    assert parts["f"].tolist() == [1, 2, 3, 4.5]
    assert values.dtype == parts["f"].dtype == np.float32


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (make_images(4) / 255, PROMPTS, "must be a numpy array of uint8, not float64"),
        (make_images(4).astype(np.int64), PROMPTS, "must be a numpy array of uint8, not int64"),
        (torch.from_numpy(make_images(4)), PROMPTS, "a numpy array of uint8, not torch.uint8"),
        (list(make_images(4)), PROMPTS, "must be a numpy array of uint8, not list"),
        (make_images(4)[0], PROMPTS, r"shape \(N, H, W, 3\), not \(128, 64, 3\)"),
        (make_images(4)[..., :1], PROMPTS, r"shape \(N, H, W, 3\), not \(4, 128, 64, 1\)"),
        (make_images(4).transpose(0, 3, 1, 2), PROMPTS, r"\(N, H, W, 3\), not \(4, 3, 128, 64\)"),
        (make_images(4), PROMPTS[:3], "every image needs its prompt: 4 and 3 given"),
        (make_images(4)[:0], [], "every image needs its prompt: 0 and 0 given"),
    ],
)
def test_images_and_prompts_that_do_not_fit(images, prompts, message):
    with pytest.raises(RewardError, match=message):
        load_reward("compress")(images, prompts)


# ---- weights ----


@pytest.mark.parametrize(
    "name, checkpoint, advice",
    [
        (
            "clip",
            rewards.CLIP_L,
            "run `hf download timm/vit_large_patch14_clip_224.openai open_clip_model.safetensors`, "
            "then copy its models--timm--vit_large_patch14_clip_224.openai to that folder",
        ),
        (
            "aesthetic",
            rewards.LAION,
            "download https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
            "sac%2Blogos%2Bava1-l14-linearMSE.pth, then put it there or set AESTHETIC_HEAD to",
        ),
        (
            "pickscore",
            rewards.PICKSCORE,
            "run `hf download yuvalkirstain/PickScore_v1 config.json model.safetensors`",
        ),
        ("hps", rewards.HPS, "run `hf download xswu/HPSv2 HPS_v2.1_compressed.pt`"),
    ],
)
def test_missing_weights_name_the_file_its_size_the_place_and_the_way(
    name, checkpoint, advice, tmp_path
):
    with pytest.raises(RewardError) as caught:
        load_reward(f"compress + {name}")
    message = str(caught.value)
    place = tmp_path / "hub"
    if name == "aesthetic":
        place = tmp_path / "torch/hub/checkpoints" / checkpoint.files[0]
    assert f"{' '.join(checkpoint.files)} ({checkpoint.size}) is not in {place} and" in message
    assert "HF_HUB_OFFLINE is set" in message  # it has not even tried
    assert f"on a connected machine {advice}" in message
    assert "\n" not in message


def test_weights_of_which_one_file_is_missing_are_missing():
    save_file({"x": torch.zeros(1)}, hub_path(rewards.PICKSCORE))
    with pytest.raises(RewardError, match="config.json model.safetensors .3.94 GB. is not in"):
        load_reward("pickscore")
    write(hub_path(rewards.PICKSCORE, "config.json"), "{}")
    path = hub_path(rewards.PICKSCORE)
    assert rewards.fetch_from_hub(rewards.PICKSCORE) == str(path)


def test_a_download_from_a_url_is_made_once_and_checked(monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(b"the head")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    digest = hashlib.sha256(b"the head").hexdigest()
    checkpoint = dataclasses.replace(rewards.LAION, sha256=digest)
    folder = Path(os.environ["TORCH_HOME"], "hub", "checkpoints")
    for _ in range(2):
        path = rewards.fetch_url(checkpoint)
        assert Path(path).read_bytes() == b"the head"
    assert asked == [rewards.LAION.source]
    assert files_below(folder) == [rewards.LAION.files[0]]  # no half-written file beside it
    with pytest.raises(RewardError, match="its sha256 is not 21dd590f.*Delete it and run again"):
        rewards.fetch_url(rewards.LAION)


def test_a_download_from_the_hub_takes_all_files_and_the_last_one_counts(monkeypatch, tmp_path):
    asked = []

    def hf_hub_download(repository, file):
        asked.append((repository, file))
        return str(write(tmp_path / file, "content"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    source = rewards.PICKSCORE.source
    path = rewards.fetch_from_hub(rewards.PICKSCORE)
    assert path == str(tmp_path / "model.safetensors")
    assert asked == [(source, "config.json"), (source, "model.safetensors")]
    with pytest.raises(RewardError, match="HPS_v2.1_compressed.pt is damaged or another file"):
        rewards.fetch_from_hub(rewards.HPS)


def test_without_a_network_it_gives_up_soon(monkeypatch):
    # an address where nothing listens, and not offline mode: the connection itself has to fail
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.time()
    with pytest.raises(RewardError, match="cannot be downloaded .Connect"):
        rewards.fetch_from_hub(rewards.CLIP_L)
    assert time.time() - start < 10  # hf_hub_download alone tries for 23 s


def test_a_clip_folder_without_safetensors_is_refused(clip_folder, tmp_path):
    config = Path(clip_folder, "open_clip_config.json").read_text()
    write(tmp_path / "open_clip_config.json", config)
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    message = "is not a CLIP folder: it has no open_clip_model.safetensors"
    with pytest.raises(RewardError, match=message):
        load_reward("clip", clip_folder=str(tmp_path))


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def test_no_pickle_runs_code(small_open_clip, monkeypatch, tmp_path):
    path = tmp_path / "attack.pth"
    executed = tmp_path / "executed"
    monkeypatch.setenv("ATTACK", str(executed))
    torch.save({"state_dict": Attack()}, path)
    monkeypatch.setenv("AESTHETIC_HEAD", str(path))
    hub_path(rewards.HPS).write_bytes(path.read_bytes())
    damaged = "is damaged or another file: its sha256 is not"
    with pytest.raises(RewardError, match=f"attack.pth {damaged} 21dd590f3ccd"):
        load_reward("aesthetic")
    with pytest.raises(RewardError, match=f"HPS_v2.1_compressed.pt {damaged} c57a"):
        load_reward("hps")

    # and if such a file were the pinned one
    pin(monkeypatch, "LAION", path)
    pin(monkeypatch, "HPS", path)
    for name in ("aesthetic", "hps"):
        with pytest.raises(pickle.UnpicklingError):
            load_reward(name)
    assert not executed.exists()
    torch.load(path, weights_only=False)
    assert executed.exists()  # the file does attack


def test_weights_of_another_model_are_refused_with_a_traceback(head, clip_l, monkeypatch):
    path = torch_hub_path(rewards.LAION)
    torch.save({"layers.0.weight": torch.zeros(3, 3)}, path)
    pin(monkeypatch, "LAION", path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_reward("aesthetic")


# ---- the command line ----


def command(*arguments, **environment):
    """Run `python rewards.py` as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "rewards.py"), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_table_of_scores(tmp_path, user_file):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    Image.fromarray(make_images(1, 32, 32)[0]).save(files[0])
    Image.fromarray(make_images(1, 40, 32, seed=1)[0]).convert("RGBA").save(files[1])
    spec = f"incompress - 2*compress + 0*{user_file}:prompt_length"
    run = command("--reward", spec, "--prompt", "a cat", *files)
    assert (run.returncode, run.stderr) == (0, "")
    header, *rows = run.stdout.splitlines()
    assert header.split() == ["reward", "incompress", "compress", "prompt_length", "picture"]
    for file, row in zip(files, rows, strict=True):
        image = np.asarray(Image.open(file).convert("RGB"))
        size = REWARDS["incompress"]("cpu")(image[None], [""])[0]
        *numbers, name = row.split()
        assert name == str(file)
        numbers = [float(number) for number in numbers]
        np.testing.assert_allclose(numbers, [3 * size, size, -size, 5], atol=1e-3)


def test_list_has_unit_download_and_source_of_all_and_loads_no_model_library(capsys):
    code = "import sys, rewards; rewards.main(rewards.Args(images=(), list=True)); "
    code += "print(*sys.modules.keys() & {'torch', 'transformers', 'open_clip', 'tyro'})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *table, imported = run.stdout.splitlines()
    assert imported == ""
    lines = {line.split()[0]: line for line in table}
    assert list(lines) == list(REWARDS) == NAMES.split(", ")
    for name, row in rewards.BUILT_IN.items():
        columns = re.split("  +", lines[name])
        assert columns == [name, row.unit, row.download, row.source]
        assert REWARDS[name] is row.factory
    assert "kB" in lines["compress"] and "nothing" in lines["compress"]
    assert "1.71 GB + 3.7 MB" in lines["aesthetic"]
    assert command("--list").stdout.splitlines() == table


def test_without_weights_it_ends_with_one_line_and_code_2(tmp_path):
    Image.fromarray(make_images(1)[0]).save(tmp_path / "a.png")
    empty = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = command("--reward", "clip", tmp_path / "a.png", **empty)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert "open_clip_model.safetensors (1.71 GB) is not in" in line


def test_a_file_that_is_no_picture_ends_with_one_line_and_code_2(tmp_path):
    Image.fromarray(make_images(1)[0]).save(tmp_path / "a.png")
    text = write(tmp_path / "text.png", "no picture")
    run = command(tmp_path / "a.png", text)
    assert run.returncode == 2
    assert len(run.stdout.splitlines()) == 2  # the header and the first picture
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"cannot read the picture {text}: ")


def test_an_error_in_a_users_file_is_shown_with_its_traceback(tmp_path):
    Image.fromarray(make_images(1)[0]).save(tmp_path / "a.png")
    path = write(tmp_path / "r.py", "open('no such file')")
    run = command("--reward", f"{path}:f", tmp_path / "a.png")
    assert run.returncode == 1
    assert f'File "{path}", line 1' in run.stderr
    assert "FileNotFoundError" in run.stderr.splitlines()[-1]


def test_a_clip_folder_that_is_not_there_is_refused():
    args = rewards.Args(images=("a.png",), reward="clip", clip_folder="no/such/folder")
    with pytest.raises(RewardError, match="--clip-folder no/such/folder is not a folder"):
        rewards.main(args)


@pytest.mark.parametrize("name", ["missing.png", "text.png", "cut.png", "cut.jpg", "folder.png"])
def test_a_picture_that_cannot_be_read_is_named(name, tmp_path):
    path = tmp_path / name
    if name == "text.png":
        path.write_text("no picture")
    elif name.startswith("cut"):
        Image.fromarray(make_images(1)[0]).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif name == "folder.png":
        path.mkdir()
    with pytest.raises(RewardError, match=f"cannot read the picture .*{name}: ") as caught:
        rewards.read_picture(path)
    assert "\n" not in str(caught.value)


LEVELS = np.array([[0, 128, 129, 257, 32896], [385, 386, 65000, 65406, 65535]])


@pytest.mark.parametrize(
    "name, mode, kind",
    [
        ("a.png", "I;16", np.uint16),
        ("a.tif", "I;16", np.uint16),
        ("big_endian.tif", "I;16B", ">u2"),
        ("a.pgm", "I", np.uint16),
    ],
)
def test_grey_of_16_bits_becomes_grey_of_8(name, mode, kind, tmp_path):
    path = tmp_path / name
    Image.fromarray(LEVELS.astype(kind)).save(path)
    assert Image.open(path).mode == mode
    image = rewards.read_picture(path)
    assert (image.shape, image.dtype) == ((2, 5, 3), np.uint8)
    expected = [[0, 0, 1, 1, 128], [1, 2, 253, 254, 255]]  # nearest to LEVELS / 257
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], expected)


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0.0, 0.5, 1.0]], dtype=np.float32),
        np.array([[0, 70000]], dtype=np.int32),
        np.array([[-5, 3]], dtype=np.int32),
    ],
)
def test_grey_of_unknown_range_is_refused(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(RewardError, match="a.tif: it has more than 16 bits per pixel and channel"):
        rewards.read_picture(tmp_path / "a.tif")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK"])
def test_pictures_of_other_modes_are_read(mode, tmp_path):
    colour = np.zeros((8, 8, 3), dtype=np.uint8)
    colour[:4] = 255
    if mode not in ("L", "LA", "1"):
        colour[:, :4] = (255, 0, 0)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture = Image.fromarray(colour).convert(mode)
    if mode == "P":
        picture.save(path, transparency=bytes([255] * 200 + [100] * 56))
    else:
        picture.save(path)
    with Image.open(path) as picture:
        assert picture.mode == mode
    np.testing.assert_array_equal(rewards.read_picture(path), colour)
