"""The embedded model: what it is, what it draws, and that ddpo_is.py learns on it."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, embed, read_metrics
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rewards
import rwr
import rwr_sparse

EMOJI = ROOT / "models/emoji"
NAMES = [*ddpo_is.ANIMALS, "elephant"]


def test_the_folder_is_small_float16_and_safetensors_only():
    files = [p for p in EMOJI.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    assert sum(p.stat().st_size for p in files if "clip" in p.parts) < 5e6
    assert {p.suffix for p in files} <= {".json", ".txt", ".safetensors", ".png", ".md"}
    for path in EMOJI.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(k).dtype for k in file.keys()}
        assert kinds - {torch.int64} == {torch.float16}, path
    listed = (EMOJI / "README.md").read_text()
    for path in files:
        if path.name != "README.md":
            assert f"| {path.relative_to(EMOJI)} | {path.stat().st_size:,} |" in listed, path


def test_it_loads_and_draws_without_any_option():
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe("cat", num_inference_steps=2).images[0].size == (64, 64)


def test_it_has_stable_diffusions_schedule():
    config = DDIMScheduler.from_pretrained(EMOJI, subfolder="scheduler").config
    expected = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    expected |= dict(prediction_type="epsilon", set_alpha_to_one=False, steps_offset=1)
    assert {k: config[k] for k in expected} == expected


def test_every_animal_is_one_token_and_older_transformers_find_their_files():
    tokenizer = StableDiffusionPipeline.from_pretrained(EMOJI, safety_checker=None).tokenizer
    assert all(len(tokenizer(name).input_ids) == 3 for name in NAMES)  # start, the animal, end
    vocab = json.loads((EMOJI / "tokenizer/vocab.json").read_text())
    merges = (EMOJI / "tokenizer/merges.txt").read_text().splitlines()[1:]
    assert vocab == tokenizer.get_vocab() and len(vocab) == 512 + len(merges) + 2
    assert [vocab["".join(pair.split(" "))] for pair in merges] == list(range(512, 512 + len(merges)))


@pytest.fixture(scope="module")
def pictures():
    """92 pictures, two of each animal, by the script's own sampler at T = 25: uint8 (92, 64, 64, 3)."""
    args = ddpo_is.Args(model=str(EMOJI), device="cpu", precision="fp32", lora_rank=0, num_steps=25, micro_batch=64)
    pipe, _ = ddpo_is.load_model(args)
    schedule = ddpo_is.make_schedule(DDIMScheduler.from_config(pipe.scheduler.config), 25, "cpu")
    shape = (26, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = torch.stack([torch.randn(shape, generator=ddpo_is.make_generator(9, 9, i, 9)) for i in range(92)])
    embeds = embed(pipe, NAMES * 2)
    latents, _ = ddpo_is.sample_trajectories(pipe.unet, embeds, noise, schedule, args)
    return ddpo_is.decode(pipe.vae, latents[:, -1])


def test_its_clip_recognises_what_it_draws(pictures):
    """The right one of 46 names first for two pictures in three; chance is 2 %, the card has the rate at T = 50."""
    clip = rewards.REWARDS["clip"]("cpu", str(EMOJI / "clip"))
    scores = np.stack([clip(pictures, [name] * 92) for name in NAMES], 1)  # (92, 46)
    assert (scores.argmax(1) == np.tile(np.arange(46), 2)).mean() > 2 / 3


def test_two_seeds_of_a_prompt_differ(pictures):
    first, second = np.split(pictures.astype(float), 2)
    assert (np.abs(first - second).mean((1, 2, 3)) > 8).all()  # grey levels of 255


@pytest.mark.parametrize(
    "script, flags",
    [
        (ddpo_is, dict(iterations=30)),
        (ddpo_sf, dict(num_updates=1)),  # with the four updates of Table 1 it falls here: three are off-policy
        (ddpo_iskl, {}),
        (rwr, dict(beta=1.0)),  # 1 / unit of the reward, here a hundredth
        (rwr_sparse, {}),
    ],
)
def test_a_users_brightness_reward_rises(tmp_path, brightness, script, flags):
    """Less than a minute on two cores; evaluated on fixed prompts and noise, so that no luck is involved."""
    options = dict(reward=brightness, model=str(EMOJI), num_steps=8, iterations=15, save_every=30, seed=3, device="cpu")
    rows = read_metrics(script.main(script.Args(**options | flags, out=str(tmp_path))))
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 3  # of 100
    assert rows[0]["eval_align"] > 0
