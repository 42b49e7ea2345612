"""`imvar env`."""

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import imvar
from imvar import cli
from imvar.cli import env


def test_it_names_versions_and_hardware(capsys):
    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["imvar"], report["python"]) == (imvar.__version__, platform.python_version())
    assert report["packages"].keys() >= {"torch", "safetensors", "huggingface_hub", "Pillow", "numpy", "einops"}
    assert report["packages"]["torch"] == torch.__version__
    assert report["threads"]["within an operation"] == torch.get_num_threads()
    assert report["cpu"]["cores"] == os.cpu_count()
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(report)
    assert f"torch {torch.__version__}" in lines[3]


def test_its_process_is_patient_and_nothing_private_is_printed(tmp_path):
    private = {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret", "TORCH_HOME": "/home/me", "LC_ALL": "C"}
    command = [sys.executable, "-m", "imvar", "env"]
    done = subprocess.run(command, env=os.environ | private, capture_output=True, text=True, check=True)
    assert "OMP_WAIT_POLICY passive" in done.stdout
    assert "HF_TOKEN (set)" in done.stdout
    assert "LC_ALL C" in done.stdout
    words = {str(tmp_path), "hf_secret", "/home", str(Path.home()), str(Path.cwd())}
    words |= {getpass.getuser(), platform.node()} - {"root", "localhost", ""}
    assert [word for word in words if word in done.stdout] == []


def test_values_of_variables():
    given = {
        "OMP_NUM_THREADS": "4",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": "mine",
        "HF_ENDPOINT": "https://x",
        "OMP_TOOL_LIBRARIES": "/home/me/tool.so",
        "SECRET": "x",
    }
    shown = {name: value for name, value in env.variables(given).items() if value != "(set)"}
    assert shown == {name: given[name] for name in list(given)[:4]}
    assert env.variables(given).keys() == given.keys() - {"SECRET"}
