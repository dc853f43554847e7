"""rewards.py: values against straight-line references, sums, users' files, and bad input.

The references run on small random weights: nothing is downloaded.
"""

import functools
import hashlib
import http.server
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

import rewards
from rewards import RewardError, load_alignment, load_reward

ROOT = Path(rewards.__file__).resolve().parent
CLIP = str(ROOT / "models/emoji/clip")
NAMES = (  # in the order of models/emoji/samples.png
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox "
    "wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle "
    "frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo elephant"
).split()
PROMPTS = ["cat", "a dog", "two foxes", "a whale on the moon"]


@pytest.fixture(autouse=True)
def no_weights_and_no_network(monkeypatch, tmp_path):
    """Whatever this machine has downloaded before, the caches are empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    rewards.load_open_clip.cache_clear()


def make_images(n, height=128, width=64):
    """Smooth random RGB pictures, uint8 (n, height, width, 3): resizing is not all rounding."""
    images = []
    for small in np.random.default_rng(0).integers(0, 256, (n, 6, 4, 3), dtype=np.uint8):
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        images.append(np.asarray(picture))
    return np.stack(images)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def values_of(spec, **options):
    """The rewards of four pictures."""
    return load_reward(spec, **options)(make_images(4), PROMPTS)[0]


# ---- values ----


def hub_path(source, file):
    """Where the cache of the Hugging Face hub has a file of a repository."""
    folder = Path(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}")
    write(folder / "refs" / "main", "0" * 40)
    return write(folder / "snapshots" / ("0" * 40) / file, "")


def torch_hub_path(source, file):
    return write(Path(os.environ["TORCH_HOME"], "hub", "checkpoints", file), "")


def pin(monkeypatch, name, path):
    """Make the content of this file the pinned one."""
    monkeypatch.setattr(rewards, name, hashlib.sha256(path.read_bytes()).hexdigest())


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
    model = strong(open_clip.CLIP(**open_clip.get_model_config("ViT-L-14"), quick_gelu=True))
    save_file(model.state_dict(), hub_path(*rewards.CLIP_L))
    return model


def reference_pixels(images, pad=False):
    """CLIP's preprocessing by hand: bicubic resize to 224, centre crop or black bars, normalise."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])  # of OpenAI's training pictures
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = []
    for image in images:
        height, width = image.shape[:2]
        scale = 224 / (max if pad else min)(height, width)
        size = (round(width * scale), round(height * scale))
        picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left = round((picture.width - 224) / 2)
        top = round((picture.height - 224) / 2)
        square = np.asarray(picture.crop((left, top, left + 224, top + 224)))  # pads with black
        pixels.append(((square / 255 - mean) / std).transpose(2, 0, 1))
    return torch.tensor(np.stack(pixels), dtype=torch.float32)


def reference_cosine(model, images, prompts, pad=False):
    image = model.visual(reference_pixels(images, pad)).double()
    text = model.encode_text(open_clip.SimpleTokenizer()(prompts)).double()
    return F.cosine_similarity(image, text).numpy()


def test_jpeg_size_is_that_of_a_file_on_disk(tmp_path):
    images = make_images(5, 64, 64)
    expected = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=95)
        expected.append(os.path.getsize(tmp_path / f"{i}.jpg") / 1000)
    assert len(set(expected)) > 1
    assert load_reward("incompress")(images, ["x"] * 5)[0].tolist() == expected
    np.testing.assert_array_equal(
        load_reward("compress")(images, ["x"] * 5)[0], -np.array(expected)
    )


def test_clip_agrees_with_a_straight_line_reference(clip_l):
    expected = 100 * reference_cosine(clip_l, make_images(4), PROMPTS)
    assert expected.std() > 1
    # a script passes MODEL/clip whether or not the model has one
    np.testing.assert_allclose(values_of("clip", clip_folder="no/folder"), expected, atol=2e-3)


def test_aesthetic_agrees_with_a_straight_line_reference(clip_l, monkeypatch):
    sizes = (768, 1024, 128, 64, 16, 1)
    x = clip_l.visual(reference_pixels(make_images(4))).double()
    x = x / x.norm(dim=1, keepdim=True)
    state = {}
    for i, name in enumerate((0, 2, 4, 6, 7)):  # LAION's head has no activations
        weight = torch.randn(sizes[i + 1], sizes[i]) * 2 / sizes[i] ** 0.5
        bias = torch.randn(sizes[i + 1]) / 10
        state |= {f"layers.{name}.weight": weight, f"layers.{name}.bias": bias}
        x = x @ weight.double().T + bias
    path = torch_hub_path(*rewards.LAION)
    torch.save(state, path)
    pin(monkeypatch, "LAION_SHA256", path)
    assert x.std() > 0.03
    np.testing.assert_allclose(values_of("aesthetic"), x[:, 0], atol=2e-4)


def test_hps_agrees_with_a_straight_line_reference(small_open_clip, monkeypatch):
    model = strong(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")))
    path = hub_path(*rewards.HPS)
    torch.save({"state_dict": model.half().state_dict()}, path)  # published in half precision
    pin(monkeypatch, "HPS_SHA256", path)
    expected = reference_cosine(model.float(), make_images(4), PROMPTS, pad=True)
    np.testing.assert_allclose(values_of("hps"), expected, atol=2e-5)


def test_pickscore_agrees_with_a_straight_line_reference(tmp_path, monkeypatch):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = size | {"patch_size": 56}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    strong(model).save_pretrained(tmp_path / "pickscore")
    monkeypatch.setattr(rewards, "PICKSCORE", str(tmp_path / "pickscore"))

    tokens = open_clip.SimpleTokenizer()(PROMPTS)
    states = model.text_model(tokens).last_hidden_state
    ends = [row.tolist().index(49407) for row in tokens]
    text = model.text_projection(states[torch.arange(4), ends])
    image = model.vision_model(reference_pixels(make_images(4))).pooler_output
    image = model.visual_projection(image)
    expected = model.logit_scale.exp() * F.cosine_similarity(image, text)
    np.testing.assert_allclose(values_of("pickscore"), expected, atol=1e-3)


def test_the_alignment_of_the_published_pictures_is_that_of_the_model_card():
    """The published sheet: 46 names in 4 columns, each 4 pictures of 64 px under a line of text."""
    card = (ROOT / "models/emoji/README.md").read_text()
    promised = re.search(r"ranks the right one of the 46 names first for ([\d.]+) %", card)
    sheet = np.asarray(Image.open(ROOT / "models/emoji/samples.png").convert("RGB"))
    images = []
    for k in range(46):
        for j in range(4):
            x, y = k % 4 * 264 + 64 * j, k // 4 * 78 + 13
            images.append(sheet[y : y + 64, x : x + 64])
    images = np.stack(images)
    prompts = np.repeat(NAMES, 4).tolist()
    align = load_alignment("compress", "cpu", CLIP)
    scores, is_top1 = align(images, prompts, [*NAMES, "cat"])
    assert (scores.shape, is_top1.dtype) == ((184,), bool)
    assert abs(100 * is_top1.mean() - float(promised[1])) < 1

    # the reward uses the same model; one picture at a time, a dog that should be a cat
    reward = load_reward("clip", clip_folder=CLIP)
    assert rewards.load_open_clip.cache_info().misses == 1
    for i in (0, 4, 183):
        single = reward(images[i : i + 1], prompts[i : i + 1])[0]
        np.testing.assert_allclose(single, scores[i], atol=1e-3)
    wrong, is_top1 = align(images[4:8], ["dog", "cat", "dog", "cat"], NAMES)
    assert is_top1.tolist() == [True, False, True, False]
    np.testing.assert_allclose(wrong[[0, 2]], scores[[4, 6]], atol=1e-3)
    assert align(images[4:8], ["cat"] * 4, ["cat", "bee"])[1].shape == (4,)  # other names


@pytest.mark.parametrize("spec", ["clip", "compress + aesthetic"])
def test_alignment_uses_the_clip_of_the_reward_and_never_downloads(spec, request):
    assert load_alignment(spec) is None  # a download would raise, offline
    request.getfixturevalue("clip_l")
    assert load_alignment("compress + moved_away.py:f") is None
    assert load_alignment(spec)(make_images(2), ["cat", "dog"], NAMES)[0].shape == (2,)


# ---- weights ----


@pytest.mark.parametrize("name", ["clip", "hps"])
def test_missing_weights_name_the_file_and_the_way(name):
    source, file = {"clip": rewards.CLIP_L, "hps": rewards.HPS}[name]
    message = f"{file} of {source} is not here and cannot be downloaded .*: use this reward on a"
    with pytest.raises(RewardError, match=message):
        load_reward(f"compress + {name}")


def test_a_download_from_a_url_is_made_once_and_checked(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a+b.pth").write_bytes(b"the head")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        path = rewards.fetch(url, "a+b.pth", hashlib.sha256(b"the head").hexdigest())
        server.shutdown()
    assert path.read_bytes() == b"the head"
    assert rewards.fetch(url, "a+b.pth") == path  # without the server
    with pytest.raises(RewardError, match="a.b.pth is damaged or another file: its sha256 is not"):
        rewards.fetch(url, "a+b.pth", rewards.LAION_SHA256)
    with pytest.raises(RewardError, match="c.pth of http.* is not here and cannot be downloaded"):
        rewards.fetch(url, "c.pth")


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def test_no_pickle_runs_code(small_open_clip, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTACK", str(tmp_path / "executed"))
    for name in ("LAION", "HPS"):
        path = {"LAION": torch_hub_path, "HPS": hub_path}[name](*getattr(rewards, name))
        torch.save({"state_dict": Attack()}, path)
        reward = {"LAION": "aesthetic", "HPS": "hps"}[name]
        with pytest.raises(RewardError, match=f"{re.escape(path.name)} is damaged or another file"):
            load_reward(reward)
        pin(monkeypatch, f"{name}_SHA256", path)  # and if such a file were the pinned one
        with pytest.raises(pickle.UnpicklingError):
            load_reward(reward)
    assert not (tmp_path / "executed").exists()


def test_a_clip_folder_without_safetensors_is_refused(tmp_path):
    config = Path(CLIP, "open_clip_config.json").read_text()
    write(tmp_path / "open_clip_config.json", config)
    with pytest.raises(RewardError, match="is not a CLIP folder: it has no open_clip_model"):
        load_reward("clip", clip_folder=str(tmp_path))


# ---- the text of --reward ----


@pytest.mark.parametrize(
    "spec, terms",
    [
        ("compress", [(1, "compress")]),
        ("-compress", [(-1, "compress")]),
        ("aesthetic+0.5*clip-hps", [(1, "aesthetic"), (0.5, "clip"), (-1, "hps")]),
        (" 2.*clip - 1e-3 * hps ", [(2, "clip"), (-1e-3, "hps")]),
        (".5*incompress + 1E+2*hps", [(0.5, "incompress"), (100, "hps")]),
        ("my rewards+more/r.py:f", [(1, "my rewards+more/r.py:f")]),
        ("0.5*my dir/r.py:f - compress", [(0.5, "my dir/r.py:f"), (-1, "compress")]),
        ("clip - a-b/r-2.py:f+g.py:h", [(1, "clip"), (-1, "a-b/r-2.py:f"), (1, "g.py:h")]),
        ("./clip-art/r.py:f", [(1, "./clip-art/r.py:f")]),
    ],
)
def test_what_a_sum_means(spec, terms):
    assert rewards.parse(spec) == terms


@pytest.mark.parametrize(
    "spec, rest",
    [
        ("beauty", "beauty"),
        ("", ""),
        ("compress +", ""),
        ("compress + + clip", "+ clip"),
        ("compress clip", "compress clip"),
        ("0.5 clip", "0.5 clip"),
        ("2 * 3 * clip", "2 * 3 * clip"),
        ("clip + missing.py", "missing.py"),
    ],
)
def test_a_sum_that_cannot_be_read(spec, rest):
    known = "it takes one of compress, incompress, aesthetic, clip, pickscore, hps, FILE.py:FUNC"
    with pytest.raises(RewardError, match=f"cannot read .*{re.escape(rest)}' in .*: {known}"):
        load_reward(spec)


def test_a_sum_equals_the_sum_of_its_parts(tmp_path):
    path = write(
        tmp_path / "my-file.py", "def mean(images, prompts): return images.mean((1, 2, 3))"
    )
    spec = f"incompress - 0.5*clip + 2e-1 * {path}:mean - clip"
    score = load_reward(spec, clip_folder=CLIP)
    assert score.names == ["incompress", "clip", "mean_3", "clip_4"]  # reward_mean is the script's
    assert score.label == "incompress-0.5clip+0.2mean-clip"
    assert score.files == [path]
    values, parts = score(make_images(4), PROMPTS)
    assert list(parts) == score.names
    sizes, cosines = values_of("incompress"), values_of("clip", clip_folder=CLIP)
    means = make_images(4).mean((1, 2, 3))
    for part, expected in zip(parts.values(), [sizes, cosines, means, cosines], strict=True):
        np.testing.assert_array_equal(part, expected)
    np.testing.assert_allclose(values, sizes - 1.5 * cosines + 0.2 * means, rtol=1e-12)


# ---- a user's own file ----

USER_FILE = """
from __future__ import annotations  # dataclasses then look for their module
from dataclasses import dataclass
import helper
import torch

def prompt_length(images, prompts):
    images[:] = 0  # its own copy
    lengths = [len(prompt) for prompt in prompts]
    prompts.clear()
    return lengths

@dataclass
class Red:
    scale: float = helper.ONE
    def __call__(self, images, prompts):
        import lazy_helper
        red = torch.tensor(images[..., 0]).double().mean((1, 2)) + lazy_helper.TWO
        return red * torch.tensor(self.scale, requires_grad=True)
"""


def test_a_users_function_class_and_modules_beside_it(tmp_path):
    path = write(tmp_path / "my rewards" / "user_file.py", USER_FILE)
    write(path.parent / "helper.py", "ONE = 1.0")
    write(path.parent / "lazy_helper.py", "TWO = 2")
    images = make_images(4)
    prompts = PROMPTS.copy()
    values, parts = load_reward(f"{path}:prompt_length + {path}:Red")(images, prompts)
    assert parts["prompt_length"].tolist() == [3, 5, 9, 19]
    expected = make_images(4)[..., 0].mean((1, 2)) + 2
    np.testing.assert_allclose(parts["Red"], expected, rtol=1e-12)
    np.testing.assert_array_equal(images, make_images(4))
    assert prompts == PROMPTS
    red = sys.modules["user_file"].Red(3.0)  # another process can import it by this name
    assert pickle.loads(pickle.dumps(red)) == red


def test_a_users_file_never_takes_the_name_of_another_module(tmp_path):
    text = "VALUE = {}\ndef f(images, prompts): return [VALUE] * len(images)"
    before = dict(sys.modules)
    assert "this" not in before  # a module of Python's
    names = ["a/json.py", "a/rewards.py", "a/this.py", "a/same.py", "b/same.py", "b/x.y.py"]
    for value, name in enumerate(names):
        path = write(tmp_path / name, text.format(value))
        assert values_of(f"{path}:f").tolist() == [value] * 4
        function = rewards.load_user_reward(path, "f")
        assert pickle.loads(pickle.dumps(function)) is function
    assert sys.modules["same"].VALUE == 3 and "this" not in sys.modules
    assert before.items() <= sys.modules.items()
    write(path, text.format("12345"))
    assert values_of(f"{path}:f").tolist() == [12345] * 4  # edited


@pytest.mark.parametrize("text, kind", [("x = 1\nx /= 0", ZeroDivisionError), ("x", NameError)])
def test_what_a_users_file_raises_keeps_its_traceback(text, kind, tmp_path):
    path = write(tmp_path / "broken.py", text)
    with pytest.raises(kind) as caught:
        load_reward(f"compress + {path}:f")
    assert caught.traceback[-1].path == path


MODES = """
import os, torch
def spoil():
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    torch.autocast("cpu").__enter__()
    torch.autocast("cpu").__enter__()
spoil()
def f(images, prompts):
    spoil()
    return [1.0 / len(images)] * len(images)
def fails(images, prompts):
    spoil()
    raise KeyError("x")
"""


def test_a_reward_leaves_torch_and_the_working_folder_as_they_were(tmp_path):
    def modes():
        depth = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        state = (torch.get_autocast_dtype("cpu"), torch.get_float32_matmul_precision())
        state += (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
        return (*state, depth, os.getcwd())

    path = write(tmp_path / "modes.py", MODES)
    before = modes()
    score = load_reward(f"{path}:f")
    assert modes() == before
    score(make_images(3), PROMPTS[:3])
    assert modes() == before
    with pytest.raises(RewardError):
        load_reward(f"{path}:fails")(make_images(3), PROMPTS[:3])
    assert modes() == before
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        inside = modes()
        score(make_images(3), PROMPTS[:3])
        assert modes() == inside
    assert modes() == before


POOL = """
import multiprocessing, os, signal, time
fork = multiprocessing.get_context("fork")
spawn = multiprocessing.get_context("spawn")

def brightness(image):
    time.sleep(0.01)
    return float(image.mean())

def stopped(images, prompts):
    child = fork.Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    return [0.0] * len(images)

def pooled(images, prompts):
    with fork.Pool(1, maxtasksperchild=1) as pool:  # its thread forks a worker for each task
        result = pool.map_async(brightness, images, chunksize=1)
        if prompts[0] == "interrupt":  # as a terminal does, and Slurm
            time.sleep(0.1)
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGUSR1)
        return result.get()

def spawned(images, prompts):
    with spawn.Pool(1) as pool:
        return pool.map(brightness, images)
"""
FORKS = """
import signal
import numpy as np
from rewards import load_reward

received = []
numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
for number in numbers:  # as the scripts do
    signal.signal(number, lambda number, frame: received.append(number))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

if __name__ == "__main__":
    images = np.full((2, 4, 4, 3), 7, dtype=np.uint8)
    for function, times in (("stopped", 100), ("pooled", 30), ("spawned", 1)):
        score = load_reward(f"pool_reward.py:{function}")
        for _ in range(times):
            rewards, _ = score(images, ["a", "b"])
    assert rewards.tolist() == [7, 7] and not received
    rewards, _ = load_reward("pool_reward.py:pooled")(images, ["interrupt", "b"])
    assert rewards.tolist() == [7, 7] and set(received) == {signal.SIGINT, signal.SIGUSR1}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGHUP}
"""


def test_a_reward_may_use_and_end_other_processes(tmp_path):
    write(tmp_path / "pool_reward.py", POOL)
    job = subprocess.Popen(
        [sys.executable, "-W", "ignore", write(tmp_path / "job.py", FORKS)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # of which the signals do not reach the tests
    )
    try:
        assert job.communicate(timeout=120)[1] == ""
    finally:
        subprocess.run(["pkill", "-KILL", "--session", str(job.pid)], check=False)
    assert job.returncode == 0


# ---- what bad input gets ----

MISBEHAVING = """
import numpy as np
import torch

def none(images, prompts): return None
def short(images, prompts): return np.zeros(len(images) - 1)
def column(images, prompts): return np.zeros((len(images), 1))
def words(images, prompts): return prompts
def fails(images, prompts): raise KeyError("too\\nmany")
def nan(images, prompts): return [float("nan") if p == "two foxes" else 1.0 for p in prompts]
def minus_inf(images, prompts): return torch.tensor([0, 0, 0, -torch.inf])
def large(images, prompts): return [1e9, 1e9 + 0.25, 1e9 + 0.5, 1e9]
def half(images, prompts): return torch.tensor([1.5, 2, 3, 4], dtype=torch.bfloat16)
"""


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "none",
            r"failed for 4 pictures from sample 0 \(prompt 'cat'\) on: .*shape \(\), not \(4,\)",
        ),
        ("short", r"failed .* returned shape \(3,\), not \(4,\)"),
        ("column", r"failed .* returned shape \(4, 1\), not \(4,\)"),
        ("words", r"failed .* on: ValueError"),
        ("fails", r"failed for 4 pictures from sample 0 \(prompt 'cat'\) on: KeyError.*too"),
        ("nan", r"is nan for sample 2 \(prompt 'two foxes'\)"),
        ("minus_inf", r"is -inf for sample 3 \(prompt 'a whale on the moon'\)"),
    ],
)
def test_a_reward_that_misbehaves(name, message, tmp_path):
    path = write(tmp_path / "misbehaving.py", MISBEHAVING)
    with pytest.raises(RewardError, match=f"^reward '{path}:{name}' {message}") as caught:
        load_reward(f"compress + {path}:{name}")(make_images(4), PROMPTS)
    if name == "fails":
        assert isinstance(caught.value.__cause__, KeyError)


def test_small_differences_of_large_rewards_stay(tmp_path):
    path = write(tmp_path / "misbehaving.py", MISBEHAVING)
    values, parts = load_reward(f"2*{path}:large + {path}:half")(make_images(4), PROMPTS)
    assert (values - 2e9).tolist() == [1.5, 2.5, 4, 4]
    assert (parts["large"] - 1e9).tolist() == [0, 0.25, 0.5, 0]


@pytest.mark.parametrize(
    "images, prompts",
    [
        (make_images(4) / 255, PROMPTS),
        (make_images(4).transpose(0, 3, 1, 2), PROMPTS),
        (make_images(4), PROMPTS[:3]),
    ],
)
def test_images_and_prompts_that_do_not_fit(images, prompts):
    with pytest.raises(RewardError, match=r"a reward takes uint8 \(N, H, W, 3\) and N prompts"):
        load_reward("compress")(images, prompts)


# ---- the command line ----


def command(*words):
    """Run `python rewards.py` as a user does."""
    words = [sys.executable, ROOT / "rewards.py", *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_the_table_of_scores(tmp_path):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    pictures = make_images(2, 64, 64)
    Image.fromarray(pictures[0]).save(files[0])
    Image.fromarray(pictures[1]).convert("RGBA").save(files[1])
    write(tmp_path / "r.py", "def length(images, prompts): return [len(p) for p in prompts]")
    spec = f"incompress - clip + 0*{tmp_path}/r.py:length"
    run = command("--reward", spec, "--clip-folder", CLIP, "--prompt", "a cat", *files)
    assert run.returncode == 0
    header, *rows = run.stdout.splitlines()
    assert header.split() == ["reward", "incompress", "clip", "length", "picture"]
    sizes = load_reward("incompress")(pictures, ["a cat"] * 2)[0]
    cosines = load_reward("clip", clip_folder=CLIP)(pictures, ["a cat"] * 2)[0]
    for i, row in enumerate(rows):
        *numbers, name = row.split()
        assert name == str(files[i])
        expected = [sizes[i] - cosines[i], sizes[i], cosines[i], 5]
        np.testing.assert_allclose([float(x) for x in numbers], expected, atol=2e-3)


def test_the_list_has_all_rewards():
    lines = command("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(rewards.REWARDS)
    assert "Minus" in lines[0] and "kB" in lines[0]


def test_what_the_command_refuses(tmp_path):
    grey = tmp_path / "grey.png"
    Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16)).save(grey)
    run = command(grey)
    message = f"rewards.py: {grey} has more than 8 bits per pixel and channel: convert it\n"
    assert (run.returncode, run.stderr) == (1, message)
    run = command("--reward", "clip", "--clip-folder", "no/folder", grey)
    assert run.returncode == 2 and "--clip-folder no/folder is not a folder" in run.stderr
