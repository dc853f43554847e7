"""Each patch of variants/ on today's script: it applies, runs, and does what its head says."""

import importlib.util
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, STABLE_DIFFUSION, load_policy, read_metrics, run
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from test_sampler import draw_with_diffusers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


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
def tiny_sdxl(tmp_path_factory):
    """Folder of a random pipeline of SDXL's classes and schedule, which draws 16 px pictures."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=24,
        eos_token_id=tokenizer.eos_token_id,
    )
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    vae = AutoencoderKL(
        latent_channels=4,
        scaling_factor=0.13,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        **blocks,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=2 * 32,  # both text encoders
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,  # pooled embedding and time ids
        **blocks,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**STABLE_DIFFUSION),
    )
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    pipe.save_pretrained(folder)
    return str(folder)


def test_group_advantages(apply, tmp_path, tiny_sd, few_prompts, monkeypatch):
    mine = apply("ddpo_is.py", "group_advantages")
    seen = []
    compute = mine.compute_advantages

    def record(rewards, prompts, adv_clip):
        seen.append((rewards, prompts, compute(rewards, prompts, adv_clip)))
        return seen[-1][-1]

    monkeypatch.setattr(mine, "compute_advantages", record)
    run(mine, tmp_path, tiny_sd, num_samples=16, prompts=few_prompts)
    assert len(seen) == 2
    for rewards, prompts, advantages in seen:
        assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 16, 4))
        assert len(set(prompts)) > 1
        for prompt in set(prompts):
            group = np.array(prompts) == prompt
            z = (rewards[group] - rewards[group].mean()) / (rewards[group].std() + 1e-6)
            assert advantages[group] == pytest.approx(z)

    # other groups do not count, and equal rewards have no advantage
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 3.0])
    advantages = compute(rewards, ["cat", "cat", "cat", "dog", "dog"], adv_clip=5.0)
    assert advantages.tolist() == pytest.approx([0, 0, 0, -1, 1], abs=1e-5)
    assert not advantages[:3].any()


def test_own_unet_layers(apply, tmp_path, tiny_sd, few_prompts):
    mine = apply("ddpo_is.py", "own_unet_layers")
    # without LoRA: the attention of the up blocks moves, and nothing else
    folder = run(mine, tmp_path, tiny_sd, prompts=few_prompts)
    before = load_file(f"{tiny_sd}/unet/diffusion_pytorch_model.safetensors")
    after = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {name for name in before if name.startswith("up_blocks.0.attentions.")}
    assert moved == attention and len(moved) > 20
    assert not any(name.startswith("up_blocks.1.attentions") for name in before)

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

    def sample(policy):
        generators = [mine.make_generator(1, 5, i, 0) for i in range(3)]
        inputs = (policy.pipe, prompts, generators, policy.schedule, policy.args)
        return mine.sample_trajectories(*inputs)["latents"][:, -1]

    def draw(policy, output_type="latent"):
        generators = [mine.make_generator(1, 5, i, 0) for i in range(3)]
        return draw_with_diffusers(policy, prompts, generators, output_type=output_type)

    # the latents, also without guidance, and the pictures are those of the pipeline
    policy = load_policy(mine, tiny_sdxl)
    pretrained = sample(policy)
    torch.testing.assert_close(pretrained, draw(policy), atol=1e-4, rtol=1e-4)
    images = mine.decode(policy.pipe.vae, pretrained)
    assert np.abs(images - 255 * draw(policy, "np")).max() <= 0.51 and images.std() > 10
    policy.args.guidance_scale = 1.0
    torch.testing.assert_close(sample(policy), draw(policy), atol=1e-4, rtol=1e-4)

    # before the first update of an iteration the ratio is 1
    folder = run(mine, tmp_path, tiny_sdxl, prompts=few_prompts, lora_rank=4, lr=1e-2)
    rows = read_metrics(folder)
    assert [row["ratio_err"] < 1e-5 for row in rows[1:]] == [True, True]
    assert rows[2]["approx_kl"] > 0

    # the LoRA in StableDiffusionXLPipeline draws what the trained policy draws
    trained = load_policy(mine, tiny_sdxl, lora_rank=4)
    state = torch.load(folder / "checkpoint.pt")
    for p, weight in zip(trained.params, state["weights"], strict=True):
        p.data.copy_(weight)
    policy = load_policy(mine, tiny_sdxl)
    policy.pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    policy.pipe.load_lora_weights(folder / "lora")
    torch.testing.assert_close(sample(trained), draw(policy), atol=1e-4, rtol=1e-4)
    assert (sample(trained) - pretrained).abs().max() > 1e-2
