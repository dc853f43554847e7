"""The sampler, the log-probs, the loss and the gradient of ddpo_is.py, on diffusers' schedulers and small models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import embed
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

import ddpo_is
import rwr

STABLE_DIFFUSION = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False, steps_offset=1
)


def make_args(**changes):
    return ddpo_is.Args(device="cpu", precision="fp32", lora_rank=0, micro_batch=8, num_steps=6, **changes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_step_equals_diffusers_ddim_with_eta_1(prediction_type):
    options = STABLE_DIFFUSION | dict(prediction_type=prediction_type, clip_sample=False)
    scheduler = DDIMScheduler(**options)
    schedule = ddpo_is.make_schedule(DDIMScheduler(**options), 50, "cpu")
    scheduler.set_timesteps(50)
    g = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        latents, output, noise = torch.randn((3, 2, 4, 8, 8), generator=g)
        step = torch.full((2,), i)
        # the unet returns `output` for cond and uncond alike, so that guidance leaves it as it is
        unet = lambda x, t, embeds: SimpleNamespace(sample=torch.cat([output, output]))
        noise_pred = ddpo_is.predict_noise(unet, latents, t.expand(2), torch.zeros(2, 2, 3, 4), schedule, 5.0)
        expected = scheduler.step(output, t, latents, eta=1.0, variance_noise=noise).prev_sample
        expected_mean = scheduler.step(output, t, latents, eta=1.0, variance_noise=torch.zeros_like(noise)).prev_sample
        next_latents, _, mean = ddpo_is.ddpm_step(noise_pred, latents, step, schedule, noise=noise)
        torch.testing.assert_close(mean, expected_mean, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(next_latents, expected, atol=2e-5, rtol=1e-5)


def test_stable_diffusions_own_pndm_config_gives_the_same_chain(tmp_path):
    """v1.4 ships a PNDMScheduler; read as a DDIMScheduler it must give the paper's 50 steps 981, 961, ..., 1."""
    PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True).save_pretrained(tmp_path / "scheduler")
    schedule = ddpo_is.make_schedule(DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler"), 50, "cpu")
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert schedule.sigmas[0] == pytest.approx(0.454, abs=1e-3)
    assert schedule.sigmas[-1] == pytest.approx(0.0206, abs=1e-4)


def test_log_prob_is_the_mean_of_the_normal_log_density():
    schedule = ddpo_is.make_schedule(DDIMScheduler(**STABLE_DIFFUSION), 10, "cpu")
    latents, noise_pred, next_latents = torch.randn((3, 10, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    step = torch.arange(10)
    _, log_prob, mean = ddpo_is.ddpm_step(noise_pred, latents, step, schedule, next_latents=next_latents)
    normal = torch.distributions.Normal(mean, schedule.sigmas.view(-1, 1, 1, 1))
    torch.testing.assert_close(log_prob, normal.log_prob(next_latents).mean((1, 2, 3)), rtol=1e-5, atol=1e-5)


def test_guidance_mixes_cond_and_uncond():
    schedule = ddpo_is.make_schedule(DDIMScheduler(**STABLE_DIFFUSION), 10, "cpu")
    unet = lambda x, t, embeds: SimpleNamespace(sample=embeds.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x))
    embeds = torch.stack([torch.full((2, 3, 4), 1.0), torch.full((2, 3, 4), 3.0)])
    noise_pred = ddpo_is.predict_noise(unet, torch.zeros(2, 4, 8, 8), torch.tensor([0, 1]), embeds, schedule, 5.0)
    torch.testing.assert_close(noise_pred, torch.full((2, 4, 8, 8), 1.0 + 5.0 * (3.0 - 1.0)))


@pytest.mark.parametrize("folder", ["tiny_sd", "tiny_sd_v"])
@pytest.mark.parametrize("script", [ddpo_is, rwr])
def test_the_sampler_draws_what_diffusers_own_pipeline_draws(folder, script, request):
    """The whole chain, the UNet's timesteps and the guidance included, against StableDiffusionPipeline with eta = 1."""
    options = dict(num_steps=7, micro_batch=3, device="cpu", precision="fp32", lora_rank=0)
    args = script.Args(model=request.getfixturevalue(folder), **options)
    pipe, _ = script.load_model(args)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["cat", "dog"]
    noise = torch.stack([torch.randn((2, 4, 8, 8), generator=script.make_generator(1, k)) for k in range(8)], 1)
    options = dict(num_inference_steps=7, guidance_scale=5.0, eta=1.0, output_type="latent", latents=noise[:, 0])
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(noise[:, 1:].unbind(1))
        patch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", lambda *args, **kwargs: next(steps))
        expected = pipe(prompts, **options).images
    schedule = script.make_schedule(DDIMScheduler.from_config(pipe.scheduler.config), 7, "cpu")
    embeds = embed(pipe, prompts)
    latents, _ = script.sample_trajectories(pipe.unet, embeds, noise, schedule, args)
    torch.testing.assert_close(latents[:, -1], expected, atol=1e-4, rtol=1e-4)


def test_the_grid_shows_what_diffusers_own_pipeline_draws(tiny_sd, tmp_path):
    """evaluate, whole: the prompts' order, embeddings, guidance, noise and decoder; two noises of each prompt."""
    args = make_args(model=tiny_sd)
    pipe, _ = ddpo_is.load_model(args)
    pipe.set_progress_bar_config(disable=True)
    schedule = ddpo_is.make_schedule(DDIMScheduler.from_config(pipe.scheduler.config), 6, "cpu")
    prompts = ["cat", "a red fox", "bee"]
    score = lambda images, prompts: (images.mean((1, 2, 3)), {})
    ddpo_is.evaluate(pipe, tmp_path, 3, prompts, score, None, schedule, (4, 8, 8), args)
    noise = torch.stack([torch.randn((7, 4, 8, 8), generator=ddpo_is.make_generator(0, 0, i, 1)) for i in range(6)])
    steps = iter(noise[:, 1:].unbind(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", lambda *args, **kwargs: next(steps))
        options = dict(num_inference_steps=6, guidance_scale=5.0, eta=1.0, output_type="np", latents=noise[:, 0])
        expected = pipe(prompts * 2, **options).images
    grid = np.asarray(Image.open(tmp_path / "images/0003.png")) / 255
    rows = [np.concatenate(row, 1) for row in np.split(expected, 2)]
    assert grid.shape == (32, 48, 3) and np.abs(grid - np.concatenate(rows)).max() < 1.5 / 255
    assert np.abs(expected[0] - expected[1]).mean() > 0.05  # the pictures differ, so that their order matters


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="only epsilon and v_prediction"):
        ddpo_is.make_schedule(DDIMScheduler(prediction_type="sample"), 10, "cpu")


def make_data(folder, args, n=4):
    """A pipeline and n trajectories of it, with advantages of both signs."""
    pipe, params = (folder, None) if not isinstance(folder, str) else ddpo_is.load_model(args)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    schedule = ddpo_is.make_schedule(scheduler, args.num_steps, "cpu")
    embeds = embed(pipe, ["cat", "dog", "cat", "bee"][:n])
    noise = torch.randn((n, args.num_steps + 1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    latents, log_probs = ddpo_is.sample_trajectories(pipe.unet, embeds, noise, schedule, args)
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5][:n]).view(-1, 1).expand_as(log_probs)
    data = {"latents": latents, "embeds": embeds, "log_prob_beh": log_probs, "advantages": advantages}
    return pipe, params, schedule, data


def gradient(pipe, params, schedule, data, args):
    """(gradient as one vector, info) of all the trajectories in `data`."""
    info = ddpo_is.accumulate_gradients(pipe.unet, data, torch.arange(len(data["latents"])), schedule, args)
    return torch.cat([p.grad.flatten() for p in params.values() if p.grad is not None]), info


def test_the_deterministic_last_step_is_skipped(tiny_sd_v):
    args = make_args(model=tiny_sd_v)
    pipe, params, schedule, data = make_data(tiny_sd_v, args)
    assert schedule.sigmas[-1] == 0 and (schedule.sigmas[:-1] > 0).all()
    assert (data["log_prob_beh"][:, -1] == 0).all() and data["latents"].isfinite().all()
    before, info = gradient(pipe, params, schedule, data, args)
    assert np.isfinite(info["loss"]) and before.isfinite().all() and before.norm() > 0
    data["latents"][:, -1] += 7.0  # what the last step made cannot matter
    torch.testing.assert_close(gradient(pipe, params, schedule, data, args)[0], before)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_what_is_stored_is_what_is_scored(model, micro_batch, request, tmp_path):
    """Rescoring the stored trajectory with unchanged weights gives ratio 1, after a checkpoint round trip too."""
    args = make_args(model=request.getfixturevalue(model))
    pipe, params, schedule, data = make_data(args.model, args)
    args.micro_batch = micro_batch
    _, info = gradient(pipe, params, schedule, data, args)
    assert info["ratio_err"] < 1e-5

    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)
    optimizer.step()
    (tmp_path / "checkpoint").mkdir()
    ddpo_is.save_checkpoint(tmp_path, pipe.unet, params, optimizer, {"iteration": 7}, args)
    _, _, _, moved = make_data(pipe, args)
    for p in params.values():
        p.data.zero_()
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)
    assert ddpo_is.load_checkpoint(tmp_path, params, optimizer) == {"iteration": 7}
    _, info = gradient(pipe, params, schedule, moved, args)
    assert info["ratio_err"] < 1e-5
    _, info = gradient(pipe, params, schedule, data, args)
    assert info["ratio_err"] > 1e-5  # the step did move the policy, so the comparison above means something
    assert len(optimizer.state) == len(params)


def test_the_gradient_does_not_depend_on_the_microbatch(tiny_sd):
    args = make_args(model=tiny_sd)
    made = make_data(tiny_sd, args)
    gradients = []
    for args.micro_batch in (1, 7, 1000):
        gradients.append(gradient(*made, args))
    for g, info in gradients[1:]:
        torch.testing.assert_close(g, gradients[0][0], rtol=1e-3, atol=1e-5 * float(gradients[0][0].abs().max()))
        assert info["loss"] == pytest.approx(gradients[0][1]["loss"], rel=1e-4)


def test_the_gradient_in_fp16_is_that_in_fp32(tiny_sd):
    """Its loss scale keeps what is under the smallest fp16 number, and is taken out again."""
    gradients = {}
    for precision in ("fp32", "fp16"):
        args = make_args(model=tiny_sd, clip_range=1.0)
        args.precision, args.lora_rank = precision, 4
        pipe, params, schedule, data = make_data(tiny_sd, args)
        data["advantages"] = data["advantages"] * 1e-4
        gradients[precision] = gradient(pipe, params, schedule, data, args)[0]
    apart = (gradients["fp16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert gradients["fp32"].norm() > 0 and apart < 0.05


def test_the_first_gradient_is_reinforce(tiny_sd):
    """With ratio = 1, d(-A ratio) = -A d log_prob: the gradient of the mean of -A log_prob by plain autograd."""
    args = make_args(model=tiny_sd)
    pipe, params, schedule, data = make_data(tiny_sd, args)
    g, _ = gradient(pipe, params, schedule, data, args)
    loss = 0
    for i in range(4):
        for s in range(6):
            x, y, step = data["latents"][i : i + 1, s], data["latents"][i : i + 1, s + 1], torch.tensor([s])
            t, embeds = schedule.timesteps[step], data["embeds"][:, i : i + 1]
            noise_pred = ddpo_is.predict_noise(pipe.unet, x, t, embeds, schedule, 5.0)
            loss = loss - data["advantages"][i, s] * ddpo_is.ddpm_step(noise_pred, x, step, schedule, next_latents=y)[1]
    expected = torch.autograd.grad(loss.sum() / 24, list(params.values()), allow_unused=True)
    expected = torch.cat([e.flatten() for e in expected if e is not None])
    torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2.0, 1.3, -2.2, 0.0),  # a good action already made likelier: clipped, no gradient
        (2.0, 0.7, -1.4, -1.4),  # a good action made unlikelier: the gradient stays
        (-2.0, 1.3, 2.6, 2.6),  # a bad action made likelier: the gradient stays
        (-2.0, 0.7, 1.8, 0.0),  # a bad action already made unlikelier: clipped
        (2.0, 1.05, -2.1, -2.1),  # inside the trust region
    ],
)
def test_clip_by_hand(advantage, ratio, loss, slope):
    """clip range 0.1; d loss / d log_prob = -A ratio where it is not clipped"""
    log_prob = torch.tensor([np.log(ratio) - 3.0], dtype=torch.float64, requires_grad=True)
    pairs = {"log_prob_beh": torch.tensor([-3.0]).double(), "advantages": torch.tensor([advantage]).double()}
    out, info = ddpo_is.compute_loss(log_prob, None, pairs, None, make_args(clip_range=0.1))
    out.sum().backward()
    assert out.item() == pytest.approx(loss) and log_prob.grad.item() == pytest.approx(slope)
    assert info["clipfrac"].item() == (abs(ratio - 1) > 0.1)
    assert info["approx_kl"].item() == pytest.approx(0.5 * np.log(ratio) ** 2)


def test_advantages_use_the_batch_and_then_the_prompts_own_history():
    history = {}
    rewards = np.array([1.0, 2.0, 3.0, 6.0])
    first = ddpo_is.compute_advantages(rewards, ["a", "a", "b", "b"], history, 5.0)
    np.testing.assert_allclose(first, (rewards - 3.0) / (rewards.std() + 1e-6))
    assert history == {"a": [1.0, 2.0], "b": [3.0, 6.0]}
    history = {"a": [float(i) for i in range(16)]}
    second = ddpo_is.compute_advantages([20.0, 5.0], ["a", "b"], history, 5.0)
    window = np.array([*range(1, 16), 20.0])  # the last 16 of a's rewards
    assert history["a"] == window.tolist()
    batch = np.array([20.0, 5.0])
    expected = [(20 - window.mean()) / (window.std() + 1e-6), (5 - batch.mean()) / (batch.std() + 1e-6)]
    np.testing.assert_allclose(second, expected)
    assert ddpo_is.compute_advantages([0.0] * 99 + [1.0], [str(i) for i in range(100)], {}, 5.0).max() == 5.0


def test_a_constant_reward_has_no_advantage():
    for n in range(1, 17):  # the mean of some of them is not exact
        assert (ddpo_is.compute_advantages(np.full(n, 2.3), ["cat"] * n, {}, 5.0) == 0).all()


def test_noise_is_a_function_of_its_key():
    draw = lambda *key: torch.randn(5, generator=ddpo_is.make_generator(*key))
    assert torch.equal(draw(1, 2, 3, 0), draw(1, 2, 3, 0))
    keys = [(1, 2, 3, 0), (2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == 5


def test_decode_undoes_scaling(tiny_sd):
    """Against diffusers' image processor."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    latents = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe.vae.decode(latents / 0.3).sample
    expected = pipe.image_processor.postprocess(expected, output_type="np")
    images = ddpo_is.decode(pipe.vae, latents)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert np.abs(images / 255 - expected).max() <= 0.5 / 255 + 1e-6
