"""`callback_on_step_end`, beside diffusers' text pipeline on the same weights where both have it."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

import imvar
from imvar import DDIMScheduler, InputError, InputTypeError
from tests.reference.conftest import ours, ref, ref_folder

__all__ = ["ours", "ref", "ref_folder"]
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # diffusers' schedulers
ALL = ("latents", "pred_original_sample", "image_embeds", "negative_image_embeds")


def run(pipe, *args, **options):
    return pipe(*args, **({"num_inference_steps": 4, "output_type": "latent", "seed": 1} | options)).images


@pytest.fixture
def text(ref):
    """diffusers' text pipeline with the components of its image variation pipeline; embeddings are its prompts."""
    parts = {name: getattr(ref, name) for name in ("vae", "unet", "scheduler")}
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = diffusers.StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(ours, text, callback, scheduler, guidance_scale=3.0, names=("latents",)):
    """Run both pipelines with the same embeddings and noise, and return their latents."""
    embeds = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for pipe in ours, text:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(text.scheduler.config)
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "latents": latents, "output_type": "latent"}
    options["callback_on_step_end"] = callback
    mine = ours(image_embeds=embeds, **options, callback_on_step_end_tensor_inputs=list(names))
    names = [name.replace("image_embeds", "prompt_embeds") for name in names]
    options |= {"height": 128, "width": 128, "negative_prompt_embeds": torch.zeros_like(embeds)}
    theirs = text(prompt_embeds=embeds, **options, callback_on_step_end_tensor_inputs=names)
    return mine.images, theirs.images


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"]
)
def test_it_is_called_where_diffusers_calls_it_and_its_latents_are_taken_over(ours, text, scheduler):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((pipe, i, float(t), pipe.num_timesteps, list(tensors)))
        if i == 1:
            tensors["latents"] = tensors["latents"] * 0.5
        if i == 2:
            tensors["latents"].add_(0.1)  # in place
            return {}
        return tensors

    mine, theirs = both(ours, text, callback, scheduler)
    half = len(seen) // 2
    assert [call[0] for call in seen] == [ours] * half + [text] * half
    assert [call[1:] for call in seen[:half]] == [call[1:] for call in seen[half:]]
    assert (mine - theirs).abs().max() < 1e-4
    assert (mine - both(ours, text, lambda *_: {}, scheduler)[0]).abs().max() > 0.01


@pytest.mark.parametrize("names", [("image_embeds",), ("latents", "image_embeds")])
def test_changed_embeddings_are_those_of_the_next_steps(ours, text, names):
    """diffusers' holds both halves of guidance in `prompt_embeds`, so this run has none."""

    def callback(pipe, i, t, tensors):
        name = "image_embeds" if pipe is ours else "prompt_embeds"
        return {name: -2 * tensors[name]} if i == 1 else {}

    mine, theirs = both(ours, text, callback, "DDIMScheduler", guidance_scale=1.0, names=names)
    assert (mine - theirs).abs().max() < 1e-4
    assert (mine - both(ours, text, lambda *_: {}, "DDIMScheduler", 1.0)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["image_embeds", "negative_image_embeds"])
@pytest.mark.parametrize("options", [{}, {"cache_interval": 2}])
def test_embeddings_changed_in_the_first_step_are_those_of_a_second_run(pipe, photo, name, in_place, options):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    first, other = pipe.encode_image(photo), pipe.encode_image(photo.rotate(90))
    seen = []

    def callback(_, i, t, tensors):
        seen.append(tensors["latents"].clone())
        if i == 0 and in_place:
            tensors[name].copy_(other)
            return None
        return {name: other} if i == 0 else {}

    names = ["latents", name]
    changed = run(
        pipe, image_embeds=first, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **options
    )
    swap = {"image_embeds": other} if name == "image_embeds" else {"negative_image_embeds": other}

    def restart(_, i, t, tensors):
        return {"latents": seen[0]} if i == 0 else None

    expected = run(pipe, **({"image_embeds": first} | swap), callback_on_step_end=restart, **options)
    if not options:
        assert torch.equal(changed, expected)
    assert (changed - run(pipe, image_embeds=first, **options)).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1, 3])
def test_reading_all_tensors_changes_nothing(pipe, photo, guidance_scale):
    names = ALL if guidance_scale > 1 else ALL[:3]
    shapes = []

    def callback(_, i, t, tensors):
        shapes.append({name: tuple(value.shape) for name, value in tensors.items()})
        return tensors

    options = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    made = run(pipe, photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **options)
    assert torch.equal(made, run(pipe, photo, **options))
    latents, embeds = tuple(made.shape), (2, *pipe.encode_image(photo).shape[1:])
    assert shapes == [dict(zip(names, (latents, latents, embeds, embeds), strict=False))] * 5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver"]
)
def test_the_predicted_x0_is_the_one_that_the_scheduler_steps_with(pipe, photo, name, karras, prediction):
    options = {"use_karras_sigmas": karras, "prediction_type": prediction, "timestep_spacing": "trailing"}
    kind, expected, seen = getattr(diffusers, f"{name}Scheduler"), [], []

    class Recording(kind):
        def convert_model_output(self, model_output, *args, sample=None, **more):
            out = super().convert_model_output(model_output, *args, sample=sample, **more)
            sigma = self.sigmas[self.step_index]
            alpha = 1 / (sigma**2 + 1) ** 0.5
            x0 = (sample - alpha * sigma * model_output) / alpha
            expected.append(alpha * sample - alpha * sigma * model_output if prediction == "v_prediction" else x0)
            return out

    pipe.scheduler = Recording.from_config(pipe.scheduler.config, **options)
    callback = lambda _, i, t, tensors: seen.append(tensors["pred_original_sample"])  # noqa: E731
    run(pipe, photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["pred_original_sample"])
    assert len(seen) == 4
    for mine, theirs in zip(seen, expected, strict=False):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_predicted_x0_of_pndm_is_that_of_ddim(pipe, photo):
    """Up to the first step, before which both have the same latents."""
    x0 = {}
    for kind in imvar.PNDMScheduler, DDIMScheduler:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        if kind is DDIMScheduler:
            pipe.scheduler.register_to_config(clip_sample=False)

        def callback(_, i, t, tensors, kind=kind):
            x0.setdefault(kind, tensors["pred_original_sample"])

        run(pipe, photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["pred_original_sample"])
    first, second = x0.values()
    assert first.std() > 0.1
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-5)


def test_a_scheduler_without_a_known_x0_is_refused_by_name(pipe, photo):
    pipe.scheduler = diffusers.IPNDMScheduler()
    assert run(pipe, photo, callback_on_step_end=lambda *_: None).isfinite().all()
    names = ["pred_original_sample"]
    with pytest.raises(InputError, match=r"pred_original_sample: expected a scheduler .* got IPNDMScheduler"):
        run(pipe, photo, callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=names)


class Halve(PipelineCallback):
    """An official callback: halve latents at the step after this share of them."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            callback_kwargs["latents"] = callback_kwargs["latents"] / 2
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_the_callback_objects_of_diffusers(ours, text, several):
    callback = Halve(cutoff_step_ratio=0.5)
    callback = MultiPipelineCallbacks([callback, Halve(cutoff_step_ratio=0.25)]) if several else callback
    mine, theirs = both(ours, text, callback, "DDIMScheduler")
    assert (mine - theirs).abs().max() < 1e-4
    assert (mine - both(ours, text, lambda *_: {}, "DDIMScheduler")[0]).abs().max() > 0.01


def test_what_is_listed_for_tools_is_what_is_taken(pipe):
    assert pipe._callback_tensor_inputs == list(ALL)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"callback_on_step_end": 3}, InputTypeError, "callback_on_step_end: expected a function"),
        ({"callback_on_step_end": lambda i, t, x: {}}, InputTypeError, "callback_on_step_end: expected a function"),
        ({"callback": lambda *_: None}, InputError, "callback: expected callback or callback_on_step_end, got both"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, InputTypeError, "tensor_inputs: expected a list"),
        ({"callback_on_step_end_tensor_inputs": None}, InputTypeError, "tensor_inputs: expected a list"),
        ({"callback_on_step_end_tensor_inputs": ["latent"]}, InputError, "names among latents, .*, got 'latent'"),
        ({"callback_on_step_end_tensor_inputs": [["latents"]]}, InputError, "names among latents, "),
        (
            {"callback_on_step_end": SDCFGCutoffCallback(0.5)},
            InputError,
            "got 'prompt_embeds'; .*function as guidance_scale",
        ),
        (
            {"callback_on_step_end_tensor_inputs": ["negative_image_embeds"], "guidance_scale": 1},
            InputError,
            "tensor_inputs: .*only under guidance",
        ),
    ],
)
def test_callbacks_that_cannot_be_called_are_refused_before_the_first_step(pipe, photo, options, kind, message):
    pipe.unet.conv_in.register_forward_hook(lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(kind, match=message):
        run(pipe, photo, **({"callback_on_step_end": lambda *_: {}} | options))


async def never_awaited():
    return {}


@pytest.mark.parametrize(
    ("returned", "kind", "message"),
    [
        (lambda x: never_awaited(), InputTypeError, "callback_on_step_end: .*returned a coroutine"),
        (lambda x: x["latents"], InputTypeError, "returns a dictionary of tensors, or None, got one that returned"),
        (lambda x: {"prompt_embeds": 1}, InputError, "callback_on_step_end: .*got 'prompt_embeds'"),
        (lambda x: {"latents": None}, InputTypeError, "latents: expected finite floats .*got NoneType"),
        (lambda x: {"latents": x["latents"].long()}, InputTypeError, "latents: .*torch.int64"),
        (lambda x: {"latents": x["latents"][:, :3]}, InputError, "latents: expected finite floats of shape"),
        (lambda x: {"latents": x["latents"] / 0}, InputError, "latents: .*got NaN or infinite values"),
        (lambda x: {"latents": x["latents"].to("meta")}, InputError, "latents: .*meta device"),
        (lambda x: {"image_embeds": x["image_embeds"][..., :5]}, InputError, "image_embeds: expected finite floats"),
        (lambda x: {"pred_original_sample": x["latents"]}, InputError, "pred_original_sample: expected the same"),
        (lambda x: x["pred_original_sample"].mul_(2) and None, InputError, "pred_original_sample: expected the same"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_a_step_cannot_go_on_from_is_refused(pipe, photo, returned, kind, message):
    steps = []

    def callback(_, i, t, tensors):
        steps.append(i)
        if "mul_" in returned.__code__.co_names:
            tensors["pred_original_sample"].mul_(2)
            return None
        return returned(tensors)

    with pytest.raises(kind, match=message):
        run(pipe, photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=ALL)
    assert steps == [0]


def test_a_negative_embedding_of_an_unguided_run_is_refused(pipe, photo):
    with pytest.raises(InputError, match=r"callback_on_step_end: .*under guidance, got 'negative_image_embeds'"):
        run(
            pipe,
            photo,
            guidance_scale=1,
            callback_on_step_end=lambda *_: {"negative_image_embeds": torch.zeros(1, 1, 24)},
        )


def test_a_changed_unet_counts_from_the_next_step(pipe, photo):
    pipe.scheduler, latents = DDIMScheduler.from_config(pipe.scheduler.config), []

    def halve(pipe, i, t, tensors):
        latents.append(tensors["latents"].clone())
        if i == 1:
            pipe.unet.conv_out.weight.data.mul_(0.5)

    changed = run(pipe, photo, callback_on_step_end=halve)
    restart = lambda _, i, t, tensors: {"latents": latents[1]} if i == 1 else {}  # noqa: E731
    assert torch.equal(run(pipe, photo, callback_on_step_end=restart), changed)


def test_latents_of_another_dtype_are_cast(pipe, photo):
    double = run(pipe, photo, callback_on_step_end=lambda _, i, t, x: {"latents": x["latents"].double()})
    assert double.dtype == torch.float32
    assert np.array_equal(double, run(pipe, photo))


def steered(pipe, photo, **options):
    """Run with everything that changes guidance, latents and embeddings from step to step."""

    def steer(_, i, t, tensors):
        if i == 1:
            tensors["image_embeds"].mul_(0.5)
        return {"latents": tensors["latents"] * 0.99}

    options |= {"guidance_scale": lambda done: 3 if done < 0.5 else 1, "guidance_rescale": 0.5}
    options |= {"callback_on_step_end": steer, "callback_on_step_end_tensor_inputs": ["latents", "image_embeds"]}
    return run(pipe, photo, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_attention_slicing("max"),
        lambda pipe: pipe.unet.register_forward_hook(lambda *_: None),  # and so without precomputation
    ],
    ids=["offload", "slicing", "hook"],
)
def test_all_of_it_under_other_switches(pipe, photo, change):
    expected = steered(pipe, photo)
    assert (expected - run(pipe, photo)).abs().max() > 1e-3
    change(pipe)
    assert torch.allclose(steered(pipe, photo), expected, rtol=1e-4, atol=1e-4)


def test_all_of_it_in_threads_that_share_the_pipeline(pipe, photo):
    expected, plain = steered(pipe, photo), run(pipe, photo)
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(function, pipe, photo) for function in (steered, run) * 4]
    assert all(torch.equal(result.result(), expected) for result in results[::2])
    assert all(torch.equal(result.result(), plain) for result in results[1::2])


def test_the_embeddings_of_regions_are_tokens_that_may_change(pipe, photo):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    one, other = pipe.encode_image(photo), pipe.encode_image(photo.rotate(90))
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    shapes, latents = [], []

    def callback(_, i, t, tensors):
        shapes.append(tuple(tensors["image_embeds"].shape))
        latents.append(tensors["latents"])
        if i == 0:
            tensors["image_embeds"][:, 1] = other[:, 0]
            return tensors
        return None

    names = ["latents", "image_embeds"]
    made = run(
        pipe,
        image_embeds=[imvar.Region(one), imvar.Region(one, mask=left)],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    restart = lambda _, i, t, tensors: {"latents": latents[0]} if i == 0 else {}  # noqa: E731
    regions = [imvar.Region(one), imvar.Region(other, mask=left)]
    assert shapes == [(1, 3, one.shape[-1])] * 4
    assert torch.equal(made, run(pipe, image_embeds=regions, callback_on_step_end=restart))


def test_a_guidance_scale_that_a_callback_sets_is_refused_each_time(pipe, photo):
    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 3.0
        return {}

    plain = run(pipe, photo)
    for _ in range(2):
        with pytest.raises(InputError, match="pass a function as guidance_scale"):
            run(pipe, photo, callback_on_step_end=callback)
    assert torch.equal(run(pipe, photo), plain)
    pipe._guidance_scale = 2.0  # a fork may keep its own there
    assert torch.equal(run(pipe, photo, callback_on_step_end=lambda *_: {}), plain)
