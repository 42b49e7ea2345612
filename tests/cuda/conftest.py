"""These tests need a GPU that PyTorch reaches through CUDA; elsewhere each is skipped and says so."""

import pytest
import torch

from tests.reference.conftest import ours, ref, ref_folder

__all__ = ["ours", "ref", "ref_folder"]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _true_float32():
    """float32 means float32 here: no TF32 in matrix products or convolutions."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
