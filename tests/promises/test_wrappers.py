"""Components inside the wrappers of PyTorch, accelerate and peft, and components of other people's classes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import distributed, nn

import imvar
from imvar import InputTypeError, StableDiffusionImageVariationPipeline

PARTS = "unet", "vae", "image_encoder", "safety_checker"


def run(pipe, photo):
    generator = torch.Generator().manual_seed(0)
    return pipe(photo, num_inference_steps=1, guidance_scale=3, output_type="pt", generator=generator).images


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compile of DistributedDataParallel": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "DistributedDataParallel of compile": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "accelerate": lambda model: Accelerator(mixed_precision="bf16", cpu=True).prepare(model),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_components_are_saved_without_their_wrappers(pipe, tmp_path, process_group, wrapper):
    pipe.save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "wrapped")
    for part in PARTS:
        setattr(pipe, part, WRAPPERS[wrapper](getattr(pipe, part)))
    pipe.save_pretrained(tmp_path / "wrapped")
    assert content(tmp_path / "wrapped") == content(tmp_path / "plain")
    assert pipe.config["unet"] == ["diffusers", "UNet2DConditionModel"]
    StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "wrapped")


def test_compiled_models_and_layers_are_saved_under_the_names_of_plain_ones(pipe, tmp_path):
    for part in PARTS:
        model = getattr(pipe, part)
        model.save_pretrained(tmp_path / "plain" / part)
        compiled(model).save_pretrained(tmp_path / "compiled" / part)
    pipe.unet.mid_block = compiled(pipe.unet.mid_block)
    pipe.unet.save_pretrained(tmp_path / "compiled" / "unet")
    assert content(tmp_path / "compiled") == content(tmp_path / "plain")


def test_compiled_components_give_the_same_images():
    """In a process of its own, where nothing has imported the pipeline's compiler; each model as one graph."""
    code = """
import torch
from tests.support.random_checkpoint import tiny_pipeline
def run():
    options = {"num_inference_steps": 1, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(torch.ones(1, 3, 32, 32), **options).images
pipe = tiny_pipeline()
expected = run()
pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
pipe.image_encoder = torch.compile(pipe.image_encoder, backend="eager", fullgraph=True)
pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager", fullgraph=True)
pipe.vae, pipe.safety_checker = (torch.compile(model, backend="eager") for model in (pipe.vae, pipe.safety_checker))
assert torch.allclose(run(), expected, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrapper", [lambda model: model, compiled])
def test_an_adapter_is_refused_before_anything_is_written(pipe, photo, tmp_path, wrapper):
    pipe.save_pretrained(tmp_path / "folder")
    before = content(tmp_path / "folder")
    adapted = get_peft_model(pipe.unet, LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    pipe.unet = wrapper(adapted)
    with pytest.raises(
        InputTypeError, match=r"unet: expected a model without an adapter, got PeftModel.*merge_and_unload"
    ):
        pipe.save_pretrained(tmp_path / "folder")
    assert content(tmp_path / "folder") == before
    pipe.unet = adapted
    expected = run(pipe, photo)
    pipe.unet = pipe.unet.merge_and_unload()
    pipe.save_pretrained(tmp_path / "folder")
    loaded = StableDiffusionImageVariationPipeline.from_pretrained(tmp_path / "folder")
    assert torch.allclose(run(loaded, photo), expected, atol=1e-4)


class Posed(StableDiffusionImageVariationPipeline):
    def __init__(self, pose_encoder, **components):
        super().__init__(**components)
        self.register_modules(pose_encoder=pose_encoder)


def test_a_plain_module_is_refused_before_anything_is_written_and_the_remedy_works(pipe, tmp_path):
    encoder = nn.Linear(3, 3)
    posed = Posed(encoder, **pipe.components)
    with pytest.raises(
        InputTypeError, match=r"pose_encoder: expected a component with save_pretrained, got Linear; .* = None"
    ):
        posed.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    posed.pose_encoder = None
    posed.save_pretrained(tmp_path / "folder")
    assert Posed.from_pretrained(tmp_path / "folder", pose_encoder=encoder).pose_encoder is encoder


class Proxy(nn.Module):
    """Someone's wrapper, which has the methods of the model inside it."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_an_unknown_wrapper_is_refused_before_anything_is_written(pipe, tmp_path):
    pipe.unet = Proxy(pipe.unet)
    with pytest.raises(InputTypeError, match="unet: expected a component with save_pretrained, got Proxy"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


class Ported(nn.Linear):
    """As written for diffusers, which passes a string, and only the options that the method names."""

    def save_pretrained(self, folder, **rest):
        assert not rest
        with open(folder + ".json", "w") as file:
            json.dump(self.weight.tolist(), file)


def test_a_component_written_for_diffusers_is_saved(pipe, tmp_path):
    encoder = Ported(2, 2)
    Posed(encoder, **pipe.components).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "pose_encoder.json").read_text()) == encoder.weight.tolist()
    assert isinstance(imvar.UNet2DConditionModel.from_pretrained(tmp_path, "unet"), imvar.UNet2DConditionModel)


def test_models_prepared_by_accelerate_return_outputs(pipe):
    pipe.unet, pipe.vae = Accelerator(mixed_precision="bf16", cpu=True).prepare(pipe.unet, pipe.vae)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 24)
    assert pipe.unet(x, 5, context).sample.dtype == torch.float32
    assert pipe.vae(torch.randn(1, 3, 32, 32)).sample.dtype == torch.float32
