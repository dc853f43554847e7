"""The embedded model: what it is, what it draws, and that every script learns on it."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

import ddpo_is
import pretrain

EMOJI = ROOT / "models/emoji"


# the folder


def list_files():
    return [path for path in EMOJI.rglob("*") if path.is_file()]


def test_the_folder_is_small():
    sizes = {path: path.stat().st_size for path in list_files()}
    assert sum(sizes.values()) < 20e6
    assert sum(size for path, size in sizes.items() if "clip" in path.parts) < 5e6


def test_weights_are_float16_in_safetensors():
    suffixes = {path.suffix for path in list_files()}
    assert suffixes <= {".json", ".txt", ".safetensors", ".png", ".md"}
    for path in EMOJI.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}
        assert dtypes - {torch.int64} == {torch.float16}, path


def test_the_card_lists_every_file():
    card = (EMOJI / "README.md").read_text()
    for path in list_files():
        if path.name != "README.md":
            assert f"| {path.relative_to(EMOJI)} | {path.stat().st_size:,} |" in card


def test_it_has_stable_diffusions_schedule():
    config = DDIMScheduler.from_pretrained(EMOJI / "scheduler").config
    assert config.beta_schedule == "scaled_linear"
    assert config.beta_start == 0.00085
    assert config.beta_end == 0.012
    assert config.num_train_timesteps == 1000
    assert config.prediction_type == "epsilon"
    assert config.steps_offset == 1
    assert not config.set_alpha_to_one


def test_its_names_are_the_prompts_of_the_scripts():
    assert set(pretrain.NAMES) == {*ddpo_is.ANIMALS.split(), "elephant"}


def test_every_animal_is_one_token():
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    for name in pretrain.NAMES:
        assert len(tokenizer(name).input_ids) == 3  # start, the animal, end


def test_the_tokenizer_has_the_files_of_older_transformers():
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    vocab = json.loads((EMOJI / "tokenizer/vocab.json").read_text())
    assert vocab == tokenizer.get_vocab()

    # CLIP's order: 512 bytes, the merges, start and end
    merges = (EMOJI / "tokenizer/merges.txt").read_text().splitlines()[1:]
    assert len(vocab) == 512 + len(merges) + 2
    for i, pair in enumerate(merges):
        assert vocab[pair.replace(" ", "")] == 512 + i


# loading and drawing


def test_it_loads_and_draws_without_any_option():
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe("cat", num_inference_steps=2).images[0].size == (64, 64)


def test_its_parts_load_without_a_notice(caplog):
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_warning()
    AutoencoderTiny.from_pretrained(EMOJI / "vae")
    UNet2DConditionModel.from_pretrained(EMOJI / "unet")
    CLIPTextModel.from_pretrained(EMOJI / "text_encoder")
    diffusers.utils.logging.set_verbosity(verbosity)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.fixture(scope="module")
def pictures():
    """Two pictures of each of the 46 names, 25 steps: uint8 (92, 64, 64, 3)."""
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    pipe.set_progress_bar_config(disable=True)
    chunks = []
    for seed in (0, 1):
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(46)]
        result = pipe(
            pretrain.NAMES,
            num_inference_steps=25,
            guidance_scale=5.0,
            eta=1.0,
            generator=generators,
            output_type="np",
        )
        chunks.append(result.images)
    return (np.concatenate(chunks) * 255).round().astype(np.uint8)


def test_its_clip_recognises_what_it_draws(pictures):
    """Chance is 2 %; the card has the rate at 50 steps."""
    ranks = pretrain.clip_ranks(EMOJI / "clip", pictures, pretrain.NAMES * 2)
    assert (ranks == 0).mean() > 0.9


def test_its_clip_recognises_the_samples_that_are_shown():
    """samples.png, where make_sheet put them: four of each name, at least three of them right."""
    sheet = np.asarray(Image.open(EMOJI / "samples.png").convert("RGB"))
    shown = []
    for k in range(46):
        x, y = k % 4 * (256 + 8), k // 4 * 78 + 13
        shown += np.split(sheet[y : y + 64, x : x + 256], 4, axis=1)
    assert np.array_equal(np.asarray(pretrain.make_sheet(np.stack(shown))), sheet)

    names = np.repeat(pretrain.NAMES, 4)
    right = pretrain.clip_ranks(EMOJI / "clip", np.stack(shown), names) == 0
    assert right.mean() >= 0.97
    assert right.reshape(46, 4).sum(1).min() >= 3


def test_two_seeds_of_a_name_differ(pictures):
    first, second = np.split(pictures.astype(float), 2)
    assert (np.abs(first - second).mean((1, 2, 3)) > 8).all()  # grey levels of 255
