"""What would be wrong without a word is refused in one line; a library's error says the rest."""

import json
import shutil

import pytest
import torch
from conftest import load_policy, read_args, run
from diffusers import UNet2DConditionModel

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse

SCRIPTS = [ddpo_sf, ddpo_is, ddpo_iskl, rwr, rwr_sparse]
DDPO = SCRIPTS[:3]


def name_of(script):
    return script.__name__


every_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)


def refused(script, out, model, **changes):
    """What is said at the end of a run that must not begin."""
    with pytest.raises(SystemExit) as stop:
        run(script, out, model, **changes)
    assert not list(out.iterdir())
    return stop.value.code


# ---- numbers ----


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan")])
@pytest.mark.parametrize(
    ("name", "scripts"),
    [
        ("lr", SCRIPTS),
        ("max_grad_norm", SCRIPTS),
        ("adv_clip", DDPO),
        ("clip_range", [ddpo_is, ddpo_iskl]),
    ],
)
def test_a_number_that_is_not_above_0(tiny_sd, tmp_path, name, scripts, value):
    for script in scripts:
        message = refused(script, tmp_path, tiny_sd, **{name: value})
        assert message == f"error: {name} must be greater than 0"


@pytest.mark.parametrize(
    ("scripts", "changes", "message"),
    [
        (DDPO, {"num_samples": 9, "num_updates": 2}, "a multiple of updates x processes"),
        ([rwr, rwr_sparse], {"num_samples": 6}, "a multiple of --samples-per-prompt"),
        ([rwr, rwr_sparse], {"samples_per_prompt": 1}, "must be 2 or more"),
        ([rwr_sparse], {"samples_per_prompt": 1, "threshold": 1.0}, "must be 2 or more"),
    ],
)
def test_samples_that_do_not_divide(tiny_sd, tmp_path, scripts, changes, message):
    for script in scripts:
        assert message in refused(script, tmp_path, tiny_sd, **changes)


def test_samples_that_do_not_divide_among_processes(tiny_sd, tmp_path, monkeypatch):
    """8 samples are 2 updates of 4, and no share for each of three processes."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda timeout: None)
    for script in SCRIPTS:
        assert "processes" in refused(script, tmp_path, tiny_sd, num_samples=8)


# ---- models ----


@every_script
def test_another_kind_of_pipeline(tiny_sd, tmp_path, script):
    """SDXL's UNet takes inputs that the scripts do not have."""
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLPipeline"
    (model / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "runs").mkdir()
    message = refused(script, tmp_path / "runs", model)
    assert message == f"error: --model {model}: it is a StableDiffusionXLPipeline"


def test_a_pickle_as_model_is_not_read(tiny_sd, tmp_path):
    """Unpickling it would run its code."""
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    (weights,) = (model / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({}, model / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        load_policy(ddpo_is, model)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_model_of_nan_ends_at_row_0(tiny_sd, tmp_path, value):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    unet.conv_out.bias.data[0] = value
    unet.save_pretrained(model / "unet")
    with pytest.raises(FloatingPointError, match="use --precision fp32 or a lower --lr"):
        run(ddpo_is, tmp_path / "runs", model, precision="fp16")
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "checkpoint.pt").exists()


# ---- prompts ----


@pytest.mark.parametrize("content", ["cat\ndog\n", "cat\r\ndog", "\n\n cat \n\t\ndog\n\n"])
def test_one_prompt_per_line(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())  # as Windows' editors begin a file
    assert ddpo_is.load_prompts(str(path)) == ["cat", "dog"]


def test_a_line_separator_of_unicode_is_part_of_a_prompt_also_after_a_resume(tmp_path, tiny_sd):
    prompts = ["a cat\u2028and a dog", "b\u0085ee", "ein M\u00e4uschen"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts), encoding="utf-8")
    folder = run(ddpo_is, tmp_path / "runs", tiny_sd, prompts=str(path), iterations=0)
    assert ddpo_is.load_prompts(ddpo_is.load_args(folder).prompts) == prompts


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.JSONL", "a.json", "A.Csv", "empty.txt", "blank.txt"]
)
def test_a_file_that_is_no_list_of_prompts(tmp_path, name):
    path = tmp_path / name
    contents = {"empty.txt": "", "blank.txt": " \n\n"}
    path.write_text(contents.get(name, "prompt\ncat\n"))
    with pytest.raises(SystemExit, match="write one prompt per line"):
        ddpo_is.load_prompts(str(path))


def test_built_in_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    animals = ddpo_is.load_prompts("animals")
    assert len(set(animals)) == 45
    assert animals[:3] == ["cat", "dog", "horse"]
    assert len(set(ddpo_is.load_prompts("imagenet_animals"))) == 398


# ---- what the libraries say ----


def test_a_reward_that_fails_is_named_and_the_run_is_kept(tiny_sd, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def broken(images, prompts):\n    return [1 / 0 for _ in prompts]\n")
    with pytest.raises(ValueError, match="broken.py:broken' failed for .* ZeroDivisionError"):
        run(rwr, tmp_path / "runs", tiny_sd, reward=f"{path}:broken")


def test_a_checkpoint_of_another_rank_or_a_damaged_one_is_not_loaded(tiny_sd, tmp_path):
    folder = run(ddpo_is, tmp_path, tiny_sd, iterations=0, lora_rank=2)
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        ddpo_is.main(ddpo_is.Args(resume=str(folder), lora_rank=4))
    assert read_args(folder)["args"]["lora_rank"] == 2  # the run keeps its flags
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[:1000])
    with pytest.raises(RuntimeError, match="failed|corrupt|invalid"):
        ddpo_is.main(ddpo_is.Args(resume=str(folder), iterations=1))
