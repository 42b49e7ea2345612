"""The base of a pipeline: components by name, which are loaded, saved, moved and configured together."""

from __future__ import annotations

import inspect
import io
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL.Image import Image
from torch import nn
from torch.nn.attention import SDPBackend

from ..atomic.file import write_text
from ..atomic.folder import atomic_folder, break_hard_links, read_consistently
from ..checks import as_device, as_path, check_int, check_type, parse_to_args
from ..config import Config
from ..errors import InputError, InputTypeError, NoMethodError, describe, in_checkpoint, invalid, short_repr, warn_user
from ..image import numpy_to_pil
from ..models.attention import Attend, memory_efficient
from ..models.stock import is_unmodified, top_package
from ..oom import explain_out_of_memory
from ..runtime import fp8, int8
from ..runtime.precompute import Runner
from ..weights.configured import ConfigFile, ConfiguredComponent, configured_from_single
from ..weights.hub import locate
from ..weights.model_index import INDEX, default_class, index_entry, index_text, unwrap
from ..weights.options import READ_OPTIONS, filter_kwargs, loading_options, locate_config, resolve_ema, should_write
from ..weights.pretrained import PretrainedModel
from ..weights.read_errors import explain_read_error
from .components import SchedulerLike, device_of
from .lora import LoraPipelineMixin
from .offload import Offload
from .pretrained import dtypes_by_component, files_to_read, read_components
from .running import RunningCall, innermost_call, interrupt_calls, run_call

if TYPE_CHECKING:
    from ..runtime.compiled import Compiler


class PipelineBase(LoraPipelineMixin, ConfigFile):
    """The components of a pipeline as its attributes, and everything that applies to all of them."""

    config_name = INDEX
    name_or_path: str | Path | None = None
    """The first argument of `from_pretrained`, if the pipeline was loaded by it."""

    _interrupted_outside = False  # what `_interrupt` was set to outside of a call

    def __init__(self) -> None:
        self._component_names: list[str] = []
        self._settings: dict[str, Any] = {}
        self._bar_options: dict[str, Any] = {}
        self._offload: Offload | None = None
        self._compiler: Compiler | None = None

    def register_modules(self, **components: Any) -> None:
        """Set components as attributes of these names; None for one that is left out."""
        for name, component in components.items():
            setattr(self, name, component)
            if name not in self._component_names:
                self._component_names = [*self._component_names, name]  # a new list, as shallow copies share the old

    def register_to_config(self, **settings: Any) -> None:
        """Set settings of the pipeline itself, which are saved with it."""
        check_type("requires_safety_checker", settings.get("requires_safety_checker"), bool)
        self._settings = self._settings | settings

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, so that `Pipeline(**other.components)` shares them."""
        return {name: getattr(self, name) for name in self._component_names}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The components with weights."""
        return {name: component for name, component in self.components.items() if isinstance(component, nn.Module)}

    @property
    def config(self) -> Config:
        """The pipeline's settings, and the library and class of each component. Settings assigned to it count."""
        entries = {name: index_entry(name, value) for name, value in self.components.items()}
        source = {} if self.name_or_path is None else {"_name_or_path": self.name_or_path}
        return Config.from_dict(self._settings | entries | source).owned_by(self)

    _internal_dict = config  # diffusers' name for it

    @classmethod
    def init_parameters(cls) -> dict[str, inspect.Parameter]:
        """Return the constructor's parameters by name, following *args and **kwargs up the MRO."""
        parameters: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if "__init__" in vars(base):
                signature = list(inspect.signature(base.__init__).parameters.values())[1:]
                named = [p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
                parameters = {p.name: p for p in named} | parameters
                if len(named) == len(signature):
                    break
        return parameters

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        revision: str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        low_cpu_mem_usage: bool = True,
        disable_mmap: bool = False,
        compile: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load a pipeline from a folder or a hub repository in the published layout, or the bundled "imvar-emoji".

        `dtype` (or `torch_dtype`): one for all components, or a dictionary of component to dtype with `"default"`;
        float32 by default; "auto" is, for each component, the widest dtype in its files, or bfloat16 if all have 8
        bits. `overrides`: components to use in place of the checkpoint's, None to leave one out, and settings of the
        pipeline such as `requires_safety_checker`. `variant` selects files such as `*.fp16.safetensors` of the
        components that have them. Weights that need no conversion are memory-mapped, so the files must not be
        rewritten in place while they are in use; `disable_mmap` reads them into memory. `low_cpu_mem_usage` has no
        effect. `compile`: call `compile()` on the pipeline. Of diffusers' other options, `force_download` downloads
        again what is in the cache, and `use_auth_token` is `token`.

        Raises `CheckpointError` with the file and what is wrong with it.
        """
        check_type("compile", compile, bool)
        check_type("variant", variant, str)
        check_type("low_cpu_mem_usage", low_cpu_mem_usage, bool)
        check_type("disable_mmap", disable_mmap, bool)
        parameters = cls.init_parameters()
        hub, overrides = loading_options(overrides, revision, cache_dir, local_files_only, token)
        overrides = filter_kwargs(overrides, parameters, f"{cls.__name__}.from_pretrained")
        dtypes = dtypes_by_component(torch_dtype if dtype is None else dtype)
        reading = {"variant": variant, "use_safetensors": use_safetensors}
        folder = locate(pretrained_model_name_or_path, hub, lambda names: files_to_read(names, overrides, **reading))
        read = partial(read_components, folder, parameters, overrides, dtypes, disable_mmap, **reading)
        with explain_read_error(folder):
            components = read_consistently(folder, files_to_read(None, overrides, **reading), read)
        try:
            pipe = cls(**(components | overrides))
        except InputError as error:
            if error.key is None or error.key in overrides:  # the caller's argument is at fault
                raise
            raise in_checkpoint(error, folder / INDEX) from error
        pipe.name_or_path = pretrained_model_name_or_path
        for name, model in pipe.modules.items():
            if name not in overrides and isinstance(model, PretrainedModel):
                model.note_revision(revision)
        if compile:
            pipe.compile()
        return pipe

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        ema: str = "auto",
        extract_ema: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        disable_mmap: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load a pipeline from one `.ckpt` or safetensors file in an original layout.

        The file: a path, a link to one on the hub, or "owner/name/file". `config`: the folder or hub repository of a
        checkpoint with the configs for these weights; by default they are read from the file, inferred from the
        tensors' shapes, or the published ones. Original files contain no safety checker: pass one as
        `safety_checker=`, or there is none. `ema` and `extract_ema` are those of a model's `from_single_file`, the
        other arguments, such as `disable_mmap`, those of `from_pretrained`.
        """
        from ..weights.single_file import SingleFile  # see weights/__init__.py

        hub, overrides = loading_options(overrides, revision, cache_dir, local_files_only, token)
        check_type("disable_mmap", disable_mmap, bool)
        overrides = {name: value for name, value in overrides.items() if name not in READ_OPTIONS}
        overrides = filter_kwargs(overrides, cls.init_parameters(), f"{cls.__name__}.from_single_file")
        dtypes = dtypes_by_component(torch_dtype if dtype is None else dtype)
        file = SingleFile.from_source(pretrained_model_link_or_path, hub, disable_mmap)
        file.check_complete(overrides)
        folder, ema = locate_config(config, hub), resolve_ema(ema, extract_ema)
        components = {
            part: default_class(part).from_single(file, folder, ema=ema, dtype=dtypes[part])
            for part in file.parts
            if part not in overrides
        }
        for part in {"scheduler", "feature_extractor"} - overrides.keys():
            components[part] = configured_from_single(part, file, folder, components.get("image_encoder"))
        components.setdefault("safety_checker", None)
        return cls(**(components | overrides))

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> None:
        """Save all components to a folder, created if needed, in the layout that diffusers reads.

        The save is atomic, even if the process is killed; `atomic/folder.py` explains how, and where it cannot be.
        Other files in the folder stay. `is_main_process=False` writes nothing, as in a distributed run.
        """
        options = filter_kwargs(options, ("is_main_process",), f"{type(self).__name__}.save_pretrained")
        if not should_write(options.get("is_main_process")):
            return
        components = {name: unwrap(component) for name, component in self.components.items() if component is not None}
        for name, component in components.items():
            got = describe(component)
            if inspect.getattr_static(component, "save_pretrained", None) is None:  # not that of a model inside it
                hint = f"save with pipe.{name} = None, and load with from_pretrained(..., {name}=...)"
                raise invalid(InputTypeError, name, "a component with save_pretrained", got, hint)
            if top_package(type(component)) == "peft":
                hint = (
                    f"set pipe.{name} = pipe.{name}.merge_and_unload(); pipe.{name}.save_pretrained saves the adapter"
                )
                raise invalid(InputTypeError, name, "a model without an adapter", got, hint)
            if (part := getattr(component, "part", name)) != name:
                raise invalid(InputTypeError, name, f"a component for {name}", f"{got}, which is for {part}")
        check_type("safe_serialization", safe_serialization, bool)
        options = {"safe_serialization": safe_serialization, "variant": variant}
        if max_shard_size is not None:  # each class has its own default
            options["max_shard_size"] = max_shard_size
        atomic = ConfiguredComponent.save_pretrained, PretrainedModel.save_pretrained
        with atomic_folder(as_path("save_directory", save_directory)) as new:
            for name, component in components.items():
                if getattr(type(component), "save_pretrained", None) not in atomic:
                    break_hard_links(new / name)  # in case it writes in place
                named = inspect.signature(component.save_pretrained).parameters
                component.save_pretrained(str(new / name), **{k: v for k, v in options.items() if k in named})
            self.save_config(new)

    def save_config(self, save_directory: str | Path, **options: Any) -> None:
        """Write the index alone into a folder, which is created if needed. There are no `options`."""
        filter_kwargs(options, (), f"{type(self).__name__}.save_config")
        text = index_text(type(self).__name__, self.components, self._settings)
        write_text(as_path("save_directory", save_directory) / INDEX, text)

    # A call changes the scheduler and no other component, so every call has its own.

    @property
    def scheduler(self) -> Any:
        """The scheduler, of any class; during a call, that call's copy."""
        return call.scheduler if (call := innermost_call(self)) else self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerLike) -> None:
        self._scheduler = scheduler

    def per_call_scheduler(self) -> AbstractContextManager[RunningCall]:
        """Within the context and in this thread alone, let `scheduler` be a shallow copy, for one call to step."""
        return run_call(self, self._scheduler)

    def interrupt(self) -> None:
        """End all calls of this pipeline that are running now, in any thread, after their current steps.

        They return the images that they have: those of the x_0 predicted in the last step, not the noisy latents. A
        call that has taken all its steps returns as usual, and later calls run as usual. Setting
        `pipe._interrupt = True` in a callback, as for diffusers, ends that call alone.
        """
        interrupt_calls(self)

    @property
    def _interrupt(self) -> bool:
        """Whether the call that this thread is in ends early. Setting it outside of one is the same as `interrupt`."""
        call = innermost_call(self)
        return self._interrupted_outside if call is None else call.interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        if call := innermost_call(self):
            call.interrupted = bool(value)
            return
        self._interrupted_outside = bool(value)  # for a subclass whose own __call__ reads it
        if value:
            interrupt_calls(self)

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the call that this thread is in, 0 outside of one."""
        return call.num_timesteps if (call := innermost_call(self)) else 0

    # Device and dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return device_of(self.components, torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next((p.dtype for module in self.modules.values() for p in module.parameters()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        return self._offload.device if self._offload else self.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast all components, as `nn.Module.to` does, and return this pipeline.

        Arguments: a device, a floating-point dtype, both, or a tensor that has both; `non_blocking` and
        `memory_format`. Raises `InputError` for any other, before anything moves, and `OutOfMemoryError`.
        """
        arguments = parse_to_args(*args, **kwargs)
        if "device" in arguments:
            self.remove_all_hooks()
        with explain_out_of_memory("use torch.float16, or enable_model_cpu_offload() instead of to()"):
            for module in self.modules.values():
                module.to(**arguments)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the components in main memory and move each to the accelerator only while it runs.

        `device`: "cuda" by default; `gpu_id`: its index. Threads that call this pipeline then wait for each other.
        Raises `InputError` if there is no accelerator.
        """
        if device is None:
            if not torch.accelerator.is_available():
                raise invalid(InputError, "enable_model_cpu_offload", "an accelerator", "a machine without one")
            device = torch.accelerator.current_accelerator()
        if gpu_id is not None:
            kind, _, index = str(device).partition(":")
            if index not in ("", str(check_int("gpu_id", gpu_id, low=0))):
                raise invalid(InputError, "gpu_id", f"{index}, the index of device={device}", str(gpu_id))
            device = f"{kind}:{gpu_id}"
        target = as_device("device", device) or torch.device("cpu")
        if target.type == "meta":
            raise invalid(InputError, "device", "an accelerator", "'meta'", "weights would be lost there")
        self.remove_all_hooks()
        self._offload = Offload(target, self.modules)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Call `enable_model_cpu_offload`, with a warning: components are moved whole, not layer by layer."""
        warn_user("enable_sequential_cpu_offload: moves whole components, as enable_model_cpu_offload does")
        self.enable_model_cpu_offload(gpu_id, device)

    def remove_all_hooks(self) -> None:
        """Disable offloading."""
        if self._offload:
            self._offload.remove()
            self._offload = None

    def maybe_free_model_hooks(self) -> None:
        """With offloading, move every component back to main memory."""
        if self._offload:
            self._offload.offload_all()

    # Speed

    def compile(self, **options: Any) -> None:
        """Compile the UNet and the autoencoder's decoder, with the `options` of `torch.compile`.

        On CUDA each of their calls is then replayed as a CUDA graph, so that no step waits for Python. That takes
        from a minute to many with `mode="max-autotune"`, in the first call of this pipeline and again for every new
        size, batch or dtype, but not for other seeds, images, guidance, schedulers or numbers of steps, nor for
        weights changed in place; replaced weights are recorded again. A model that cannot be compiled runs eagerly,
        with a warning. So do, without one, models with hooks or custom layers and models that are offloaded.

        `backend="cudagraphs"` skips `torch.compile`: on CUDA it records eager calls as CUDA graphs, which needs no
        compiling; on other devices it changes nothing. It takes no other option.
        """
        from ..runtime.compiled import Compiler  # with its imports, which nothing else needs

        self._compiler = Compiler(**options)

    def enable_fp8(self) -> None:
        """Approximate: run the UNet's linear layers in FP8 with a scale per row (arXiv:2209.05433).

        For NVIDIA Ada, Hopper and later; slower elsewhere. It replaces int8. Raises `InputError` on a GPU without FP8.
        """
        fp8.enable(self.components["unet"])

    def disable_fp8(self) -> None:
        fp8.disable(self.components["unet"])

    def enable_int8(self) -> None:
        """Approximate: run the UNet's linear layers and convolutions in int8 on a CPU (arXiv:1712.05877).

        These are the linear layers of self-attention and feed-forward layers, and the 3x3 convolutions
        of resnet blocks and downsampling. Weights have a scale per output channel, inputs one per sample, from their
        extremes in each call. `state_dict()` and what is saved stay in full precision, and their int8 copies take
        memory beside them. Gradients, autocast and other devices are computed in full precision; `compile` has no
        effect on the UNet. It replaces FP8. Raises `InputError` for a UNet that is not on a CPU, or not in float32 or
        bfloat16, and on a processor without VNNI or AMX instructions.
        """
        int8.enable(self.components["unet"])

    def disable_int8(self) -> None:
        int8.disable(self.components["unet"])

    @property
    def runner(self) -> Runner:
        """Run functions of the models, compiled after `compile`."""
        compiler = self._compiler
        if compiler is None or self._offload:
            return partial
        return lambda function, model: (compiler if is_unmodified(model) else partial)(function, model)

    # Settings of the models

    def _configure(self, names: Sequence[str], method: str, *args: Any, **options: Any) -> None:
        """Call a method of each of these components that has it. Raises `NoMethodError` if none has."""
        components = [component for name in names if hasattr(component := self.components[name], method)]
        if not components:
            raise invalid(NoMethodError, names[0], f"a component with {method}", describe(self.components[names[0]]))
        for component in components:
            getattr(component, method)(*args, **options)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute the UNet's attention for a few heads at a time: "auto" half, "max" one, a number, or None for all."""
        self._configure(["unet"], "set_attention_slice", slice_size)

    def disable_attention_slicing(self) -> None:
        self._configure(["unet"], "set_attention_slice", None)

    def enable_xformers_memory_efficient_attention(self, attention_op: SDPBackend | Attend | None = None) -> None:
        """Use PyTorch's memory-efficient attention, or `attention_op`, in UNet and autoencoder, where they have it."""
        kernel = memory_efficient(attention_op)
        self._configure(["unet", "vae"], "enable_xformers_memory_efficient_attention", kernel)

    def disable_xformers_memory_efficient_attention(self) -> None:
        self._configure(["unet", "vae"], "disable_xformers_memory_efficient_attention")

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Do nothing: see `fuse_qkv_projections` of the models."""

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Do nothing."""

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Merge the UNet's skip connections by FreeU (arXiv:2309.11497)."""
        self._configure(["unet"], "enable_freeu", s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        self._configure(["unet"], "disable_freeu")

    def enable_vae_slicing(self) -> None:
        """Decode a batch one image at a time."""
        self._configure(["vae"], "enable_slicing")

    def disable_vae_slicing(self) -> None:
        self._configure(["vae"], "disable_slicing")

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles, which changes them a little."""
        self._configure(["vae"], "enable_tiling")

    def disable_vae_tiling(self) -> None:
        self._configure(["vae"], "disable_tiling")

    # Progress bar

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Return a tqdm bar over `iterable`, or one of `total` steps that is updated by hand."""
        tqdm = tqdm_of_hub()
        if iterable is None and total is None:
            raise invalid(InputError, "progress_bar", "an iterable or a total", "neither")
        if iterable is not None and not isinstance(iterable, Iterable):
            raise invalid(InputTypeError, "iterable", "an iterable", short_repr(iterable))
        return tqdm(iterable, total=total, **self._bar_options)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set the options of tqdm, such as `disable=True`. Raises `InputTypeError` for any that tqdm does not take."""
        tqdm = tqdm_of_hub()

        class TrialBar(tqdm.__mro__[1]):  # type: ignore[misc]  # tqdm's own class, which no setting disables
            _lock, monitor_interval = tqdm.get_lock(), 0

        try:
            if not hasattr(options.get("file") or sys.stderr, "write"):
                raise TypeError("file has no write")
            bool(options.get("disable"))
            tried = {name: value for name, value in options.items() if name not in ("name", "write_bytes")}
            with TrialBar(total=2, **(tried | {"file": io.StringIO(), "disable": False})) as bar:
                bar.update()
        except Exception as error:  # for an unknown name, tqdm raises a KeyError of its own
            got = f"{short_repr(options)} ({error})"
            raise invalid(
                InputTypeError, "set_progress_bar_config", "options of tqdm such as disable=True", got
            ) from error
        self._bar_options = options

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the file of the progress bar, which belongs to this process."""
        bar_options = {name: value for name, value in self._bar_options.items() if name != "file"}
        return vars(self) | {"_bar_options": bar_options}

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image]:
        """Convert an array (b, h, w, 3) with values in [0, 1] to PIL images."""
        return numpy_to_pil(images)

    def __repr__(self) -> str:
        lines = (f"  {name}: {type(component).__name__}" for name, component in self.components.items())
        return "\n".join([type(self).__name__, *lines])


def tqdm_of_hub() -> Any:
    """Return huggingface_hub's tqdm, without its warning that a notebook without ipywidgets gets a bar of text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub.utils import tqdm
    return tqdm
