"""The bank of a fine-tuning: equal to encoding in each step, and continued where it was killed."""

import multiprocessing
import os
import pickle
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from finetuning import bank as module
from finetuning.bank import Bank, open_bank
from finetuning.encoding import Encoder
from finetuning.images import Images
from torch.utils.data import default_collate

from imvar.errors import InputError
from tests.support.random_checkpoint import tiny_pipeline

SIDE, COUNT = 64, 20
ALONE = SimpleNamespace(wait_for_everyone=lambda: None, process_index=0, num_processes=1, is_main_process=True)


class Recorded(Images):
    """Images that record which of them are read, and kill the process at one of them."""

    read: list
    fatal = None

    def __getitem__(self, index):
        if index == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        vars(self).setdefault("read", []).append(index)
        return super().__getitem__(index)


@pytest.fixture
def files(photo, tmp_path):
    """A folder with 20 images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(COUNT):
        photo.crop((10 * i, 0, 10 * i + 100, 100)).resize((SIDE, SIDE)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def open_(files, tmp_path, pipe, monkeypatch):
    """A function that returns the bank of the images, and those that it read. Each file has 8 images."""
    monkeypatch.setattr(module, "PART", 8)

    def opened(pipe=pipe, skip_broken=False, side=SIDE, preprocess="training", flip=False):
        images = Recorded([str(files)], tmp_path / "out", pipe, side, preprocess, flip)
        images.read = []
        bank = open_bank(tmp_path / "out" / "bank", images, Encoder(pipe), ALONE, skip_broken=skip_broken)
        return bank, images.read

    return opened


def on_the_fly(files, tmp_path, pipe, batch, flip=False):
    """Return what encoding in each step gives, (n, ...) each."""
    images = Images([str(files)], tmp_path / "out", pipe, SIDE, "training", flip)
    batches = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    encoded = [Encoder(pipe).encode(default_collate([images[i] for i in batch])) for batch in batches]
    return {name: torch.cat([example[name] for example in encoded]) for name in encoded[0]}


def whole(bank):
    return default_collate([bank[i] for i in range(len(bank))])


@pytest.mark.parametrize("flip", [False, True])
def test_a_bank_is_equal_to_encoding_in_each_step(open_, files, tmp_path, pipe, flip):
    bank, _ = open_(flip=flip)
    expected = on_the_fly(files, tmp_path, pipe, 8, flip)
    found = whole(bank)
    assert len(bank) == COUNT * (1 + flip)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name, other in on_the_fly(files, tmp_path, pipe, 1, flip).items():  # which rounds differently
        torch.testing.assert_close(found[name], other, rtol=1e-5, atol=1e-5)


def test_a_bank_of_half_precision_loses_nothing_and_is_half_as_large(open_, files, tmp_path, pipe):
    size = sum(path.stat().st_size for path in open_()[0].paths)
    for model in (pipe.vae, pipe.image_encoder):
        model.bfloat16()
    bank, _ = open_()
    found = whole(bank)
    for name, expected in on_the_fly(files, tmp_path, pipe, 8).items():
        assert expected.dtype == torch.float32
        assert torch.equal(found[name], expected)
    assert sum(path.stat().st_size for path in bank.paths) < 0.6 * size


def test_a_bank_is_encoded_once(open_):
    first, read = open_()
    assert read == [*range(COUNT)]
    again, read = open_()
    assert read == []
    assert torch.equal(whole(again)["mean"], whole(first)["mean"])


@pytest.mark.parametrize("change", ["weights", "side", "preprocess"])
def test_a_bank_of_other_weights_or_options_is_another_one(open_, pipe, change):
    before, _ = open_()
    if change == "weights":
        with torch.no_grad():
            pipe.vae.encoder.conv_in.bias[0] += 0.5
        after, read = open_()
    else:
        after, read = open_(**({"side": 32} if change == "side" else {"preprocess": "clip"}))
    assert read == [*range(COUNT)]
    assert not set(before.paths) & set(after.paths)
    name = "embedding" if change == "preprocess" else "mean"
    assert whole(before)[name].shape != whole(after)[name].shape or not torch.equal(
        whole(before)[name], whole(after)[name]
    )


def test_equal_weights_share_a_bank(open_, tmp_path):
    open_()
    assert open_(pipe=tiny_pipeline())[1] == []


def test_only_the_part_of_a_changed_image_is_encoded_again(open_, files):
    before, _ = open_()
    (files / "09.png").write_bytes((files / "00.png").read_bytes())
    after, read = open_()
    assert read == [*range(8, 16)]
    torch.testing.assert_close(after[9]["mean"], before[0]["mean"], rtol=1e-5, atol=1e-5)
    assert torch.equal(after[8]["mean"], before[8]["mean"])


def test_a_killed_run_is_continued(open_, files, tmp_path, pipe):
    images = Recorded([str(files)], tmp_path / "out", pipe, SIDE)
    images.fatal = 13  # in the second of three files
    arguments = (tmp_path / "out" / "bank", images, Encoder(pipe), ALONE)
    process = multiprocessing.get_context("fork").Process(target=open_bank, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out" / "bank").glob("*.safetensors"))) == 1
    bank, read = open_()
    assert read == [*range(8, COUNT)]
    assert torch.equal(whole(bank)["mean"], on_the_fly(files, tmp_path, pipe, 8)["mean"])


def test_broken_images_are_all_named_and_left_out_on_request(open_, files, capsys):
    before = whole(open_()[0])
    for name in ("03.png", "08.png", "19.png"):
        (files / name).write_bytes(b"broken")
    with pytest.raises(InputError, match=r"^images: expected images that can be read, got 3 of 20 that cannot; "):
        open_(flip=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    assert [line.partition(": ")[0] for line in lines] == [str(files / f"{name}.png") for name in ("03", "08", "19")]
    bank, read = open_(flip=True, skip_broken=True)
    assert read == []  # as the others were encoded although the first call failed
    kept = [i for i in range(COUNT) if i not in (3, 8, 19)]
    assert len(bank) == 2 * len(kept)
    for place, i in enumerate(kept):
        torch.testing.assert_close(bank[place]["mean"], before["mean"][i], rtol=1e-5, atol=1e-5)


def test_images_that_are_all_broken_are_refused(open_, files):
    for file in files.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match="got 20 of 20 that cannot"):
        open_(skip_broken=True)


def test_ranks_encode_parts_of_their_own(open_, files, tmp_path, pipe):
    barrier = threading.Barrier(2)
    images = [Recorded([str(files)], tmp_path / "out", pipe, SIDE) for _ in range(2)]
    banks = {}

    def run(rank):
        rank_ = SimpleNamespace(
            wait_for_everyone=barrier.wait, process_index=rank, num_processes=2, is_main_process=rank == 0
        )
        banks[rank] = open_bank(tmp_path / "out" / "bank", images[rank], Encoder(pipe), rank_)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images[0].read == [*range(8), *range(16, COUNT)]
    assert images[1].read == [*range(8, 16)]
    expected = on_the_fly(files, tmp_path, pipe, 8)["mean"]
    assert torch.equal(whole(banks[0])["mean"], expected)
    assert torch.equal(whole(banks[1])["mean"], expected)


def test_a_bank_is_pickled_without_its_tensors(open_):
    bank, _ = open_()
    expected = bank[17]
    data = pickle.dumps(bank)
    assert len(data) < 2000
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pickle.loads(data)[17].items())


def test_a_missing_file_is_named(open_):
    bank, _ = open_()
    bank.paths[1].unlink()
    with pytest.raises(InputError, match=rf"{bank.paths[1].name}: expected a file of the bank, got none"):
        Bank(bank.paths)
