"""The plan of the memory of fine-tuning, beside what a training step takes on the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from finetuning.trainable import choose_parameters

from imvar import UNet2DConditionModel
from imvar.weights.published_config import PUBLISHED_CONFIGS

SCRIPTS = Path(__file__).parents[2] / "scripts"
CODE = """
import json, sys
from finetuning.memory_plan import Options, make_plan
items = make_plan(sys.argv[1], Options(stage="lora", ema=False)).items(int(sys.argv[2]))
print(json.dumps(items))
"""


@pytest.mark.parametrize(("model", "batch"), [("imvar-emoji", 64), ("published", 1)])
def test_a_step_takes_what_was_planned(model, batch):
    command = [sys.executable, "-c", CODE, model, str(batch)]
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    items = json.loads(printed)
    published = model == "published"
    config = PUBLISHED_CONFIGS["unet"] if published else UNet2DConditionModel.load_config(model, subfolder="unet")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        unet = UNet2DConditionModel.from_config(config)
        parameters = choose_parameters(unet.train(), "lora").values()
        side = unet.config.sample_size
        noisy, noise = torch.randn(2, batch, 4, side, side)
        timesteps, context = torch.full((batch,), 500), torch.randn(batch, 1, unet.config.cross_attention_dim)
    optimizer = torch.optim.AdamW(parameters, 1e-5, fused=True)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            output = unet(noisy, timesteps, context, return_dict=False)[0]
        F.mse_loss(output.float(), noise, reduction="none").mean().backward()
        del output
        optimizer.step()
        optimizer.zero_grad()
    taken = torch.cuda.max_memory_allocated() - before
    assert abs(taken - (sum(items.values()) - items["margin"])) < 0.1 * taken
