"""Small randomly initialised pipelines of Stable Diffusion's classes, and a brightness reward from a user's file."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: nothing may wait for a network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def make_pipeline(folder, **scheduler_options):
    """A Stable Diffusion pipeline of 16 px pictures, 8 x 8 latents and 0.2 M weights, saved under `folder`."""
    torch.manual_seed(0)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(b + "</w>" for b in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = CLIPTextConfig(vocab_size=514, max_position_embeddings=16, bos_token_id=512, eos_token_id=513, **size)
    channels = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    vae_blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    unet_blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    schedule |= dict(set_alpha_to_one=False, steps_offset=1) | scheduler_options
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(latent_channels=4, scaling_factor=0.3, **channels, **vae_blocks),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8, cross_attention_dim=16, attention_head_dim=2, **channels, **unet_blocks
        ),
        scheduler=DDIMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
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
    options = dict(prediction_type="v_prediction", set_alpha_to_one=True, steps_offset=0)
    return make_pipeline(tmp_path_factory.mktemp("tiny_sd_v"), **options)


@pytest.fixture
def brightness(tmp_path):
    """A user's reward, file.py:function: the mean grey level from 0 to 100."""
    path = tmp_path / "user_reward.py"
    path.write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3)) / 2.55\n")
    return f"{path}:brightness"


def embed(pipe, prompts):
    """Text embeddings (2, N, L, D) of N empty prompts and of the prompts, one prompt at a time."""
    encode = lambda prompt: pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()
    return torch.stack([torch.cat([encode("")] * len(prompts)), torch.cat([encode(prompt) for prompt in prompts])])


def read_metrics(run):
    """metrics.csv as a list of {column: float}, blank cells left out."""
    import csv

    with open(Path(run) / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def read_args(run):
    return json.loads((Path(run) / "args.json").read_text())
