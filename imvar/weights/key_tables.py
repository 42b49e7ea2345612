"""The tables of the four models: what their modules are called in older published files and in the original ones.

Only names that differ have a row; inside a module, equal names need none. Where a row has no `original`, the original
files use the published name. The original UNet and autoencoder are CompVis', the original image encoder OpenAI's CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

VAE_RESNET = [
    KeyRow("conv_shortcut", original="nin_shortcut"),
]

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


def unet(down: Sequence[bool], up: Sequence[bool], layers: int, depth: int) -> Keymap:
    """`unet/diffusion_pytorch_model.*`. `down` and `up` say which blocks have attention.

    Each of `layers` resnets of a block (one more in up blocks) is followed by a transformer of `depth` blocks there.
    The original numbers resnets, downsamplers and upsamplers consecutively, so a block's first number depends on the
    blocks before it.
    """
    n_blocks = len(down)

    def block(name: str, originals: Sequence[str]) -> Iterator[KeyRow]:
        for j, original in enumerate(originals):
            yield from nest(KeyRow(f"{name}.resnets.{j}", original=f"{original}.0"), UNET_RESNET)
            yield KeyRow(f"{name}.attentions.{j}", original=f"{original}.1")  # whose insides have the same names

    def rows() -> Iterator[KeyRow]:
        yield KeyRow("conv_in", original="input_blocks.0.0")
        yield KeyRow("time_embedding.linear_1", original="time_embed.0")
        yield KeyRow("time_embedding.linear_2", original="time_embed.2")
        for i in range(n_blocks):
            first, last = 1 + i * (layers + 1), (i + 1) * (layers + 1)
            yield from block(f"down_blocks.{i}", [f"input_blocks.{n}" for n in range(first, last)])
            yield KeyRow(f"down_blocks.{i}.downsamplers.0.conv", original=f"input_blocks.{last}.0.op")
        yield from nest(KeyRow("mid_block.resnets.0", original="middle_block.0"), UNET_RESNET)
        yield KeyRow("mid_block.attentions.0", original="middle_block.1")
        yield from nest(KeyRow("mid_block.resnets.1", original="middle_block.2"), UNET_RESNET)
        for i in range(n_blocks):
            first, last = i * (layers + 1), (i + 1) * (layers + 1) - 1
            yield from block(f"up_blocks.{i}", [f"output_blocks.{n}" for n in range(first, last + 1)])
            position = 2 if up[i] else 1  # behind a transformer if there is one
            yield KeyRow(f"up_blocks.{i}.upsamplers.0", original=f"output_blocks.{last}.{position}")
        yield KeyRow("conv_norm_out", original="out.0")
        yield KeyRow("conv_out", original="out.2")

    return Keymap(rows())


def vae(n_blocks: int, layers: int) -> Keymap:
    """`vae/diffusion_pytorch_model.*`, with today's names of the attention's projections and those of 2022.

    The original numbers the decoder's blocks from the finest.
    """

    def block(parent: KeyRow, layers: int, resample: KeyRow) -> Iterator[KeyRow]:
        yield parent
        for j in range(layers):
            yield from nest(parent, nest(KeyRow(f"resnets.{j}", original=f"block.{j}"), VAE_RESNET))
        yield from nest(parent, [resample])

    def half(parent: KeyRow, blocks: Iterator[KeyRow]) -> Iterator[KeyRow]:
        yield from nest(parent, blocks)
        for j in range(2):
            resnet = KeyRow(f"mid_block.resnets.{j}", original=f"mid.block_{j + 1}")
            yield from nest(parent, nest(resnet, VAE_RESNET))
        attention = KeyRow("mid_block.attentions.0", original="mid.attn_1")
        yield from nest(parent, nest(attention, PIXEL_ATTENTION))
        yield from nest(parent, [KeyRow("conv_norm_out", original="norm_out")])

    def down() -> Iterator[KeyRow]:
        for i in range(n_blocks):
            parent = KeyRow(f"down_blocks.{i}", original=f"down.{i}")
            yield from block(parent, layers, KeyRow("downsamplers.0", original="downsample"))

    def up() -> Iterator[KeyRow]:
        for i in range(n_blocks):
            parent = KeyRow(f"up_blocks.{i}", original=f"up.{n_blocks - 1 - i}")
            yield from block(parent, layers + 1, KeyRow("upsamplers.0", original="upsample"))

    def rows() -> Iterator[KeyRow]:
        yield from half(KeyRow("encoder"), down())
        yield from half(KeyRow("decoder"), up())

    return Keymap(rows(), {Dialect.ORIGINAL: VAE_TRAINING})


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
