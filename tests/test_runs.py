"""Whole runs, as a user starts, stops and continues them: files, resume, signals, processes."""

import itertools
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TIMES, load_policy, read_args, read_metrics, run, without_times
from PIL import Image
from safetensors.torch import load_file

import ddpo_is
import ddpo_iskl
import ddpo_sf
import rwr
import rwr_sparse
from rewards import load_metrics, load_reward

SCRIPTS = [ddpo_sf, ddpo_is, ddpo_iskl, rwr, rwr_sparse]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def name_of(script):
    return script.__name__


every_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)

# A reward that runs $ACTION, which is Python code, when it is called the $ACT_AT-th time
REWARD = """
import os
import signal

calls = 0


def brightness(images, prompts):
    global calls
    calls += 1
    if calls == int(os.environ.get("ACT_AT", 0)):
        exec(os.environ["ACTION"])
    return images.mean((1, 2, 3)) / 2.55
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_sd):
    """A run of six iterations with a checkpoint in the middle. Its reward is called at row 0, at
    iterations 1, 2, 3, for the evaluation at 3, and at 4, which is the sixth call."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("cat\na red fox\n")
    (folder / "reward.py").write_text(REWARD)
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


def flags(**options):
    """The words of a command line."""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        words.append(f"--no-{name}" if value is False else f"--{name}={value}")
    return words


# ---- real processes, which start at once: forks of a server that has imported the scripts ----


def work(words, environment, output, ending):
    """What a process does: `python WORDS`, with stdout and stderr in files, or without a reader."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    if ending == "tee was killed":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
    sys.argv = words
    sys.path.insert(0, str(ROOT))
    runpy.run_path(words[0], run_name="__main__")


class Process:
    """A command `python WORDS` in a process of its own."""

    def __init__(self, words, output, ending="", **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ddpo_is"])
        self.output = output
        inputs = ([str(word) for word in words], environment, str(output), ending)
        self.process = context.Process(target=work, args=inputs, daemon=True)
        self.process.start()

    def wait(self, timeout=120):
        """Its exit code; a process that hangs is a failure."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"no end after {timeout} s: {self.out}{self.err}")
        return self.process.exitcode

    @property
    def out(self):
        return Path(f"{self.output}.out").read_text()

    @property
    def err(self):
        return Path(f"{self.output}.err").read_text()

    @property
    def folder(self):
        return Path(self.printed_command()[-1])

    def printed_command(self):
        """The words after `python` of the command that resumes."""
        (line,) = [line for line in self.out.splitlines() if line.startswith("to resume: ")]
        python, *words = shlex.split(line.removeprefix("to resume: "))
        assert python == "python"
        return words


def start(script, output, ending="", environment=None, **options):
    words = [script.__file__, *flags(**options, out=output)]
    return Process(words, output, ending, **(environment or {}))


def start_processes(script, output, environments, **options):
    """What torchrun starts: processes that know each other."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    group = []
    for rank, environment in enumerate(environments):
        environment = environment | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(environments)),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        words = [script.__file__, *flags(**options, out=output)]
        group.append(Process(words, f"{output}.{rank}", **environment))
    return group


def load_state(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def assert_same_run(folder, other):
    """Metrics but for times, weights, optimizer and rewards of before: equal to the last bit."""
    assert without_times(folder) == without_times(other)
    assert_same_state(folder, other)


def assert_same_state(folder, other):
    state = load_state(folder)
    expected = load_state(other)
    for weight, value in zip(state["weights"], expected["weights"], strict=True):
        assert torch.equal(weight, value)
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    moments = state["optimizer"]["state"]
    assert len(moments) == len(state["weights"])
    for number, moment in expected["optimizer"]["state"].items():
        for name, value in moment.items():
            assert torch.equal(moments[number][name], value), (number, name)
    assert state["scaler"] == expected["scaler"]
    assert state.get("history") == expected.get("history")


# ---- files ----


def png_sizes(folder):
    return {path.name: Image.open(path).size for path in folder.iterdir()}


@pytest.fixture(scope="module")
def command_line_runs(tmp_path_factory, few_prompts):
    """{script: (words, out, process)}: all five as users start them, side by side to save time."""
    runs = {}
    for script in SCRIPTS:
        out = tmp_path_factory.mktemp(script.__name__)
        words = flags(model="models/emoji", prompts=few_prompts, out=out, device="cpu")
        words += flags(num_samples=4, num_steps=10, iterations=2, save_every=3)
        command = [sys.executable, f"{script.__name__}.py", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        runs[script] = (words, out, process)
    return runs


@pytest.mark.smoke
@every_script
def test_the_command_line_leaves_a_whole_run_folder(command_line_runs, script):
    name = script.__name__
    words, out, process = command_line_runs[script]
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")  # no progress bar, no notice of diffusers
    (folder,) = out.iterdir()
    assert folder.name.startswith(f"{name}__compress__s1__")

    lines = stdout.splitlines()
    assert lines[:4] == [
        "models/emoji on 1 x cpu in fp32",
        "LoRA rank 0 (0: all weights), 80 pairs per forward pass",
        "4 prompts (0 cut at 16 tokens): cat, dog, a red fox, bee, ...",
        f"to resume: python {name}.py --resume {folder}",
    ]
    assert [line.partition(":")[0] for line in lines[4:]] == [
        "iteration 1",
        "iteration 2",
        "compress",
    ]

    files = {"args.json", "checkpoint.pt", "images", "metrics.csv", "prompts.txt", "trajectory"}
    assert {path.name for path in folder.iterdir()} == files | {f"{name}.py", "rewards.py", "unet"}
    for source in (f"{name}.py", "rewards.py"):
        assert (folder / source).read_text() == (ROOT / source).read_text()
    assert png_sizes(folder / "images") == dict.fromkeys(["0000.png", "0002.png"], (256, 128))
    assert png_sizes(folder / "trajectory") == dict.fromkeys(["0000.png", "0002.png"], (384, 64))
    metadata = read_args(folder)
    assert metadata["script"] == name
    assert metadata["args"].keys() == script.Args.__dataclass_fields__.keys()
    assert metadata["args"]["precision"] == "fp32"
    assert metadata["commands"] == [shlex.join(["python", f"{name}.py", *words])]
    assert metadata["versions"]["torch"] == torch.__version__

    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert [row["samples"] for row in rows] == [0, 4, 8]
    assert rows[0]["eval_reward"] == pytest.approx(-2.5, abs=0.3)  # kB
    assert rows[0]["eval_align"] > 0
    assert "eval_reward" not in rows[1]
    evaluated = set(rows[0])
    trained = {"reward_mean", "reward_std", "loss", "grad_norm", "skipped", *TIMES}
    policy = {"ratio_err", "approx_kl"}
    own = {
        "ddpo_sf": policy,
        "ddpo_is": policy | {"clipfrac"},
        "ddpo_iskl": policy | {"clipfrac", "kl_ref", "kl_penalty"},
        "rwr": {"mse", "effective_samples"},
        "rwr_sparse": {"mse", "threshold", "passed"},
    }
    assert set(rows[2]) == evaluated | trained | own[name]
    assert np.isfinite(list(rows[2].values())).all()
    assert rows[2]["skipped"] == 0 < rows[2]["grad_norm"]
    assert rows[2].get("ratio_err", 0) < 1e-5


def test_a_saved_lora_loads_in_diffusers_and_draws_the_pictures_of_training(
    straight, options, tmp_path
):
    """For saved UNets test_variants.py shows it, with results/held_out/evaluate.py."""
    folder = straight(ddpo_is, lora_rank=4, lr=2e-2)
    policy = load_policy(ddpo_is, options["model"], num_steps=4, lora_rank=0)
    policy.pipe.load_lora_weights(folder / "lora")
    prompts = ["cat", "a red fox"]
    tools = (load_reward(options["reward"]), load_metrics(options["reward"]))
    row = ddpo_is.evaluate(policy.pipe, tmp_path, 6, prompts, *tools, policy.schedule, policy.args)
    pictures = [np.asarray(Image.open(run / "images/0006.png")) for run in (tmp_path, folder)]
    np.testing.assert_allclose(*pictures, atol=1)
    before, *_, after = read_metrics(folder)
    assert row["eval_reward"] == pytest.approx(after["eval_reward"], abs=1e-4)
    assert abs(after["eval_reward"] - before["eval_reward"]) > 0.01


def test_a_sum_of_rewards_names_the_run_and_the_columns_and_its_file_is_kept(options, tmp_path):
    changes = {"reward": f"incompress + 0.5*{options['reward']}", "iterations": 1}
    folder = run(ddpo_is, tmp_path, **options | changes)
    assert folder.name.startswith("ddpo_is__incompress+0.5brightness__s1__")
    row = read_metrics(folder)[-1]
    total = row["reward_incompress"] + 0.5 * row["reward_brightness"]
    assert row["reward_mean"] == pytest.approx(total, rel=1e-6)
    assert (folder / "reward.py").read_text() == REWARD


def test_no_iterations_evaluate_the_pretrained_model(options, straight, tmp_path):
    folder = run(ddpo_is, tmp_path, **options | {"iterations": 0})
    assert without_times(folder) == without_times(straight(ddpo_is))[:1]
    pretrained = load_file(Path(options["model"], "unet/diffusion_pytorch_model.safetensors"))
    saved = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in pretrained.items())


def test_the_seed_decides_training_and_not_the_evaluation(straight, options, tmp_path):
    rows = without_times(straight(ddpo_is))
    changes = {"seed": 2, "iterations": 2, "lr": 1e-12}
    before, first, second = without_times(run(ddpo_is, tmp_path, **options | changes))
    assert before == rows[0]
    assert abs(first["reward_mean"] - rows[1]["reward_mean"]) > 1e-3
    assert abs(first["reward_mean"] - second["reward_mean"]) > 1e-3  # other samples


# ---- resume ----


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        *((script, {}) for script in SCRIPTS),
        (ddpo_iskl, {"lora_rank": 4}),
        (ddpo_is, {"precision": "fp16"}),  # with the state of the loss scale
    ],
)
def test_a_killed_run_resumes_to_the_bit(straight, options, tmp_path, script, changes):
    """kill -9 in iteration 5, two after the checkpoint. --resume needs no other flag."""
    kill = {"ACTION": "os.kill(os.getpid(), signal.SIGKILL)", "ACT_AT": "7"}
    prompts = shutil.copy(options["prompts"], tmp_path)
    killed = start(
        script, tmp_path / "runs", environment=kill, **options | changes | {"prompts": prompts}
    )
    assert killed.wait() == -signal.SIGKILL, killed.err
    assert [row["iteration"] for row in read_metrics(killed.folder)] == [0, 1, 2, 3, 4]

    Path(prompts).write_text("a blue whale\n")  # the run keeps its own
    resumed = Process([*killed.printed_command()], tmp_path / "resumed")
    assert resumed.wait() == 0, resumed.err
    assert " -> " not in resumed.out.splitlines()[0]  # no flag has changed
    assert_same_run(killed.folder, straight(script, **changes))


def test_resume_from_python_keeps_the_arguments_of_the_run(straight, options, tmp_path, capsys):
    folder = run(ddpo_is, tmp_path, **options | {"iterations": 3})
    assert ddpo_is.main(ddpo_is.Args(resume=str(folder), iterations=6)) == folder
    assert "iterations: 3 -> 6\n" in capsys.readouterr().out
    assert_same_run(folder, straight(ddpo_is))
    metadata = read_args(folder)
    assert metadata["args"]["iterations"] == 6
    assert len(metadata["commands"]) == 2


def test_flags_that_are_given_anew_are_printed_and_taken(options, tmp_path):
    folder = run(ddpo_is, tmp_path, **options | {"iterations": 3})
    kept = shutil.copytree(folder, tmp_path / "kept")
    before = load_state(folder)["weights"]
    moves = []
    new = ["--precision=fp16", "--num-samples=4", "--lr=1e-4", "--adam-betas", "0.8", "0.99"]
    new += ["--reward=compress"]
    for path, words in ((kept, []), (folder, new)):
        resumed = Process(
            [ddpo_is.__file__, "--resume", path, "--iterations=4", *words], tmp_path / path.name
        )
        assert resumed.wait() == 0, resumed.err
        after = load_state(path)["weights"]
        moves.append(sum((x - y).abs().sum() for x, y in zip(before, after)).item())
    assert resumed.out.splitlines()[:6] == [
        f"reward: {options['reward']} -> compress",
        "iterations: 3 -> 4",
        "precision: fp32 -> fp16",
        "num_samples: 8 -> 4",
        "lr: 0.001 -> 0.0001",
        "adam_betas: (0.9, 0.999) -> (0.8, 0.99)",
    ]
    assert 0.05 < moves[1] / moves[0] < 0.2
    assert [row["samples"] for row in read_metrics(folder)] == [0, 8, 16, 24, 28]
    assert load_state(folder)["history"].keys() == {options["reward"], "compress"}
    assert read_args(folder)["commands"][1].endswith(" ".join(new))


def test_a_run_without_a_checkpoint_starts_again_in_its_folder(straight, options, tmp_path):
    """It was killed while it wrote the first one."""
    folder = run(ddpo_is, tmp_path, **options | {"iterations": 1})
    (folder / "checkpoint.pt").rename(folder / "checkpoint.tmp")
    assert ddpo_is.main(ddpo_is.Args(resume=str(folder), iterations=6)) == folder
    assert_same_run(folder, straight(ddpo_is))


def test_a_checkpoint_is_whole_at_any_time(straight, options, tmp_path, monkeypatch):
    folder = run(ddpo_is, tmp_path, **options | {"iterations": 3})
    whole = (folder / "checkpoint.pt").read_bytes()

    def save(state, path):
        Path(path).write_bytes(whole[:1000])
        raise MemoryError("the end")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(MemoryError):
            ddpo_is.main(ddpo_is.Args(resume=str(folder), iterations=6))
    assert (folder / "checkpoint.pt").read_bytes() == whole


@pytest.mark.parametrize("script", [ddpo_sf, ddpo_iskl, rwr, rwr_sparse], ids=name_of)
def test_a_run_of_another_script_is_refused(straight, script):
    folder = straight(ddpo_is)
    for resume in (
        lambda: script.parse_args(["--resume", str(folder)]),
        lambda: script.main(script.Args(resume=str(folder))),
    ):
        with pytest.raises(SystemExit, match="is a run of ddpo_is.py"):
            resume()


def test_the_optimizer_moves_between_devices(straight, options, tmp_path):
    """A GPU has its weights and moments in channels_last, and a fused AdamW; a CPU neither.

    The kernels of a fused AdamW, which the CPU has too, take it that the formats are the same.
    """
    state = load_state(straight(ddpo_is))
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].ndim == 4:
                moments[name] = moments[name].to(memory_format=torch.channels_last)
    state["optimizer"]["param_groups"][0]["fused"] = True
    torch.save(state, tmp_path / "checkpoint.pt")

    updated = []
    for folder, is_on_gpu in itertools.product((straight(ddpo_is), tmp_path), (False, True)):
        policy = load_policy(ddpo_is, options["model"])
        if is_on_gpu:
            policy.unet.to(memory_format=torch.channels_last)
        for fused in (None, True):
            optimizer = torch.optim.AdamW(policy.params, lr=1e-4, fused=fused)
            ddpo_is.load(folder, policy.params, optimizer, torch.amp.GradScaler(enabled=False))
            (group,) = optimizer.param_groups
            assert (group["fused"], group["lr"]) == (fused, 1e-4)
        for p in policy.params:
            assert optimizer.state[p]["exp_avg"].stride() == p.stride()
            assert optimizer.state[p]["exp_avg_sq"].stride() == p.stride()
            p.grad = torch.ones_like(p)
        optimizer.step()
        updated.append([p.detach() for p in policy.params])
    for weights in updated[1:]:
        for weight, expected in zip(weights, updated[0]):
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)


# ---- signals ----


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_iteration_and_saves(options, tmp_path, number):
    """Ctrl-C, a batch system, a closed terminal; what happens is said at once."""
    action = f"os.kill(os.getpid(), {number}); os.write(2, b'then the reward')"
    environment = {"ACTION": action, "ACT_AT": "6"}
    stopped = start(ddpo_is, tmp_path / "a folder", environment=environment, **options)
    assert stopped.wait() == 128 + number, stopped.err
    assert stopped.err == "\nfinishing the iteration; again to stop now\nthen the reward"
    rows = read_metrics(stopped.folder)
    assert rows[-1]["iteration"] == 4
    assert "eval_reward" in rows[-1]
    assert load_state(stopped.folder)["rows"][-1]["iteration"] == 4


def test_after_a_resume_to_more_iterations_the_printed_command_resumes(straight, options, tmp_path):
    folder = run(ddpo_is, tmp_path, **options | {"iterations": 3})
    words = [ddpo_is.__file__, "--resume", folder, "--iterations=6"]
    environment = {"ACTION": "os.kill(os.getpid(), signal.SIGTERM)", "ACT_AT": "1"}
    stopped = Process(words, tmp_path / "stopped", **environment)
    assert stopped.wait() == 128 + signal.SIGTERM
    resumed = Process(stopped.printed_command(), tmp_path / "resumed")
    assert resumed.wait() == 0, resumed.err
    assert_same_state(folder, straight(ddpo_is))


def test_a_second_signal_ends_at_once(options, tmp_path):
    action = "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)"
    environment = {"ACTION": action, "ACT_AT": "6"}
    stopped = start(ddpo_is, tmp_path / "runs", environment=environment, **options)
    assert stopped.wait() == 128 + signal.SIGINT
    assert "Traceback" not in stopped.err
    assert read_metrics(stopped.folder)[-1]["iteration"] == 3


@pytest.fixture
def handlers():
    """The handlers of the signals, which are put back after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_under_nohup_ignores_the_end_of_its_terminal(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert ddpo_is.catch_signals() == []
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]


def test_from_python_a_run_leaves_the_signals_alone_and_works_in_a_thread(
    straight, options, tmp_path, handlers
):
    folders = []

    def work():
        folders.append(run(ddpo_is, tmp_path, **options))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_run(*folders, straight(ddpo_is))
    run(ddpo_is, tmp_path, **options | {"iterations": 0})
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_a_run_does_not_need_a_reader(straight, options, tmp_path):
    """Ctrl-C in `2>&1 | tee log` ends tee, so that all lines that follow have no reader."""
    environment = {"ACTION": "os.kill(os.getpid(), signal.SIGINT)", "ACT_AT": "6"}
    stopped = start(ddpo_is, tmp_path / "runs", "tee was killed", environment, **options)
    assert stopped.wait() == 128 + signal.SIGINT
    (folder,) = (tmp_path / "runs").iterdir()
    assert load_state(folder)["rows"][-1]["iteration"] == 4


def test_a_run_into_a_pipe_that_ends_or_nowhere(straight, options, tmp_path):
    processes = {}
    for name, redirection in (("head", "2>&1 | head -3"), ("closed", ">&-")):
        out = tmp_path / name
        words = shlex.join([sys.executable, ddpo_is.__file__, *flags(**options, out=out)])
        processes[out] = subprocess.Popen(["bash", "-c", f"set -o pipefail; {words} {redirection}"])
    for out, process in processes.items():
        assert process.wait(timeout=300) == 0
        (folder,) = out.iterdir()
        assert_same_run(folder, straight(ddpo_is))


# ---- several processes ----


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        *((script, {}) for script in (ddpo_sf, ddpo_iskl)),
        (rwr, {"num_updates": 2}),
        # one of four samples has a weight, so one of the processes has none
        (rwr_sparse, {"num_samples": 4, "center_weights": False}),
    ],
    ids=["ddpo_sf", "ddpo_iskl", "rwr", "rwr_sparse"],
)
def test_two_processes_do_what_one_does(straight, options, tmp_path, script, changes):
    changes = changes | {"lr": 1e-4, "iterations": 2}
    one = without_times(straight(script, **changes))
    group = start_processes(script, tmp_path / "runs", [{}, {}], **options | changes)
    assert [process.wait() for process in group] == [0, 0], group[0].err + group[1].err
    assert group[1].out + group[1].err == ""  # one of them prints and writes
    rows = without_times(group[0].folder)
    assert rows[0] == one[0]
    assert rows[1]["reward_mean"] == pytest.approx(one[1]["reward_mean"], rel=1e-7)
    for row, expected in zip(rows, one, strict=True):
        assert row == pytest.approx(expected, rel=5e-4, abs=2e-6)


def test_a_signal_to_one_process_stops_both_and_one_alone_goes_on(straight, options, tmp_path):
    signalled = {"ACTION": "os.kill(os.getpid(), signal.SIGTERM)", "ACT_AT": "6"}
    group = start_processes(ddpo_is, tmp_path / "runs", [signalled, {}], **options)
    assert [process.wait() for process in group] == [128 + signal.SIGTERM, 0]
    folder = group[0].folder
    assert read_metrics(folder)[-1]["iteration"] == 4
    resumed = Process(group[0].printed_command(), tmp_path / "resumed")
    assert resumed.wait() == 0, resumed.err
    last = without_times(straight(ddpo_is))[-1]
    assert without_times(folder)[-1] == pytest.approx(last, rel=1.5e-3, abs=1e-5)


# ---- numbers that must not go wrong without a word ----


@pytest.mark.parametrize("script", [ddpo_is, rwr], ids=name_of)
@pytest.mark.parametrize("period", [1, 2])
def test_an_update_that_is_not_finite_is_skipped(options, tmp_path, monkeypatch, script, period):
    """All of them, or one in two, which counts as 0.5. The norm of such gradients is infinite."""
    real = script.compute_loss
    calls = itertools.count()

    def sometimes_large(*inputs):
        loss, metrics = real(*inputs)
        return loss * (1e30 if next(calls) % period == 0 else 1), metrics

    monkeypatch.setattr(script, "compute_loss", sometimes_large)
    folder = run(script, tmp_path, **options | {"num_updates": 2, "iterations": 2})
    row = read_metrics(folder)[1]
    assert row["skipped"] == 1 / period
    assert np.isfinite(row["grad_norm"]) == (period == 2)
    pretrained = load_policy(script, options["model"]).params
    weights = load_state(folder)["weights"]
    assert all(weight.isfinite().all() for weight in weights)
    unmoved = [torch.equal(weight, before) for weight, before in zip(weights, pretrained)]
    assert all(unmoved) == (period == 1)


def test_a_large_reward_with_small_differences_trains(straight, options, tmp_path):
    path = tmp_path / "large.py"
    path.write_text("def large(images, prompts):\n    return 1e9 + images.mean((1, 2, 3)) / 2.55\n")
    folder = run(ddpo_is, tmp_path, **options | {"reward": f"{path}:large", "iterations": 1})
    row = read_metrics(folder)[1]
    expected = read_metrics(straight(ddpo_is))[1]
    for name in ("loss", "grad_norm", "reward_std"):
        assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("script", "words"),
    [(ddpo_is, "(all equal: nothing to learn)"), (rwr, "(no sample has a weight: no update)")],
    ids=["ddpo_is", "rwr"],
)
def test_equal_rewards_are_said_and_train_nothing(options, tmp_path, capsys, script, words):
    path = tmp_path / "equal.py"
    path.write_text("def equal(images, prompts):\n    return [0.1] * len(images)\n")
    changes = {"reward": f"{path}:equal", "weight_decay": 0.0, "iterations": 1}
    folder = run(script, tmp_path, **options | changes)
    assert words in capsys.readouterr().out
    pretrained = load_policy(script, options["model"]).params
    assert all(map(torch.equal, load_state(folder)["weights"], pretrained))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("script", [ddpo_is, rwr], ids=name_of)
def test_in_half_precision_a_policy_gradient_repeats_the_batches_of_sampling(
    options, tmp_path, script, precision
):
    """Batches of 4 divide 12 samples, and not the 6 of an update; regression repeats nothing."""
    changes = {"num_samples": 12, "num_updates": 2, "micro_batch": 4, "iterations": 2}
    folder = run(script, tmp_path, **options | changes | {"precision": precision})
    chosen = read_args(folder)["args"]["micro_batch"]
    assert chosen == {"ddpo_is": 2, "rwr": 4}[script.__name__]
    assert [row.get("ratio_err", 0) for row in read_metrics(folder)[1:]] == [0, 0]
