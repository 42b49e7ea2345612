"""One name has one meaning: what `def` and `class` bind in two modules or more is listed below with what it means.

Counted are the names of functions, methods and classes, nested ones too, that two files of imvar/ define; double
underscores are Python's own. A name that is new to the list is either one meaning more, so another name is better, or
the same meaning again, so it is added with that meaning.
"""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "imvar"
SHARED = {
    "after_death": "what the driver of a batch does when a worker has ended otherwise than well",
    "_apply": "move or cast the tensors of a module, which PyTorch calls",
    "add_noise": "a scheduler's forward process",
    "check": "validate a config's own fields",
    "config": "the configuration of a component or pipeline, as a property",
    "decode": "latents to images",
    "delete_adapters": "remove LoRA adapters",
    "device": "the device of a model's or pipeline's weights",
    "disable": "undo `enable` of FP8 or int8",
    "disable_freeu": "undo `enable_freeu`",
    "disable_lora": "use no LoRA adapter",
    "disable_xformers_memory_efficient_attention": "undo `enable_xformers_memory_efficient_attention`",
    "dtype": "the dtype of weights, or of what is computed with them",
    "enable": "replace layers of a model by those in FP8 or int8",
    "enable_freeu": "use FreeU in the UNet",
    "enable_lora": "use the LoRA adapters again",
    "enable_xformers_memory_efficient_attention": "use a memory-efficient attention kernel",
    "fits": "whether a quantized layer can take the place of another",
    "flush": "write what is buffered, as a file object does",
    "forward": "the computation of a torch module",
    "from_config": "build a component from the fields of a config",
    "from_dict": "build a config from the fields of a file",
    "from_layer": "build a layer of this class from another, with its weights",
    "from_pretrained": "load from a folder or the hub",
    "from_single_file": "load from one file in the original layout",
    "end_workers": "let the workers of a batch end",
    "encode": "images to latents",
    "fuse_qkv_projections": "diffusers' switch for what is fused already",
    "fuse_lora": "make LoRA adapters part of the weights",
    "get_velocity": "the target of v-prediction",
    "init_noise_sigma": "the scale of a scheduler's first latents",
    "is_gradient_checkpointing": "whether `enable_gradient_checkpointing` is in effect",
    "is_embedding": "whether an input is an embedding and no photo",
    "json_text": "an object as text in JSON, equal for equal objects",
    "keymap": "the key table of a model",
    "load": "from stored tensors to those of a model",
    "make_betas": "the noise schedule of a scheduler",
    "make_tables": "what a scheduler computes from its config alone",
    "min_tensor_count": "the fewest tensors that a model's config can have",
    "numpy_to_pil": "arrays to PIL images",
    "poll_worker": "the exit status of a worker of a batch, None while it works",
    "precompute": "compute the part of a module that depends on the conditioning alone",
    "reason_of_end": "why a worker of a batch has ended",
    "start_worker": "start a worker of a batch",
    "quantize": "return the quantized weight of a layer",
    "read": "build from local files",
    "record_fields": "note which fields of a config were given",
    "Report": "what a command has done",
    "records": "how the images of a call are made",
    "register_to_config": "change fields of a config",
    "resnet": "build a resnet block of a model's kind",
    "save": "to the form, or the file, in which something is stored",
    "save_config": "write the config file of a component or pipeline alone",
    "save_pretrained": "save to a folder",
    "run": "run a command of the command line",
    "saved_config": "the config as it is written to a file",
    "scale_model_input": "scale latents for the network",
    "set_adapters": "choose the active LoRA adapters and their weights",
    "set_timesteps": "choose a scheduler's timesteps",
    "sigma_range": "the highest and lowest noise level of a spacing",
    "step": "one denoising step of a scheduler",
    "to": "move to a device or dtype",
    "to_json_string": "the text of a config or its file",
    "unfuse_qkv_projections": "undo `fuse_qkv_projections`",
    "unfuse_lora": "undo `fuse_lora`",
    "add_conv": "add a convolution to its residual, and the kernel that computes it on a CPU",
    "upsample_conv": "upsample by 2 and convolve, and the kernel that computes it on a CPU",
    "weights_to_save": "the tensors that `save_pretrained` writes",
    "write": "write as a file object does",
}


def definitions() -> dict[str, list[str]]:
    """Return where each name is bound by `def` or `class`: `file:line`, at most one per file."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = str(file.relative_to(PACKAGE))
                places[node.name].setdefault(name, f"{name}:{node.lineno}")
    return {name: list(by_file.values()) for name, by_file in places.items()}


def test_names_with_several_definitions_have_one_meaning():
    several = {name: places for name, places in definitions().items() if len(places) > 1 and name[:2] != "__"}
    assert {name: places for name, places in several.items() if name not in SHARED} == {}


def test_the_list_is_current():
    places = definitions()
    assert [name for name in SHARED if len(places.get(name, [])) < 2] == []
