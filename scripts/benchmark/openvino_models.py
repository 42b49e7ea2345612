"""The models of diffusers converted to OpenVINO, and run by it on a CPU."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from imvar.records.digests import file_digest

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # int8: of the operations that are not quantized
MODEL = "model.xml"


def import_openvino() -> ModuleType:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then sends no statistics
    import openvino

    return openvino


class ForwardOf(nn.Module):
    """A function of a model and tensors, as a module of the tensors."""

    def __init__(self, function: Callable[..., Tensor], model: nn.Module):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.model, *inputs)


def converted(
    folder: Path,
    function: Callable[..., Tensor],
    load: Callable[[], nn.Module],
    weights: Path,
    inputs: Sequence[Tensor],
) -> Path:
    """Return the file of `function(model, *inputs)` in OpenVINO's format, float32; convert it unless `folder` has it.

    `load` returns the model, float32, of the folder `weights`. The name in `folder` is a digest of its files, the
    function, the shapes and dtypes of the inputs, and the versions of the libraries.
    """
    identity = {
        "function": function.__name__,
        "files": {path.name: file_digest(path) for path in sorted(weights.iterdir()) if path.is_file()},
        "inputs": [(list(t.shape), str(t.dtype)) for t in inputs],
        "weights": "float32",
        "versions": {name: version(name) for name in ("openvino", "torch", "diffusers")},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / digest
    if not target.exists():
        print(f"converting {weights.name} to OpenVINO", file=sys.stderr, flush=True)
        openvino = import_openvino()
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder) as unfinished:
            warnings.simplefilter("ignore")  # the tracer's, of the branches that fixed shapes decide
            shapes = [list(t.shape) for t in inputs]
            model = ForwardOf(function, load()).eval()
            graph = openvino.convert_model(model, example_input=tuple(inputs), input=shapes)
            whole = Path(unfinished) / "whole"
            openvino.save_model(graph, whole / MODEL, compress_to_fp16=False)
            (whole / "identity.json").write_text(json.dumps(identity, indent=2))
            whole.rename(target)
    return target / MODEL


def quantized(file: Path, samples: Sequence[Sequence[Tensor]]) -> Path:
    """Return the file of a converted model quantized to int8 by nncf; quantize it unless it is beside the other.

    Scales are those of the inputs in `samples`, with SmoothQuant (arXiv:2211.10438), the preset for transformers.
    """
    values = hashlib.sha256(b"".join(t.numpy().tobytes() for sample in samples for t in sample)).hexdigest()[:16]
    target = file.parent / f"int8-{version('nncf')}-{values}"
    if not target.exists():
        print(f"quantizing {file.parent.name} with nncf", file=sys.stderr, flush=True)
        openvino = import_openvino()
        import nncf

        def arrays(sample: Sequence[Tensor]) -> list[np.ndarray]:
            return [t.numpy() for t in sample]

        with tempfile.TemporaryDirectory(dir=file.parent) as unfinished:
            model = nncf.quantize(
                openvino.Core().read_model(file),
                nncf.Dataset(samples, arrays),
                subset_size=len(samples),
                model_type=nncf.ModelType.TRANSFORMER,
            )
            whole = Path(unfinished) / "whole"
            openvino.save_model(model, whole / MODEL, compress_to_fp16=False)
            whole.rename(target)
    return target / MODEL


class OpenVINOModel:
    """A converted model, compiled for the CPU and the shortest time of a call: a function of tensors.

    `precision` is the one that OpenVINO computes in: float32 for "bf16" on a processor without instructions for it.
    """

    def __init__(self, file: Path, dtype: str, threads: int):
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "INFERENCE_NUM_THREADS": threads,
        }
        compiled = import_openvino().Core().compile_model(file, "CPU", hints)
        self.precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.request = compiled.create_infer_request()

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.request.infer([t.numpy() for t in inputs], share_inputs=True)
        return torch.from_numpy(self.request.get_output_tensor(0).data).clone()
