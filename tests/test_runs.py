"""The scripts as a user runs them: files, exit codes, resume, signals, and the saved weights in diffusers."""

import ast
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, embed, read_args, read_metrics
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse
from rewards import RewardError

SCRIPTS = [ddpo_is, ddpo_sf, ddpo_iskl, rwr, rwr_sparse]
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
SMALL = dict(num_samples=4, num_steps=5, iterations=2, save_every=2, device="cpu")
TIMES = {"sample_s", "reward_s", "train_s", "images_per_s", "peak_mem_gb"}


def run(out, model, script=ddpo_is, **changes):
    options = SMALL | dict(out=str(out), model=model) | changes
    return script.main(script.Args(**options))


def command(*words, cwd=ROOT, timeout=300):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def weights(folder):
    return load_file(Path(folder) / "checkpoint/state.safetensors")


def without_times(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder)]


def test_the_command_line_leaves_a_whole_run_folder(tiny_sd, tmp_path):
    flags = ["--model", tiny_sd, "--num-samples", 4, "--num-steps", 10, "--iterations", 3, "--save-every", 2]
    done = command("ddpo_is.py", "--reward", "compress", "--out", tmp_path, "--device", "cpu", *flags)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("ddpo_is__compress__s1__")
    lines = done.stdout.splitlines()
    assert "on cpu in fp32" in lines[0]
    assert lines[1] == "4 samples; 2 updates of 20 pairs, 64 at a time"
    assert any(line.startswith("iteration 3/3: reward") for line in lines)
    assert "->" in lines[-1] and str(folder) in lines[-1]

    about = read_args(folder)
    assert about["script"] == "ddpo_is" and about["args"]["lora_rank"] == 0 and about["args"]["num_steps"] == 10
    assert "--num-samples 4" in about["command"] and torch.__version__.startswith(about["versions"]["torch"])
    for name in ("ddpo_is.py", "rewards.py"):
        assert (folder / name).read_text() == (ROOT / name).read_text()

    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3] and [row["samples"] for row in rows] == [0, 4, 8, 12]
    trained = "reward_mean reward_std loss grad_norm ratio_err approx_kl clipfrac skipped".split()
    for row in rows[1:]:
        assert {*trained, *TIMES} <= row.keys()
        assert row["ratio_err"] < 1e-5 and row["skipped"] == 0 and row["grad_norm"] > 0
    assert [("eval_reward" in row, "eval_diversity" in row) for row in rows] == [(b, b) for b in (1, 0, 1, 1)]
    assert [p.name for p in sorted((folder / "images").iterdir())] == ["0000.png", "0002.png", "0003.png"]
    assert Image.open(folder / "images/0000.png").size == (16 * 16, 2 * 16)
    assert Image.open(folder / "trajectory/0003.png").size == (6 * 16, 16)
    before_after = np.asarray(Image.open(folder / "before_after.png"))
    assert (before_after[:16] == np.asarray(Image.open(folder / "images/0000.png"))[:16]).all()
    assert (before_after[16:] == np.asarray(Image.open(folder / "images/0003.png"))[:16]).all()


@every_script
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_saved_weights_load_in_diffusers_and_change_the_picture(tiny_sd, tmp_path, lora_rank, script):
    folder = run(tmp_path, tiny_sd, script, lora_rank=lora_rank, lr=1e-2)

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(0)
        return pipe("cat", num_inference_steps=5, generator=g, output_type="np").images[0]

    def load():
        return StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)

    before, pipe = draw(load()), load()
    if lora_rank:
        pipe.load_lora_weights(folder / "lora")
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert np.abs(draw(pipe) - before).mean() > 1e-3
    # and it predicts what the policy of the checkpoint predicts
    args = script.Args(model=tiny_sd, device="cpu", precision="fp32", lora_rank=lora_rank)
    policy, params = script.load_model(args)
    script.load_checkpoint(folder, params, torch.optim.AdamW(params.values()))
    x, t, embeds = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(x, t, embeds).sample, policy.unet(x, t, embeds).sample)


@every_script
def test_the_policy_is_guided_by_the_prompts_that_are_scored(tiny_sd, tmp_path, monkeypatch, script):
    """The text embeddings of the sampler: empty prompts first, then each sample's own."""
    seen, name = [], "compute_weights" if hasattr(script, "compute_weights") else "compute_advantages"
    sample, algorithm = script.sample_trajectories, getattr(script, name)
    monkeypatch.setattr(script, "sample_trajectories", lambda unet, x, *rest: seen.append(x) or sample(unet, x, *rest))
    monkeypatch.setattr(script, name, lambda rewards, x, *rest: seen.append(x) or algorithm(rewards, x, *rest))
    run(tmp_path, tiny_sd, script, num_samples=8, num_steps=2, iterations=1)
    _, embeds, prompts, _ = seen  # evaluation, sampling, training, evaluation
    assert len(prompts) == 8 and len(set(prompts)) > 1
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    torch.testing.assert_close(embeds, embed(pipe, prompts))


@every_script
def test_same_seed_same_bits_and_another_seed_another_run(tiny_sd, tmp_path, script):
    a, b, c = (run(tmp_path / str(i), tiny_sd, script, seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert without_times(a) == without_times(b) != without_times(c)
    first, second, third = weights(a), weights(b), weights(c)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], third[k]) for k in first)
    # evaluation noise does not depend on the seed: the pretrained model scores the same
    assert read_metrics(a)[0] == read_metrics(c)[0]


@every_script
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_resume_equals_uninterrupted(tiny_sd, tmp_path, lora_rank, script):
    options = dict(script=script, lora_rank=lora_rank, lr=1e-3, num_samples=8, num_steps=3, save_every=10)
    straight = run(tmp_path / "a", tiny_sd, iterations=6, **options)
    half = run(tmp_path / "b", tiny_sd, iterations=3, **options)
    assert not torch.equal(*(weights(f)[first_weight(half)] for f in (straight, half)))
    assert run(tmp_path / "b", tiny_sd, iterations=6, resume=str(half), **options) == half
    a, b = weights(straight), weights(half)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda rows: [{k: v for k, v in row.items() if not k.startswith("eval")} for row in rows]
    assert strip(without_times(straight)) == strip(without_times(half))
    assert without_times(straight)[-1] == without_times(half)[-1]


def first_weight(folder):
    return next(k for k in weights(folder) if k.startswith("param."))


def test_micro_batch_changes_nothing_but_rounding(tiny_sd, tmp_path):
    a, b = (run(tmp_path / str(m), tiny_sd, micro_batch=m, lr=1e-4) for m in (1, 64))
    for x, y in zip(without_times(a), without_times(b)):
        assert x["samples"] == y["samples"]
        for name in x.keys() & {"reward_mean", "eval_reward", "loss"}:
            assert x[name] == pytest.approx(y[name], rel=1e-3, abs=1e-5)


def test_a_constant_reward_moves_nothing_but_weight_decay(tiny_sd, tmp_path):
    path = tmp_path / "constant.py"
    path.write_text("import numpy as np\ndef constant(images, prompts):\n    return np.full(len(images), 2.3)\n")
    folder = run(tmp_path / "runs", tiny_sd, reward=f"{path}:constant", weight_decay=0.1, lr=1e-2)
    start = UNet2DConditionModel.from_pretrained(Path(tiny_sd) / "unet").state_dict()
    for name, p in UNet2DConditionModel.from_pretrained(folder / "unet").state_dict().items():
        torch.testing.assert_close(p, start[name] * (1 - 1e-2 * 0.1) ** 4, rtol=1e-5, atol=1e-8)


def test_a_reward_that_breaks_stops_the_run_with_its_name_the_sample_and_the_place(tiny_sd, tmp_path):
    path = tmp_path / "broken.py"
    lines = ["def broken(images, prompts):", "r = images.mean((1, 2, 3))", "r[1] = float('nan')", "return r"]
    path.write_text("\n    ".join(lines) + "\n\ndef raises(images, prompts):\n    return images.brightness\n")
    with pytest.raises(RewardError, match="reward '.*broken' is nan for sample 1"):
        run(tmp_path / "runs", tiny_sd, reward=f"{path}:broken")
    flags = ["--model", tiny_sd, "--num-samples", 4, "--num-steps", 2, "--out", tmp_path, "--device", "cpu"]
    done = command("ddpo_is.py", "--reward", f"{path}:raises", *flags)
    assert done.returncode == 1 and "return images.brightness" in done.stderr  # the user's own line
    assert re.search("RewardError: reward '.*raises' failed for .*brightness", done.stderr.strip().splitlines()[-1])


def test_updates_that_are_not_finite_are_skipped_and_then_stop_the_run(tiny_sd, tmp_path, monkeypatch):
    real = ddpo_is.compute_loss

    def infinite(*inputs):
        loss, info = real(*inputs)
        return loss * float("inf"), info

    monkeypatch.setattr(ddpo_is, "compute_loss", infinite)
    folder = run(tmp_path / "a", tiny_sd)
    start = UNet2DConditionModel.from_pretrained(Path(tiny_sd) / "unet").state_dict()
    end = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert all(torch.equal(start[k], end[k]) for k in start)
    assert [row["skipped"] for row in read_metrics(folder)[1:]] == [1, 1]
    with pytest.raises(SystemExit, match="10 updates in a row"):
        run(tmp_path / "b", tiny_sd, iterations=6)


def test_sigint_saves_and_the_printed_command_resumes(tiny_sd, tmp_path):
    words = ["ddpo_is.py", "--model", tiny_sd, "--num-samples", "4", "--num-steps", "5", "--out", str(tmp_path)]
    words += ["--iterations", "500", "--save-every", "400", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("iteration 2/"):
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    resume = lines[-1].strip()
    assert resume.startswith("go on with: python ddpo_is.py") and "--resume" in resume
    (folder,) = tmp_path.iterdir()
    last = read_metrics(folder)[-1]
    assert 2 <= last["iteration"] < 500 and "eval_reward" in last
    again = resume.removeprefix("go on with: python ")
    again = again.replace("--iterations 500", f"--iterations {last['iteration'] + 1:.0f}")
    done = command(*again.split())
    assert done.returncode == 0, done.stderr
    assert read_metrics(folder)[-1]["iteration"] == last["iteration"] + 1


def test_a_run_killed_while_saving_keeps_a_whole_checkpoint(tiny_sd, tmp_path, monkeypatch):
    folder = run(tmp_path, tiny_sd)
    whole = weights(folder)
    monkeypatch.setattr(ddpo_is, "save_file", lambda tensors, path, metadata: Path(path).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, tiny_sd, iterations=4, resume=str(folder))
    assert read_metrics(folder)[-1]["iteration"] == 4  # the rows are written before the weights
    assert all(torch.equal(whole[k], v) for k, v in weights(folder).items())


def test_weights_that_are_not_finite_are_never_saved(tiny_sd, tmp_path):
    args = ddpo_is.Args(model=tiny_sd, device="cpu", precision="fp32", lora_rank=0)
    pipe, params = ddpo_is.load_model(args)
    next(iter(params.values())).data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        ddpo_is.save_checkpoint(tmp_path, pipe.unet, params, torch.optim.AdamW(params.values()), {}, args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lora_trains_in_half_precision_with_float32_weights(tiny_sd, tmp_path, precision):
    folder = run(tmp_path, tiny_sd, lora_rank=4, precision=precision, lr=1e-2, num_steps=2, iterations=1)
    saved = weights(folder)
    assert all(v.dtype == torch.float32 for k, v in saved.items() if k.startswith("param."))
    assert any(v.abs().max() > 0 for k, v in saved.items() if "lora_B" in k)  # B starts at 0
    assert read_metrics(folder)[-1]["skipped"] < 1


def test_the_weights_and_biases_log_holds_every_row(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    folder = run(tmp_path / "runs", tiny_sd, track=True)
    wandb.finish()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    assert folder.name.encode() in written and b"eval_reward" in written and b"ratio_err" in written


def test_too_much_rounding_is_said_once(tiny_sd, tmp_path, monkeypatch, capsys):
    real = ddpo_is.predict_noise
    calls = []

    def rounded(*args):  # from the second iteration on, training is not what sampling was
        calls.append(torch.is_grad_enabled())
        return real(*args) * (1 + 0.01 * (calls[-1] and sum(calls) > 2))

    monkeypatch.setattr(ddpo_is, "predict_noise", rounded)
    folder = run(tmp_path, tiny_sd, iterations=4)
    assert [row["ratio_err"] > 1e-5 for row in read_metrics(folder)[1:]] == [False, True, True, True]
    assert capsys.readouterr().out.count("over a tenth of the clip range") == 1


def test_a_grid_is_at_most_2048_pixels_wide(tiny_sd, tmp_path):
    args = ddpo_is.Args(model=tiny_sd, device="cpu", num_steps=1)
    prompts, schedule, _ = ddpo_is.resolve(args)
    pipe, _ = ddpo_is.load_model(args)
    score = lambda images, prompts: (images.mean((1, 2, 3)), {})
    ddpo_is.evaluate(pipe, tmp_path, 0, prompts, score, None, schedule, (4, 72, 72), args)  # 144 px, 16 in a row
    assert Image.open(tmp_path / "images/0000.png").size == (2048, 256)
    assert Image.open(tmp_path / "trajectory/0000.png").size == (6 * 144, 144)


def test_prompts_come_from_a_file_and_imagenet(tiny_sd, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\n\n  a blue whale \n")
    load = lambda prompts: ddpo_is.resolve(ddpo_is.Args(model=tiny_sd, device="cpu", prompts=prompts))[0]
    assert load(str(tmp_path / "prompts.txt")) == ["a red fox", "a blue whale"]
    imagenet = load("imagenet")
    assert len(imagenet) == 398 and imagenet[0] == "tench" and len(load("animals")) == 45
    folder = run(tmp_path, tiny_sd, prompts=str(tmp_path / "prompts.txt"))
    assert Image.open(folder / "images/0000.png").size == (2 * 16, 2 * 16)


def test_a_sum_of_rewards_logs_its_parts(tiny_sd, tmp_path, brightness):
    row = read_metrics(run(tmp_path, tiny_sd, reward=f"incompress + 0.5*{brightness}"))[-1]
    assert row["reward_mean"] == pytest.approx(row["reward_incompress"] + 0.5 * row["reward_brightness"], rel=1e-4)


@every_script
def test_every_flag_has_help(script):
    """A comment beside every field, and what tyro makes of it."""
    text = Path(script.__file__).read_text()
    (args,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    done = command(f"{script.__name__}.py", "--help")
    help_text = "".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 0 and len(args.body) == len(script.Args.__dataclass_fields__)
    for field in args.body:
        _, comment = text.splitlines()[field.lineno - 1].split("  # ")
        assert f"--{field.target.id.replace('_', '-')}" in help_text
        assert len(comment) > 10 and "".join(comment.split()) in help_text


def refused(capsys, tmp_path, **changes):
    """What the one line on stderr says; nothing else happened: no run folder, no traceback, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(changes.pop("out", tmp_path / "runs"), changes.pop("model"), **changes)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: ")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    return lines[-1]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(reward="beauty"), ["beauty", "compress", "aesthetic"]),
        (dict(reward="compress + 0.5*"), ["compress"]),
        (dict(prompts="nowhere.txt"), ["nowhere.txt"]),
        (dict(num_samples=5), ["--num-samples 5", "2 equal shares"]),
        (dict(lr=0.0), ["--lr 0.0"]),
        (dict(lr=-1e-3), ["--lr -0.001"]),
        (dict(lr=float("nan")), ["--lr nan"]),
        (dict(iterations=0), ["--iterations 0"]),
        (dict(num_steps=1000), ["--num-steps 1000", "999"]),
        (dict(seed=-1), ["--seed -1"]),
        (dict(device="tpu9"), ["tpu9"]),
        (dict(adam_betas=(0.9, 1.0)), ["beta", "1.0"]),
        (dict(micro_batch=-4), ["--micro-batch -4"]),
        (dict(weight_decay=-0.1), ["--weight-decay -0.1"]),
        (dict(max_grad_norm=0.0), ["--max-grad-norm 0.0"]),
        (dict(lora_rank=-1), ["--lora-rank -1"]),
        (dict(model="no/such-model"), ["no/such-model", "model_index.json"]),
        (dict(resume="nowhere"), ["nowhere"]),
    ],
)
def test_bad_input_gets_one_line(tiny_sd, tmp_path, capsys, changes, words):
    message = refused(capsys, tmp_path, **(dict(model=tiny_sd) | changes))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "script, changes, words",
    [
        *((script, dict(lr=0.0), ["--lr 0.0"]) for script in SCRIPTS[1:]),
        *((script, dict(reward="beauty"), ["beauty", "compress"]) for script in SCRIPTS[1:]),
        *((script, dict(model="no/such-model"), ["no/such-model", "model_index.json"]) for script in SCRIPTS[1:]),
        (ddpo_sf, dict(num_samples=6), ["--num-samples 6", "4 equal shares"]),
        (ddpo_iskl, dict(clip_range=0.0), ["--clip-range 0.0"]),
        (ddpo_iskl, dict(kl_coef=-1.0), ["--kl-coef -1.0"]),
        (rwr, dict(num_samples=6), ["--num-samples 6", "4 per prompt"]),
        (rwr, dict(samples_per_prompt=0), ["--samples-per-prompt 0"]),
        (rwr, dict(samples_per_prompt=1), ["--samples-per-prompt 1", "nothing is learned"]),
        (rwr, dict(beta=-1.0), ["--beta -1.0"]),
        (rwr, dict(beta=float("nan")), ["--beta nan"]),
        (rwr_sparse, dict(quantile=90.0), ["--quantile 90.0"]),
        (rwr_sparse, dict(num_samples=6), ["--num-samples 6", "4 per prompt"]),
        (rwr_sparse, dict(samples_per_prompt=1), ["--samples-per-prompt 1", "nothing is learned"]),
    ],
)
def test_what_each_script_refuses(tiny_sd, tmp_path, capsys, script, changes, words):
    message = refused(capsys, tmp_path, **(dict(model=tiny_sd, script=script) | changes))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "script, changes",
    [
        (rwr, dict(beta=0.0)),
        (rwr, dict(num_updates=3)),  # not a divisor of 16: every update takes all samples
        (rwr_sparse, dict(threshold=-2.0, samples_per_prompt=1)),
        (ddpo_iskl, dict(kl_coef=0.0)),
    ],
)
def test_what_may_be_asked_for(tiny_sd, script, changes):
    script.resolve(script.Args(model=str(tiny_sd), device="cpu", **changes))


def test_bad_files_and_folders_get_one_line(tiny_sd, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert "empty" in refused(capsys, tmp_path, model=tiny_sd, prompts=str(tmp_path / "empty.txt"))
    (tmp_path / "folder").mkdir()
    assert "model_index.json" in refused(capsys, tmp_path, model=str(tmp_path / "folder"))
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, tmp_path, model=tiny_sd, out=str(tmp_path / "file"))
    index = tmp_path / "folder/model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "FluxPipeline" in refused(capsys, tmp_path, model=str(tmp_path / "folder"))


def test_resume_of_a_run_of_another_script_gets_one_line(tiny_sd, tmp_path, capsys):
    folder = run(tmp_path, tiny_sd)
    message = refused(capsys, tmp_path / "x", model=tiny_sd, script=rwr, resume=str(folder))
    assert "with script ddpo_is, not rwr" in message


def test_resume_of_another_run_gets_one_line(tiny_sd, tmp_path, capsys):
    folder = run(tmp_path, tiny_sd)
    assert "lr" in refused(capsys, tmp_path, model=tiny_sd, resume=str(folder), lr=1e-2)
    about = read_args(folder)
    (folder / "args.json").write_text(json.dumps(about | {"script": "rwr"}))
    assert "script rwr" in refused(capsys, tmp_path, model=tiny_sd, resume=str(folder))


def test_resume_without_a_checkpoint_gets_one_line(tiny_sd, tmp_path, capsys):
    folder = run(tmp_path, tiny_sd)
    (folder / "checkpoint/state.safetensors").unlink()
    assert "state.safetensors" in refused(capsys, tmp_path / "x", model=tiny_sd, resume=str(folder))


def test_an_unknown_flag_and_a_bad_value_exit_with_2():
    for words in (["--learning-rate", "1"], ["--lr", "fast"], ["--precision", "fp8"]):
        done = command("ddpo_is.py", *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
