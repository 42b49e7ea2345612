"""Loading and running models imports neither sympy nor more of torch's compiler than `import torch` does.

They take seconds of a process. Some arithmetic on the meta device imports them, where models are built before their
weights are assigned.
"""

import subprocess
import sys

from safetensors.torch import save_file

from imvar import bundled_examples
from tests.support.lora import random_lora, random_unet

SLOW = (
    "sympy.",
    "torch._decomp.",
    "torch._dynamo.",
    "torch._functorch.",
    "torch._inductor.",
    "torch._refs.",
    "torch.distributed.",
    "torch.fx.experimental.",
)
SCRIPT = f"""
import sys
import torch

def loaded():
    return {{name for name in sys.modules if f"{{name}}.".startswith({SLOW})}}

def check(done):
    assert loaded() == before, f"{{done}} has imported {{sorted(loaded() - before)[:5]}}"

before = loaded()
from imvar import *
folder, file, lora = sys.argv[1:]
"""


def test_loading_a_pipeline_and_all_samplers(checkpoint, small, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file(random_lora(random_unet()), lora)
    code = """
pipe = StableDiffusionImageVariationPipeline.from_pretrained(folder)
check("from_pretrained")
StableDiffusionImageVariationPipeline.from_single_file(file)
check("from_single_file")
pipe.load_lora_weights(lora)
check("load_lora_weights")
pipe.set_progress_bar_config(disable=True)
for kind in pipe.scheduler.compatibles:
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe(torch.zeros(1, 3, 32, 32), num_inference_steps=5, output_type="pt", seed=0)
    check(kind.__name__)
for name in "image_encoder", "safety_checker", "unet", "vae":
    model = pipe.components[name]
    type(model).from_config(model.config)
    check(f"from_config of the {name}")
"""
    subprocess.run([sys.executable, "-c", SCRIPT + code, checkpoint, small, lora], check=True)


def test_a_command_that_makes_an_image(tmp_path):
    options = ["--checkpoint", "imvar-emoji", "-n", "1", "--steps", "2", "-o", tmp_path]
    loaded = imported("-m", "imvar", "vary", bundled_examples()["fox-noto"], *options)
    assert (tmp_path / "fox-noto-0.png").exists()
    assert {"torch", "imvar.models.clip"} <= loaded
    slow = {name for name in loaded if f"{name}.".startswith(SLOW)}
    assert slow <= imported("-c", "import torch")


def imported(*command):
    """Return the modules that a Python process imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
