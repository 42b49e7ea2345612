"""Embeddings as values: mix, slerp, augment, and their files."""

import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import imvar
from imvar import CheckpointError, InputError, InputTypeError, augment, load_image_embeds, mix, save_image_embeds, slerp

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORMS = [(1, 1, 768), (3, 1, 768), (3, 768)]


def embeds(*shape, seed=0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape or (2, 1, 768), generator=torch.Generator().manual_seed(seed)).to(dtype)


A, B, C, D, E = (embeds(seed=seed) for seed in range(5))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.cosine_similarity(x.double(), y.double(), dim=-1)


# ---- mix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_mix_is_the_weighted_sum_in_order(shape, dtype):
    terms = [embeds(*shape, seed=seed, dtype=dtype) for seed in range(5)]
    a, b, c, d, e = terms
    out = mix(zip(terms, [0.7, 0.3, -1, 0, 2.5], strict=True))
    assert torch.equal(out, 0.7 * a + 0.3 * b + -1 * c + 0 * d + 2.5 * e)
    assert (out.dtype, out.shape) == (dtype, shape)


def test_mix_equals_the_sum_of_kandinsky():
    weights = [0.5, 0.2, 0.3]
    reference = torch.cat([(x[:1, 0] * w) for x, w in zip([A, B, C], weights, strict=True)]).sum(dim=0, keepdim=True)
    assert torch.equal(mix(zip([A[:1], B[:1], C[:1]], weights, strict=True))[:, 0], reference)


def test_mix_does_not_normalize_its_weights():
    assert torch.equal(mix([(A, 1), (B, 1)]), A + B)
    assert torch.equal(mix([(A, 2)]), 2 * A)


def test_no_function_changes_or_returns_its_arguments():
    a, b = A.clone(), B.clone()
    for out in [mix([(a, 1)]), mix([(a, 1), (b, 1)]), slerp(a, b, 0), slerp(a, b, 1), augment(a, 0), augment(a, 0.5)]:
        out.zero_()
    assert torch.equal(a, A)
    assert torch.equal(b, B)


@pytest.mark.parametrize(
    ("weighted", "kind", "words"),
    [
        ([], InputTypeError, "weighted: expected pairs such as .*, got an empty list"),
        (A, InputTypeError, "weighted: expected pairs"),
        (None, InputTypeError, "weighted: expected pairs .*, got None"),
        ([A, B], InputTypeError, "weighted: expected pairs"),
        ({"a": 1}, InputTypeError, "weighted: expected pairs"),
        ([(A, 1, 2)], InputTypeError, "weighted: expected pairs"),
        ([(A, 1), ("b", 1)], InputTypeError, r"weighted\[1\]\[0\]: expected a tensor \(b, 1, c\) or \(b, c\), got str"),
        ([(A, "1")], InputTypeError, r"weighted\[0\]\[1\]: expected a finite number, got '1'"),
        ([(A, True)], InputTypeError, r"weighted\[0\]\[1\]: expected a finite number, got True"),
        ([(A, math.nan)], InputError, r"weighted\[0\]\[1\]: expected a finite number, got nan"),
        ([(A, 1), (B, math.inf)], InputError, r"weighted\[1\]\[1\]: expected a finite number, got inf"),
    ],
)
def test_mix_refuses_other_pairs(weighted, kind, words):
    with pytest.raises(kind, match=words):
        mix(weighted)


# ---- slerp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_slerp_returns_its_ends_exactly(shape, dtype):
    a, b = embeds(*shape, seed=1, dtype=dtype), embeds(*shape, seed=2, dtype=dtype)
    assert torch.equal(slerp(a, b, 0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    assert (middle.dtype, middle.shape) == (dtype, shape)


@pytest.mark.parametrize("t", [1e-3, 0.25, 0.5, 0.9])
def test_slerp_turns_at_a_constant_rate_and_its_length_changes_linearly(t):
    a, b = A.double(), 5 * B.double()
    out = slerp(a, b, t)
    assert torch.allclose(cosine(a, out).acos(), t * cosine(a, b).acos(), atol=1e-12, rtol=1e-9)
    assert torch.allclose(out.norm(dim=-1), (1 - t) * a.norm(dim=-1) + t * b.norm(dim=-1), rtol=1e-14)
    assert torch.allclose(slerp(A, 5 * B, t).double(), out, rtol=1e-5, atol=1e-5)


def test_slerp_equals_shoemakes_formula():
    a, b = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (A, B))
    theta = cosine(a, b).acos()[..., None]
    for t in (0.1, 0.5, 0.8):
        expected = (theta * (1 - t)).sin() / theta.sin() * a + (theta * t).sin() / theta.sin() * b
        assert torch.allclose(slerp(a, b, t), expected, rtol=1e-12, atol=1e-14)


def test_slerp_of_a_batch_is_that_of_its_rows():
    rows = [slerp(a[None], b[None], 0.3) for a, b in zip(A, B, strict=True)]
    assert torch.equal(slerp(A, B, 0.3), torch.cat(rows))
    assert torch.equal(slerp(A[:, 0], B[:, 0], 0.3), slerp(A, B, 0.3)[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", [0, 1e-7, 1e-4])
def test_slerp_between_almost_parallel_embeddings_is_almost_linear(dtype, distance):
    a, b = A.to(dtype), (2 * (A + distance * B)).to(dtype)
    assert torch.allclose(slerp(a, b, 0.25).double(), 0.75 * a.double() + 0.25 * b.double(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("distance", [0, 1e-7, 1e-4])
def test_slerp_between_opposite_embeddings_passes_at_a_right_angle(distance):
    b = -2 * (A + distance * B)
    middle = slerp(A, b, 0.5)
    assert cosine(A, middle).abs().max() < 1e-4
    assert torch.allclose(middle.norm(dim=-1), 1.5 * A.norm(dim=-1), rtol=1e-4)
    assert cosine(b, slerp(A, b, 0.999)).min() > 0.999  # and arrives at b
    assert torch.equal(middle, slerp(A, b, 0.5))


def test_slerp_from_or_to_zeros_scales():
    zeros = torch.zeros_like(A)
    assert torch.allclose(slerp(A, zeros, 0.25), 0.75 * A, atol=1e-6)
    assert torch.allclose(slerp(zeros, A, 0.25), 0.25 * A, atol=1e-6)
    assert torch.equal(slerp(zeros, zeros, 0.25), zeros)


@pytest.mark.parametrize(
    ("t", "kind"), [(-0.1, InputError), (1.1, InputError), (math.nan, InputError), ("half", InputTypeError)]
)
def test_slerp_refuses_other_positions(t, kind):
    with pytest.raises(kind, match="t: expected a number from 0 to 1"):
        slerp(A, B, t)


# ---- augment


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_augment_by_0_returns_the_same_bits(shape, dtype):
    a = embeds(*shape, dtype=dtype)
    out = augment(a, 0, seed=3)
    assert torch.equal(out, a)
    assert (out.dtype, out.shape) == (dtype, shape)


@pytest.mark.parametrize("amount", [0.3, 0.6, 1.0])
def test_augment_equals_its_formula(amount):
    noise = torch.stack([torch.randn(1, 768, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    a = 9 * A.double()
    expected = math.sqrt(1 - amount**2) * a + amount * (a**2).mean(-1, keepdim=True) ** 0.5 * noise
    assert torch.allclose(augment(a, amount, seed=7), expected, rtol=1e-12)
    for dtype, tolerance in (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02):
        out = augment((9 * A).to(dtype), amount, seed=7)
        assert out.dtype == dtype
        assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_augment_keeps_the_expected_length():
    many = A[:1].expand(200, 1, 768)
    for amount in (0.2, 0.6, 1):
        lengths = augment(many, amount).square().sum(-1)
        assert lengths.mean() == pytest.approx(float(A[0].square().sum()), rel=0.02)


def test_a_seed_gives_the_same_noise_in_any_batch_and_form():
    both = augment(A, 0.5, seed=3)
    assert torch.equal(both[:1], augment(A[:1], 0.5, seed=3))
    assert torch.equal(both[1:], augment(A[1:], 0.5, seed=4))
    assert torch.equal(both, augment(A, 0.5, seed=[3, 4]))
    assert torch.equal(both[:, 0], augment(A[:, 0], 0.5, seed=3))
    assert torch.equal(augment(A, 0.5), augment(A, 0.5, seed=0))
    assert not torch.equal(both, augment(A, 0.5, seed=4))


def test_augment_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    augment(A, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"amount": 1.5}, "amount: expected a number from 0 to 1, got 1.5"),
        ({"amount": -0.5}, "amount: expected a number from 0 to 1, got -0.5"),
        ({"amount": math.nan}, "amount: expected a number from 0 to 1, got nan"),
        ({"amount": "much"}, "amount: expected a number from 0 to 1, got 'much'"),
        ({"amount": 0, "seed": -1}, "seed: expected an integer from 0"),
        ({"amount": 0.5, "seed": "x"}, "seed: expected an integer from 0"),
        ({"amount": 0.5, "seed": None}, "seed: expected an integer from 0"),
        ({"amount": 0.5, "seed": [1]}, "seed: expected one integer, or one for each of 2"),
    ],
    ids=str,
)
def test_augment_refuses_other_arguments(call, words):
    with pytest.raises(InputError, match=words):
        augment(A, **call)


# ---- what all refuse

NOT_EMBEDS = [
    (None, InputTypeError, r"expected a tensor \(b, 1, c\) or \(b, c\), got NoneType"),
    (A.tolist(), InputTypeError, r"expected a tensor \(b, 1, c\) or \(b, c\), got list"),
    (A.numpy(), InputTypeError, r"expected a tensor \(b, 1, c\) or \(b, c\), got an array"),
    (A[0, 0], InputError, r"expected a tensor \(b, 1, c\) or \(b, c\), got a tensor of shape \(768,\)"),
    (A[None], InputError, r"expected a tensor \(b, 1, c\) or \(b, c\), got a tensor of shape \(1, 2, 1, 768\)"),
    (A[:0], InputError, r"got a tensor of shape \(0, 1, 768\)"),
    (
        A.expand(2, 2, 768),
        InputError,
        r"one token per image, got a tensor of shape \(2, 2, 768\); combine .* imvar.mix",
    ),
    (A.long(), InputTypeError, r"expected floating-point values of 16 bits or more, got values of torch.int64"),
    (A.to(torch.float8_e4m3fn), InputTypeError, "expected floating-point values of 16 bits or more"),
    (A.to_sparse(), InputTypeError, "expected a dense tensor"),
    (A.to("meta"), InputError, "expected a tensor with values"),
    (A.masked_fill(A > 2, math.nan), InputError, "expected finite values, got NaN or infinite values"),
    (A.masked_fill(A > 2, math.inf), InputError, "expected finite values, got NaN or infinite values"),
]


@pytest.mark.parametrize(("value", "kind", "words"), NOT_EMBEDS)
def test_every_function_refuses_what_is_not_embeddings(value, kind, words, tmp_path):
    for name, attempt in [
        ("weighted[0][0]", lambda: mix([(value, 1)])),
        ("weighted[1][0]", lambda: mix([(A, 1), (value, 1)])),
        ("a", lambda: slerp(value, A, 0)),
        ("b", lambda: slerp(A, value, 0)),
        ("image_embeds", lambda: augment(value, 0)),
        ("image_embeds", lambda: save_image_embeds(tmp_path / "a.safetensors", value)),
    ]:
        with pytest.raises(kind, match=words) as caught:
            attempt()
        assert str(caught.value).startswith(f"{name}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (B[:1], r"expected a tensor of shape \(2, 1, 768\), the shape of the first, got .* \(1, 1, 768\)"),
        (B[:, 0], r"expected a tensor of shape \(2, 1, 768\), the shape of the first, got .* \(2, 768\)"),
        (B[..., :700], r"expected a tensor of shape \(2, 1, 768\)"),
        (B.half(), "expected torch.float32, the dtype of the first, got torch.float16"),
    ],
)
def test_embeddings_that_differ_in_form_are_refused(other, words):
    with pytest.raises(InputError, match=r"^weighted\[1\]\[0\]: " + words):
        mix([(A, 0.5), (other, 0.5)])
    with pytest.raises(InputError, match="^b: " + words):
        slerp(A, other, 0.5)


# ---- files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_a_file_returns_the_same_bits(shape, dtype, tmp_path):
    a, file = embeds(*shape, dtype=dtype), tmp_path / "new folder" / "fox.safetensors"
    save_image_embeds(str(file), a)
    out = load_image_embeds(str(file))
    assert torch.equal(out, a.reshape(shape[0], 1, 768))
    assert out.dtype == dtype
    assert out.device.type == "cpu"
    assert load_file(file).keys() == {"image_embeds"}
    assert torch.equal(load_file(file)["image_embeds"], out)
    assert os.listdir(file.parent) == ["fox.safetensors"]


def test_a_file_of_safetensors_is_read(tmp_path):
    save_file({"image_embeds": A[:, 0].contiguous()}, tmp_path / "fox.safetensors")
    assert torch.equal(load_image_embeds(tmp_path / "fox.safetensors"), A)


def test_views_and_gradients_are_saved_by_value(tmp_path):
    file, rows = tmp_path / "x.safetensors", torch.cat([A, B]).requires_grad_()
    save_image_embeds(file, rows[::2])
    assert torch.equal(load_image_embeds(file), rows[::2].detach())
    assert file.stat().st_size < 3 * A.nbytes


def test_loaded_embeddings_do_not_change_with_the_file(tmp_path):
    file = tmp_path / "x.safetensors"
    save_image_embeds(file, A)
    loaded = load_image_embeds(file)
    with file.open("r+b") as f:
        f.truncate(0)
    assert torch.equal(loaded, A)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    """In a process whose files may have 100 bytes."""
    file = tmp_path / "x.safetensors"
    save_image_embeds(file, A)
    program = (
        "import imvar, resource, signal, sys, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: imvar.save_image_embeds(sys.argv[1], torch.ones(1, 1, 768))\n"
        "except imvar.CheckpointError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True)
    assert "expected a writable path, got a file above the size limit" in done.stdout
    assert torch.equal(load_image_embeds(file), A)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("fox.pt", InputError, "path: expected a path that ends in .safetensors, got 'fox.pt'"),
        ("fox", InputError, "path: expected a path that ends in .safetensors, got 'fox'"),
        ("", InputError, "path: expected a path that is not empty"),
        (None, InputTypeError, "path: expected a path, got None"),
        (3, InputTypeError, "path: expected a path, got 3"),
    ],
)
def test_other_paths_are_refused(path, kind, words):
    with pytest.raises(kind, match=words):
        save_image_embeds(path, A)
    with pytest.raises(kind, match=words):
        load_image_embeds(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"image_embeddings": A},
            r"image_embeds: expected one tensor, image_embeds, got tensors \['image_embeddings'\]",
        ),
        ({"image_embeds": A, "x": B}, r"expected one tensor, image_embeds, got tensors \['image_embeds', 'x'\]"),
        ({}, r"expected one tensor, image_embeds, got tensors \[\]"),
        ({"image_embeds": A[0, 0]}, r"image_embeds: expected a tensor \(b, 1, c\) or \(b, c\), got .* \(768,\)"),
        ({"image_embeds": torch.ones(2, 3, 4)}, r"one token per image, got a tensor of shape \(2, 3, 4\)"),
        ({"image_embeds": A / 0}, "image_embeds: expected finite values, got NaN or infinite values"),
        ({"image_embeds": torch.ones(1, 1, 8, dtype=torch.int64)}, "image_embeds: expected floating-point values"),
    ],
)
def test_other_tensors_in_a_file_are_refused(tensors, words, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_image_embeds(file)
    assert (caught.value.path, caught.value.key) == (file, "image_embeds")


@pytest.mark.parametrize(
    "content", [None, b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}", "folder"]
)
def test_files_that_cannot_be_read_are_refused_by_name(content, tmp_path):
    file = tmp_path / "x.safetensors"
    if content == "folder":
        file.mkdir()
        with pytest.raises(CheckpointError, match=r"x\.safetensors: expected a writable path, got a folder"):
            save_image_embeds(file, A)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected"):
        load_image_embeds(file)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_image_embeds(file, A)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        load_image_embeds(file)


def test_the_functions_are_public():
    names = {"mix", "slerp", "augment", "save_image_embeds", "load_image_embeds"}
    assert names <= set(imvar.__all__)
