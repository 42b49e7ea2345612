"""The safety checker's decision in the output, and the policies for images that it flags."""

import pickle

import numpy as np
import pytest
import torch

from imvar import FlaggedError, ImvarError, InputError, InputTypeError

CONCEPT = 4


def run(pipe, photo, **options):
    options = {"num_inference_steps": 2, "output_type": "np", "num_images_per_prompt": 2, "seed": 0} | options
    return pipe(photo, **options)


@pytest.fixture
def strict(pipe, photo):
    """A pipeline whose checker flags one of two images, by one concept: `strict.flagged` is its index."""
    checker = pipe.safety_checker
    checker.special_care_embeds_weights.data.fill_(2.0)
    thresholds = checker.concept_embeds_weights.data.fill_(2.0)
    first, second = (2 + scores["concept_scores"][CONCEPT] for scores in run(pipe, photo).scores)
    assert first != second
    thresholds[CONCEPT] = (first + second) / 2
    pipe.flagged, pipe.sound = int(second > first), int(first > second)
    return pipe


def test_scores_by_index_of_the_concept(strict, photo):
    output = run(strict, photo)
    assert output.nsfw_content_detected[strict.flagged] is True
    assert output.nsfw_content_detected[strict.sound] is False
    bad, good = output.scores[strict.flagged], output.scores[strict.sound]
    assert bad["bad_concepts"] == [CONCEPT]
    assert good["bad_concepts"] == good["special_care"] == bad["special_care"] == []
    assert list(bad["concept_scores"]) == list(range(17))
    assert list(bad["special_scores"]) == list(range(3))
    assert bad["concept_scores"][CONCEPT] > 0 > good["concept_scores"][CONCEPT]
    assert output["nsfw_content_detected"] == output[1] == output.nsfw_content_detected


def test_special_care_is_reported(pipe, photo):
    pipe.safety_checker.special_care_embeds_weights.data.copy_(torch.tensor([2.0, -2.0, 2.0]))
    assert [scores["special_care"] for scores in run(pipe, photo).scores] == [[1], [1]]


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_a_flagged_image(strict, photo, output_type):
    def images_of(how):
        images = run(strict, photo, on_flagged=how, output_type=output_type).images
        return np.stack([np.asarray(image, dtype=np.float32) for image in images])

    kept, black, blurred = map(images_of, ("keep", "black", "blur"))
    which = strict.flagged
    assert not black[which].any()
    assert kept[which].std() > 0
    for other in black, blurred:
        assert np.array_equal(other[strict.sound], kept[strict.sound])
    top = 255 if output_type == "pil" else 1
    assert abs(blurred[which].mean() - kept[which].mean()) < 0.02 * top
    rows = -2 if output_type == "pt" else 0
    steps = [np.abs(np.diff(x[which], axis=rows)).mean() for x in (blurred, kept)]
    assert steps[0] < 0.3 * steps[1]  # nothing finer than a cell is left


def test_raise(strict, photo):
    with pytest.raises(FlaggedError, match=rf"1 of 2 images flagged \(seed {strict.flagged}\).*on_flagged") as caught:
        run(strict, photo, on_flagged="raise")
    error = caught.value
    assert error.flags.index(True) == strict.flagged
    assert error.scores[strict.flagged]["bad_concepts"] == [CONCEPT]
    assert error.seeds == [0, 1]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.flags, again.scores, again.seeds) == (str(error), error.flags, error.scores, error.seeds)
    strict.safety_checker.concept_embeds_weights.data.fill_(2.0)
    assert len(run(strict, photo, on_flagged="raise").images) == 2


@pytest.mark.parametrize(("how", "kind"), [("white", InputError), (None, InputTypeError), (3, InputTypeError)])
def test_other_policies(pipe, photo, how, kind):
    with pytest.raises(kind, match=r"on_flagged: expected one of 'black', 'blur', 'keep', 'raise', got"):
        run(pipe, photo, on_flagged=how)


def test_a_third_party_checker(pipe, photo):
    """One that writes into its input, as that of diffusers does, and returns no scores."""

    def check(images, clip_input):
        images[1] = 0
        return images, [False, True]

    pipe.safety_checker = None
    kept = run(pipe, photo).images
    pipe.safety_checker = check
    assert np.array_equal(run(pipe, photo, on_flagged="keep").images, kept)
    output = run(pipe, photo)
    assert not output.images[1].any()
    assert np.array_equal(output.images[0], kept[0])
    assert output.scores is None
    with pytest.raises(FlaggedError) as caught:
        run(pipe, photo, on_flagged="raise", seed=None)
    assert caught.value.flags == [False, True]
    assert caught.value.scores is caught.value.seeds is None


@pytest.mark.parametrize("prefix", ["concept_embeds", "visual_projection", "vision_model"])
def test_a_checker_with_nan_is_an_error(pipe, photo, prefix):
    next(p for name, p in pipe.safety_checker.named_parameters() if name.startswith(prefix)).data.fill_(float("nan"))
    with pytest.raises(ImvarError, match="safety_checker: expected finite scores, got NaN"):
        run(pipe, photo)


def test_nan_is_not_a_flag(pipe, photo):
    """Images that are not finite are an error that names the weights, never black."""
    pipe.vae.decoder.conv_out.weight.data[0, 0] = float("nan")
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(ImvarError, match=r"images: expected finite values.*AutoencoderKL.*decoder\.conv_out"):
            run(pipe, photo, output_type=output_type)
