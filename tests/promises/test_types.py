"""Types of the public functions."""

import inspect

from imvar import StableDiffusionImageVariationPipeline
from imvar.pipeline.call_options import AnyOptions, CallOptions


def test_the_options_of_the_overloads_are_those_of_the_signature():
    parameters = inspect.signature(StableDiffusionImageVariationPipeline.__call__).parameters
    annotations = {
        name: parameter.annotation for name, parameter in parameters.items() if name not in ("self", "image")
    }
    options = {name: kind.__forward_arg__ for name, kind in AnyOptions.__annotations__.items()}
    assert options == annotations
    assert CallOptions.__annotations__.keys() == options.keys() - {"output_type", "return_dict"}
