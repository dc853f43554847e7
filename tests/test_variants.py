"""Each patch of variants/ on today's script: it applies, runs, and does what its head says.

So does a user's script that evaluates finished runs, results/held_out/evaluate.py.
"""

import importlib.util
import runpy
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, load_policy, read_metrics, run
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from test_sampler import draw_with_diffusers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import ddpo_is


@pytest.fixture
def apply(tmp_path):
    """The module of a script with a patch of variants/, made as the patch's head says."""

    def apply(script, name):
        mine = tmp_path / "mine.py"
        patch = ROOT / f"variants/{name}.patch"
        assert f"patch -o mine.py {script} variants/{name}.patch" in patch.read_text()
        subprocess.run(["patch", "-o", mine, ROOT / script, patch], check=True)
        shutil.copy(ROOT / "rewards.py", tmp_path)  # a run keeps a copy of it
        spec = importlib.util.spec_from_file_location("mine", mine)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return apply


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory, tiny_sd):
    """Folder of a random pipeline of SDXL's classes, made of the parts of tiny_sd."""
    torch.manual_seed(0)
    parts = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None).components
    text = CLIPTextConfig(**parts["text_encoder"].config.to_dict() | {"projection_dim": 24})
    config = parts["unet"].config | {
        "cross_attention_dim": 2 * text.hidden_size,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,  # pooled embedding and time ids
    }
    pipe = StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer"],
        unet=UNet2DConditionModel.from_config(config),
        scheduler=parts["scheduler"],
    )
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    pipe.save_pretrained(folder)
    return str(folder)


def test_group_advantages(apply, tmp_path, tiny_sd, few_prompts, monkeypatch):
    mine = apply("ddpo_is.py", "group_advantages")
    seen = []
    compute = mine.compute_advantages

    def record(rewards, prompts, adv_clip):
        advantages = compute(rewards, prompts, adv_clip)
        seen.append((rewards, np.array(prompts), advantages))
        return advantages

    monkeypatch.setattr(mine, "compute_advantages", record)
    run(mine, tmp_path, tiny_sd, num_samples=16, prompts=few_prompts)
    assert len(seen) == 2
    for rewards, prompts, advantages in seen:
        names, counts = np.unique(prompts, return_counts=True)
        assert len(names) > 1
        assert not (counts % 4).any()
        for name in names:
            group = rewards[prompts == name]
            expected = (group - group.mean()) / (group.std() + 1e-6)
            assert advantages[prompts == name] == pytest.approx(expected)

    # other groups do not count, and equal rewards have no advantage
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 3.0])
    advantages = compute(rewards, ["cat", "cat", "cat", "dog", "dog"], adv_clip=5.0)
    assert advantages.tolist() == pytest.approx([0, 0, 0, -1, 1], abs=1e-5)
    assert not advantages[:3].any()


def test_common_draws(apply, tmp_path, tiny_sd, few_prompts, monkeypatch):
    mine = apply("rwr.py", "common_draws")
    seen = []
    accumulate = mine.accumulate_gradients

    def record(unet, rollout, *rest):
        seen.append((rollout["timesteps"].numpy(), rollout["noise"].numpy()))
        return accumulate(unet, rollout, *rest)

    monkeypatch.setattr(mine, "accumulate_gradients", record)
    run(mine, tmp_path, tiny_sd, num_samples=16, num_updates=2, prompts=few_prompts)
    assert len(seen) == 4
    for draws in zip(*seen):  # all timesteps, then all noise
        draws = np.concatenate(draws)
        first = draws[::4]  # of the samples of a prompt
        assert (draws == first.repeat(4, axis=0)).all()
        assert len(np.unique(first, axis=0)) == 16  # prompts, updates and iterations differ
    timesteps = np.concatenate([timesteps for timesteps, _ in seen])
    assert (timesteps // 200 == range(5)).all()  # one in each fifth of 1000
    assert len(np.unique(timesteps % 200)) > 50  # of 80 distinct draws


def test_own_unet_layers(apply, tmp_path, tiny_sd, few_prompts):
    mine = apply("ddpo_is.py", "own_unet_layers")
    # without LoRA: the attention of the up blocks moves, and nothing else
    folder = run(mine, tmp_path, tiny_sd, prompts=few_prompts)
    before = load_file(f"{tiny_sd}/unet/diffusion_pytorch_model.safetensors")
    after = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    for name in before:
        has_moved = not torch.equal(before[name], after[name])
        assert has_moved == name.startswith("up_blocks.0.attentions."), name

    # with LoRA: all linear layers, and StableDiffusionPipeline loads them
    folder = run(mine, tmp_path, tiny_sd, prompts=few_prompts, lora_rank=2)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    linear = [n for n, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Linear)]
    pipe.load_lora_weights(folder / "lora")
    for name in linear:
        assert pipe.unet.get_submodule(name).lora_B["default_0"].weight.any(), name


def test_sdxl(apply, tmp_path, tiny_sdxl, few_prompts):
    mine = apply("ddpo_is.py", "sdxl")
    prompts = ["cat", "a red fox", "bee"]

    def make_generators():
        return [mine.make_generator(1, 5, i, 0) for i in range(3)]

    def sample(policy):
        inputs = (policy.pipe, prompts, make_generators(), policy.schedule, policy.args)
        rollout = mine.sample_trajectories(*inputs)
        return rollout["latents"][:, -1]

    def draw(policy, output_type="latent"):
        return draw_with_diffusers(policy, prompts, make_generators(), output_type=output_type)

    def assert_same(latents, others):
        torch.testing.assert_close(latents, others, atol=1e-4, rtol=1e-4)

    # the latents, also without guidance, and the pictures are those of the pipeline
    policy = load_policy(mine, tiny_sdxl)
    pretrained = sample(policy)
    assert_same(pretrained, draw(policy))
    images = mine.decode(policy.pipe.vae, pretrained)
    assert np.abs(images - 255 * draw(policy, "np")).max() <= 0.51  # rounded
    assert images.std() > 10
    policy.args.guidance_scale = 1.0
    assert_same(sample(policy), draw(policy))

    # before the first update of an iteration the ratio is 1
    folder = run(mine, tmp_path, tiny_sdxl, prompts=few_prompts, lora_rank=4, lr=1e-2)
    rows = read_metrics(folder)
    assert rows[1]["ratio_err"] < 1e-5
    assert rows[2]["ratio_err"] < 1e-5
    assert rows[2]["approx_kl"] > 0

    # the LoRA in StableDiffusionXLPipeline draws what the trained policy draws
    trained = load_policy(mine, tiny_sdxl, lora_rank=4)
    state = torch.load(folder / "checkpoint.pt")
    for p, weight in zip(trained.params, state["weights"], strict=True):
        p.data.copy_(weight)
    policy = load_policy(mine, tiny_sdxl)
    policy.pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    policy.pipe.load_lora_weights(folder / "lora")
    latents = sample(trained)
    assert_same(latents, draw(policy))
    assert (latents - pretrained).abs().max() > 1e-2


def test_held_out_evaluation_of_the_trained_prompts_is_the_runs_own(
    tmp_path, tiny_sd, few_prompts, brightness
):
    changes = {"prompts": few_prompts, "reward": brightness, "lr": 2e-2}
    folder = run(ddpo_is, tmp_path / "runs", tiny_sd, **changes)
    evaluate = runpy.run_path(str(ROOT / "results/held_out/evaluate.py"))["evaluate"]
    evaluate(folder, few_prompts, tmp_path / "out")
    before, _, after = read_metrics(folder)
    assert abs(after["eval_reward"] - before["eval_reward"]) > 0.01
    for row, expected in zip(read_metrics(tmp_path / "out"), (before, after), strict=True):
        assert row == pytest.approx({name: expected[name] for name in row}, rel=1e-6)
