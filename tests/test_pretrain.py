"""pretrain.py: its parts, and all its stages in a few steps on made-up drawings (no npm)."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextModel, CLIPTokenizer

EMOJI = ROOT / "models/emoji"
sys.path.insert(0, str(EMOJI))
pretrain = importlib.import_module("pretrain")


def test_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path):
    """Checked on channels-last weights, where a step rounds differently from a contiguous one."""

    def train(name, stop_at=None):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last)
        calls = []

        def compute_loss(generator):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(2, 16, 8, 8, generator=generator)
            return (conv(x) - x[..., 1:-1, 1:-1]).square().mean()

        try:
            params = dict(conv.named_parameters())
            pretrain.fit(name, tmp_path, params, 300, 1e-2, compute_loss, seed=0)
        except KeyboardInterrupt:
            pass
        return conv.weight, len(calls)

    straight, _ = train("straight")
    train("halves", stop_at=270)
    resumed, num_steps = train("halves")
    assert num_steps == 50  # the state was saved after 250
    assert torch.equal(straight, resumed)
    again, num_steps = train("halves")
    assert num_steps == 0
    assert torch.equal(straight, again)


@pytest.mark.parametrize("color", [(0, 0, 0), (128, 128, 128), (230, 140, 130)])
def test_a_picture_shows_its_drawing_before_another_colour(color):
    drawing = np.zeros((128, 128, 4), np.uint8)
    drawing[16:112, 16:112] = (*color, 255)
    captions = []
    for seed in range(200):
        picture, caption = pretrain.compose(drawing, "ant", np.random.default_rng(seed))
        assert (picture[32, 32] == color).all()  # the middle is covered whatever the shift
        background = picture[1, 1].astype(float)
        assert np.linalg.norm(background - color) > 40  # 80, and the gradient
        captions.append(caption)
        if caption not in ("ant", "an ant"):
            name = caption.removeprefix("ant on a ").removesuffix(" background")
            assert np.abs(background - pretrain.COLORS[name]).max() < 70
    assert captions.count("ant") / 200 == pytest.approx(0.75, abs=0.09)
    assert captions.count("an ant") / 200 == pytest.approx(0.1, abs=0.07)


def test_drawings_are_centred():
    drawing = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(drawing).rectangle([200, 100, 240, 179], fill="red")  # 41 x 80
    square = pretrain.center(drawing, size=64, margin=3)
    rows = np.flatnonzero(square[..., 3].any(1))
    columns = np.flatnonzero(square[..., 3].any(0))
    assert (rows[0], rows[-1]) == (3, 60)  # 58 pixels, the longer side
    assert len(columns) == 30
    assert abs(columns[0] + columns[-1] - 63) <= 1


def test_the_tokenizer_in_the_folder_is_the_one_that_is_trained(tmp_path):
    """It depends on the words of the captions, not on the pictures."""
    captions = [f"a {name}" for name in pretrain.NAMES]
    captions += [f"an ant on a {color} background" for color in pretrain.COLORS]
    pretrain.save_tokenizer(pretrain.train_tokenizer(captions), tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (EMOJI / "tokenizer" / name).read_bytes()
        assert (tmp_path / name).read_bytes() == (EMOJI / "clip" / name).read_bytes()


def test_the_architecture_in_the_folder_is_the_scripts():
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    pairs = {
        "unet": (pretrain.make_unet(), UNet2DConditionModel),
        "vae": (pretrain.make_vae(), AutoencoderTiny),
        "text_encoder": (pretrain.make_text_encoder(tokenizer), CLIPTextModel),
    }
    for name, (made, kind) in pairs.items():
        loaded = kind.from_pretrained(EMOJI / name).state_dict()
        shapes = {key: value.shape for key, value in made.state_dict().items()}
        assert shapes == {key: value.shape for key, value in loaded.items()}
    scheduler = DDIMScheduler.from_pretrained(EMOJI / "scheduler")
    assert torch.equal(scheduler.betas, pretrain.make_scheduler().betas)


def test_all_stages_write_the_files_of_the_folder(tmp_path):
    """Two steps of each, on ellipses for drawings. A second run trains nothing again."""
    arrays = {"rgba": [], "small": [], "names": [], "icons": []}
    for i, icon in enumerate([*pretrain.NAMES, "one", "two", "three"]):
        picture = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(picture).ellipse([4 + i, 20, 110, 90 + i // 2], fill=(5 * i, 9, 200))
        arrays["rgba"].append(np.asarray(picture))
        arrays["small"].append(np.asarray(picture.resize((64, 64))))
        arrays["names"].append(icon if icon in pretrain.NAMES else "")
        arrays["icons"].append(icon)

    work = tmp_path / "work"
    work.mkdir()
    np.savez(work / "drawings.npz", **arrays)
    steps = {name: 2 for name in ("vae_steps", "unet_steps", "decoder_steps", "clip_steps")}
    for out in ("first", "second"):
        folder = str(tmp_path / out)
        pretrain.main(pretrain.Args(str(work), folder, pictures=96, sample_steps=1, **steps))

    files = {path.relative_to(EMOJI) for path in EMOJI.rglob("*.*") if path.suffix[:3] != ".py"}
    first = tmp_path / "first"
    assert {path.relative_to(first) for path in first.rglob("*.*")} == files - {Path("README.md")}
    for path in first.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(first)).read_bytes()
