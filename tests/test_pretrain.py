"""pretrain.py: its parts, and all of its stages in a few steps on drawings made up here (the real ones need npm)."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

import pretrain

EMOJI = ROOT / "models/emoji"


def test_training_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    def train(name, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 1)

        def loss_fn(indices, generator):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            x = torch.randn(len(indices), 8, generator=generator)
            return ((layer(x)[:, 0] - x.sum(1) - indices / 100) ** 2).mean()

        calls = []
        pretrain.fit(name, tmp_path, dict(layer.named_parameters()), 600, 1e-2, 4, 100, loss_fn, seed=3)
        return layer.weight, len(calls)

    straight, _ = train("straight")
    with pytest.raises(KeyboardInterrupt):
        train("halves", stop=400)
    resumed, calls = train("halves")
    assert calls == 350  # from the state that was saved after 250
    assert torch.equal(straight, resumed) and (straight - 1).abs().max() < 0.2  # and it has learned the sum
    again, calls = train("halves")
    assert calls == 0 and torch.equal(again, resumed)


def test_pictures_and_captions(tmp_path):
    drawing = np.zeros((128, 128, 4), np.uint8)
    drawing[32:96, 32:96] = (255, 0, 0, 255)
    pairs = [pretrain.compose(drawing, "ant", np.random.default_rng(i)) for i in range(400)]
    pictures, captions = np.stack([picture for picture, _ in pairs]), [caption for _, caption in pairs]
    assert pictures.shape == (400, 64, 64, 3) and pictures.dtype == np.uint8
    assert (pictures[:, 32, 32] == (255, 0, 0)).all()  # the drawing covers the middle whatever the shift
    assert not (pictures[:, 2, 2] == (255, 0, 0)).all(1).any()
    shares = [
        np.mean([caption == "ant" for caption in captions]),
        np.mean([caption == "an ant" for caption in captions]),
    ]
    assert shares == pytest.approx([0.6, 0.15], abs=0.06)
    assert all(c in ("ant", "an ant") or c.startswith("ant on a ") and c.endswith(" background") for c in captions)
    again, caption = pretrain.compose(drawing, "ant", np.random.default_rng(7))
    assert (again == pictures[7]).all() and caption == captions[7]


def test_the_clip_sees_the_drawing_in_other_poses_and_colours():
    drawings = torch.zeros(256, 4, 64, 64, dtype=torch.uint8)
    drawings[:, 1:, 16:48, 16:48] = 255  # a cyan square in the middle
    pictures = pretrain.augment(drawings, torch.Generator().manual_seed(0))
    assert pictures.shape == (256, 3, 64, 64) and pictures.abs().max() <= 1
    assert torch.equal(pictures, pretrain.augment(drawings, torch.Generator().manual_seed(0)))
    middle = pictures[..., 28:36, 28:36].mean((2, 3))
    assert middle.amax(1).median() > 0.8 and middle.argmax(1).unique().tolist() == [0, 1, 2]  # bright, channels swapped
    shape = ((pictures - pictures[..., :1, :1]).abs().amax(1) > 0.5).float()  # where it is not background
    shape = shape[shape.sum((1, 2)) > 50]
    area, x = shape.mean((1, 2)), (shape * torch.arange(64.0)).sum((1, 2)) / shape.sum((1, 2))
    for values, least in ((area, 0.06), (x, 2.0)):  # the middle half differs in scale and place; unmoved: 0.03, 0.5
        assert values.quantile(0.75) - values.quantile(0.25) > least


def test_the_script_makes_the_model_that_is_here():
    """Architecture, schedule and names in the script are those of the committed folder."""
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    made = {"unet": pretrain.make_unet(), "vae": pretrain.make_vae()}
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderTiny)):
        here = kind.from_pretrained(EMOJI / name).state_dict()
        assert {k: v.shape for k, v in made[name].state_dict().items()} == {k: v.shape for k, v in here.items()}
    text = pretrain.make_text_encoder(tokenizer)
    here = StableDiffusionPipeline.from_pretrained(EMOJI, safety_checker=None).text_encoder
    assert {k: v.shape for k, v in text.state_dict().items()} == {k: v.shape for k, v in here.state_dict().items()}
    betas = DDIMScheduler.from_pretrained(EMOJI / "scheduler").betas
    assert torch.equal(pretrain.make_scheduler().betas, betas)
    assert len(pretrain.NAMES) == 46 and all(len(tokenizer(name).input_ids) == 3 for name in pretrain.NAMES)


def test_the_tokenizer_knows_its_words(tmp_path):
    tokenizer = pretrain.train_tokenizer(["a cat", "cat on a red background", "an elephant"])
    pretrain.save_tokenizer(tokenizer, tmp_path)
    assert len(tokenizer("elephant").input_ids) == 3
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    older = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)  # as from the files of transformers 4
    for text in ("a cat", "An Elephant on red", "unheard of"):
        assert tokenizer(text).input_ids == older(text).input_ids


def test_ranks_by_the_mean_score_of_several_views():
    sheet = np.asarray(Image.open(EMOJI / "samples.png").convert("RGB"))
    blocks = [(k % 4 * (256 + 8), k // 4 * 78 + 13) for k in range(46)]
    pictures = np.stack([sheet[y : y + 64, x + 64 * j : x + 64 * j + 64] for x, y in blocks for j in range(4)])
    single = pretrain.clip_ranks(EMOJI / "clip", pictures, np.repeat(pretrain.NAMES, 4))
    together = pretrain.clip_ranks(EMOJI / "clip", pictures, pretrain.NAMES, views=4)
    assert single.shape == (184,) and together.shape == (46,)
    assert (single == 0).mean() > 0.9 and (together == 0).mean() >= (single == 0).mean()
    every = single.reshape(46, 4)
    assert (together[(every == 0).all(1)] == 0).all()  # right about each, right about their mean


def make_drawings(work):
    """Six "sets" of every animal and of three other things: an ellipse, its colours and sides the name's own."""
    arrays = {"rgba": [], "small": [], "names": [], "icons": [], "sets": []}
    for k, name in enumerate([*pretrain.NAMES, "one", "two", "three"]):
        for s, emoji_set in enumerate(pretrain.EMOJI_SETS):
            picture, rng = Image.new("RGBA", (128, 128)), np.random.default_rng(k)
            box = [*rng.integers(4, 40, 2), *rng.integers(88, 124, 2)]
            ImageDraw.Draw(picture).ellipse([int(x) + s for x in box], fill=(*map(int, rng.integers(0, 255, 3)), 255))
            arrays["rgba"].append(np.asarray(picture))
            arrays["small"].append(np.asarray(picture.resize((64, 64))))
            arrays["names"].append(name if name in pretrain.NAMES else "")
            arrays["icons"].append(name)
            arrays["sets"].append(emoji_set)
    work.mkdir(parents=True)
    np.savez(work / "drawings.npz", **{name: np.array(values) for name, values in arrays.items()})


def test_all_stages_make_a_pipeline_a_clip_a_sheet_and_a_card(tmp_path):
    make_drawings(tmp_path / "work")
    steps = dict(vae_steps=2, unet_steps=2, decoder_steps=2, clip_steps=2, pictures=256)
    args = dict(work=str(tmp_path / "work"), out=str(tmp_path / "emoji"), **steps)
    pretrain.main(pretrain.Args(**args))
    out = tmp_path / "emoji"
    pipe = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert pipe("cat", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    assert Image.open(out / "samples.png").size == Image.open(EMOJI / "samples.png").size
    card = (out / "README.md").read_text()
    assert "276 drawings" in card and "without `twemoji`" in card and "46 drawings" in card
    sizes = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file() and p.suffix != ".md"}
    assert all(f"| {name} | {size:,} |" in card for name, size in sizes.items())
    assert sum(sizes.values()) < 20e6 and not [name for name in sizes if name.endswith((".bin", ".pt", ".ckpt"))]

    before = (out / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    (out / "unet/diffusion_pytorch_model.safetensors").unlink()
    pretrain.main(pretrain.Args(**args, stage="export"))  # reads back what was trained
    assert (out / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_drawings_are_fetched_from_the_npm_archives(tmp_path):
    pytest.importorskip("resvg_py", reason="only pretraining needs it")
    icons = {"cat": "red", "dog-face": "blue", "rocket": "lime", "person-dark": "black", "flag-x": "black"}
    icons = {k: {"body": f'<rect width="16" height="16" fill="{color}"/>'} for k, color in icons.items()}
    data = json.dumps({"icons": icons, "width": 16, "height": 16}).encode()
    for emoji_set in pretrain.EMOJI_SETS:
        with tarfile.open(tmp_path / f"iconify-json-{emoji_set}-1.0.0.tgz", "w:gz") as tar:
            info = tarfile.TarInfo("package/icons.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pretrain.fetch_drawings(tmp_path)
    drawings = np.load(tmp_path / "drawings.npz")
    assert drawings["names"].tolist() == ["cat", "dog", ""] * 6  # without skin tones and flags
    assert drawings["rgba"].shape == (18, 128, 128, 4) and drawings["small"].shape == (18, 64, 64, 4)
    assert (drawings["rgba"][0, 64, 64] == (255, 0, 0, 255)).all()
