"""Nano models, contents of folders, and child processes that are killed while saving."""

import ctypes
import itertools
import os
import signal
import sys
import traceback
from functools import cache

import torch

import imvar
from imvar import StableDiffusionImageVariationPipeline
from tests.support.random_checkpoint import TINY_UNET, TINY_VAE, randomize

NANO_ENCODER = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 8,
}
NANO_UNET = TINY_UNET | {
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
NANO_VAE = TINY_VAE | {
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
ROOT = os.geteuid() == 0


@cache
def nano_encoder(seed):
    """Return an encoder whose config depends on the seed, so that a mix of two saves does not load."""
    return randomize(imvar.CLIPVisionModelWithProjection(**NANO_ENCODER | {"intermediate_size": 8 + seed}), seed)


@cache
def nano_pipeline(seed, **parts):
    own = {
        "vae": randomize(imvar.AutoencoderKL(**NANO_VAE), seed),
        "image_encoder": nano_encoder(seed),
        "unet": randomize(imvar.UNet2DConditionModel(**NANO_UNET), seed),
        "safety_checker": None,
        "scheduler": imvar.PNDMScheduler(steps_offset=seed),
        "feature_extractor": imvar.CLIPImageProcessor(),
    }
    return StableDiffusionImageVariationPipeline(**own | parts, requires_safety_checker=False)


def equal(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def read_files(folder):
    """Return the bytes of each file and the target of each symbolic link in a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def save_and_read(part, folder, **options):
    part.save_pretrained(folder, **options)
    return read_files(folder)


def leftovers(folder):
    return [path for path in folder.rglob(".*") if ".tmp" in path.name]


def run_and_exit(run):
    """Call `run` and exit with 0, or with 1 after an error."""
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_in_child(run):
    """Call `run` in a child process; return its exit code: 0, 1 after an error, -n after signal n."""
    child = os.fork()
    if not child:
        run_and_exit(run)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changes_files(event, args):
    if event == "open":
        return isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    harmless = ("os.listdir", "os.scandir", "os.kill")
    return event.partition(".")[0] in ("os", "shutil", "ctypes", "fcntl") and event not in harmless


def stopped_at_each_step(save, first):
    """Start a child process that stops before each file operation of `save` from number `first` on; return its id."""
    child = os.fork()
    if not child:
        operations = itertools.count()

        def hook(event, args):
            if changes_files(event, args) and next(operations) >= first:
                os.kill(os.getpid(), signal.SIGSTOP)

        sys.addaudithook(hook)
        run_and_exit(save)
    return child


def killed_at_each_step(save, every=1):
    """Run `save` in a child process that stops before each of its file operations, and yield at each.

    At every `every`-th the child is killed and started again, which changes no file and releases its locks. Yields
    whether it was killed.
    """
    child = None
    try:
        for step in itertools.count():
            child = child or stopped_at_each_step(save, step)
            _, status = os.waitpid(child, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                child = None
                assert status == 0
                yield False
                return
            if killed := step % every == 0:
                child = kill(child)
            yield killed
            if child:
                os.kill(child, signal.SIGCONT)
    finally:
        if child:
            kill(child)


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def mount(kind, source, target, options=None):
    """Mount in a namespace of this process; return False where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, bind, recursive, private = 1 << 17, 1 << 28, 1 << 12, 1 << 14, 1 << 18
    return not (
        libc.unshare(new_mounts if ROOT else new_mounts | new_user)
        or libc.mount(b"none", b"/", None, recursive | private, None)
        or libc.mount(os.fsencode(source), os.fsencode(target), kind, 0 if kind else bind, options)
    )
