"""rewards.py: values against straight-line references, sums, users' files, and bad input.

The references run on small random weights: nothing is downloaded.
"""

import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image, ImageOps
from safetensors.torch import save_file
from test_pretrain import pretrain
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import rewards
from rewards import RewardError, load_metrics, load_reward

ROOT = Path(rewards.__file__).resolve().parent
CLIP = str(ROOT / "models/emoji/clip")
PROMPTS = ["cat", "a dog", "two foxes", "a whale on the moon"]


@pytest.fixture(autouse=True)
def no_weights_and_no_network(monkeypatch, tmp_path):
    """Whatever this machine has downloaded before, the caches are empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    rewards.load_open_clip.cache_clear()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_images():
    """Four smooth random RGB pictures, uint8 (4, 128, 64, 3): resizing is not all rounding."""
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((64, 128))) for x in small])


def values_of(spec, **options):
    return load_reward(spec, **options)(make_images(), PROMPTS)[0]


def cached(source, file):
    """Where the cache of the Hugging Face hub, or that of torch, has a file."""
    if source.startswith("http"):
        return write(Path(torch.hub.get_dir(), "checkpoints", file), "")
    folder = Path(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}")
    write(folder / "refs" / "main", "0" * 40)
    return write(folder / "snapshots" / ("0" * 40) / file, "")


def save_pinned(monkeypatch, name, weights):
    """Save weights in their cache, and make this content the pinned one."""
    path = cached(*getattr(rewards, name))
    torch.save(weights, path)
    monkeypatch.setattr(rewards, f"{name}_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


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
    save_file(model.state_dict(), cached(*rewards.CLIP_L))
    return model


def reference_pixels(images, pad=False):
    pictures = [Image.fromarray(image) for image in images]
    if pad:  # to a square, with black
        pictures = [ImageOps.pad(picture, (224, 224)) for picture in pictures]
    return CLIPImageProcessorPil()(pictures, return_tensors="pt").pixel_values


def reference_cosine(model, pad=False):
    image = model.visual(reference_pixels(make_images(), pad)).double()
    text = model.encode_text(open_clip.SimpleTokenizer()(PROMPTS)).double()
    return F.cosine_similarity(image, text).numpy()


def test_jpeg_size_is_that_of_a_file_on_disk(tmp_path):
    expected = []
    for image in make_images():
        Image.fromarray(image).save(tmp_path / "a.jpg", quality=95)
        expected.append(os.path.getsize(tmp_path / "a.jpg") / 1000)
    assert len(set(expected)) > 1
    assert values_of("incompress").tolist() == expected
    assert values_of("compress").tolist() == [-x for x in expected]


def test_clip_agrees_with_a_straight_line_reference(clip_l):
    expected = 100 * reference_cosine(clip_l)
    assert expected.std() > 1
    # a script passes MODEL/clip whether or not the model has one
    np.testing.assert_allclose(values_of("clip", clip_folder="no/folder"), expected, atol=2e-3)


def test_aesthetic_agrees_with_a_straight_line_reference(clip_l, monkeypatch):
    sizes = (768, 1024, 128, 64, 16, 1)
    x = clip_l.visual(reference_pixels(make_images())).double()
    x = x / x.norm(dim=1, keepdim=True)
    state = {}
    for i, name in enumerate((0, 2, 4, 6, 7)):  # LAION's head has no activations
        weight = torch.randn(sizes[i + 1], sizes[i]) * 2 / sizes[i] ** 0.5
        bias = torch.randn(sizes[i + 1]) / 10
        state |= {f"layers.{name}.weight": weight, f"layers.{name}.bias": bias}
        x = x @ weight.double().T + bias
    save_pinned(monkeypatch, "LAION", state)
    assert x.std() > 0.03
    np.testing.assert_allclose(values_of("aesthetic"), x[:, 0], atol=2e-4)


def test_hps_agrees_with_a_straight_line_reference(small_open_clip, monkeypatch):
    model = strong(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")))
    # published in half precision
    save_pinned(monkeypatch, "HPS", {"state_dict": model.half().state_dict()})
    expected = reference_cosine(model.float(), pad=True)
    np.testing.assert_allclose(values_of("hps"), expected, atol=2e-5)


def test_pickscore_agrees_with_a_straight_line_reference(tmp_path, monkeypatch):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "eos_token_id": 49407}  # of SimpleTokenizer
    config = CLIPConfig(text_config=size, vision_config=size | {"patch_size": 56})
    torch.manual_seed(0)
    model = strong(CLIPModel(config))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(rewards, "PICKSCORE", tmp_path)

    tokens = open_clip.SimpleTokenizer()(PROMPTS)
    pixels = reference_pixels(make_images())
    expected = [model(tokens[i : i + 1], pixels[i : i + 1]).logits_per_image for i in range(4)]
    np.testing.assert_allclose(values_of("pickscore"), torch.cat(expected)[:, 0], atol=1e-3)


def test_the_clip_metrics_of_the_published_pictures_are_those_of_the_model_card():
    """The published sheet: 46 names in 4 columns, each 4 pictures of 64 px under a line of text."""
    card = (ROOT / "models/emoji/README.md").read_text()
    promised = re.search(r"ranks the right one of the 46 names first for ([\d.]+) %", card)
    sheet = np.asarray(Image.open(ROOT / "models/emoji/samples.png").convert("RGB"))
    images = []
    for i in range(184):
        x, y = i // 4 % 4 * 264 + i % 4 * 64, i // 16 * 78 + 13
        images.append(sheet[y : y + 64, x : x + 64])
    images = np.stack(images)
    prompts = np.repeat(pretrain.NAMES, 4).tolist()
    scores = load_reward("clip", clip_folder=CLIP)(images, prompts)[0]
    measure = load_metrics("compress", "cpu", CLIP)
    metrics = measure(scores, images, prompts, pretrain.NAMES)
    assert rewards.load_open_clip.cache_info().misses == 1
    assert abs(100 * metrics["eval_top1"] - float(promised[1])) < 1
    np.testing.assert_allclose(metrics["eval_align"], scores.mean(), rtol=1e-5)

    # dogs that should be cats, and other names than before, of which one is there twice
    wrong = measure(scores[:4], images[4:8], ["dog", "cat", "dog", "dog"], pretrain.NAMES)
    assert wrong["eval_top1"] == 0.75
    names = ["bee", "dog", "cat", "cat"]
    wrong = measure(scores[:4], images[2:6], ["cat", "cat", "cat", "dog"], names)
    assert wrong["eval_top1"] == 0.75


def test_metrics_use_the_clip_of_the_reward_and_never_download(request):
    images, values = make_images(), np.array([1, 2, 3, 6.0])
    without = load_metrics("clip")(values, images, PROMPTS, PROMPTS)  # a download would raise
    distances = [np.linalg.norm(images[i] / 255 - images[i + 2] / 255) for i in (0, 1)]
    diversity = np.mean(distances) / (128 * 64 * 3) ** 0.5
    expected = {"eval_reward": 3, "eval_reward_se": (7 / 6) ** 0.5, "eval_diversity": diversity}
    assert without == pytest.approx(expected)
    request.getfixturevalue("clip_l")
    assert load_metrics("compress + moved_away.py:f")(values, images, PROMPTS, PROMPTS) == without
    for spec in ("clip", "compress + aesthetic"):
        metrics = load_metrics(spec)(values, images, PROMPTS, PROMPTS)
        np.testing.assert_allclose(metrics["eval_align"], values_of("clip").mean(), rtol=1e-5)


def test_a_download_is_made_once_and_checked(tmp_path, monkeypatch):
    write(tmp_path / "a+b.pth", "the head")
    monkeypatch.chdir(tmp_path)
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        path = rewards.fetch(url, "a+b.pth", hashlib.sha256(b"the head").hexdigest())
        server.shutdown()
    assert path.read_text() == "the head"
    assert rewards.fetch(url, "a+b.pth") == path  # without the server
    for source, file in ((url, "c.pth"), rewards.CLIP_L, rewards.HPS):
        with pytest.raises(RewardError, match=f"{file} of {source} is not here and cannot be down"):
            rewards.fetch(source, file)


@pytest.mark.parametrize("name, reward", [("LAION", "aesthetic"), ("HPS", "hps")])
def test_a_pickle_of_other_content_or_with_code_is_refused(
    name, reward, small_open_clip, monkeypatch
):
    cached(*getattr(rewards, name))  # an empty file
    with pytest.raises(RewardError, match=f"{re.escape(getattr(rewards, name)[1])} is damaged or"):
        load_reward(reward)
    save_pinned(monkeypatch, name, {"state_dict": os.system})
    with pytest.raises(pickle.UnpicklingError):
        load_reward(reward)


def test_a_clip_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(RewardError, match="is not a CLIP folder: it has no open_clip_model"):
        load_reward("clip", clip_folder=str(tmp_path))


SUMS = {
    "-compress": [(-1, "compress")],
    "aesthetic+0.5*clip-hps": [(1, "aesthetic"), (0.5, "clip"), (-1, "hps")],
    " 2.*clip - 1e-3 * hps ": [(2, "clip"), (-1e-3, "hps")],
    ".5*incompress + 1E+2*hps": [(0.5, "incompress"), (100, "hps")],
    "clip - a-b/r-2.py:f+g h.py:i": [(1, "clip"), (-1, "a-b/r-2.py:f"), (1, "g h.py:i")],
    "0.5*./clip-art/r.py:f - hps": [(0.5, "./clip-art/r.py:f"), (-1, "hps")],
}


def test_what_a_sum_means():
    for spec, terms in SUMS.items():
        assert rewards.parse(spec) == terms
    for spec in ("", "beauty", "hps +", "+ + hps", "hps clip", "0.5 clip", "2*3*hps", "missing.py"):
        with pytest.raises(RewardError, match="cannot read .* it takes one of compress"):
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
    values, parts = score(make_images(), PROMPTS)
    assert list(parts) == score.names
    size, cosine, mean, _ = parts.values()
    np.testing.assert_array_equal(size, values_of("incompress"))
    np.testing.assert_array_equal(cosine, values_of("clip", clip_folder=CLIP))
    np.testing.assert_array_equal(mean, make_images().mean((1, 2, 3)))
    np.testing.assert_array_equal(parts["clip_4"], cosine)
    np.testing.assert_allclose(values, size - 1.5 * cosine + 0.2 * mean, rtol=1e-12)


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
    images = make_images()
    prompts = PROMPTS.copy()
    values, parts = load_reward(f"{path}:prompt_length + {path}:Red")(images, prompts)
    assert parts["prompt_length"].tolist() == [3, 5, 9, 19]
    expected = make_images()[..., 0].mean((1, 2)) + 2
    np.testing.assert_allclose(parts["Red"], expected, rtol=1e-12)
    np.testing.assert_array_equal(images, make_images())
    assert prompts == PROMPTS
    assert type(rewards.load_user_reward(path, "Red")) is sys.modules["user_file"].Red
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
    rewards.load_user_reward(ROOT / "rewards.py", "parse")
    assert sys.modules["same"].VALUE == 3 and "this" not in sys.modules
    assert before.items() <= sys.modules.items()
    write(path, text.format("12345"))  # edited
    assert values_of(f"{path}:f").tolist() == [12345] * 4


MODES = """
import os, torch
def spoil(images, prompts):
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    torch.autocast("cpu").__enter__()
    torch.autocast("cpu").__enter__()
    return [1.0 / len(prompt) for prompt in prompts]
spoil([], [])
"""


def modes():
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    autocast = (depth, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
    return (*autocast, torch.get_default_dtype(), torch.get_float32_matmul_precision(), os.getcwd())


def test_a_reward_leaves_torch_and_the_working_folder_as_they_were(tmp_path):
    before = modes()
    score = load_reward(f"{write(tmp_path / 'modes.py', MODES)}:spoil")
    assert modes() == before
    score(make_images(), PROMPTS)
    assert modes() == before
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        score(make_images(), [""] * 4)
    assert modes() == before
    with torch.no_grad(), torch.autocast("cpu"):
        before = modes()
        score(make_images(), PROMPTS)
        assert modes() == before


POOL = """
import multiprocessing, os, signal, time
fork = multiprocessing.get_context("fork")
spawn = multiprocessing.get_context("spawn")

def brightness(image):
    return float(image.mean())

def interrupted(image):  # as by a terminal, and by Slurm
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGUSR1)
    return float(image.mean())

def stopped(images, prompts):
    child = fork.Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    return [0.0] * len(images)

def pooled(images, prompts):
    with fork.Pool(1, maxtasksperchild=1) as pool:  # its thread forks a worker for each task
        return pool.map(interrupted if prompts[0] == "interrupt" else brightness, images, 1)

def spawned(images, prompts):
    with spawn.Pool(1) as pool:
        return pool.map(brightness, images)
"""
FORKS = """
import signal
import numpy as np
from rewards import load_reward

if __name__ == "__main__":
    received = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # as the scripts do
        signal.signal(number, lambda number, frame: received.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    images = np.full((2, 4, 4, 3), 7, dtype=np.uint8)
    for function, times in (("stopped", 50), ("pooled", 30), ("spawned", 1)):
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
    job = subprocess.run(
        [sys.executable, "-W", "ignore", write(tmp_path / "job.py", FORKS)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        start_new_session=True,  # of which the signals do not reach the tests
    )
    assert (job.returncode, job.stderr) == (0, b"")


MISBEHAVING = """
import numpy as np
import torch

def none(images, prompts): return None
def short(images, prompts): return np.zeros(len(images) - 1)
def column(images, prompts): return np.zeros((len(images), 1))
def fails(images, prompts): raise KeyError("too many")
def nan(images, prompts): return [float("nan") if p == "two foxes" else 1.0 for p in prompts]
def minus_inf(images, prompts): return torch.tensor([0, 0, 0, -torch.inf])
def large(images, prompts): return [1e9, 1e9 + 0.25, 1e9 + 0.5, 1e9]
def half(images, prompts): return torch.tensor([1.5, 2, 3, 4], dtype=torch.bfloat16)
"""
MESSAGES = {
    "none": r"failed for 4 pictures from sample 0 \(prompt 'cat'\) on: .*shape \(\), not \(4,\)",
    "short": r"failed .* returned shape \(3,\), not \(4,\)",
    "column": r"failed .* returned shape \(4, 1\), not \(4,\)",
    "fails": r"failed for 4 pictures from sample 0 \(prompt 'cat'\) on: KeyError\('too many'\)",
    "nan": r"is nan for sample 2 \(prompt 'two foxes'\)",
    "minus_inf": r"is -inf for sample 3 \(prompt 'a whale on the moon'\)",
}


def test_what_does_not_fit_is_refused(tmp_path):
    images = make_images()
    for bad in (images / 255, images.transpose(0, 3, 1, 2), images[:3]):
        with pytest.raises(RewardError, match=r"takes uint8 \(N, H, W, 3\) and N prompts"):
            load_reward("compress")(bad, PROMPTS)
    path = write(tmp_path / "misbehaving.py", MISBEHAVING)
    for name, message in MESSAGES.items():
        with pytest.raises(RewardError, match=f"^reward '{path}:{name}' {message}") as caught:
            values_of(f"compress + {path}:{name}")
        assert isinstance(caught.value.__cause__, KeyError) == (name == "fails")


def test_small_differences_of_large_rewards_stay(tmp_path):
    path = write(tmp_path / "misbehaving.py", MISBEHAVING)
    values, parts = load_reward(f"2*{path}:large + {path}:half")(make_images(), PROMPTS)
    assert (values - 2e9).tolist() == [1.5, 2.5, 4, 4]
    assert (parts["large"] - 1e9).tolist() == [0, 0.25, 0.5, 0]


def command(*words):
    words = [sys.executable, ROOT / "rewards.py", *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(make_images()[0]).convert("RGBA").save(file)
    run = command("--reward=incompress - clip", "--clip-folder", CLIP, "--prompt", "cat", file)
    header, row = run.stdout.splitlines()
    assert header.split() == ["reward", "incompress", "clip", "picture"]
    *numbers, name = row.split()
    assert name == str(file)
    size, cosine = values_of("incompress")[0], values_of("clip", clip_folder=CLIP)[0]
    expected = [size - cosine, size, cosine]
    np.testing.assert_allclose([float(x) for x in numbers], expected, atol=2e-3)

    lines = command("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(rewards.REWARDS)
    assert "Minus the size" in lines[0] and "kB" in lines[0]

    Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16)).save(file)
    run = command(file)
    message = f"rewards.py: {file} has more than 8 bits per pixel and channel: convert it\n"
    assert (run.returncode, run.stderr) == (1, message)
    run = command("--reward", "clip", "--clip-folder", "no/folder", file)
    assert run.returncode == 2 and "--clip-folder no/folder is not a folder" in run.stderr
