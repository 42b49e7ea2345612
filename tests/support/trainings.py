"""Trainings by `finetuning.loop` one after another in the processes of a launch, for tests: a driver, and its start.

python tests/support/trainings.py PLAN, where PLAN is a JSON file: {name: {"settings": {...}, "fault": ...}}. Each
training writes to its `out`, and the message with which it ended on a rank to `out/ended-RANK.txt`. Faults: "same
batches" gives all ranks the batches of the first one, "not finite" the last rank a loss of NaN at the third step,
"other images" the last rank only half of the images.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write_drawings(folder, count=12):
    """Write drawings that imvar-emoji was not trained on, and return their paths."""
    folder.mkdir()
    sheet = Image.open(ROOT / "tests/emoji/held-out.png").convert("RGB")
    paths = [folder / f"{i:02}.png" for i in range(count)]
    for i, path in enumerate(paths):
        x, y = 64 * (i % 12), 64 * (i // 12)
        sheet.crop((x, y, x + 64, y + 64)).save(path)
    return [str(path) for path in paths]


def launch(ranks=1, launcher="torchrun"):
    """Return the beginning of a command that starts a script on a number of ranks.

    accelerate starts one process with `--cpu`, whatever the number, so it is started as for GPUs.
    """
    if ranks == 1:
        return [sys.executable]
    if launcher == "accelerate":
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        return [*command, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def environment():
    """Return the environment of such a command: the checkout, one thread, no inherited rank."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def finetune(arguments, ranks=1, launcher="torchrun", check=True):
    """Run `scripts/finetune.py` and return the finished process."""
    command = [*launch(ranks, launcher), str(ROOT / "scripts/finetune.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def run_trainings(plan, folder, ranks=1):
    """Run the trainings of a plan in the processes of one launch."""
    path = folder / f"plan-{ranks}.json"
    path.write_text(json.dumps(plan))
    command = [*launch(ranks), __file__, str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def assert_same(a, b):
    """Compare tensors bit for bit, within dictionaries and lists."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)  # the betas of AdamW, a tuple, are a list after resuming
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif hasattr(a, "dtype"):
        assert a.dtype == b.dtype
        assert a.equal(b)
    else:
        assert a == b


def main():
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from finetuning import loop
    from finetuning.settings import Settings

    Accelerator.end_training = lambda self: None  # the next training has the same processes
    micro_batches, losses = loop.micro_batches, loop.Trainer.losses

    def break_losses(self, *args):
        return losses(self, *args) * (float("nan") if RANK == RANKS - 1 and self.run.step == 2 else 1)

    for training in json.loads(Path(sys.argv[1]).read_text()).values():
        fault, settings = training.get("fault"), training["settings"]
        out = Path(settings["out"])
        loop.micro_batches, loop.Trainer.losses = micro_batches, losses
        if fault == "same batches":
            loop.micro_batches = lambda first, steps, batch, accumulate, rank, ranks: micro_batches(
                first, steps, batch, accumulate, 0, ranks
            )
        elif fault == "not finite":
            loop.Trainer.losses = break_losses
        elif fault == "other images" and RANK == RANKS - 1:
            settings["images"] = settings["images"][: len(settings["images"]) // 2]
        ended = ""
        try:
            loop.Trainer(Settings(**settings | {"out": out})).train()
        except SystemExit as error:
            ended = str(error)
        (out / f"ended-{RANK}.txt").write_text(ended)
        AcceleratorState._reset_state()  # whose precision is that of the first training
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
