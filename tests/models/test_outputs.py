"""Outputs as dictionaries and pytrees, and as other libraries copy and rebuild them."""

import copy
import pickle

import pytest
import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch.utils import _pytree as pytree

from imvar import InputTypeError, StableDiffusionPipelineOutput
from imvar.outputs import CLIPVisionModelOutput, DenoisedOutput, Output


def classes(base=Output):
    return [base, *(each for sub in base.__subclasses__() for each in classes(sub))][base is Output :]


@pytest.mark.parametrize("kind", classes())
def test_an_output_is_rebuilt_from_a_mapping_and_from_pairs_as_other_libraries_do(kind):
    output = kind(torch.ones(2))
    assert isinstance(output, dict)
    for rebuilt in (
        type(output)({name: value + 1 for name, value in output.items()}),  # accelerate
        type(output)((name, output[name] + 1) for name in output),  # DataParallel
        pytree.tree_map(lambda value: value + 1, output),
    ):
        assert type(rebuilt) is kind
        assert list(rebuilt) == list(output)
        assert torch.equal(rebuilt.to_tuple()[0], torch.full((2,), 2.0))
        assert all(getattr(rebuilt, name) is rebuilt[name] for name in rebuilt)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_copies_have_the_same_fields(copied):
    output = copied(StableDiffusionPipelineOutput(["image"], None, seeds=[3], scores=[{}]))
    fields = {"images": ["image"], "nsfw_content_detected": None, "seeds": [3], "scores": [{}], "recorded": None}
    assert vars(output) == fields
    assert dict(output) == {"images": ["image"]}


def test_a_type_parameter_is_not_stored():
    output = StableDiffusionPipelineOutput[torch.Tensor](torch.ones(1))
    assert vars(output).keys() == {"images", "nsfw_content_detected", "seeds", "scores", "recorded"}
    assert list(output) == ["images"]
    assert isinstance(output, StableDiffusionPipelineOutput)


def test_fields_and_items_are_the_same():
    output = DenoisedOutput(torch.ones(1))
    output.prev_sample = output["pred_original_sample"] = torch.zeros(1)
    assert output["prev_sample"] is output[0] is output.pred_original_sample is output.to_tuple()[1]
    assert {**output}.keys() == {"prev_sample", "pred_original_sample"}
    output.pred_original_sample = None
    assert list(output) == list(output.keys()) == ["prev_sample"]
    for change in (lambda: output.pop("prev_sample"), lambda: output.update(prev_sample=1), output.clear):
        with pytest.raises(InputTypeError, match=r"DenoisedOutput: expected output.field = value"):
            change()


def test_a_pytree_keeps_the_fields_that_are_read_by_attribute_only():
    output = StableDiffusionPipelineOutput(torch.ones(2), [False, True], seeds=[3, 4])
    leaves, spec = pytree.tree_flatten(output)
    rebuilt = pytree.tree_unflatten(leaves, spec)
    assert (rebuilt.seeds, rebuilt.scores, rebuilt[1]) == ([3, 4], None, [False, True])


def test_accelerate_moves_and_casts_outputs():
    output = CLIPVisionModelOutput(torch.ones(2, dtype=torch.bfloat16), hidden_states=(torch.ones(1).half(),))
    for changed in (convert_to_fp32(output), send_to_device(convert_to_fp32(output), "cpu")):
        assert changed.image_embeds.dtype == changed["hidden_states"][0].dtype == torch.float32
        assert changed.last_hidden_state is None
