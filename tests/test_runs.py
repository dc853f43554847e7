"""Whole runs, as a user starts, stops and continues them: files, resume, signals, processes."""

import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TIMES,
    command,
    embed,
    load_policy,
    read_args,
    read_metrics,
    run,
    without_times,
)
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from PIL import Image
from safetensors.torch import load_file, save_file

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse

SCRIPTS = [ddpo_sf, ddpo_is, ddpo_iskl, rwr, rwr_sparse]


def name_of(script):
    return script.__name__


every_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
full_and_lora = pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])

BRIGHTNESS = "def brightness(images, prompts):\n    return images.mean((1, 2, 3)) / 2.55\n"
# A reward that does something to its own process when its pictures are those of iteration 4. The
# reward is called for row 0, then once per iteration, and at iteration 3 for the evaluation too.
ACTING = """
import os
import signal
import subprocess
import time
from pathlib import Path

calls = 0


def brightness(images, prompts):
    global calls
    calls += 1
    if calls == 6:
        act()
    return images.mean((1, 2, 3)) / 2.55


def act():
    {}
"""


@pytest.fixture(autouse=True)
def signals():
    """Put back the handlers of the signals that a run catches."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_sd):
    """A run of six iterations with a checkpoint in the middle; the prompts' histories fill up."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("cat\na red fox\n")
    (folder / "reward.py").write_text(BRIGHTNESS)
    return {
        "model": tiny_sd,
        "prompts": str(folder / "prompts.txt"),
        "reward": f"{folder / 'reward.py'}:brightness",
        "num_samples": 8,
        "num_steps": 4,
        "iterations": 6,
        "save_every": 3,
        "lr": 1e-3,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory, options):
    """straight(script, ...): the folder of an uninterrupted run, which is made once."""
    made = {}

    def make(script, **changes):
        key = (script.__name__, *sorted(changes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("straight")
            made[key] = run(script, out, **options | changes)
        return made[key]

    return make


@pytest.fixture
def half(tmp_path, options, tmp_path_factory):
    """half(script, ...): the folder of a run that has done three of its six iterations."""

    def make(script, **changes):
        return run(script, tmp_path / "half", **options | {"iterations": 3} | changes)

    return make


@pytest.fixture
def command_line(capsys, monkeypatch):
    """Run a script as `python SCRIPT WORDS` does, but in this process, which takes no start."""

    def start(*words, script=ddpo_is):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return start


def flags(**options):
    """The words of a command line."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def resume(script, folder, *words):
    return script.main(script.parse_args(["--resume", str(folder), *map(str, words)]))


def load_state(folder):
    return torch.load(Path(folder) / "checkpoint/state.pt", weights_only=True)


def weights(folder):
    return load_state(folder)["weights"]


def assert_same_run(folder, other):
    """Metrics but for times, weights, optimizer and rewards of before: equal to the last bit."""
    assert without_times(folder) == without_times(other)
    state = load_state(folder)
    other_state = load_state(other)
    assert state["weights"].keys() == other_state["weights"].keys()
    for name, value in state["weights"].items():
        assert torch.equal(value, other_state["weights"][name]), name
    moments = state["optimizer"]["state"]
    other_moments = other_state["optimizer"]["state"]
    assert moments.keys() == other_moments.keys()
    for number, moment in moments.items():
        for name, value in moment.items():
            assert torch.equal(value, other_moments[number][name]), (number, name)
    assert state["state"].get("history") == other_state["state"].get("history")


# ---- real processes, which start at once: forks of a server that has imported the scripts ----


def work(script, words, environment, output):
    """What a process does: `python SCRIPT WORDS`, with stdout and stderr in files."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Run:
    """A script in a process of its own."""

    def __init__(self, script, words, output, **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ddpo_is", "wandb"])
        words = [str(word) for word in words]
        inputs = (f"{script.__name__}.py", words, environment, str(output))
        self.output = output
        self.process = context.Process(target=work, args=inputs, daemon=True)
        self.process.start()

    def wait(self, timeout=120):
        """Its exit code; a process that hangs is a failure."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            pytest.fail(f"no end after {timeout} s: {self.out}{self.err}")
        return self.process.exitcode

    @property
    def out(self):
        return self.read("out")

    @property
    def err(self):
        return self.read("err")

    def read(self, name):
        path = Path(f"{self.output}.{name}")
        return path.read_text() if path.exists() else ""


def processes(script, words, output, count=2):
    """What torchrun starts: `count` processes that know each other. Waits for all of them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    runs = []
    for rank in range(count):
        environment = {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        runs.append(Run(script, words, f"{output}.{rank}", **environment))
    for one in runs:
        one.wait()
    return runs


# ---- files ----


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, tiny_sd, few_prompts):
    """smoke(script): what the command line of a short run printed, and its folder."""
    made = {}

    def make(script):
        if script not in made:
            out = tmp_path_factory.mktemp("smoke")
            words = flags(model=tiny_sd, prompts=few_prompts, out=out, device="cpu")
            words += flags(num_samples=4, num_steps=10, iterations=3, save_every=2)
            done = command(f"{script.__name__}.py", "--reward", "compress", *words)
            assert done.returncode == 0, done.stderr
            (folder,) = out.iterdir()
            made[script] = (done, folder)
        return made[script]

    return make


@pytest.mark.smoke
@every_script
def test_the_command_line_leaves_a_whole_run_folder(smoke, tiny_sd, script):
    done, folder = smoke(script)
    name = script.__name__
    assert re.fullmatch(rf"{name}__compress__s1__\d{{8}}-\d{{6}}", folder.name)

    # what is printed: the batch arithmetic, a line per iteration, the result; and nothing else
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert lines[0] == f"{tiny_sd} on 1 x cpu in fp32"
    assert lines[1].startswith("4 samples of 10 steps; ")
    assert lines[2].startswith("full fine-tuning: 0.06 M of 0.1 M parameters")
    assert [line.partition(":")[0] for line in lines[3:6]] == [
        "iteration 1",
        "iteration 2",
        "iteration 3",
    ]
    assert lines[6].startswith("compress: ")
    assert lines[6].endswith(f"on fixed prompts and noise; see {folder}")
    assert len(lines) == 7

    # design.md, section 7
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            "args.json",
            "before_after.png",
            "checkpoint",
            "images",
            "metrics.csv",
            "prompts.txt",
            "rewards.py",
            f"{name}.py",
            "trajectory",
            "unet",
        ]
    )
    for source in (f"{name}.py", "rewards.py"):
        assert (folder / source).read_text() == (ROOT / source).read_text()
    assert (folder / "prompts.txt").read_text() == "cat\ndog\na red fox\nbee\n"
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["state.pt"]

    metadata = read_args(folder)
    assert metadata["script"] == name
    assert metadata["args"]["model"] == tiny_sd
    assert metadata["args"]["lora_rank"] == 0
    assert metadata["args"]["precision"] == "fp32"
    assert metadata["args"].keys() == script.Args.__dataclass_fields__.keys()
    assert metadata["command"].startswith(f"{name}.py --reward compress --model ")
    assert re.fullmatch("[0-9a-f]{40}", metadata["git"])
    assert metadata["versions"]["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{64}", metadata["weights"])


@every_script
def test_the_rows_of_metrics(smoke, script):
    _, folder = smoke(script)
    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert [row["samples"] for row in rows] == [0, 4, 8, 12]
    evaluated = ["eval_reward" in row for row in rows]
    assert evaluated == [True, False, True, True]
    for row in rows:
        assert ("eval_reward_se" in row) == ("eval_reward" in row)
        assert ("eval_diversity" in row) == ("eval_reward" in row)

    trained = {"reward_mean", "reward_std", "loss", "grad_norm", "skipped", *TIMES}
    own = {
        "ddpo_sf": {"ratio_err", "approx_kl", "clipfrac"} - {"approx_kl", "clipfrac"},
        "ddpo_is": {"ratio_err", "approx_kl", "clipfrac"},
        "ddpo_iskl": {"ratio_err", "approx_kl", "clipfrac", "kl_ref", "kl_penalty"},
        "rwr": {"mse"},
        "rwr_sparse": {"mse", "threshold", "passed"},
    }
    for row in rows[1:]:
        assert trained | own[script.__name__] <= row.keys()
        assert all(np.isfinite(list(row.values())))
        assert row["skipped"] == 0
        assert row["grad_norm"] > 0
        assert row.get("ratio_err", 0) < 1e-5


@every_script
def test_the_pictures_of_a_run(smoke, script):
    _, folder = smoke(script)
    names = ["0000.png", "0002.png", "0003.png"]
    assert sorted(path.name for path in (folder / "images").iterdir()) == names
    assert sorted(path.name for path in (folder / "trajectory").iterdir()) == names
    grids = {}
    for name in names:
        grids[name] = np.asarray(Image.open(folder / "images" / name))
        assert grids[name].shape == (2 * 16, 4 * 16, 3)
        assert Image.open(folder / "trajectory" / name).size == (6 * 16, 16)
    before_after = np.asarray(Image.open(folder / "before_after.png"))
    assert (before_after[:16] == grids["0000.png"][:16]).all()
    assert (before_after[16:] == grids["0003.png"][:16]).all()


def test_a_quiet_start_with_the_embedded_model(few_prompts, tmp_path):
    """None of diffusers' and transformers' notices, no progress bar where there is no terminal."""
    words = flags(prompts=few_prompts, out=tmp_path, device="cpu")
    words += flags(num_samples=2, num_steps=2, iterations=1)
    done = command("ddpo_is.py", *words)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"{ROOT / 'models/emoji'} on 1 x cpu in fp32"
    assert len(lines) == 5
    (folder,) = tmp_path.iterdir()
    assert read_args(folder)["args"]["model"] == "models/emoji"
    assert read_metrics(folder)[-1]["eval_align"] > 0


@every_script
@full_and_lora
def test_saved_weights_load_in_diffusers_and_predict_what_the_policy_predicts(
    straight, options, script, lora_rank
):
    folder = straight(script, lora_rank=lora_rank)
    pipe = StableDiffusionPipeline.from_pretrained(options["model"], safety_checker=None)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    inputs = (latents, torch.tensor([500, 20]), embed(pipe, ["cat", "dog"])[1])
    with torch.no_grad():
        pretrained = pipe.unet(*inputs).sample
        if lora_rank > 0:
            pipe.load_lora_weights(folder / "lora")
        else:
            pipe.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        found = pipe.unet(*inputs).sample

        policy = load_policy(script, options["model"], lora_rank=lora_rank)
        optimizer = torch.optim.AdamW(policy.params.values())
        assert script.load_checkpoint(folder, policy.params, optimizer)["rows"]
        expected = policy.unet(*inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - pretrained).abs().max() > 1e-3


def test_a_lora_goes_to_other_programs_and_back(straight, options, tmp_path):
    """lora/ in kohya's format, which AUTOMATIC1111 and ComfyUI read, draws the same pictures."""
    lora = straight(ddpo_is, lora_rank=4) / "lora/pytorch_lora_weights.safetensors"
    kohya = convert_state_dict_to_kohya(load_file(lora))
    assert all(name.startswith("lora_unet_") for name in kohya)
    save_file(kohya, tmp_path / "kohya.safetensors")

    def predict(path=None):
        pipe = StableDiffusionPipeline.from_pretrained(options["model"], safety_checker=None)
        if path is not None:
            pipe.load_lora_weights(path.parent, weight_name=path.name)
        latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return pipe.unet(latents, 500, embed(pipe, ["cat", "dog"])[1]).sample

    torch.testing.assert_close(predict(tmp_path / "kohya.safetensors"), predict(lora))
    assert (predict(lora) - predict()).abs().max() > 1e-2


@every_script
def test_the_policy_is_guided_by_the_prompts_that_are_scored(
    options, tmp_path, monkeypatch, script
):
    """The text embeddings of the sampler: empty prompts first, then each sample's own."""
    algorithm = "compute_weights" if hasattr(script, "compute_weights") else "compute_advantages"
    sample = script.sample_trajectories
    compute = getattr(script, algorithm)
    sampled = []
    scored = []

    def sample_trajectories(unet, embeds, *others):
        sampled.append(embeds)
        return sample(unet, embeds, *others)

    def compute_algorithm(rewards, prompts, *others):
        scored.append(prompts)
        return compute(rewards, prompts, *others)

    monkeypatch.setattr(script, "sample_trajectories", sample_trajectories)
    monkeypatch.setattr(script, algorithm, compute_algorithm)
    changes = {"prompts": "animals", "num_samples": 12, "num_steps": 2, "iterations": 1}
    run(script, tmp_path, **options | changes)
    _, embeds, _ = sampled  # evaluation, sampling, evaluation
    (prompts,) = scored
    assert len(prompts) == 12
    assert len(set(prompts)) > 1
    pipe = StableDiffusionPipeline.from_pretrained(options["model"], safety_checker=None)
    torch.testing.assert_close(embeds, embed(pipe, prompts))


def test_two_runs_started_in_the_same_second_both_run(options, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    folders = []
    for lr in (1e-3, 1e-4, 1e-5):
        folders.append(run(ddpo_is, tmp_path, **options | {"iterations": 1, "lr": lr}))
    name = "ddpo_is__brightness__s1__20260101-000000"
    assert [folder.name for folder in folders] == [name, f"{name}-2", f"{name}-3"]
    assert [read_args(folder)["args"]["lr"] for folder in folders] == [1e-3, 1e-4, 1e-5]


def test_two_processes_started_together_both_run(options, tmp_path):
    words = flags(**options | {"iterations": 1, "out": tmp_path / "runs"})
    runs = [Run(ddpo_is, words, tmp_path / str(number)) for number in range(3)]
    assert [one.wait() for one in runs] == [0, 0, 0]
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    for folder in folders:
        assert len(read_metrics(folder)) == 2


def test_a_sum_of_rewards_names_the_run_and_the_columns(options, tmp_path):
    changes = {"reward": f"incompress + 0.5*{options['reward']}", "iterations": 1}
    folder = run(ddpo_is, tmp_path, **options | changes)
    assert folder.name.startswith("ddpo_is__incompress+0.5brightness__s1__")
    row = read_metrics(folder)[-1]
    total = row["reward_incompress"] + 0.5 * row["reward_brightness"]
    assert row["reward_mean"] == pytest.approx(total, rel=1e-5)


def test_a_part_called_mean_does_not_overwrite_the_mean(options, tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("def mean(images, prompts):\n    return [7.0] * len(images)\n")
    changes = {"reward": f"{path}:mean + compress", "iterations": 1}
    row = read_metrics(run(ddpo_is, tmp_path / "runs", **options | changes))[-1]
    assert row["reward_mean_2"] == 7
    assert row["reward_mean"] == pytest.approx(7 + row["reward_compress"], rel=1e-5)


# ---- reproducibility ----


@every_script
def test_same_seed_same_bits_and_another_seed_another_run(straight, options, tmp_path, script):
    folder = straight(script)
    assert_same_run(run(script, tmp_path / "same", **options), folder)
    other = run(script, tmp_path / "other", **options | {"seed": 2, "iterations": 1})
    assert read_metrics(other)[1]["reward_mean"] != read_metrics(folder)[1]["reward_mean"]
    # evaluation noise does not depend on the seed: the pretrained model scores the same
    assert read_metrics(other)[0] == read_metrics(folder)[0]


@every_script
def test_the_micro_batch_changes_only_rounding(straight, options, tmp_path, script):
    rows = read_metrics(straight(script))
    folder = run(script, tmp_path, **options | {"iterations": 3, "micro_batch": 2})
    other = read_metrics(folder)
    assert read_args(folder)["args"]["micro_batch"] == 2
    assert read_args(straight(script))["args"]["micro_batch"] > 2
    for name in ("reward_mean", "loss", "grad_norm"):
        assert other[1][name] == pytest.approx(rows[1][name], rel=1e-3, abs=1e-5)
    assert other[3]["reward_mean"] == pytest.approx(rows[3]["reward_mean"], rel=2e-3)


@pytest.mark.parametrize("script", [ddpo_iskl, rwr], ids=name_of)
def test_gradient_checkpointing_gives_the_same_numbers(straight, options, tmp_path, script):
    folder = run(script, tmp_path, **options | {"gradient_checkpointing": True})
    rows = without_times(straight(script))
    for row, other in zip(rows, without_times(folder), strict=True):
        assert other == pytest.approx(row, rel=1e-5)


def test_gradient_checkpointing_forgets_activations(options):
    """It keeps the inputs of the blocks and computes the rest again."""
    kept = {}
    for flag in (False, True):
        policy = load_policy(ddpo_is, options["model"], gradient_checkpointing=flag)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda x: x
        ):
            policy.unet(torch.zeros(2, 4, 8, 8), 5, torch.zeros(2, 16, 16))
        kept[flag] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


# ---- resume ----


@every_script
@full_and_lora
def test_resume_equals_uninterrupted(straight, half, script, lora_rank):
    folder = half(script, lora_rank=lora_rank)
    assert [row["iteration"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    assert resume(script, folder, "--iterations", 6) == folder
    assert_same_run(folder, straight(script, lora_rank=lora_rank))


def test_resume_in_fp16_restores_the_scale_of_the_loss(straight, half):
    """At a scale of 65536 the first updates overflow and are skipped; the scale is halved."""
    folder = half(ddpo_is, precision="fp16")
    resume(ddpo_is, folder, "--iterations", 6)
    assert_same_run(folder, straight(ddpo_is, precision="fp16"))
    scaler = load_state(folder)["state"]["scaler"]
    assert scaler == load_state(straight(ddpo_is, precision="fp16"))["state"]["scaler"]


def test_resume_with_a_slash_more_and_from_another_folder(
    straight, half, tmp_path, monkeypatch, options
):
    """All relative paths of the first command line keep their meaning."""
    home = Path(options["reward"]).parent
    model = Path(options["model"])
    monkeypatch.chdir(home)
    relative = {
        "model": os.path.relpath(model),
        "prompts": "prompts.txt",
        "reward": "reward.py:brightness",
    }
    folder = half(ddpo_is, **relative)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    resume(ddpo_is, f"../half/{folder.name}/", "--iterations", 6)
    assert_same_run(folder, straight(ddpo_is))
    assert not list(elsewhere.iterdir())


def test_resume_of_a_moved_folder(straight, half, tmp_path, capsys):
    folder = Path(shutil.move(half(ddpo_is), tmp_path / "moved here"))
    assert resume(ddpo_is, folder, "--iterations", 6) == folder
    assert "already finished" not in capsys.readouterr().out
    assert_same_run(folder, straight(ddpo_is))
    assert not list((tmp_path / "half").iterdir())


def test_resume_with_a_model_that_has_moved(straight, half, tmp_path, options, command_line):
    model = Path(shutil.copytree(options["model"], tmp_path / "model"))
    folder = half(ddpo_is, model=str(model))
    model.rename(tmp_path / "moved")
    done = command_line("--resume", folder, "--iterations", 6)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: --model {model}: cannot read model_index.json")
    resume(ddpo_is, folder, "--iterations", 6, "--model", tmp_path / "moved")
    assert_same_run(folder, straight(ddpo_is))


@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_a_run_in_progress_keeps_its_reward_and_its_prompts(
    straight, half, tmp_path, options, change
):
    folder = tmp_path / "inputs"
    shutil.copytree(Path(options["reward"]).parent, folder)
    prompts = folder / "prompts.txt"
    reward = folder / "reward.py"
    started = half(ddpo_is, prompts=str(prompts), reward=f"{reward}:brightness")
    if change == "edited":
        prompts.write_text("a blue whale\n")
        reward.write_text(BRIGHTNESS.replace("return ", "return -"))
    else:
        shutil.rmtree(folder)
    resume(ddpo_is, started, "--iterations", 6)
    assert_same_run(started, straight(ddpo_is))


def test_a_module_beside_the_reward_is_kept_too(half, tmp_path):
    folder = tmp_path / "a folder + more"
    folder.mkdir()
    (folder / "helper.py").write_text("SCALE = 3\n")
    reward = folder / "my reward.py"
    reward.write_text(
        "import helper\n\ndef f(images, prompts):\n    return [helper.SCALE] * len(images)\n"
    )
    started = half(ddpo_is, reward=f"{reward}:f")
    shutil.rmtree(folder)
    resume(ddpo_is, started, "--iterations", 4)
    assert read_metrics(started)[-1]["reward_mean"] == 3


def damage(path, how):
    content = path.read_bytes()
    if how == "cut":
        content = content[: len(content) // 2]
    if how == "empty":
        content = b""
    if how == "text":
        content = b"version https://git-lfs.github.com/spec/v1\n"
    if how == "one bit":
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if how == "zeros":
        content = bytes(len(content))
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options):
    """The folder of a short run, to be copied."""
    return run(ddpo_is, tmp_path_factory.mktemp("finished"), **options | {"iterations": 1})


@pytest.mark.parametrize("how", ["cut", "empty", "text", "one bit", "zeros"])
def test_a_damaged_checkpoint_gets_one_line(finished, tmp_path, command_line, how):
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder / "checkpoint/state.pt", how)
    before = (folder / "metrics.csv").read_bytes()
    done = command_line("--resume", folder)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: {folder}/checkpoint/state.pt is damaged")
    assert (folder / "metrics.csv").read_bytes() == before


def test_folders_that_somebody_has_deleted_are_made_again(straight, half):
    folder = half(ddpo_is)
    for name in ("images", "trajectory", "unet"):
        shutil.rmtree(folder / name)
    (folder / "metrics.csv").unlink()
    resume(ddpo_is, folder, "--iterations", 6)
    assert_same_run(folder, straight(ddpo_is))
    assert [path.name for path in (folder / "images").iterdir()] == ["0006.png"]


@pytest.mark.parametrize("what", ["no folder", "no state.pt", "only state.tmp"])
def test_a_run_without_a_checkpoint_starts_again(straight, half, capsys, what):
    folder = half(ddpo_is)
    state = folder / "checkpoint/state.pt"
    if what == "no folder":
        shutil.rmtree(folder / "checkpoint")
    if what == "no state.pt":
        state.unlink()
    if what == "only state.tmp":
        state.rename(state.with_suffix(".tmp"))
    capsys.readouterr()
    assert resume(ddpo_is, folder, "--iterations", 6) == folder
    assert f"{folder} has no checkpoint: starting from the beginning" in capsys.readouterr().out
    assert_same_run(folder, straight(ddpo_is))


def test_resume_of_a_finished_run_changes_nothing(finished, tmp_path, command_line):
    folder = shutil.copytree(finished, tmp_path / "run")
    done = command_line("--resume", folder)
    assert done.code == 0
    last = done.out.splitlines()[-1]
    assert last.startswith("already finished; to train longer: python ")
    assert last.endswith(f"ddpo_is.py --resume {folder} --iterations N")
    assert_same_run(folder, finished)


def test_resume_says_that_the_script_was_edited(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    notice = "ddpo_is.py has changed since this run began"
    resume(ddpo_is, folder)
    assert notice not in capsys.readouterr().out
    with open(folder / "ddpo_is.py", "a") as file:
        file.write("# a line more\n")
    resume(ddpo_is, folder)
    assert f"{notice}, see its copy {folder}/ddpo_is.py" in capsys.readouterr().out
    (folder / "ddpo_is.py").unlink()
    resume(ddpo_is, folder)
    assert notice not in capsys.readouterr().out


def test_resume_takes_all_arguments_of_the_run(finished):
    saved = read_args(finished)["args"]
    args = ddpo_is.parse_args(["--resume", str(finished)])
    for name, value in vars(args).items():
        if name == "adam_betas":
            value = list(value)
        assert name == "resume" or value == saved[name], name


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--iterations", "9"),
        ("--save-every", "7"),
        ("--track", None),
        ("--device", "auto"),
        ("--micro-batch", "2"),
        ("--model", "elsewhere"),
    ],
)
def test_what_may_be_given_anew(finished, flag, value):
    words = [flag] if value is None else [flag, value]
    args = ddpo_is.parse_args(["--resume", str(finished), *words])
    found = getattr(args, flag.removeprefix("--").replace("-", "_"))
    assert str(found) == (value or "True")


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--lr", ["0.01"]),
        ("--seed", ["2"]),
        ("--reward", ["incompress"]),
        ("--prompts", ["animals"]),
        ("--num-samples", ["16"]),
        ("--num-steps", ["50"]),
        ("--num-updates", ["1"]),
        ("--lora-rank", ["4"]),
        ("--precision", ["bf16"]),
        ("--guidance-scale", ["1"]),
        ("--adam-betas", ["0.9", "0.99"]),
        ("--weight-decay", ["0"]),
        ("--clip-range", ["0.1"]),
        ("--adv-clip", ["1"]),
        ("--out", ["elsewhere"]),
    ],
)
def test_another_flag_is_refused_by_name(finished, command_line, flag, values):
    done = command_line("--resume", finished, flag, *values)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: --resume {finished}: {flag} was ")
    assert line.endswith("must stay")


@pytest.mark.parametrize("script", [ddpo_sf, ddpo_iskl, rwr, rwr_sparse], ids=name_of)
def test_a_run_of_another_script_is_refused(finished, command_line, script):
    done = command_line("--resume", finished, script=script)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line == f"error: --resume {finished}: it is a run of ddpo_is.py"


def test_a_folder_that_is_no_run_is_refused(finished, tmp_path, command_line):
    for content in (None, "", "{}", "[]", '{"script": "ddpo_is"}'):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        if content is not None:
            (folder / "args.json").write_text(content)
        done = command_line("--resume", folder)
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert line.startswith(f"error: --resume {folder}: it has no args.json of this script")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_other_pretrained_weights_are_refused(finished, tmp_path, options, command_line, part):
    model = Path(shutil.copytree(options["model"], tmp_path / "model"))
    (file,) = (model / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file)
    done = command_line("--resume", finished, "--iterations", 2, "--model", model)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line == f"error: --resume {finished}: it started from other weights than {model}"


# ---- what a checkpoint survives ----

KILLS = 2  # of each script; tried once with 4


@every_script
def test_killed_at_random_moments(options, tmp_path, script):
    """kill -9, resume, kill -9, resume: no bit differs from the uninterrupted run."""
    options = options | {"iterations": 12, "save_every": 1}
    whole = Run(script, flags(**options | {"out": tmp_path / "whole"}), tmp_path / "whole.log")
    assert whole.wait() == 0, whole.err
    (uninterrupted,) = (tmp_path / "whole").iterdir()

    rng = random.Random(script.__name__)
    words = flags(**options | {"out": tmp_path / "runs"})
    codes = []
    for number in range(KILLS):
        one = Run(script, words, tmp_path / f"{number}.log")
        lines = rng.randint(0, 3)  # then somewhere in the iteration that follows
        while one.out.count("iteration ") < lines and one.process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        one.process.kill()
        one.process.join()
        codes.append(one.process.exitcode)
        for path in (tmp_path / "runs").glob("*/args.json"):
            words = ["--resume", path.parent]
        line = one.out.splitlines()[-1:]
        print(f"{script.__name__}: kill {number + 1}, exit code {codes[-1]}, after {line}")
    assert -signal.SIGKILL in codes
    one = Run(script, words, tmp_path / "last.log")
    assert one.wait() == 0, one.err
    (folder,) = [path.parent for path in (tmp_path / "runs").glob("*/checkpoint")]
    assert_same_run(folder, uninterrupted)


def test_killed_while_saving(straight, half, monkeypatch):
    """A checkpoint is written beside the last one, which stays until the new one is whole."""
    folder = half(ddpo_is)
    whole = (folder / "checkpoint/state.pt").read_bytes()

    def save(checkpoint, path):
        Path(path).write_bytes(whole[:1000])
        raise MemoryError("the end")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(MemoryError):
            resume(ddpo_is, folder, "--iterations", 6)
    assert (folder / "checkpoint/state.pt").read_bytes() == whole
    resume(ddpo_is, folder, "--iterations", 6)
    assert_same_run(folder, straight(ddpo_is))


def acting_reward(tmp_path, action):
    """A reward that does something at iteration 4 of the run of `options`."""
    path = tmp_path / "acting.py"
    path.write_text(ACTING.format(action))
    return f"{path}:brightness"


def printed_command(out):
    """The words after `python SCRIPT` in the last line."""
    line = out.splitlines()[-1]
    assert line.startswith("resume with: python ")
    return shlex.split(line.removeprefix("resume with: python "))[1:]


@pytest.mark.parametrize(
    ("script", "number"),
    [
        (ddpo_is, "SIGINT"),
        (ddpo_is, "SIGHUP"),
        *((script, "SIGTERM") for script in SCRIPTS),
    ],
)
def test_a_signal_saves_and_the_printed_command_resumes(
    straight, options, tmp_path, command_line, script, number
):
    """Ctrl-C, a batch system, a closed terminal: the iteration in hand is finished."""
    reward = acting_reward(tmp_path, f"os.kill(os.getpid(), signal.{number})")
    words = flags(**options | {"reward": reward, "out": tmp_path / "a folder"})
    done = command_line(*words, script=script)
    assert done.code == 0
    assert done.err == ""
    (folder,) = (tmp_path / "a folder").iterdir()
    rows = read_metrics(folder)
    assert rows[-1]["iteration"] == 4
    assert "eval_reward" in rows[-1]
    assert load_state(folder)["state"]["rows"][-1]["iteration"] == 4

    words = printed_command(done.out)
    assert words == ["--resume", str(folder)]
    copy = folder / "reward/0/acting.py"
    copy.write_text(copy.read_text().replace("calls == 6", "False"))
    assert command_line(*words, script=script).code == 0
    weights_now = weights(folder)
    for name, value in weights(straight(script)).items():
        assert torch.equal(weights_now[name], value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside(options, tmp_path, number):
    words = flags(**options | {"iterations": 10_000, "save_every": 10_000, "out": tmp_path / "a"})
    one = Run(ddpo_is, words, tmp_path / "log")
    while "iteration 2:" not in one.out:
        assert one.process.is_alive(), one.err
        time.sleep(0.05)
    os.kill(one.process.pid, number)
    assert one.wait() == 0, one.err
    words = printed_command(one.out)
    (folder,) = (tmp_path / "a").iterdir()
    last = int(read_metrics(folder)[-1]["iteration"])
    assert 2 <= last < 10_000
    again = Run(ddpo_is, [*words, "--iterations", last + 1], tmp_path / "again")
    assert again.wait() == 0, again.err
    assert read_metrics(folder)[-1]["iteration"] == last + 1


def test_a_run_under_nohup_ignores_the_end_of_its_terminal(options, tmp_path):
    reward = acting_reward(tmp_path, "os.kill(os.getpid(), signal.SIGHUP)")
    words = flags(**options | {"reward": reward, "out": tmp_path / "runs"})
    nohup = shutil.which("nohup")
    if nohup is None:
        pytest.skip("there is no nohup")
    done = subprocess.run(
        [nohup, sys.executable, "ddpo_is.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_metrics(folder)[-1]["iteration"] == 6
    assert "resume with" not in done.stdout


def test_a_second_interrupt_ends_at_once(straight, options, tmp_path, command_line):
    """The first save is the one of iteration 3; what came after it is done again."""
    action = "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)"
    reward = acting_reward(tmp_path, action)
    words = flags(**options | {"reward": reward, "out": tmp_path / "runs"})
    done = command_line(*words)
    assert done.code == 128 + signal.SIGINT
    assert "Traceback" not in done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_metrics(folder)[-1]["iteration"] == 3
    copy = folder / "reward/0/acting.py"
    copy.write_text(copy.read_text().replace("calls == 6", "False"))
    assert command_line("--resume", folder).code == 0
    assert_same_run(folder, straight(ddpo_is))


def test_a_reward_that_fails_in_the_middle(straight, options, tmp_path):
    """The user's line in the traceback, the command that resumes, exit code 1."""
    action = "if not os.environ.get('IT_WORKS'): print(1 / 0)"
    reward = acting_reward(tmp_path, action)
    words = flags(**options | {"reward": reward, "out": tmp_path / "runs"})
    failed = Run(ddpo_is, words, tmp_path / "failed")
    assert failed.wait() == 1
    (folder,) = (tmp_path / "runs").iterdir()
    lines = failed.err.splitlines()
    advice = f"then resume with: python {ROOT / 'ddpo_is.py'} --resume {folder}"
    assert any(line.endswith(advice) for line in lines)
    assert "print(1 / 0)" in failed.err
    assert f'File "{tmp_path / "acting.py"}"' in failed.err
    assert "ZeroDivisionError: division by zero" in lines
    last = lines[-1]
    assert last.startswith(f"rewards.RewardError: reward '{reward}' failed for 8 pictures")

    again = Run(ddpo_is, ["--resume", folder], tmp_path / "again", IT_WORKS="1")
    assert again.wait() == 0, again.err
    assert_same_run(folder, straight(ddpo_is))


# ---- training that goes wrong ----


@pytest.mark.parametrize("script", [ddpo_sf, ddpo_is, ddpo_iskl], ids=name_of)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_constant_reward_moves_nothing_but_weight_decay(options, tmp_path, script, weight_decay):
    path = tmp_path / "constant.py"
    path.write_text("def f(images, prompts):\n    return [0.1] * len(images)\n")
    changes = {"reward": f"{path}:f", "weight_decay": weight_decay, "iterations": 2}
    if script is ddpo_iskl:
        changes["kl_coef"] = 0.0
    folder = run(script, tmp_path / "runs", **options | changes)
    start = load_file(Path(options["model"], "unet/diffusion_pytorch_model.safetensors"))
    updates = 2 * read_args(folder)["args"]["num_updates"]
    for name, value in weights(folder).items():
        if weight_decay == 0:
            assert torch.equal(value, start[name]), name
        else:
            expected = start[name] * (1 - options["lr"] * weight_decay) ** updates
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert [row["grad_norm"] for row in read_metrics(folder)[1:]] == [0, 0]


@every_script
def test_updates_that_are_not_finite_are_skipped_and_then_stop_the_run(
    options, tmp_path, monkeypatch, capsys, script
):
    real = script.compute_loss

    def infinite(*inputs):
        loss, metrics = real(*inputs)
        return loss * float("inf"), metrics

    monkeypatch.setattr(script, "compute_loss", infinite)
    changes = {"num_updates": 2, "iterations": 4}
    folder = run(script, tmp_path / "four", **options | changes)
    start = load_file(Path(options["model"], "unet/diffusion_pytorch_model.safetensors"))
    for name, value in weights(folder).items():
        assert torch.equal(value, start[name]), name
    assert [row["skipped"] for row in read_metrics(folder)[1:]] == [1, 1, 1, 1]
    # the fifth iteration has the ninth and the tenth, also after a resume
    with pytest.raises(SystemExit) as stop:
        resume(script, folder, "--iterations", 6)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: 10 updates in a row were not finite: start a new run")
    assert read_metrics(folder)[-1]["iteration"] == 4


@every_script
def test_a_policy_that_is_not_finite_ends_the_run(
    straight, options, tmp_path, monkeypatch, command_line, script
):
    """The last good checkpoint is kept, and goes on once the cause is gone."""
    real = torch.optim.AdamW.step
    updates = 4 * script.Args().num_updates
    calls = []

    def step(optimizer, *inputs):
        real(optimizer, *inputs)
        calls.append(1)
        if len(calls) == updates:  # the last update of iteration 4
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        done = command_line(*flags(**options | {"out": tmp_path / "runs"}), script=script)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("error: latents are not finite from step 1 of 4 on (sample 0). ")
    (folder,) = (tmp_path / "runs").iterdir()
    state = load_state(folder)
    assert state["state"]["rows"][-1]["iteration"] == 3
    assert all(value.isfinite().all() for value in state["weights"].values())
    resume(script, folder)
    assert_same_run(folder, straight(script))


def test_weights_that_are_not_finite_are_never_saved(options, tmp_path, capsys):
    policy = load_policy(ddpo_is, options["model"])
    next(iter(policy.params.values())).data[0] = float("inf")
    optimizer = torch.optim.AdamW(policy.params.values())
    with pytest.raises(SystemExit) as stop:
        ddpo_is.save_checkpoint(tmp_path, policy.pipe, policy.params, optimizer, {}, policy.args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: the weights are not finite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
def test_a_mistake_while_saving_keeps_its_traceback(options, tmp_path, monkeypatch, error):
    """Only a disk's errors are told in one line."""

    def save(*_):
        raise error("share memory")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", save)
    with pytest.raises(error, match="share memory"):
        run(ddpo_is, tmp_path, **options)


# ---- disks ----


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode > 0:
        pytest.skip("mounting a small disk takes Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


FILL = """
    free = os.statvfs({0!r})
    room = free.f_bavail * free.f_bsize - {1}
    Path({0!r}, "filler").write_bytes(bytes(room))
"""


def assert_one_line_and_a_whole_checkpoint(done, folder):
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: cannot write to {folder}: ")
    assert f"ddpo_is.py --resume {folder}" in line
    assert load_state(folder)["state"]["rows"][-1]["iteration"] == 3


@pytest.mark.parametrize("room", [0, 100_000, 500_000])
def test_a_full_disk(straight, options, tmp_path, command_line, disk, room):
    """With no room for a picture, for the UNet, and for the checkpoint, which has 0.8 MB."""
    reward = acting_reward(tmp_path, FILL.format(str(disk), room).strip())
    done = command_line(*flags(**options | {"reward": reward, "out": disk}))
    (folder,) = disk.glob("ddpo_is__*")
    assert_one_line_and_a_whole_checkpoint(done, folder)
    assert "No space left" in done.err or "unexpected pos" in done.err or room > 0

    (disk / "filler").unlink()
    copy = folder / "reward/0/acting.py"
    copy.write_text(copy.read_text().replace("calls == 6", "False"))
    assert command_line("--resume", folder).code == 0
    assert_same_run(folder, straight(ddpo_is))


def test_a_disk_that_becomes_read_only(straight, options, tmp_path, command_line, disk):
    remount = ["mount", "-o", "remount,ro", str(disk)]
    reward = acting_reward(tmp_path, f"subprocess.run({remount}, check=True)")
    done = command_line(*flags(**options | {"reward": reward, "out": disk}))
    (folder,) = disk.glob("ddpo_is__*")
    assert_one_line_and_a_whole_checkpoint(done, folder)
    assert "Read-only file system" in done.err

    # a resume says so too
    again = command_line("--resume", folder)
    assert again.code == 2
    (line,) = again.err.splitlines()
    assert line.startswith(f"error: cannot write to {folder}: ")
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    copy = folder / "reward/0/acting.py"
    copy.write_text(copy.read_text().replace("calls == 6", "False"))
    assert command_line("--resume", folder).code == 0
    assert_same_run(folder, straight(ddpo_is))


def test_a_read_only_output_folder(options, tmp_path, command_line, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = command_line(*flags(**options | {"out": disk}))
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: --out {disk}: ")
    assert "Read-only file system" in line


# ---- Weights & Biases ----


@pytest.mark.parametrize("trouble", ["unreachable", "no key"])
def test_tracking_never_stops_a_run(options, tmp_path, monkeypatch, trouble):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # of a user who has never logged in
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")  # seconds
    if trouble == "unreachable":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    words = flags(**options | {"iterations": 2, "save_every": 2, "out": tmp_path / "runs"})
    done = command("ddpo_is.py", *words, "--track")
    assert done.returncode == 0, done.stderr
    assert "logging offline" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(read_metrics(folder)) == 3

    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    for word in (folder.name, "eval_reward", "ratio_err"):
        assert word.encode() in written
    (logged,) = log.parent.glob("files/media/images/*.png")
    grid = Image.open(folder / "images/0002.png")
    assert np.array_equal(np.asarray(Image.open(logged)), np.asarray(grid))


# ---- torch.compile ----


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_policy_gives_the_same_numbers(options, tmp_path):
    """On a UNet of one block, since compiling takes half a minute."""
    model = shutil.copytree(options["model"], tmp_path / "model")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    ).save_pretrained(model / "unet")
    changes = {"model": str(model), "num_samples": 4, "iterations": 1, "micro_batch": 4}
    rows = []
    for flag in (False, True):
        folder = run(ddpo_is, tmp_path / str(flag), **options | changes | {"compile": flag})
        rows.append(read_metrics(folder)[1])
    row, compiled = rows
    for name in ("reward_mean", "loss", "grad_norm"):
        assert compiled[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5)
    assert compiled["ratio_err"] < 1e-5
    UNet2DConditionModel.from_pretrained(folder / "unet")  # its weights have the usual names


# ---- several processes ----


@pytest.fixture(scope="module")
def two(tmp_path_factory, options):
    """two(script): the folder of an uninterrupted run of two processes, and their outputs."""
    made = {}

    def make(script):
        if script not in made:
            folder = tmp_path_factory.mktemp("two")
            words = flags(**options | {"micro_batch": 4, "out": folder / "runs"})
            runs = processes(script, words, folder / "log")
            assert [one.process.exitcode for one in runs] == [0, 0], runs[0].err + runs[1].err
            (run_folder,) = (folder / "runs").iterdir()
            made[script] = (run_folder, runs)
        return made[script]

    return make


@every_script
def test_two_processes_do_what_one_does(straight, two, script):
    folder, runs = two(script)
    rows = read_metrics(folder)
    one = read_metrics(straight(script, micro_batch=4))
    assert [row["samples"] for row in rows] == [row["samples"] for row in one]
    assert rows[0]["eval_reward"] == one[0]["eval_reward"]
    for name in ("reward_mean", "reward_std"):
        assert rows[1][name] == pytest.approx(one[1][name], rel=1e-6)
        assert rows[3][name] == pytest.approx(one[3][name], rel=2e-3)
    for name in ("loss", "grad_norm"):
        assert rows[1][name] == pytest.approx(one[1][name], rel=1e-3, abs=1e-5)
    # one of them prints and writes
    assert "iteration 6: reward" in runs[0].out
    assert runs[1].out == runs[1].err == ""


@every_script
def test_two_processes_resume_exactly(two, options, tmp_path, script):
    words = flags(**options | {"micro_batch": 4, "iterations": 3, "out": tmp_path / "runs"})
    processes(script, words, tmp_path / "first")
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_metrics(folder)[-1]["iteration"] == 3
    processes(script, ["--resume", folder, "--iterations", 6], tmp_path / "second")
    uninterrupted, _ = two(script)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("script", [ddpo_is, rwr], ids=name_of)
def test_resume_with_another_number_of_processes(straight, half, tmp_path, script):
    one = read_metrics(straight(script, micro_batch=4))
    folder = half(script, micro_batch=4)
    runs = processes(script, ["--resume", folder, "--iterations", 4], tmp_path / "log", count=2)
    assert [one.process.exitcode for one in runs] == [0, 0], runs[0].err
    runs = processes(script, ["--resume", folder, "--iterations", 5], tmp_path / "log4", count=4)
    assert [one.process.exitcode for one in runs] == [0] * 4, runs[0].err
    resume(script, folder, "--iterations", 6)
    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == list(range(7))
    assert rows[4]["reward_mean"] == pytest.approx(one[4]["reward_mean"], rel=1e-6)
    assert rows[6]["reward_mean"] == pytest.approx(one[6]["reward_mean"], rel=2e-3)


@pytest.mark.parametrize("script", [ddpo_is, rwr], ids=name_of)
def test_samples_that_do_not_divide_among_the_processes(options, tmp_path, script):
    changes = {"num_samples": 9, "num_updates": 3, "out": tmp_path / "runs"}
    if script is rwr:
        changes["samples_per_prompt"] = 3
    runs = processes(script, flags(**options | changes), tmp_path / "log")
    assert [one.process.exitcode for one in runs] == [2, 2]
    (line,) = runs[0].err.splitlines()
    assert line.startswith("error: --num-samples 9: not a multiple of ")
    assert "processes" in line
    assert not (tmp_path / "runs").exists()


def torchrun(*words):
    """The real launcher. Returns a process whose output is text."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, "--nproc_per_node=2", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # of which the signal does not reach the tests
    )


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_torchrun_and_a_signal_to_the_job(options, tmp_path, how):
    """Both processes stop at the same iteration, which is saved.

    Ctrl-C reaches all processes of the terminal's session. torchrun's have sessions of their own,
    so that they get it once, from the launcher: a second one would end them at once.
    """
    words = flags(**options | {"iterations": 10_000, "save_every": 10_000, "out": tmp_path})
    job = torchrun("ddpo_is.py", *words)
    lines = []
    for line in job.stdout:
        lines.append(line)
        if line.startswith("iteration 2:") and how == "Ctrl-C":
            os.killpg(job.pid, signal.SIGINT)
        elif line.startswith("iteration 2:"):
            job.send_signal(signal.SIGTERM)
    job.wait(120)
    (folder,) = tmp_path.iterdir()
    assert lines[0] == f"{options['model']} on 2 x cpu in fp32\n"
    assert printed_command("".join(lines)) == ["--resume", str(folder)]
    last = read_metrics(folder)[-1]
    assert 2 <= last["iteration"] < 10_000
    assert load_state(folder)["state"]["rows"][-1]["iteration"] == last["iteration"]


def test_torchrun_and_a_reward_that_fails_in_one_process(options, tmp_path):
    """The job ends with that message, and the other process does not wait for ever."""
    action = "if os.environ['RANK'] == '1': print(1 / 0)"
    reward = acting_reward(tmp_path, action)
    # the process with rank 1 does not evaluate: its sixth call is that of iteration 6
    words = flags(**options | {"reward": reward, "out": tmp_path / "runs"})
    job = torchrun("ddpo_is.py", *words)
    out, err = job.communicate(timeout=180)
    assert job.returncode != 0
    assert "then resume with: " in err
    assert "RewardError: reward" in err
    assert "print(1 / 0)" in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert load_state(folder)["state"]["rows"][-1]["iteration"] == 3
