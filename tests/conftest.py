"""What the tests share: small random pipelines of Stable Diffusion's classes, and short runs."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# All of this must be set before torch and huggingface_hub are imported.
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for more

# Under nohup, or in the background of a shell script, processes start with these ignored; the
# scripts respect that, and so would the runs that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# Stable Diffusion's noise schedule
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_TERMINAL_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
# A run of two short iterations; see `run`.
SMALL = {
    "num_samples": 4,
    "num_steps": 5,
    "iterations": 2,
    "save_every": 2,
    "device": "cpu",
}
# The columns of metrics.csv that differ between two runs of one seed.
TIMES = {"sample_s", "reward_s", "train_s", "images_per_s", "peak_mem_gb"}


def make_pipeline(folder, sample_size=8, **scheduler_options):
    """Save a Stable Diffusion pipeline of 16 px pictures, with 65 thousand weights in its UNet."""
    torch.manual_seed(0)
    alphabet = sorted(ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in alphabet]
    tokens = [*alphabet, *endings, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    text_config = CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        max_position_embeddings=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        scaling_factor=0.3,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    text_encoder = CLIPTextModel(text_config)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        cross_attention_dim=16,
        attention_head_dim=2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16),
        unet=unet,
        scheduler=DDIMScheduler(**(STABLE_DIFFUSION | scheduler_options)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    # as asked for: the pipeline has set steps_offset to 1 and clip_sample to False
    scheduler = DDIMScheduler(**(STABLE_DIFFUSION | scheduler_options))
    scheduler.save_pretrained(Path(folder, "scheduler"))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Folder of a small epsilon model with Stable Diffusion's schedule."""
    return make_pipeline(tmp_path_factory.mktemp("tiny_sd"))


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory):
    """Folder of a small v_prediction model whose last step is deterministic (sigma = 0)."""
    return make_pipeline(
        tmp_path_factory.mktemp("tiny_sd_v"),
        prediction_type="v_prediction",
        set_alpha_to_one=True,
        steps_offset=0,
    )


@pytest.fixture(scope="session")
def tiny_sd_zero_snr(tmp_path_factory):
    """Folder of a small v_prediction model that starts from pure noise (abar = 0)."""
    return make_pipeline(tmp_path_factory.mktemp("tiny_sd_zero_snr"), **ZERO_TERMINAL_SNR)


@pytest.fixture(scope="session")
def tiny_sd_rectangle(tmp_path_factory):
    """Folder of a small epsilon model with latents of 8 x 12, pictures of 16 x 24."""
    return make_pipeline(tmp_path_factory.mktemp("tiny_sd_rectangle"), sample_size=[8, 12])


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
    options = {"device": "cpu", "lora_rank": 0, "num_steps": 6, "micro_batch": 8} | changes
    args = script.Args(model=str(model), **options)
    script.check_args(args)
    scheduler, latent_shape = script.check_model(args)
    pipe, params = script.load_model(args)
    pipe.set_progress_bar_config(disable=True)
    return SimpleNamespace(
        args=args,
        pipe=pipe,
        unet=pipe.unet,
        params=params,
        schedule=script.make_schedule(scheduler, args.num_steps, args.device),
        latent_shape=latent_shape,
    )


def run(script, out, model, **changes):
    """Run the main of a script (a module) with the options of SMALL. Returns the run folder."""
    options = SMALL | {"out": str(out), "model": str(model)} | changes
    return script.main(script.Args(**options))


def command(*words, cwd=ROOT, timeout=300):
    """Run Python with these words, as a user does: `.returncode`, `.stdout`, `.stderr`."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def embed(pipe, prompts):
    """Text embeddings (2, N, L, D) of N empty prompts and of the prompts, one by one."""

    def encode(prompt):
        prompt_embeds, _ = pipe.encode_prompt(
            prompt, "cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return prompt_embeds.detach()

    negative_prompt_embeds = torch.cat([encode("") for _ in prompts])
    prompt_embeds = torch.cat([encode(prompt) for prompt in prompts])
    return torch.stack([negative_prompt_embeds, prompt_embeds])


def read_metrics(run_folder):
    """metrics.csv as a list of {column: float}, blank cells left out."""
    rows = []
    with open(Path(run_folder) / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            rows.append({name: float(value) for name, value in row.items() if value})
    return rows


def without_times(run_folder):
    """The rows of metrics.csv without the columns in which two equal runs differ."""
    rows = []
    for row in read_metrics(run_folder):
        rows.append({name: value for name, value in row.items() if name not in TIMES})
    return rows


def read_args(run_folder):
    return json.loads((Path(run_folder) / "args.json").read_text())
