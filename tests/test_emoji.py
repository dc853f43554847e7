"""The embedded model: what is in its folder, and what it draws."""

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from test_pretrain import EMOJI, pretrain

import ddpo_is


def test_the_folder_is_small_and_its_weights_are_float16():
    files = [path for path in EMOJI.rglob("*.*") if path.suffix != ".pyc"]
    kinds = {".json", ".txt", ".safetensors", ".png", ".md", ".py"}
    assert {path.suffix for path in files} <= kinds
    assert sum(path.stat().st_size for path in files) < 15e6
    for path in EMOJI.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}
        assert dtypes - {torch.int64} == {torch.float16}, path


def test_the_card_names_the_sources():
    card = (EMOJI / "README.md").read_text()
    for emoji_set, version in pretrain.EMOJI_SETS.items():
        assert f"| @iconify-json/{emoji_set} | {version} | " in card


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_its_names_are_the_prompts_of_the_scripts_and_one_token_each(pipe):
    assert set(pretrain.NAMES) == {*ddpo_is.load_prompts("animals"), "elephant"}
    for name in pretrain.NAMES:
        assert len(pipe.tokenizer(name).input_ids) == 3  # start, the animal, end


def test_it_draws_what_its_clip_recognises(pipe):
    """Chance is 2 %. Two seeds of a name do not draw the same picture."""
    generators = [torch.Generator().manual_seed(i) for i in range(92)]
    prompts = np.repeat(pretrain.NAMES, 2).tolist()
    options = {"num_inference_steps": 20, "guidance_scale": 5.0, "eta": 1.0, "output_type": "pt"}
    pictures = pipe(prompts, generator=generators, **options).images  # (92, 3, 64, 64)

    name = f"local-dir:{EMOJI / 'clip'}"
    clip = open_clip.create_model(name).eval()
    tokens = open_clip.get_tokenizer(name)(pretrain.NAMES)
    with torch.no_grad():
        scores = clip.encode_image(2 * pictures - 1, normalize=True) @ clip.encode_text(tokens).T
    right = scores.argmax(1) == torch.arange(46).repeat_interleave(2)
    assert right.float().mean() > 0.9
    difference = pictures[::2] - pictures[1::2]
    assert difference.abs().mean((1, 2, 3)).min() > 0.03  # 8 grey levels of 255
