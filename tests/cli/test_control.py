"""`imvar mix`, `interpolate` and `grid`, embeddings in files, and the conditioning options of `imvar vary`."""

import numpy as np
import pytest
import torch
from PIL import Image

import imvar
from imvar import cli
from imvar.cli import renderer

COMMON = "--steps", "2", "--dtype", "float32", "--device", "cpu"


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("fox", "panda")]
    Image.radial_gradient("L").convert("RGB").resize((60, 60)).save(paths[0])
    Image.linear_gradient("L").convert("RGB").resize((40, 60)).save(paths[1])
    return paths


@pytest.fixture
def run(checkpoint, tmp_path):
    """Return a function that runs a command with two steps, and returns the images it saved, by name."""

    def run(*args):
        out = tmp_path / "out"
        options = "--checkpoint", checkpoint, "-o", out, "--overwrite", *COMMON
        assert cli.main([str(arg) for arg in (*args, *options)]) == 0
        images = {path.name: np.asarray(Image.open(path)) for path in out.iterdir()}
        assert images.pop("contact-sheet.png").any()
        return images

    return run


@pytest.fixture
def pipe(checkpoint):
    pipe = imvar.StableDiffusionImageVariationPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_vae_slicing()  # as on the command line
    return pipe


def call(pipe, **options):
    defaults = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pil", "seed": 0}
    return [np.asarray(image) for image in pipe(**(defaults | options)).images]


def embed(pipe, path):
    return pipe.encode_image(imvar.load_image(path))


def test_mix_varies_the_weighted_sum_of_embeddings(run, pipe, photos):
    images = run("mix", f"{photos[0]}=0.7", f"{photos[1]}=.3", "-n", 2)
    mixed = imvar.mix([(embed(pipe, photos[0]), 0.7), (embed(pipe, photos[1]), 0.3)])
    expected = call(pipe, image_embeds=mixed, num_images_per_prompt=2)
    assert sorted(images) == ["fox+panda-0.png", "fox+panda-1.png"]
    assert all(np.array_equal(images[f"fox+panda-{seed}.png"], expected[seed]) for seed in (0, 1))


def test_interpolate_goes_from_one_image_to_the_other_with_one_seed(run, pipe, photos):
    images = run("interpolate", *photos, "-n", 3, "--seed", 4)
    ends = [embed(pipe, photo) for photo in photos]
    assert sorted(images) == [f"fox-to-panda-{k}.png" for k in (1, 2, 3)]
    for k, t in enumerate((0, 0.5, 1)):
        (expected,) = call(pipe, image_embeds=imvar.slerp(*ends, t), seed=4)
        assert np.array_equal(images[f"fox-to-panda-{k + 1}.png"], expected)


def test_grid_has_an_image_for_each_pair_of_values(run, pipe, photos):
    images = run("grid", photos[0], "--rows", "guidance=1,3", "--columns", "seed=5..6")
    assert len(images) == 4
    for guidance in (1, 3):
        expected = call(pipe, image=imvar.load_image(photos[0]), guidance_scale=guidance, seed=6)
        made = images[f"fox-guidance-{guidance}-seed-6.png"].astype(int)
        assert np.abs(made - expected[0]).max() <= 1  # as seeds 5 and 6 are computed together


def test_grid_of_schedulers_and_steps(run, pipe, photos):
    images = run("grid", photos[0], "--rows", "scheduler=ddim,lms", "--columns", "steps=1,3")
    pipe.scheduler = imvar.LMSDiscreteScheduler.from_config(pipe.scheduler.config)
    (expected,) = call(pipe, image=imvar.load_image(photos[0]), num_inference_steps=3)
    assert np.array_equal(images["fox-scheduler-lms-steps-3.png"], expected)


def test_a_scheduler_in_a_grid_does_not_depend_on_those_before_it(run, pipe, photos):
    names = ["dpm++", "ddpm", "euler-ancestral", "euler", "lms", "pndm", "ddim"]
    images = run("grid", photos[0], "--rows", f"scheduler={','.join(names)}", "--columns", "steps=4")
    again = run("grid", photos[0], "--rows", f"scheduler={','.join(reversed(names))}", "--columns", "steps=4")
    assert len(images) == len(names)
    assert all(np.array_equal(images[name], again[name]) for name in images)
    pipe.scheduler = imvar.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    (expected,) = call(pipe, image=imvar.load_image(photos[0]), num_inference_steps=4)
    assert np.array_equal(images["fox-scheduler-dpm++-steps-4.png"], expected)


def test_an_embedding_may_stand_for_a_photo(run, pipe, photos, tmp_path):
    file = tmp_path / "saved.safetensors"
    imvar.save_image_embeds(file, embed(pipe, photos[0]))
    (expected,) = call(pipe, image=imvar.load_image(photos[0]))
    assert np.array_equal(run("vary", file, "-n", 1)["saved-0.png"], expected)
    assert np.array_equal(run("mix", f"{file}=1", "-n", 1)["saved-0.png"], expected)


def test_guidance_leads_away_from_a_negative_image(run, pipe, photos):
    images = run("vary", photos[0], "-n", 1, "--negative", photos[1])
    negative = embed(pipe, photos[1])
    (expected,) = call(pipe, image=imvar.load_image(photos[0]), negative_image_embeds=negative)
    assert np.array_equal(images["fox-0.png"], expected)


def test_several_embeddings_in_a_file_are_refused(checkpoint, tmp_path, capsys):
    file = tmp_path / "two.safetensors"
    imvar.save_image_embeds(file, torch.ones(2, 1, 32))
    assert cli.main(["vary", str(file), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]) == 1
    assert "two.safetensors: expected one embedding (1, 1, c)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mix", "fox.png"], "expected PHOTO=WEIGHT such as fox.png=0.7"),
        (["mix", "fox.png=much"], "expected PHOTO=WEIGHT such as fox.png=0.7"),
        (["mix", "a=0.5.png", "b.png=1"], "finite number as the weight, got 'a=0.5.png'"),
        (["mix", "fox.png=inf"], "finite number as the weight, got 'fox.png=inf'"),
        (["vary", "a.png", "--init", "b.png", "--strength", "2"], "--strength: expected a number from 0 to 1, got '2'"),
        (["vary", "a.png", "--guidance", "-1"], "--guidance: expected a finite number from 0, got '-1'"),
        (["vary", "a.png", "--device", "cuda:x"], "--device: expected auto, cpu, cuda, cuda:1 or another device, got"),
        (["vary", "a.png", "--revision", "v1", "--checkpoint", "."], "--revision: expected none for the local check"),
        (["vary", "--revision", "v1", "--checkpoint", "imvar-emoji"], "--revision: expected none for imvar-emoji, wh"),
        (["web", "--revision", "v1"], "--revision: expected none for imvar-emoji"),
        (["convert", "imvar-emoji", "out", "--revision", "v1"], "--revision: expected none for imvar-emoji"),
        (["interpolate", "a.png"], "the following arguments are required: B"),
        (["interpolate", "a.png", "b.png", "-n", "1"], "expected an integer from 2"),
        (["grid", "a.png"], "required: --rows"),
        (["grid", "a.png", "--rows", "colour=1,2"], "expected one of guidance, "),
        (["grid", "a.png", "--rows", "seed=1,2"], "--columns: expected another option than --rows seed"),
        (["grid", "a.png", "--rows", "strength=0.5,1.5", "--init", "b.png"], "expected a number from 0 to 1"),
        (["grid", "a.png", "--rows", "seed=9..5"], "expected seed=LOW..HIGH"),
        (["grid", "a.png", "--rows", "steps=1,x"], "expected an integer"),
        (["grid", "a.png", "--rows", "scheduler=best"], "expected one of ddim"),
    ],
)
def test_usage_errors(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_grid_of_strengths_and_rescales(run, pipe, photos):
    init = photos[1]
    images = run("grid", photos[0], "--rows", "strength=0.5,1", "--columns", "rescale=0,0.7", "--init", init)
    assert len(images) == 4
    options = {"init_image": imvar.load_image(init), "strength": 0.5, "guidance_rescale": 0.7}
    expected = call(pipe, image=imvar.load_image(photos[0]), **options)
    assert np.array_equal(images["fox-strength-0.5-rescale-0.7.png"], expected[0])


def test_strength_without_an_init_image_is_refused(checkpoint, photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["vary", str(photos[0]), "--strength", "0.5", "--checkpoint", str(checkpoint), "-o", str(tmp_path)])
    assert end.value.code == 2
    assert "--strength: expected --init with it, got none" in capsys.readouterr().err


def test_the_footer_names_what_all_images_share(checkpoint, photos, tmp_path, monkeypatch):
    footers = []
    monkeypatch.setattr(
        renderer, "contact_sheet", lambda rows, footer: footers.append(footer) or Image.new("RGB", (8, 8))
    )
    for axes in ["steps=1,2", "guidance=1,2"], ["seed=0,1", "scheduler=ddim,lms"]:
        args = ["grid", photos[0], "--rows", axes[0], "--columns", axes[1], "--checkpoint", checkpoint]
        assert cli.main([*map(str, args), "-o", str(tmp_path / "out"), *COMMON]) == 0
    assert footers == [f"PNDM, {checkpoint}", f"2 steps, guidance 3, {checkpoint}"]
