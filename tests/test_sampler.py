"""The sampler against diffusers: the schedule, one step, the whole chain, pictures, log-probs.

The sampler is the same in all five scripts (test_scripts_in_sync.py); ddpo_is.py stands for them.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import STABLE_DIFFUSION, load_policy, make_pipeline
from diffusers import DDIMScheduler, EDMEulerScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

import ddpo_is

V_PREDICTION = {"prediction_type": "v_prediction"}
ZERO_SNR = V_PREDICTION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# name: options of the scheduler in the model's folder, and --guidance-scale
CHAINS = {
    "epsilon": ({}, 5.0),
    "v_prediction": (V_PREDICTION, 5.0),
    "zero_terminal_snr": (ZERO_SNR, 5.0),
    "trailing": ({"timestep_spacing": "trailing"}, 5.0),
    "deterministic_last_step": ({"set_alpha_to_one": True}, 5.0),
    "not_read_as_it_stands": ({"steps_offset": 0, "clip_sample": True}, 5.0),
    "guidance_above_1": ({}, 1.01),
    "guidance_1": ({}, 1.0),
    "guidance_0": ({}, 0.0),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_generators(numbers):
    return [ddpo_is.make_generator(1, 5, i, 0) for i in numbers]


def sample(policy, prompts, numbers=(0, 1, 2)):
    """The trajectories of these samples of an iteration."""
    inputs = (policy.pipe, prompts, make_generators(numbers), policy.schedule, policy.args)
    return ddpo_is.sample_trajectories(*inputs)


def draw_with_diffusers(policy, prompts, generators, **options):
    """Run StableDiffusionPipeline with eta = 1 on the noise of the generators."""
    shape = (policy.args.num_steps + 1, *policy.schedule.latent_shape)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    step_noise = iter(noise[:, 1:].unbind(dim=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffusers.schedulers.scheduling_ddim.randn_tensor",
            lambda *args, **kwargs: next(step_noise),
        )
        return policy.pipe(
            prompts,
            num_inference_steps=policy.args.num_steps,
            guidance_scale=policy.args.guidance_scale,
            eta=1.0,
            latents=noise[:, 0],
            **options,
        ).images


@pytest.fixture(scope="module")
def pipe(tiny_sd):
    return StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)


def make_schedule(pipe, num_steps=50, **options):
    """The schedule of a model with these options in its DDIMScheduler."""
    pipe.scheduler = DDIMScheduler(**(STABLE_DIFFUSION | options))
    return ddpo_is.make_schedule(pipe, ddpo_is.Args(device="cpu", num_steps=num_steps))


def step_with(noise_pred, latents, step, schedule, **options):
    """ddpm_step of a UNet that predicts noise_pred."""

    def unet(latents, t, embeds):
        assert torch.equal(t, schedule.timesteps[step])
        return SimpleNamespace(sample=noise_pred)

    args = ddpo_is.Args(guidance_scale=1.0)
    embeds = torch.zeros(2, len(latents), 1, 1)
    return ddpo_is.ddpm_step(unet, latents, step, embeds, schedule, args, **options)


# ---- the schedule ----


def test_stable_diffusions_own_pndm_config_gives_its_50_steps(pipe):
    """v1.4 ships a PNDMScheduler, read as a DDIMScheduler: 981, 961, ..., 1, as in the paper."""
    options = {"skip_prk_steps": True, "steps_offset": 0}  # the offset is 1 whatever is in the file
    pipe.scheduler = PNDMScheduler.from_config(STABLE_DIFFUSION, **options)
    schedule = ddpo_is.make_schedule(pipe, ddpo_is.Args(device="cpu"))
    sigma = schedule.tables[4]
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert schedule.noisy_steps.tolist() == list(range(50))
    assert sigma[0].item() == pytest.approx(0.454, abs=1e-3)
    assert sigma[-1].item() == pytest.approx(0.0206, abs=1e-4)


@pytest.mark.parametrize(
    "options, num_steps, message",
    [
        ({"thresholding": True}, 50, "thresholds x_0"),
        ({"prediction_type": "sample"}, 50, "predicts sample"),
        (ZERO_SNR | {"prediction_type": "epsilon"}, 50, "zero terminal SNR"),
        ({}, 400, "starts at t = 799"),
        ({"timestep_spacing": "trailing"}, 400, None),  # begins at 999
        ({}, 300, None),  # at 898
        ({}, 1, None),
    ],
)
def test_schedules_that_would_run_but_not_as_trained_are_refused(pipe, options, num_steps, message):
    if message is None:
        assert len(make_schedule(pipe, num_steps, **options).timesteps) == num_steps
    else:
        with pytest.raises(SystemExit, match=message):
            make_schedule(pipe, num_steps, **options)


def test_models_that_are_not_ddpms_are_refused(pipe):
    pipe = copy.deepcopy(pipe)
    args = ddpo_is.Args(device="cpu")
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(SystemExit, match="no betas"):
        ddpo_is.make_schedule(pipe, args)
    pipe.unet.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(SystemExit, match="LCM"):
        make_schedule(pipe)


# ---- one step ----


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "zero_terminal_snr", "trailing"])
def test_ddpm_step_equals_diffusers_ddim_with_eta_1(pipe, name):
    """All 50 steps, in float32 against diffusers in double precision, whose numbers are of size 1.

    eta is a hair below 1: at abar = 0 diffusers takes the square root of 0, or of -1e-17.
    """
    options, _ = CHAINS[name]
    schedule = make_schedule(pipe, **options)
    scheduler = DDIMScheduler(**(STABLE_DIFFUSION | options))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(50)
    for i, t in enumerate(scheduler.timesteps):
        latents, noise_pred, noise = normal(3, 2, 4, 8, 8, seed=i)
        inputs = {"model_output": noise_pred.double(), "timestep": t, "sample": latents.double()}
        inputs["eta"] = 1 - 1e-14
        no_noise = torch.zeros_like(noise).double()
        expected_mean = scheduler.step(**inputs, variance_noise=no_noise).prev_sample
        expected = scheduler.step(**inputs, variance_noise=noise.double()).prev_sample
        step = torch.full((2,), i)
        next_latents, _, mean = step_with(noise_pred, latents, step, schedule, noise=noise)
        scale = max(latents.abs().max(), expected.abs().max())
        assert (mean - expected_mean).abs().max() < 1e-6 * scale
        assert (next_latents - expected).abs().max() < 1e-6 * scale


def test_log_prob_is_the_mean_of_the_normal_log_density_at_each_rows_own_step(pipe):
    schedule = make_schedule(pipe, num_steps=10)
    latents, noise_pred, noise = normal(3, 10, 4, 8, 8)
    step = torch.arange(10).flip(0)
    next_latents, drawn, mean = step_with(noise_pred, latents, step, schedule, noise=1.5 * noise)
    _, scored, _ = step_with(noise_pred, latents, step, schedule, next_latents=next_latents)
    density = torch.distributions.Normal(mean, schedule.tables[4, step].view(-1, 1, 1, 1))
    expected = density.log_prob(next_latents).mean(dim=(1, 2, 3))
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn, scored)
    assert expected.std() > 0.1  # the steps differ, so that the comparison means something
    for i in range(10):
        row = slice(i, i + 1)
        inputs = (noise_pred[row], latents[row], step[row], schedule)
        alone = step_with(*inputs, next_latents=next_latents[row])
        for all_rows, one_row in zip((next_latents, scored, mean), alone, strict=True):
            assert torch.equal(all_rows[row], one_row)


# ---- the whole chain ----


@pytest.mark.parametrize("name", CHAINS)
def test_the_sampler_draws_what_diffusers_own_pipeline_draws(name, tmp_path):
    """Timesteps, guidance, prompts and every step, in chunks that do not divide the samples.

    At zero terminal SNR and, say, 7 steps diffusers' own rounding gives NaN; at 8 it does not.
    """
    options, guidance_scale = CHAINS[name]
    folder = make_pipeline(tmp_path, **options)
    DDIMScheduler(**(STABLE_DIFFUSION | options)).save_pretrained(tmp_path / "scheduler")
    settings = {"num_steps": 8, "micro_batch": 2, "guidance_scale": guidance_scale}
    policy = load_policy(ddpo_is, folder, **settings)
    prompts = ["cat", "dog", "bee"]
    expected = draw_with_diffusers(policy, prompts, make_generators(range(3)), output_type="latent")
    rollout = sample(policy, prompts)
    assert rollout["latents"].shape == (3, 9, 4, 8, 8) and rollout["log_probs"].shape == (3, 8)
    assert rollout["latents"].dtype == rollout["log_probs"].dtype == torch.float32
    torch.testing.assert_close(rollout["latents"][:, -1], expected, atol=1e-4, rtol=1e-4)
    noisy_steps = policy.schedule.noisy_steps  # those that have a log-prob
    assert len(noisy_steps) == (7 if name == "deterministic_last_step" else 8)
    assert rollout["log_probs"][:, noisy_steps].isfinite().all()

    # the same noise with another prompt is another picture, at any guidance scale
    other = sample(policy, ["dog", "dog", "bee"])["latents"][:, -1]
    changed = (other - rollout["latents"][:, -1]).abs().amax(dim=(1, 2, 3))
    assert changed[0] > 0.01 and changed[1:].max() < 1e-4


def test_a_rectangular_model_draws_rectangles(tmp_path):
    policy = load_policy(ddpo_is, make_pipeline(tmp_path, sample_size=[8, 12]))
    assert policy.schedule.latent_shape == (4, 8, 12)
    expected = draw_with_diffusers(policy, ["cat"], make_generators([0]), output_type="np")
    latents = sample(policy, ["cat"], [0])["latents"]
    images = ddpo_is.decode(policy.pipe.vae, latents[:, -1])
    assert images.shape == (1, 16, 24, 3)
    assert np.abs(images / 255 - expected).max() < 1.5 / 255


# ---- pictures ----


def test_decode_equals_diffusers_decoder_and_image_processor(pipe):
    """Ten pictures, more than one chunk of the decoder, with values outside of [-1, 1]."""
    latents = 5 * normal(10, 4, 8, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.3).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="np")
    images = ddpo_is.decode(pipe.vae, latents)
    assert images.shape == (10, 16, 16, 3) and images.dtype == np.uint8
    assert np.abs(images / 255 - expected).max() <= 0.5 / 255 + 1e-6
    assert decoded.abs().max() > 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_picture_that_is_not_finite_is_never_scored(pipe, bad):
    vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias[1] = bad  # one channel
    with pytest.raises(FloatingPointError, match="--precision fp32"):
        ddpo_is.decode(vae, normal(6, 4, 8, 8))


def grid_cells(path):
    """The 16 px pictures of a grid, row by row, as float arrays from 0 to 1."""
    grid = np.asarray(Image.open(path)) / 255
    rows = grid.reshape(grid.shape[0] // 16, 16, grid.shape[1] // 16, 16, 3)
    return rows.transpose(0, 2, 1, 3, 4).reshape(-1, 16, 16, 3)


def evaluate(policy, folder, prompts):
    """Returns what is measured: rewards, images, their prompts, all prompts."""

    def score(images, prompts):
        return images.mean(axis=(1, 2, 3)), {}

    def measure(*inputs):
        return inputs

    inputs = (policy.pipe, folder, 3, prompts, score, measure, policy.schedule, policy.args)
    return ddpo_is.evaluate(*inputs)


def test_evaluate_shows_and_measures_what_diffusers_own_pipeline_draws(tiny_sd, tmp_path):
    """Order of the prompts, fixed noise, grid, and figure 4's steps 0 9 19 29 39 49 of 50."""
    policy = load_policy(ddpo_is, tiny_sd, num_steps=50)
    prompts = ["cat", "a red fox", "bee"]
    chosen = prompts + prompts
    after_step = []

    def keep(pipe, step, t, tensors):
        after_step.append(tensors["latents"][-1])
        return tensors

    expected = draw_with_diffusers(
        policy,
        [*chosen, "elephant"],
        [ddpo_is.make_generator(0, 0, i, 1) for i in range(7)],
        output_type="np",
        callback_on_step_end=keep,
    )
    rewards, images, scored_prompts, all_prompts = evaluate(policy, tmp_path, prompts)
    assert np.abs(grid_cells(tmp_path / "images/0003.png") - expected[:6]).max() < 1.5 / 255
    assert np.abs(images / 255 - expected[:6]).max() < 1.5 / 255
    assert scored_prompts == chosen and all_prompts == prompts
    np.testing.assert_allclose(rewards, images.mean(axis=(1, 2, 3)))

    shown = torch.stack([after_step[step] for step in (0, 9, 19, 29, 39, 49)])
    strip = ddpo_is.decode(policy.pipe.vae, shown) / 255
    assert np.abs(grid_cells(tmp_path / "trajectory/0003.png") - strip).max() < 1.5 / 255


def test_up_to_32_prompts_spread_over_the_list_are_evaluated(tiny_sd, tmp_path):
    policy = load_policy(ddpo_is, tiny_sd, num_steps=2)
    prompts = [f"p{i}" for i in range(94)]
    assert evaluate(policy, tmp_path, prompts)[2] == prompts[::3] + prompts[::3]


# ---- randomness ----


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_a_sample_does_not_depend_on_the_others_of_its_batch(tiny_sd, micro_batch):
    policy = load_policy(ddpo_is, tiny_sd)
    prompts = ["cat", "a red fox", "bee"]
    together = sample(policy, prompts)
    noise = torch.randn((7, 4, 8, 8), generator=ddpo_is.make_generator(1, 5, 1, 0))
    assert torch.equal(together["latents"][1, 0], noise[0])  # x_T
    policy.args.micro_batch = micro_batch
    for numbers in ([2, 0], [1]):
        some = sample(policy, [prompts[i] for i in numbers], numbers)
        for name, atol in (("latents", 1e-4), ("log_probs", 1e-5)):
            torch.testing.assert_close(some[name], together[name][numbers], atol=atol, rtol=1e-4)


# ---- the UNet ----


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_copy_of_the_unet_has_weights_of_its_own(tiny_sd, lora_rank):
    """An average of the weights, or a frozen copy, is made with copy.deepcopy."""
    policy = load_policy(ddpo_is, tiny_sd, lora_rank=lora_rank, precision="bf16")
    inputs = (normal(2, 4, 8, 8), torch.tensor([5, 900]), normal(2, 2, 16, 128), 5.0)
    with torch.no_grad():
        before = ddpo_is.predict_noise(policy.unet, *inputs)
        assert before.dtype == torch.float32
        duplicate = copy.deepcopy(policy.unet)
        assert torch.equal(ddpo_is.predict_noise(duplicate, *inputs), before)
        for p in policy.params:
            p.add_(0.1)
        assert not torch.equal(ddpo_is.predict_noise(policy.unet, *inputs), before)
        assert torch.equal(ddpo_is.predict_noise(duplicate, *inputs), before)
