"""The tables of the four models: what their modules are called in older published files and in the original ones.

Only names that differ have a row; inside a module, equal names need none. Where a row has no `original`, the original
files use the published name. The original UNet and autoencoder are CompVis', the original image encoder OpenAI's CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from .keymap import POINTWISE, TRANSPOSED, Chunk, Dialect, Keymap, KeyRow, nest

VAE_TRAINING = ("loss.*", "model_ema.decay", "model_ema.num_updates")  # in autoencoders' own original files
POSITION_IDS = "*embeddings.position_ids"  # integers from 0, which were once saved as a buffer
TEXT_MODEL = ("text_model.*", "text_projection.weight", "logit_scale")  # of a whole CLIP model
ORIGINAL_TEXT_MODEL = (
    "transformer.*",
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.*",
    "text_projection",
    "logit_scale",
)

UNET_RESNET = [
    KeyRow("norm1", original="in_layers.0"),
    KeyRow("conv1", original="in_layers.2"),
    KeyRow("time_emb_proj", original="emb_layers.1"),
    KeyRow("norm2", original="out_layers.0"),
    KeyRow("conv2", original="out_layers.3"),
    KeyRow("conv_shortcut", original="skip_connection"),
]

VAE_RESNET = [KeyRow("conv_shortcut", original="nin_shortcut")]

PIXEL_ATTENTION = [
    KeyRow("group_norm", original="norm"),
    KeyRow("to_q", older=("query",), original="q", transform=POINTWISE),
    KeyRow("to_k", older=("key",), original="k", transform=POINTWISE),
    KeyRow("to_v", older=("value",), original="v", transform=POINTWISE),
    KeyRow("to_out.0", older=("proj_attn",), original="proj_out", transform=POINTWISE),
]

CLIP_LAYER = [
    KeyRow("self_attn", original="attn"),
    KeyRow("layer_norm1", original="ln_1"),
    *(
        KeyRow(f"self_attn.{x}_proj.{kind}", original=f"attn.in_proj_{kind}", transform=Chunk(i))
        for i, x in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    KeyRow("self_attn.out_proj", original="attn.out_proj"),
    KeyRow("layer_norm2", original="ln_2"),
    KeyRow("mlp.fc1", original="mlp.c_fc"),
    KeyRow("mlp.fc2", original="mlp.c_proj"),
]


def unet(up: Sequence[bool], layers: int) -> Keymap:
    """`unet/diffusion_pytorch_model.*`. `up`: for each up block, whether it has attention.

    Each of `layers` resnets of a block (one more in up blocks) may be followed by a transformer. The original numbers
    resnets, downsamplers and upsamplers consecutively, so a block's first number depends on the blocks before it.
    """

    def block(name: str, original: str, numbers: range) -> Iterator[KeyRow]:
        for j, n in enumerate(numbers):
            yield from nest(KeyRow(f"{name}.resnets.{j}", original=f"{original}.{n}.0"), UNET_RESNET)
            yield KeyRow(f"{name}.attentions.{j}", original=f"{original}.{n}.1")  # whose insides have the same names

    def rows() -> Iterator[KeyRow]:
        yield KeyRow("conv_in", original="input_blocks.0.0")
        yield KeyRow("time_embedding.linear_1", original="time_embed.0")
        yield KeyRow("time_embedding.linear_2", original="time_embed.2")
        for i, has_attention in enumerate(up):
            first, last = i * (layers + 1), (i + 1) * (layers + 1)
            yield from block(f"down_blocks.{i}", "input_blocks", range(first + 1, last))
            yield KeyRow(f"down_blocks.{i}.downsamplers.0.conv", original=f"input_blocks.{last}.0.op")
            yield from block(f"up_blocks.{i}", "output_blocks", range(first, last))
            position = 2 if has_attention else 1  # behind a transformer if there is one
            yield KeyRow(f"up_blocks.{i}.upsamplers.0", original=f"output_blocks.{last - 1}.{position}")
        yield from nest(KeyRow("mid_block.resnets.0", original="middle_block.0"), UNET_RESNET)
        yield KeyRow("mid_block.attentions.0", original="middle_block.1")
        yield from nest(KeyRow("mid_block.resnets.1", original="middle_block.2"), UNET_RESNET)
        yield KeyRow("conv_norm_out", original="out.0")
        yield KeyRow("conv_out", original="out.2")

    return Keymap(rows())


def vae(n_blocks: int, layers: int) -> Keymap:
    """`vae/diffusion_pytorch_model.*`, with today's names of the attention's projections and those of 2022.

    The original numbers the decoder's blocks from the finest.
    """

    def half(name: str, kind: str, layers: int) -> Iterator[KeyRow]:
        for i in range(n_blocks):
            place = i if kind == "down" else n_blocks - 1 - i
            block = KeyRow(f"{name}.{kind}_blocks.{i}", original=f"{name}.{kind}.{place}")
            yield from nest(block, [KeyRow(f"{kind}samplers.0", original=f"{kind}sample")])
            for j in range(layers):
                yield from nest(block, nest(KeyRow(f"resnets.{j}", original=f"block.{j}"), VAE_RESNET))
        for j in range(2):
            yield from nest(KeyRow(f"{name}.mid_block.resnets.{j}", original=f"{name}.mid.block_{j + 1}"), VAE_RESNET)
        yield from nest(KeyRow(f"{name}.mid_block.attentions.0", original=f"{name}.mid.attn_1"), PIXEL_ATTENTION)
        yield KeyRow(f"{name}.conv_norm_out", original=f"{name}.norm_out")

    rows = chain(half("encoder", "down", layers), half("decoder", "up", layers + 1))
    return Keymap(rows, {Dialect.ORIGINAL: VAE_TRAINING})


def clip_vision(layers: int, *, older: tuple[str, ...] = ()) -> Iterator[KeyRow]:
    """A CLIP vision model and its projection. `older`: prefixes that the vision model once had."""

    def vision_model() -> Iterator[KeyRow]:
        yield KeyRow("embeddings.class_embedding", original="class_embedding")
        yield KeyRow("embeddings.patch_embedding", original="conv1")
        yield KeyRow("embeddings.position_embedding.weight", original="positional_embedding")
        yield KeyRow("pre_layrnorm", original="ln_pre")
        for i in range(layers):
            yield from nest(KeyRow(f"encoder.layers.{i}", original=f"transformer.resblocks.{i}"), CLIP_LAYER)
        yield KeyRow("post_layernorm", original="ln_post")

    yield from nest(KeyRow("vision_model", older=older, original="visual"), vision_model())
    yield KeyRow("visual_projection.weight", original="visual.proj", transform=TRANSPOSED)


def image_encoder(layers: int) -> Keymap:
    """`image_encoder/model.*`, or the vision half of a whole CLIP model."""
    droppable = {Dialect.PUBLISHED: (POSITION_IDS, *TEXT_MODEL), Dialect.ORIGINAL: ORIGINAL_TEXT_MODEL}
    return Keymap(clip_vision(layers), droppable)


def safety_checker(layers: int) -> Keymap:
    """`safety_checker/model.*`: the vision model's prefix was doubled until transformers 5."""
    rows = clip_vision(layers, older=("vision_model.vision_model",))
    return Keymap(rows, {Dialect.PUBLISHED: (POSITION_IDS,)})
