"""pretrain.py: its parts, and all its stages in a few steps on made-up drawings (no npm)."""

import io
import json
import tarfile

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextModel, CLIPTokenizer

import pretrain

EMOJI = ROOT / "models/emoji"


# fit


def train_line(work, name, stop_at=None):
    """Learns y = sum(x) with `fit`. Returns the weights and the number of steps it has made."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 1)
    calls = []

    def compute_loss(generator):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 8, generator=generator)
        return ((layer(x)[:, 0] - x.sum(1)) ** 2).mean()

    try:
        params = dict(layer.named_parameters())
        pretrain.fit(name, work, params, steps=600, lr=1e-2, compute_loss=compute_loss, seed=3)
    except KeyboardInterrupt:
        pass
    return layer.weight, len(calls)


def test_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path):
    straight, _ = train_line(tmp_path, "straight")
    train_line(tmp_path, "halves", stop_at=400)
    resumed, steps = train_line(tmp_path, "halves")
    assert steps == 350  # the state was saved after 250
    assert torch.equal(straight, resumed)
    assert (straight - 1).abs().max() < 0.2  # it has learned the sum


def test_finished_training_is_not_repeated(tmp_path):
    first, _ = train_line(tmp_path, "model")
    again, steps = train_line(tmp_path, "model")
    assert steps == 0
    assert torch.equal(first, again)


def test_resuming_keeps_the_memory_format(tmp_path):
    """A step on channels-last weights rounds differently from one on contiguous weights."""

    def train(name, stop_at):
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
        return conv.weight

    straight = train("straight", stop_at=None)
    train("halves", stop_at=270)
    assert torch.equal(straight, train("halves", stop_at=None))


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    weight = torch.nn.Parameter(torch.ones(1))

    def compute_loss(generator):
        return weight.sum() * float("nan")

    with pytest.raises(RuntimeError, match="non-finite"):
        pretrain.fit("nan", tmp_path, {"weight": weight}, 10, 1e-2, compute_loss, seed=0)
    assert torch.isfinite(weight).all()


# data


def make_square(color):
    drawing = np.zeros((128, 128, 4), np.uint8)
    drawing[16:112, 16:112, :3] = color
    drawing[16:112, 16:112, 3] = 255
    return drawing


def test_a_picture_shows_the_drawing_before_a_background():
    drawing = make_square((255, 0, 0))
    for seed in range(100):
        picture, _ = pretrain.compose(drawing, "ant", np.random.default_rng(seed))
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert (picture[32, 32] == (255, 0, 0)).all()  # the middle is covered whatever the shift
        assert not (picture[1, 1] == (255, 0, 0)).all()


def test_pictures_are_a_function_of_the_seed():
    drawing = make_square((255, 0, 0))
    first, first_caption = pretrain.compose(drawing, "ant", np.random.default_rng(7))
    again, again_caption = pretrain.compose(drawing, "ant", np.random.default_rng(7))
    other, _ = pretrain.compose(drawing, "ant", np.random.default_rng(8))
    assert (first == again).all()
    assert first_caption == again_caption
    assert (first != other).any()


def test_most_captions_are_the_bare_name():
    captions = []
    for seed in range(400):
        _, caption = pretrain.compose(make_square((0, 0, 0)), "ant", np.random.default_rng(seed))
        captions.append(caption)
    assert captions.count("ant") / 400 == pytest.approx(0.75, abs=0.06)
    assert captions.count("an ant") / 400 == pytest.approx(0.1, abs=0.05)
    for caption in set(captions) - {"ant", "an ant"}:
        assert caption.startswith("ant on a ")
        assert caption.endswith(" background")


@pytest.mark.parametrize("color", [(0, 0, 0), (128, 128, 128), (255, 255, 255), (230, 140, 130)])
def test_a_drawing_stands_out_from_its_background(color):
    drawing = make_square(color)
    rng = np.random.default_rng(0)
    for name in {pretrain.choose_color(drawing, rng) for _ in range(100)}:
        assert np.linalg.norm(np.subtract(color, pretrain.COLORS[name])) > 80


def test_drawings_are_centred():
    drawing = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(drawing).rectangle([200, 100, 240, 179], fill="red")  # 41 x 80
    square = pretrain.center(drawing, size=64, margin=3)
    rows = np.flatnonzero(square[..., 3].any(1))
    columns = np.flatnonzero(square[..., 3].any(0))
    assert (rows[0], rows[-1]) == (3, 60)  # 58 pixels, the longer side
    assert len(columns) == 30
    assert abs(columns[0] + columns[-1] - 63) <= 1


def test_drawings_are_fetched_from_the_npm_archives(tmp_path):
    pytest.importorskip("resvg_py", reason="only pretraining needs it")
    colors = {
        "cat": "red",
        "dog-face": "blue",
        "rocket": "lime",
        "poodle": "black",  # left out, as are skin tones and flags
        "person-dark": "black",
        "flag-x": "black",
    }
    icons = {}
    for icon, color in colors.items():
        icons[icon] = {"body": f'<rect width="16" height="16" fill="{color}"/>'}
    icons["nothing"] = {"body": ""}
    data = json.dumps({"icons": icons, "width": 16, "height": 16}).encode()
    for emoji_set, (version, _) in pretrain.EMOJI_SETS.items():
        with tarfile.open(tmp_path / f"iconify-json-{emoji_set}-{version}.tgz", "w:gz") as tar:
            info = tarfile.TarInfo("package/icons.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    pretrain.fetch_drawings(tmp_path)
    drawings = np.load(tmp_path / "drawings.npz")
    assert drawings["names"].tolist() == ["cat", "dog", ""] * 6
    assert drawings["icons"].tolist() == ["cat", "dog-face", "rocket"] * 6
    assert drawings["rgba"].shape == (18, 128, 128, 4)
    assert drawings["small"].shape == (18, 64, 64, 4)
    assert (drawings["rgba"][0, 64, 64] == (255, 0, 0, 255)).all()


# tokenizer and architecture


def test_the_tokenizer_knows_its_words(tmp_path):
    tokenizer = pretrain.train_tokenizer(["a cat", "cat on a red background", "an elephant"])
    assert len(tokenizer("elephant").input_ids) == 3  # start, the word, end
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))

    # the files of transformers 4 make the same tokenizer
    pretrain.save_tokenizer(tokenizer, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split()) for line in lines[1:]]
    older = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    for text in ("a cat", "An Elephant on red", "unheard of"):
        assert tokenizer(text).input_ids == older(text).input_ids


def get_shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


def test_the_script_makes_the_architecture_that_is_in_the_folder():
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(EMOJI / "unet")
    assert get_shapes(pretrain.make_unet()) == get_shapes(unet)
    text_encoder = CLIPTextModel.from_pretrained(EMOJI / "text_encoder")
    assert get_shapes(pretrain.make_text_encoder(tokenizer)) == get_shapes(text_encoder)
    vae = AutoencoderTiny.from_pretrained(EMOJI / "vae")
    assert get_shapes(pretrain.make_vae()) == get_shapes(vae)
    scheduler = DDIMScheduler.from_pretrained(EMOJI / "scheduler")
    assert torch.equal(pretrain.make_scheduler().betas, scheduler.betas)


def test_every_name_is_one_token():
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    assert len(pretrain.NAMES) == 46
    for name in pretrain.NAMES:
        assert len(tokenizer(name).input_ids) == 3


# CLIP


def test_the_clip_sees_a_drawing_in_other_poses_and_colours():
    drawings = torch.zeros(256, 4, 64, 64, dtype=torch.uint8)
    drawings[:, 1:, 16:48, 16:48] = 255  # a cyan square in the middle
    pictures = pretrain.augment(drawings, torch.Generator().manual_seed(0))
    again = pretrain.augment(drawings, torch.Generator().manual_seed(0))
    assert pictures.shape == (256, 3, 64, 64)
    assert pictures.abs().max() <= 1
    assert torch.equal(pictures, again)

    # bright in the middle, with channels swapped
    middle = pictures[..., 28:36, 28:36].mean((2, 3))
    assert middle.amax(1).median() > 0.8
    assert middle.argmax(1).unique().tolist() == [0, 1, 2]

    # where it is not background; the middle half of the pictures differs in scale and place
    shape = ((pictures - pictures[..., :1, :1]).abs().amax(1) > 0.5).float()
    shape = shape[shape.sum((1, 2)) > 50]
    area = shape.mean((1, 2))
    x = (shape * torch.arange(64.0)).sum((1, 2)) / shape.sum((1, 2))
    assert area.quantile(0.75) - area.quantile(0.25) > 0.06  # 0.03 if it is not moved
    assert x.quantile(0.75) - x.quantile(0.25) > 2  # 0.5 if it is not moved


def test_ranks_by_the_mean_score_of_several_views():
    sheet = np.asarray(Image.open(EMOJI / "samples.png").convert("RGB"))
    pictures = []
    for k in range(46):
        x = k % 4 * (256 + 8)
        y = k // 4 * 78 + 13
        for j in range(4):
            pictures.append(sheet[y : y + 64, x + 64 * j : x + 64 * j + 64])

    labels = np.repeat(pretrain.NAMES, 4)
    single = pretrain.clip_ranks(EMOJI / "clip", pictures, labels)
    together = pretrain.clip_ranks(EMOJI / "clip", pictures, pretrain.NAMES, views=4)
    assert single.shape == (184,)
    assert together.shape == (46,)
    assert (single == 0).mean() > 0.9
    assert (together == 0).mean() >= (single == 0).mean()
    always_right = (single.reshape(46, 4) == 0).all(1)
    assert (together[always_right] == 0).all()


# all stages


def make_drawings(work):
    """drawings.npz of six sets: each animal is an ellipse with its own colour and sides."""
    arrays = {"rgba": [], "small": [], "names": [], "icons": [], "sets": []}
    for k, icon in enumerate([*pretrain.NAMES, "one", "two", "three"]):
        for shift, emoji_set in enumerate(pretrain.EMOJI_SETS):
            rng = np.random.default_rng(k)
            left, top = (rng.integers(4, 40, 2) + shift).tolist()
            right, bottom = (rng.integers(88, 120, 2) + shift).tolist()
            color = tuple(rng.integers(0, 255, 3).tolist())
            picture = Image.new("RGBA", (128, 128))
            ImageDraw.Draw(picture).ellipse([left, top, right, bottom], fill=color)
            arrays["rgba"].append(np.asarray(picture))
            arrays["small"].append(np.asarray(picture.resize((64, 64))))
            arrays["names"].append(icon if icon in pretrain.NAMES else "")
            arrays["icons"].append(icon)
            arrays["sets"].append(emoji_set)
    work.mkdir(parents=True)
    np.savez(work / "drawings.npz", **arrays)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The folder of a model of two steps per stage, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("pretrain")
    make_drawings(folder / "work")
    args = pretrain.Args(
        work=str(folder / "work"),
        out=str(folder / "emoji"),
        pictures=96,
        vae_steps=2,
        unet_steps=2,
        decoder_steps=2,
        clip_steps=2,
        sample_steps=2,
    )
    pretrain.main(args)
    return folder / "emoji", args


def test_the_stages_make_a_pipeline(tiny_run):
    out, _ = tiny_run
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pictures = pipe("cat", num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)
    assert (out / "clip/open_clip_model.safetensors").exists()
    assert Image.open(out / "samples.png").size == Image.open(EMOJI / "samples.png").size


def test_its_parts_load_without_a_notice(tiny_run, caplog):
    out, _ = tiny_run
    diffusers.utils.logging.set_verbosity_warning()
    AutoencoderTiny.from_pretrained(out / "vae")
    UNet2DConditionModel.from_pretrained(out / "unet")
    CLIPTextModel.from_pretrained(out / "text_encoder")
    assert [record.getMessage() for record in caplog.records] == []


def test_the_card_tells_counts_and_sizes(tiny_run):
    out, _ = tiny_run
    card = (out / "README.md").read_text()
    assert "276 drawings" in card
    assert "without `twemoji`" in card
    assert "46 drawings" in card
    for path in out.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert f"| {path.relative_to(out)} | {path.stat().st_size:,} |" in card
            assert path.suffix in (".json", ".txt", ".safetensors", ".png")


def test_a_second_run_writes_the_same_bytes(tiny_run, tmp_path):
    out, args = tiny_run
    make_drawings(tmp_path / "work")
    again = pretrain.Args(**{**vars(args), "work": tmp_path / "work", "out": tmp_path / "emoji"})
    pretrain.main(again)
    for path in out.rglob("*"):
        if path.is_file() and path.name != "README.md":  # the card holds times
            assert path.read_bytes() == (tmp_path / "emoji" / path.relative_to(out)).read_bytes()


def test_it_stops_after_the_stage_that_is_named(tmp_path):
    make_drawings(tmp_path / "work")
    args = pretrain.Args(work=tmp_path / "work", out=tmp_path / "emoji", pictures=64, vae_steps=1)
    args.stop_after = "data"
    pretrain.main(args)
    assert np.load(tmp_path / "work/animals.npy").shape == (64, 64, 64, 3)
    assert np.load(tmp_path / "work/others.npy").shape == (16, 64, 64, 3)
    assert not (tmp_path / "work/vae.pt").exists()
    args.stop_after = "vae"
    pretrain.main(args)
    assert (tmp_path / "work/vae.pt").exists()
    assert not (tmp_path / "emoji").exists()
