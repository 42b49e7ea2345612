"""The scripts of docs/scale.md run, on imvar-emoji and without a cluster: each makes the same files as one process."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from imvar import batch, bundled_examples
from imvar.batch.inputs import CHECKS
from imvar.batch.worker import work
from imvar.cli.parser import command_parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
SETTINGS = {"checkpoint": "imvar-emoji", "steps": 2, "n": 2, "shard": 1}
OPTIONS = "--checkpoint imvar-emoji --steps 2 -n 2 --shard 1"

needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


def block(language, text):
    """Return the block of code in a language that contains a text."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL) if text in code]
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "photos"
    folder.mkdir()
    for name, path in list(bundled_examples().items())[:4]:
        shutil.copy(path, folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory):
    """The files that one process makes."""
    out = tmp_path_factory.mktemp("expected")
    work(batch.plan(photos, out, **SETTINGS).folder.parent)
    return contents(out)


def contents(out):
    """Return the bytes of what a batch has made, by path."""
    made = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: data for name, data in made.items() if not name.startswith("plan/items")}


@pytest.fixture
def programs(tmp_path):
    """The environment of a process that finds imvar and torchrun as this Python has them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, module in {"imvar": "imvar", "torchrun": "torch.distributed.run"}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_together(commands, environments, cwd):
    """Run a command in each environment, all at once."""
    started = [
        subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, env in zip(commands, environments, strict=True)
    ]
    for process in started:
        output, _ = process.communicate()
        assert process.returncode == 0, output


@needs_bash
def test_the_slurm_script(photos, expected, programs, tmp_path):
    out, script = tmp_path / "variations", tmp_path / "join.sh"
    batch.plan(photos, out, **SETTINGS)
    script.write_text(block("bash", "exec imvar batch join"))
    tasks = [programs | {"SLURM_ARRAY_TASK_ID": str(task)} for task in range(2)]
    run_together([["bash", script, out]] * 2, tasks, tmp_path)
    assert contents(out) == expected


@needs_bash
def test_the_slurm_script_without_a_shared_folder(photos, expected, programs, tmp_path):
    text = block("bash", "SLURM_ARRAY_TASK_COUNT")
    assert "imvar batch run photos " in text
    assert " --threads 8 " in text
    script = tmp_path / "parts.sh"
    script.write_text(text.replace("run photos ", f"run {photos} {OPTIONS} ").replace("--threads 8", "--threads 1"))
    tasks = []
    for task in range(2):
        (tmp_path / f"disk-{task}").mkdir()
        numbers = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        tasks.append(programs | numbers | {"TMPDIR": str(tmp_path / f"disk-{task}")})
    run_together([["bash", script]] * 2, tasks, tmp_path)
    out = tmp_path / "variations"
    assert not (out / "manifest.jsonl").exists()
    work(out)
    assert contents(out) == expected


@needs_bash
def test_the_line_for_torchrun(photos, expected, programs, tmp_path):
    out = tmp_path / "shared" / "variations"
    batch.plan(photos, out, **SETTINGS)
    line = block("bash", "torchrun")
    assert "/shared/variations" in line
    run_together([["bash", "-c", line.replace("/shared/variations", f"'{out}'")]], [programs], tmp_path)
    assert contents(out) == expected


# ---- Kubernetes


def strict(required, **more):
    """Return the schema of an object with these properties alone; `more` are optional."""
    properties = required | more
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def list_of(schema):
    return {"type": "array", "items": schema, "minItems": 1}


NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}  # a DNS label
TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
PATH = {"type": "string", "pattern": "^/"}
EXIT_CODES = strict(
    {
        "operator": {"enum": ["In", "NotIn"]},
        "values": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 255},
    },
    containerName=NAME,
)
CONDITION = strict({"type": {"enum": ["DisruptionTarget", "ConfigIssue"]}, "status": {"enum": ["True", "False"]}})
ACTION = {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}
CONTAINER = strict(
    {"name": NAME, "image": TEXT, "command": list_of(TEXT)},
    env=list_of(strict({"name": TEXT, "value": {"type": "string"}})),
    resources=strict({"limits": strict({"nvidia.com/gpu": COUNT})}),
    volumeMounts=list_of(strict({"name": NAME, "mountPath": PATH})),
)
POD = strict(
    {"restartPolicy": {"const": "Never"}, "containers": list_of(CONTAINER)},  # as backoffLimitPerIndex needs
    terminationGracePeriodSeconds=COUNT,
    volumes=list_of(strict({"name": NAME, "persistentVolumeClaim": strict({"claimName": NAME})})),
)
JOB = strict(
    {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "Job"},
        "metadata": strict({"name": NAME}),
        "spec": strict(
            {
                "completionMode": {"const": "Indexed"},  # as backoffLimitPerIndex needs, which FailIndex does
                "completions": COUNT,
                "backoffLimitPerIndex": COUNT,
                "template": strict({"spec": POD}),
            },
            parallelism=COUNT,
            podFailurePolicy=strict(
                {
                    "rules": list_of(
                        {
                            "oneOf": [
                                strict({"action": ACTION, "onExitCodes": EXIT_CODES}),
                                strict({"action": ACTION, "onPodConditions": list_of(CONDITION)}),
                            ]
                        }
                    )
                }
            ),
        ),
    }
)
"""The part of Kubernetes' Job (batch/v1) that the page uses, and nothing else of it."""


def test_the_kubernetes_job():
    job = yaml.safe_load(block("yaml", "kind: Job"))
    jsonschema.validate(job, JOB)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    codes = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert [code["containerName"] for code in codes] == [container["name"]]
    assert codes[0]["values"] == sorted({batch.exits.MISUSED, batch.exits.OUT_OF_MEMORY, batch.exits.FULL_DISK})
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    program, *arguments = container["command"]
    args = command_parser().parse_args(arguments)
    assert (program, args.command, args.action) == ("imvar", "batch", "join")
    mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    assert args.out.parent in mounts


# ---- Ray and Spark


def test_the_ray_cluster():
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    cluster = yaml.safe_load(block("yaml", "cluster_name:"))
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))
    head, gpu = (cluster["available_node_types"].pop(name) for name in (cluster["head_node_type"], "gpu"))
    assert cluster["available_node_types"] == {}
    assert "GPU" not in head["resources"]

    exec_, config, line = shlex.split(block("bash", "ray exec").replace("\\\n", ""))[1:]
    assert (exec_, config) == ("exec", "cluster.yaml")
    args = command_parser().parse_args(shlex.split(line)[1:])
    assert (args.command, args.action, args.engine) == ("batch", "run", "ray")
    assert args.jobs == gpu["max_workers"] == cluster["max_workers"]
    assert args.threads == gpu["resources"]["CPU"]


def test_the_function_for_spark(photos, expected, tmp_path):
    plan = batch.plan(photos, tmp_path, **SETTINGS)
    names = {"batch": batch}
    exec("def make_shards" + PAGE.partition("def make_shards")[2].partition("\n\n")[0], names)
    assert [sum(names["make_shards"](part, tmp_path)) for part in ([3, 0], [2, 1])] == [4, 4]
    work(plan.folder.parent)
    assert contents(tmp_path) == expected


# ---- Tables


def test_the_keys_of_lists():
    rows = PAGE.partition("| key | value |")[2].partition("\n\n")[0].splitlines()[2:]
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert keys == CHECKS.keys() | {"id"}


def test_the_exit_statuses():
    rows = PAGE.partition("| exit status |")[2].partition("\n\n")[0].splitlines()[2:]
    statuses = {int(number) for row in rows for number in re.findall(r"\d+", row.split("|")[1])}
    assert statuses == {value for name, value in vars(batch.exits).items() if name.isupper() and type(value) is int}


def test_the_tree(tmp_path, photos, expected):
    """The tree has the files of a batch, in all formats, and no others."""
    found = {*expected, "plan/items-0.jsonl"}
    for format in "tar", "parquet":
        work(batch.plan(photos, tmp_path / format, **SETTINGS, format=format).folder.parent)
        found |= contents(tmp_path / format).keys()
    names = {line.split()[0] for line in block("", "variations/\n").splitlines()[1:] if "claims/" not in line}
    assert {general(name) for name in found} == {general(name) for name in names}


def general(name):
    """Return a path with * for the numbers of shards and the names of images."""
    return re.sub(r"\d{4,}|[\w-]+\.png", "*", name)
