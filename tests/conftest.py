"""What the tests share: small random pipelines of Stable Diffusion's classes, and short runs."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# set before torch and huggingface_hub are imported
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for more

# the runs that tests start would inherit from nohup that these are ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

# Stable Diffusion's noise schedule
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TIMES = {"sample_s", "reward_s", "train_s", "images_per_s", "peak_mem_gb"}  # differ between runs


def make_pipeline(folder, sample_size=8, **scheduler_options):
    """Save a pipeline of 16 px pictures: random UNet and VAE, models/emoji's text encoder."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    vae = AutoencoderKL(
        latent_channels=4,
        scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        **blocks,
    )
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        cross_attention_dim=128,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )
    scheduler = DDIMScheduler(**(STABLE_DIFFUSION | scheduler_options))
    pipe = StableDiffusionPipeline.from_pretrained(
        ROOT / "models/emoji", vae=vae, unet=unet, scheduler=scheduler, safety_checker=None
    )
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Folder of a small epsilon model with Stable Diffusion's schedule."""
    return make_pipeline(tmp_path_factory.mktemp("tiny_sd"))


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory):
    """Folder of a small v_prediction model whose last step is deterministic (sigma = 0)."""
    options = {"prediction_type": "v_prediction", "set_alpha_to_one": True}
    return make_pipeline(tmp_path_factory.mktemp("tiny_sd_v"), **options)


@pytest.fixture
def brightness(tmp_path):
    """A user's reward, FILE.py:FUNCTION: the mean grey level, from 0 to 100."""
    path = tmp_path / "user_reward.py"
    path.write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3)) / 2.55\n")
    return f"{path}:brightness"


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory):
    """A file of four prompts: evaluation draws 9 pictures then, and 65 for the animals."""
    path = tmp_path_factory.mktemp("prompts") / "few.txt"
    path.write_text("cat\ndog\na red fox\nbee\n")
    return str(path)


def load_policy(script, model, **changes):
    """What the main of a script (a module) loads: args, pipe, unet, params, schedule."""
    options = {"device": "cpu", "precision": "fp32", "num_steps": 6, "micro_batch": 8} | changes
    args = script.Args(model=str(model), **options)
    pipe, params = script.load_model(args)
    schedule = script.make_schedule(pipe, args)
    return SimpleNamespace(args=args, pipe=pipe, unet=pipe.unet, params=params, schedule=schedule)


def run(script, out, model, **changes):
    """Run the main of a script (a module), for two short iterations. Returns the run folder."""
    small = {"num_samples": 4, "num_steps": 5, "iterations": 2, "save_every": 2, "device": "cpu"}
    return script.main(script.Args(out=str(out), model=str(model), **(small | changes)))


def command(*words, cwd=ROOT, timeout=300):
    """Run Python with these words, as a user does: `.returncode`, `.stdout`, `.stderr`."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def read_metrics(folder):
    """metrics.csv of a run as a list of {column: float}, blank cells left out."""
    with open(Path(folder, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def without_times(folder):
    """The rows of metrics.csv without the columns in which two equal runs differ."""
    rows = read_metrics(folder)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def read_args(folder):
    return json.loads(Path(folder, "args.json").read_text())
