"""Every scheduler of diffusers in imvar's pipeline: it runs as in diffusers' pipeline, or is refused by name."""

import json

import diffusers
import pytest
import torch

import imvar
from imvar import InputTypeError
from tests.reference.conftest import ours, ref, ref_folder

__all__ = ["ours", "ref", "ref_folder"]
pytestmark = pytest.mark.filterwarnings("ignore:__array")  # of scipy and NumPy, in diffusers

RUN = [
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
REFUSED = {
    "CogVideoXDPMScheduler": "missing a required argument: 'timestep_back' of its step",
    "DDPMWuerstchenScheduler": "whose step takes a timestep per sample",
    "FlowMatchEulerDiscreteScheduler": "which has no scale_model_input",
    "FlowMatchHeunDiscreteScheduler": "which has no scale_model_input",
    "FlowMatchLCMScheduler": "which has no scale_model_input",
    "KarrasVeScheduler": "missing a required argument: 'sample_hat' of its step",
    "RePaintScheduler": "missing a required argument: 'original_image' of its step",
    "SCMScheduler": "which has no scale_model_input",
    "ScoreSdeVeScheduler": "which has no step",
}
OWN = [name for name in RUN if hasattr(imvar, name)]


def latents_of(pipe, photo):
    pipe.unet.conv_out.weight.data *= 0.1  # random networks magnify rounding
    pipe.unet.conv_out.bias.data *= 0.1
    generator = torch.Generator().manual_seed(5)
    return pipe(photo, num_inference_steps=5, guidance_scale=3, generator=generator, output_type="latent").images


def config_of(pipe, name):
    config = getattr(diffusers, name)().config
    changes = {"clip_sample": False} if "clip_sample" in config else {}
    return dict(pipe.scheduler.config) | changes


@pytest.mark.parametrize(("name", "library"), [*((n, diffusers) for n in RUN), *((n, imvar) for n in OWN)])
def test_a_scheduler_that_runs(ours, ref, photo, name, library):
    ours.scheduler = getattr(library, name).from_config(config_of(ours, name))
    ref.scheduler = getattr(diffusers, name).from_config(config_of(ref, name))
    latents, expected = latents_of(ours, photo), latents_of(ref, photo)
    assert expected.abs().max() > 0.1
    assert (latents - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", OWN)
def test_a_saved_pipeline_has_the_scheduler_in_both_libraries(ours, ref, photo, name, tmp_path):
    """Also DPM-Solver's, whose file has a number that is not finite; and another scheduler reads and keeps it."""
    for pipe, library in ((ours, imvar), (ref, diffusers)):
        pipe.scheduler = getattr(library, name).from_config(config_of(pipe, name))
        pipe.save_pretrained(tmp_path / library.__name__)
    for folder in tmp_path.iterdir():
        pipes = [
            library.StableDiffusionImageVariationPipeline.from_pretrained(folder) for library in (imvar, diffusers)
        ]
        assert [type(pipe.scheduler).__name__ for pipe in pipes] == [name, name]
        assert (latents_of(pipes[0], photo) - latents_of(pipes[1], photo)).abs().max() <= 1e-4
    files = []
    for library in (imvar, diffusers):  # with the fields of the other class
        lms = library.LMSDiscreteScheduler.from_pretrained(tmp_path / "diffusers", subfolder="scheduler")
        lms.save_pretrained(tmp_path / "lms")
        files.append(json.loads((tmp_path / "lms" / "scheduler_config.json").read_text()))
    assert files[0] == files[1]


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheduler_that_is_refused_before_a_step(ours, photo, name):
    ours.scheduler = getattr(diffusers, name)()
    ours.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet ran"))
    with pytest.raises(InputTypeError, match=rf"scheduler: expected .*, got {name}.* ?{REFUSED[name]}"):
        ours(photo, num_inference_steps=5)


def test_a_step_with_arguments_of_ones_own(ours, photo):
    """A subclass of the pipeline may supply what a scheduler's step needs."""

    class Filling(type(ours)):
        def prepare_extra_step_kwargs(self, generator, eta):
            return {"strength": 0.5}

    class Demanding(imvar.DDIMScheduler):
        def step(self, model_output, timestep, sample, *, strength):
            return super().step(model_output, timestep, sample, strength)

    ours.scheduler = Demanding.from_config(ours.scheduler.config)
    with pytest.raises(InputTypeError, match=r"got Demanding .*'strength' of its step"):
        ours(photo, num_inference_steps=2)
    Filling(**ours.components)(photo, num_inference_steps=2)
