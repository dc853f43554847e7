"""Whatever is wrong with flags, models and files is said in one line, with exit code 2."""

import json
import pickle
import runpy
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, make_pipeline, read_args, read_metrics, run
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import ddpo_is
import ddpo_sf
import rwr

SCRIPTS = ["ddpo_sf", "ddpo_is", "ddpo_iskl", "rwr", "rwr_sparse"]
every_script = pytest.mark.parametrize("script", SCRIPTS)
# the flags of a run of two short iterations
SHORT = ["--num-samples", "4", "--num-steps", "5", "--iterations", "2", "--device", "cpu"]
# what torch.save and others would write for an object that runs a command when it is read
TOUCH = "import pathlib; pathlib.Path({!r}).touch()"


@pytest.fixture(autouse=True)
def signals():
    """Put back the handlers of the signals that a run catches."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def command_line(capsys, monkeypatch):
    """Run a script as `python SCRIPT WORDS` does, but in this process, which takes no start."""

    def start(*words, script="ddpo_is", folder=ROOT):
        path = str(Path(folder, f"{script}.py"))
        monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return start


@pytest.fixture
def refused(command_line, monkeypatch, tmp_path):
    """The one line of a run that ends before weights are loaded and before it has a folder."""

    def load_weights(*args, **options):
        raise AssertionError("weights were loaded")

    def start(*words, script="ddpo_is"):
        monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", load_weights)
        out = tmp_path / "runs"
        done = command_line("--out", out, *words, script=script)
        assert done.code == 2
        assert len(done.err.splitlines()) == 1, done.err
        assert done.err.startswith("error: ")
        assert not out.exists()
        return done.err

    return start


@pytest.fixture
def model(tiny_sd, tmp_path):
    """A copy of the small pipeline, to be spoilt."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def edit(path, **changes):
    """Change entries of a JSON file; None takes an entry out."""
    content = json.loads(path.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(content))


# ---- flags ----


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--lr", "0", ["--lr 0.0", "greater than 0"]),
        ("--lr", "-1e-3", ["--lr -0.001"]),
        ("--lr", "nan", ["--lr nan"]),
        ("--lr", "inf", ["--lr inf"]),
        ("--iterations", "0", ["--iterations 0"]),
        ("--save-every", "0", ["--save-every 0"]),
        ("--num-samples", "0", ["--num-samples 0"]),
        ("--num-samples", "5", ["--num-samples 5", "multiple of 2"]),
        ("--num-updates", "0", ["--num-updates 0"]),
        ("--num-updates", "3", ["--num-samples 16", "multiple of 3"]),
        ("--num-steps", "0", ["--num-steps 0"]),
        ("--num-steps", "-5", ["--num-steps -5"]),
        ("--seed", "-1", ["--seed -1"]),
        ("--seed", str(2**63), [f"--seed {2**63}"]),
        ("--lora-rank", "-1", ["--lora-rank -1"]),
        ("--micro-batch", "-4", ["--micro-batch -4"]),
        ("--guidance-scale", "nan", ["--guidance-scale nan"]),
        ("--weight-decay", "-0.1", ["--weight-decay -0.1"]),
        ("--adam-eps", "-1e-8", ["--adam-eps -1e-08"]),
        ("--max-grad-norm", "0", ["--max-grad-norm 0.0"]),
        ("--max-grad-norm", "nan", ["--max-grad-norm nan"]),
        ("--adv-clip", "0", ["--adv-clip 0.0"]),
        ("--clip-range", "nan", ["--clip-range nan"]),
        ("--device", "tpu9", ["--device tpu9"]),
        ("--reward", "beauty", ["--reward beauty", "compress", "aesthetic"]),
        ("--reward", "compress + 0.5*", ["--reward compress + 0.5*", "end"]),
        ("--reward", "", ["--reward", "end"]),
        ("--reward", "nowhere.py:f", ["there is no file 'nowhere.py'"]),
        ("--prompts", "nowhere.txt", ["--prompts nowhere.txt", "animals"]),
        ("--model", "no/such-model", ["no/such-model", "model_index.json"]),
        ("--resume", "nowhere", ["--resume nowhere", "args.json"]),
    ],
)
def test_a_flag_that_no_run_can_use(refused, tiny_sd, flag, value, words):
    message = refused("--model", tiny_sd, "--device", "cpu", flag, value)
    for word in words:
        assert word in message


@pytest.mark.parametrize("betas", [("0.9", "1.0"), ("-0.1", "0.9"), ("nan", "0.9")])
def test_adam_betas(refused, tiny_sd, betas):
    message = refused("--model", tiny_sd, "--device", "cpu", "--adam-betas", *betas)
    assert "--adam-betas" in message


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("ddpo_sf", ["--num-samples", 6, "--num-updates", 4], ["--num-samples 6", "multiple of 4"]),
        ("ddpo_sf", ["--adv-clip", 0], ["--adv-clip 0.0"]),
        ("ddpo_iskl", ["--adv-clip", "nan"], ["--adv-clip nan"]),
        ("ddpo_iskl", ["--clip-range", 0], ["--clip-range 0.0"]),
        ("ddpo_iskl", ["--kl-coef", -1], ["--kl-coef -1.0"]),
        ("ddpo_iskl", ["--kl-coef", "inf"], ["--kl-coef inf"]),
        ("ddpo_iskl", ["--num-samples", 5], ["--num-samples 5", "multiple of 2"]),
        ("rwr", ["--beta", -1], ["--beta -1.0"]),
        ("rwr", ["--beta", "nan"], ["--beta nan"]),
        ("rwr", ["--samples-per-prompt", 0], ["--samples-per-prompt 0"]),
        ("rwr", ["--samples-per-prompt", 1], ["--samples-per-prompt 1", "at least 2"]),
        ("rwr", ["--num-samples", 6], ["--num-samples 6", "--samples-per-prompt"]),
        ("rwr_sparse", ["--quantile", 90], ["--quantile 90.0", "from 0 to 1"]),
        ("rwr_sparse", ["--quantile", "nan"], ["--quantile nan"]),
        ("rwr_sparse", ["--threshold", "nan"], ["--threshold nan"]),
        ("rwr_sparse", ["--samples-per-prompt", 1], ["--samples-per-prompt 1", "at least 2"]),
        ("rwr_sparse", ["--threshold", -2, "--samples-per-prompt", 1], ["at least 2"]),
        ("rwr_sparse", ["--num-samples", 6], ["--num-samples 6", "--samples-per-prompt"]),
    ],
)
def test_what_one_algorithm_refuses(refused, tiny_sd, script, flags, words):
    message = refused("--model", tiny_sd, "--device", "cpu", *flags, script=script)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("ddpo_iskl", ["--kl-coef", 0]),
        ("rwr", ["--beta", 0]),
        ("rwr", ["--num-updates", 3]),  # every update takes all samples
        ("rwr_sparse", ["--quantile", 1]),
        ("rwr_sparse", ["--threshold", -2, "--samples-per-prompt", 1, "--no-center-weights"]),
    ],
)
def test_what_only_looks_wrong(command_line, tiny_sd, few_prompts, tmp_path, script, flags):
    inputs = ["--model", tiny_sd, "--prompts", few_prompts, "--out", tmp_path]
    done = command_line(*SHORT, *inputs, *flags, script=script)
    assert done.code == 0
    (folder,) = tmp_path.glob(f"{script}__*")
    assert len(read_metrics(folder)) == 3


@every_script
@pytest.mark.parametrize(
    "words",
    [["--learning-rate", "1"], ["--lr", "fast"], ["--precision", "fp8"], ["--seed", "1.5"]],
)
def test_an_unknown_flag_and_a_value_of_another_type(command_line, script, words):
    """What tyro says: a box, with the flag in it."""
    done = command_line(*words, script=script)
    assert done.code == 2
    assert words[0] in done.err
    assert done.out == ""


@every_script
def test_every_script_refuses_a_number_a_reward_a_model_and_a_file(refused, tiny_sd, script):
    """The checks of all five are the same lines; here each is seen to call them."""
    flags = ["--model", tiny_sd, "--device", "cpu"]
    assert "--lr 0.0" in refused(*flags, "--lr", 0, script=script)
    assert "beauty" in refused(*flags, "--reward", "beauty", script=script)
    assert "nowhere.txt" in refused(*flags, "--prompts", "nowhere.txt", script=script)
    assert "--num-steps 400" in refused(*flags, "--num-steps", 400, script=script)
    assert "no/such" in refused("--device", "cpu", "--model", "no/such", script=script)
    assert "--resume nowhere" in refused("--resume", "nowhere", script=script)


def test_compile_needs_a_compiler(refused, tiny_sd, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refused("--model", tiny_sd, "--device", "cpu", "--compile")
    assert "--compile: needs a C++ compiler" in message


def test_compile_needs_a_compiler_on_the_path(refused, tiny_sd, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused("--model", tiny_sd, "--device", "cpu", "--compile")
    assert "g++" in message


# ---- schedulers ----


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler])
def test_a_scheduler_without_betas(refused, model, scheduler):
    scheduler().save_pretrained(model / "scheduler")
    message = refused("--model", model, "--device", "cpu")
    assert f"{scheduler.__name__} has no DDPM chain" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"thresholding": True}, "thresholds"),
        ({"prediction_type": "sample"}, "it predicts sample"),
        ({"prediction_type": "flow_prediction"}, "it predicts flow_prediction"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_a_scheduler_of_another_kind(refused, model, changes, words):
    edit(model / "scheduler/scheduler_config.json", **changes)
    assert words in refused("--model", model, "--device", "cpu")


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_a_scheduler_with_the_same_betas_is_the_same_chain(model, tiny_sd, scheduler):
    """Models come with a scheduler of their own, v1.4 with PNDM: only its betas matter."""
    expected, shape = ddpo_is.check_model(ddpo_is.Args(model=tiny_sd, num_steps=20))
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler(**options, steps_offset=1).save_pretrained(model / "scheduler")
    edit(model / "scheduler/scheduler_config.json", set_alpha_to_one=False)
    found, found_shape = ddpo_is.check_model(ddpo_is.Args(model=str(model), num_steps=20))
    schedule = ddpo_is.make_schedule(expected, 20, "cpu")
    found_schedule = ddpo_is.make_schedule(found, 20, "cpu")
    assert found_shape == shape == (4, 8, 8)
    if "timestep_spacing" not in json.loads(
        (model / "scheduler/scheduler_config.json").read_text()
    ):
        pytest.fail("the scheduler's own file says how it spaces its steps")
    assert torch.equal(found_schedule.alphas_cumprod, schedule.alphas_cumprod)


@pytest.mark.parametrize("num_steps", [1000, 5000])
def test_more_steps_than_the_scheduler_has(refused, tiny_sd, num_steps):
    message = refused("--model", tiny_sd, "--device", "cpu", "--num-steps", num_steps)
    assert f"--num-steps {num_steps}: at most 999" in message


@pytest.mark.parametrize(("num_steps", "first"), [(400, 799), (600, 600), (334, 667)])
def test_steps_that_would_begin_with_half_a_picture(refused, tiny_sd, num_steps, first):
    """1000 // 400 is 2, and 400 steps of 2 begin at 799: pure noise would be taken for that."""
    message = refused("--model", tiny_sd, "--device", "cpu", "--num-steps", num_steps)
    assert f"--num-steps {num_steps}: the chain would begin at timestep {first}" in message


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 30, 50, 100, 250, 333, 500, 999])
def test_steps_that_begin_near_the_last_timestep(tiny_sd, num_steps):
    scheduler, _ = ddpo_is.check_model(ddpo_is.Args(model=tiny_sd, num_steps=num_steps))
    spacing = 1000 // num_steps
    assert len(scheduler.timesteps) == num_steps
    assert scheduler.timesteps[0] >= 900 - spacing


def test_a_chain_without_any_noise(refused, tmp_path):
    """One step that ends at abar = 1 is deterministic: there is nothing to train."""
    folder = make_pipeline(tmp_path / "model", set_alpha_to_one=True)
    message = refused("--model", folder, "--device", "cpu", "--num-steps", 1)
    assert "no step of this scheduler has noise" in message


def test_zero_terminal_snr_runs(command_line, tiny_sd_zero_snr, few_prompts, tmp_path):
    inputs = ["--model", tiny_sd_zero_snr, "--prompts", few_prompts, "--out", tmp_path]
    for script in SCRIPTS:
        done = command_line(*SHORT, *inputs, script=script)
        assert done.code == 0, done.err
        (folder,) = tmp_path.glob(f"{script}__*")
        rows = read_metrics(folder)
        assert len(rows) == 3
        assert all(np.isfinite(list(row.values())).all() for row in rows)
        grid = np.asarray(Image.open(folder / "images/0000.png"))
        assert grid.std() > 1  # not black


# ---- models ----


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"in_channels": 9}, "does not take 4 channels"),
        ("unet/config.json", {"out_channels": 8}, "does not return 4 channels"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds"),
        ("unet/config.json", {"time_cond_proj_dim": 32}, "time_cond_proj_dim"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"encoder_hid_dim": 64}, "encoder_hid_dim"),
        ("unet/config.json", {"cross_attention_dim": 32}, "attends to 32 text features, not 16"),
        ("unet/config.json", {"sample_size": None}, "no sample_size"),
        ("vae/config.json", {"latent_channels": 16}, "does not take 16 channels"),
        ("vae/config.json", {"out_channels": 1}, "does not decode to RGB"),
        ("text_encoder/config.json", {"hidden_size": 32}, "attends to 16 text features, not 32"),
        ("model_index.json", {"_class_name": None}, "its pipeline is None"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "DiffusionXLPipeline"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "its pipeline is FluxPipeline"),
    ],
)
def test_a_model_that_only_looks_like_stable_diffusion(refused, model, file, changes, words):
    edit(model / file, **changes)
    message = refused("--model", model, "--device", "cpu")
    assert f"--model {model}: " in message
    assert words in message


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "tokenizer",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_model_with_a_missing_part(refused, model, missing):
    path = model / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert missing in refused("--model", model, "--device", "cpu")


@pytest.mark.parametrize("content", ["", "{", "not json", "\x00"])
def test_a_model_whose_json_is_broken(refused, model, content):
    (model / "model_index.json").write_text(content)
    assert "cannot read model_index.json" in refused("--model", model, "--device", "cpu")


def test_a_model_that_is_a_file_or_an_empty_folder(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "model_index.json" in refused("--model", tmp_path / "file", "--device", "cpu")
    (tmp_path / "folder").mkdir()
    assert "model_index.json" in refused("--model", tmp_path / "folder", "--device", "cpu")


@pytest.mark.parametrize(
    ("part", "stem"),
    [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ],
)
@pytest.mark.parametrize("ending", ["fp16.safetensors", "bin", "ckpt"])
def test_weights_in_other_files(refused, model, part, stem, ending):
    """fp16 variants and .bin files alone; the latter are pickles, which are never read."""
    (model / part / f"{stem}.safetensors").rename(model / part / f"{stem}.{ending}")
    message = refused("--model", model, "--device", "cpu")
    assert f"no {part}/{stem}.safetensors" in message


def test_a_rectangular_sample_size_works(command_line, tiny_sd_rectangle, few_prompts, tmp_path):
    inputs = ["--model", tiny_sd_rectangle, "--prompts", few_prompts, "--out", tmp_path]
    for script in SCRIPTS:
        assert command_line(*SHORT, *inputs, script=script).code == 0
        (folder,) = tmp_path.glob(f"{script}__*")
        assert Image.open(folder / "images/0002.png").size == (4 * 24, 2 * 16)
        assert Image.open(folder / "trajectory/0002.png").size == (6 * 24, 16)
        assert len(read_metrics(folder)) == 3


# ---- models that are not finite ----


def spoil(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_unet_that_overflows_in_fp16_ends_at_row_0(command_line, model, tmp_path):
    def overflow(tensors):
        tensors["conv_in.weight"] *= 1e6

    spoil(model / "unet/diffusion_pytorch_model.safetensors", overflow)
    flags = ["--model", model, "--out", tmp_path / "runs", "--precision", "fp16"]
    done = command_line(*SHORT, *flags)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "latents are not finite from step 1 of 5 on" in line
    assert "--precision fp32" in line
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "checkpoint").exists()
    assert not (folder / "metrics.csv").exists()


def test_a_vae_with_a_channel_of_nan_ends_at_row_0(command_line, model, tmp_path):
    """Its other channels are finite, and the pictures would be scored as black or half black."""

    def not_a_number(tensors):
        tensors["decoder.conv_out.bias"][1] = float("nan")

    spoil(model / "vae/diffusion_pytorch_model.safetensors", not_a_number)
    done = command_line(*SHORT, "--model", model, "--out", tmp_path / "runs")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "the VAE's pictures of finite latents are not finite" in line
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "images").exists()


def test_a_unet_of_nan_is_never_scored(model, tmp_path):
    def not_a_number(tensors):
        tensors["conv_out.bias"][0] = float("nan")

    spoil(model / "unet/diffusion_pytorch_model.safetensors", not_a_number)
    reward = tmp_path / "reward.py"
    reward.write_text("def f(images, prompts):\n    raise SystemError('it was scored')\n")
    for script in (ddpo_is, ddpo_sf, rwr):
        with pytest.raises(FloatingPointError, match="from step 1 of 5 on"):
            run(script, tmp_path / "runs", model, reward=f"{reward}:f")


# ---- prompt files ----


def load_prompts(path):
    return ddpo_is.load_prompts(ddpo_is.Args(prompts=str(path)))


@pytest.mark.parametrize(
    "content",
    [
        b"a red fox\n\n  a blue whale \n",
        b"\xef\xbb\xbfa red fox\na blue whale",  # a byte-order mark, as Windows' editor writes
        b"a red fox\r\na blue whale\r\n",
        b"a red fox\n \t \n\n\na blue whale\n\n",
    ],
    ids=["spaces", "byte-order mark", "carriage return", "blank lines"],
)
def test_one_prompt_per_line(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert load_prompts(path) == ["a red fox", "a blue whale"]


def test_a_line_separator_of_unicode_is_part_of_the_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("ein Füchslein\u2028im Wald\n猫\u0085\x0b犬\n", encoding="utf-8")
    assert load_prompts(path) == ["ein Füchslein\u2028im Wald", "猫\u0085\x0b犬"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.txt", "café\n".encode("latin-1"), "UTF-8"),
        ("wide.txt", "a red fox\n".encode("utf-16"), "UTF-8"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n\t\n", "empty"),
        ("table.csv", b"prompt\na red fox\n", "one prompt per line"),
        ("list.json", b'["a red fox"]', "one prompt per line"),
        ("list.jsonl", b'{"prompt": "a red fox"}\n', "one prompt per line"),
    ],
)
def test_a_file_that_is_no_list_of_prompts(refused, tiny_sd, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused("--model", tiny_sd, "--device", "cpu", "--prompts", path)
    assert f"--prompts {path}: " in message
    assert words in message


def test_a_folder_of_prompts(refused, tiny_sd, tmp_path):
    message = refused("--model", tiny_sd, "--device", "cpu", "--prompts", tmp_path)
    assert f"--prompts {tmp_path}: " in message


def test_built_in_prompts():
    assert len(load_prompts("animals")) == 45
    imagenet = load_prompts("imagenet")
    assert len(imagenet) == 398
    assert imagenet[0] == "tench"


def test_long_prompts_are_said_once(command_line, tiny_sd, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("cat\n" + "a very long story of a red fox " * 9 + "\n")
    inputs = ["--model", tiny_sd, "--prompts", path, "--out", tmp_path / "runs"]
    done = command_line(*SHORT, *inputs)
    assert done.code == 0
    said = done.out + done.err
    assert said.count("1 of 2 prompts are cut after 16 tokens") == 1
    assert "truncated" not in said
    assert "Token indices" not in said


def test_short_prompts_are_not_said(command_line, tiny_sd, few_prompts, tmp_path):
    done = command_line(*SHORT, "--model", tiny_sd, "--prompts", few_prompts, "--out", tmp_path)
    assert "tokens" not in done.out + done.err


# ---- output folders ----


def test_an_output_folder_that_cannot_be_made(command_line, tiny_sd, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere/at/all")
    for out in (tmp_path / "file", tmp_path / "file/runs", tmp_path / "dangling", "/proc/runs"):
        done = command_line(*SHORT, "--model", tiny_sd, "--out", out)
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert line.startswith(f"error: --out {out}: ")


# ---- nothing hostile is run ----


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (TOUCH.format(str(self.path)),)


def test_a_pickle_as_checkpoint_is_refused_and_runs_no_code(command_line, tiny_sd, tmp_path):
    folder = run(ddpo_is, tmp_path, tiny_sd, iterations=1)
    marker = tmp_path / "it was run"
    state = folder / "checkpoint/state.pt"

    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # so it works
    marker.unlink()

    torch.save({"weights": Hostile(marker), "optimizer": {}, "state": {}}, state)
    done = command_line("--resume", folder)
    assert done.code == 2
    assert done.err.startswith(f"error: {state} is damaged")
    state.write_bytes(pickle.dumps(Hostile(marker)))
    done = command_line("--resume", folder)
    assert done.code == 2
    assert done.err.startswith(f"error: {state} is damaged")
    assert not marker.exists()


def test_a_pickle_as_model_is_refused_and_runs_no_code(refused, model, tmp_path):
    marker = tmp_path / "it was run"
    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    (model / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Hostile(marker)))
    refused("--model", model, "--device", "cpu")
    assert not marker.exists()


# ---- a script that a user has copied and edited ----


def copy_script(folder, script="ddpo_is"):
    folder.mkdir()
    for name in (f"{script}.py", "rewards.py"):
        shutil.copy(ROOT / name, folder)
    return folder / f"{script}.py"


def test_an_error_in_an_edited_line_keeps_its_traceback(tiny_sd, tmp_path):
    copy = copy_script(tmp_path / "mine")
    text = copy.read_text()
    line = "pipe.to(args.device)"
    assert text.count(line) == 1
    copy.write_text(text.replace(line, line + "\n    pipe.unet.config.no_such_entry"))
    done = command(copy, *SHORT, "--model", tiny_sd, "--out", tmp_path / "runs", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "pipe.unet.config.no_such_entry" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_copied_script_says_where_it_looks_for_its_model(tmp_path):
    copy = copy_script(tmp_path / "mine")
    done = command(copy.name, "--device", "cpu", cwd=copy.parent)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --model models/emoji: cannot read model_index.json")
    assert str(copy.parent) in line


def test_a_copied_script_outside_a_checkout_has_no_commit(command_line, tiny_sd, tmp_path):
    copy = copy_script(tmp_path / "mine")
    copy.rename(copy.with_stem("my_ddpo"))
    inputs = ["--model", tiny_sd, "--out", tmp_path / "runs"]
    done = command_line(*SHORT, *inputs, script="my_ddpo", folder=copy.parent)
    assert done.code == 0
    assert "fatal" not in done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("my_ddpo__compress__s1__")
    assert read_args(folder)["git"] == ""
    assert (folder / "my_ddpo.py").read_text() == (ROOT / "ddpo_is.py").read_text()


def test_a_run_without_git_has_no_commit(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = run(ddpo_is, tmp_path / "runs", tiny_sd, iterations=1)
    assert read_args(folder)["git"] == ""


# ---- any combination of flags ----

FLAGS = {
    "--num-samples": [4, 8, 8, 12, 6, 0],
    "--num-steps": [1, 2, 3, 5, 400],
    "--num-updates": [1, 2, 2, 4, 3],
    "--micro-batch": [0, 1, 3, 100, -1],
    "--guidance-scale": [0, 1, 5, 7.5, "nan"],
    "--lr": [1e-5, 1e-3, 0.1, 0, "inf"],
    "--weight-decay": [0, 0.1, 1, -1],
    "--adam-eps": [0, 1e-8, "nan"],
    "--max-grad-norm": [1e-3, 1, 1e29, 1e31],
    "--lora-rank": [0, 1, 4, -2],
    "--precision": ["auto", "fp32", "fp16", "bf16"],
    "--seed": [0, 7, 2**63 - 1, 2**63],
    "--save-every": [1, 2, 9, 0],
    "--reward": ["compress", "compress + 0.5*incompress", "-2e3*compress", "beauty", "0*"],
}
OF_ONE_SCRIPT = {
    "ddpo_sf": {"--adv-clip": [1e-3, 5, "inf", -1]},
    "ddpo_is": {"--clip-range": [1e-9, 1e-4, 10, 0]},
    "ddpo_iskl": {"--kl-coef": [0, 0.01, 100, -1], "--kl": ["exact", "squared"]},
    "rwr": {"--beta": [0, 10, 1e6, -1], "--samples-per-prompt": [2, 4, 1]},
    "rwr_sparse": {"--quantile": [0, 0.5, 1, 2], "--threshold": [-9, 0, 1e9, "nan"]},
}


def values_of(flags):
    return {name: st.sampled_from(values) for name, values in flags.items()}


@st.composite
def command_lines(draw):
    """A script and up to six of its flags."""
    script = draw(st.sampled_from(SCRIPTS))
    strategies = values_of(FLAGS | OF_ONE_SCRIPT[script])
    names = draw(st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=6))
    words = []
    for name in names:
        words += [name, str(draw(strategies[name]))]
    return script, words


def test_any_combination_of_flags_is_refused_or_runs(command_line, tiny_sd, few_prompts, tmp_path):
    inputs = [*SHORT, "--model", tiny_sd, "--prompts", few_prompts]
    codes = []

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def try_one(case):
        script, words = case
        out = tmp_path / str(len(codes))
        done = command_line(*inputs, "--out", out, *words, script=script)
        codes.append(done.code)
        if done.code == 0:
            (folder,) = out.iterdir()
            rows = read_metrics(folder)
            assert [row["iteration"] for row in rows] == [0, 1, 2]
            assert all(np.isfinite(list(row.values())).all() for row in rows)
            assert (folder / "checkpoint/state.pt").exists()
        else:
            assert done.code == 2
            assert len(done.err.splitlines()) == 1, done.err
            assert done.err.startswith("error: ")

    try_one()
    assert codes.count(0) > 5
    assert codes.count(2) > 5
