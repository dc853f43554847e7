"""pretrain.py: its parts, and all its stages in a few steps on made-up drawings (no npm)."""

import importlib
import sys

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


@pytest.mark.parametrize("level", [0, 128, 250])
def test_a_picture_shows_its_drawing_before_another_colour(level):
    color = (level, level, level)
    drawing = np.zeros((128, 128, 4), np.uint8)
    drawing[16:112, 16:112] = (*color, 255)
    captions = []
    for seed in range(200):
        picture, caption = pretrain.compose(drawing, "ant", np.random.default_rng(seed))
        assert (picture[32, 32] == color).all()  # the middle is covered whatever the shift
        background = picture[1, 1].astype(float)
        assert np.linalg.norm(background - color) > 40  # 80, and the gradient
        captions.append(caption)
    assert captions.count("ant") == pytest.approx(150, abs=18)
    assert captions.count("an ant") == pytest.approx(20, abs=14)


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
    pictures = []
    for i in range(len(pretrain.NAMES) + 3):
        picture = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(picture).ellipse([4 + i, 20, 110, 90], fill=(5 * i, 9, 200))
        pictures.append(picture)

    work = tmp_path / "work"
    work.mkdir()
    np.savez(
        work / "drawings.npz",
        rgba=[np.asarray(picture) for picture in pictures],
        small=[np.asarray(picture.resize((64, 64))) for picture in pictures],
        names=[*pretrain.NAMES, "", "", ""],
        icons=[*pretrain.NAMES, "one", "two", "three"],
    )
    steps = {name: 2 for name in ("vae_steps", "unet_steps", "decoder_steps", "clip_steps")}
    for out in ("first", "second"):
        folder = str(tmp_path / out)
        pretrain.main(pretrain.Args(str(work), folder, pictures=96, sample_steps=1, **steps))

    files = [path.relative_to(EMOJI) for path in EMOJI.rglob("*.*")]
    for path in files:
        if path.suffix not in (".py", ".pyc", ".md"):
            first = (tmp_path / "first" / path).read_bytes()
            assert first == (tmp_path / "second" / path).read_bytes()
