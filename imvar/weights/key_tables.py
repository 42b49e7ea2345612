"""The dictionary: what each place of ours is called in the published files, and in the original ones.

Only names that differ have a row; within a place, equal names need none. Where a row has no
`original`, the original files use the published name. The original UNet and autoencoder are
CompVis', the original image encoder is OpenAI's CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .keymap import POINTWISE, TRANSPOSED, Dialect, Keymap, Row, Share, under

VAE_TRAINING = ("loss.*", "model_ema.decay", "model_ema.num_updates")  # in autoencoders' own original files
POSITION_IDS = "*embeddings.position_ids"  # int64 numbers from 0, once saved as a buffer
TEXT_TOWER = ("text_model.*", "text_projection.weight", "logit_scale")  # of a whole CLIP model
ORIGINAL_TEXT_TOWER = (
    "transformer.*",
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.*",
    "text_projection",
    "logit_scale",
)

UNET_RESNET = [
    Row("norm1", "norm1", original="in_layers.0"),
    Row("conv1", "conv1", original="in_layers.2"),
    Row("time", "time_emb_proj", original="emb_layers.1"),
    Row("norm2", "norm2", original="out_layers.0"),
    Row("conv2", "conv2", original="out_layers.3"),
    Row("skip", "conv_shortcut", original="skip_connection"),
]

VAE_RESNET = [
    Row("skip", "conv_shortcut", original="nin_shortcut"),
]

TRANSFORMER_BLOCK = [
    Row("self_attn", "attn1"),
    Row("self_attn.norm", "norm1"),
    Row("self_attn.to_out", "attn1.to_out.0"),
    Row("cross_attn", "attn2"),
    Row("cross_attn.norm", "norm2"),
    Row("cross_attn.to_out", "attn2.to_out.0"),
    Row("feed_forward", "ff"),
    Row("feed_forward.norm", "norm3"),
    Row("feed_forward.widen", "ff.net.0.proj"),
    Row("feed_forward.narrow", "ff.net.2"),
]

PIXEL_ATTENTION = [
    Row("norm", "group_norm", original="norm"),
    Row("to_q", "to_q", older=("query",), original="q", form=POINTWISE),
    Row("to_k", "to_k", older=("key",), original="k", form=POINTWISE),
    Row("to_v", "to_v", older=("value",), original="v", form=POINTWISE),
    Row("to_out", "to_out.0", older=("proj_attn",), original="proj_out", form=POINTWISE),
]

CLIP_LAYER = [
    Row("attn", "self_attn", original="attn"),
    Row("attn.norm", "layer_norm1", original="ln_1"),
    *(Row(f"attn.to_{x}", f"self_attn.{x}_proj") for x in "qkv"),
    *(
        Row(f"attn.to_{x}.{kind}", f"self_attn.{x}_proj.{kind}", original=f"attn.in_proj_{kind}", form=Share(i))
        for i, x in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    Row("attn.to_out", "self_attn.out_proj", original="attn.out_proj"),
    Row("mlp", "mlp"),
    Row("mlp.norm", "layer_norm2", original="ln_2"),
    Row("mlp.widen", "mlp.fc1", original="mlp.c_fc"),
    Row("mlp.narrow", "mlp.fc2", original="mlp.c_proj"),
]


def unet(down: Sequence[bool], up: Sequence[bool], layers: int, depth: int) -> Keymap:
    """`unet/diffusion_pytorch_model.*`: which levels have attention on the way `down` and `up`.

    Each of `layers` resnets of a level (one more on the way up) is followed by a transformer of `depth` blocks there.
    The original counts resnets and changes of size through, so what a level starts with depends on those before.
    """
    levels = len(down)

    def resnet(place: Row) -> Iterator[Row]:
        yield from under(place, UNET_RESNET)

    def transformer(place: Row) -> Iterator[Row]:
        yield place
        for j in range(depth):
            block = Row(f"blocks.{j}", f"transformer_blocks.{j}")
            yield from under(place, under(block, TRANSFORMER_BLOCK))

    def level(ours: str, theirs: str, originals: Sequence[str]) -> Iterator[Row]:
        yield Row(ours, theirs)
        for j, original in enumerate(originals):
            yield from resnet(Row(f"{ours}.resnets.{j}", f"{theirs}.resnets.{j}", original=f"{original}.0"))
            at = Row(f"{ours}.transformers.{j}", f"{theirs}.attentions.{j}", original=f"{original}.1")
            yield from transformer(at)

    def rows() -> Iterator[Row]:
        yield Row("conv_in", "conv_in", original="input_blocks.0.0")
        yield Row("time.linear1", "time_embedding.linear_1", original="time_embed.0")
        yield Row("time.linear2", "time_embedding.linear_2", original="time_embed.2")
        for i in range(levels):
            first, last = 1 + i * (layers + 1), (i + 1) * (layers + 1)
            yield from level(f"down.{i}", f"down_blocks.{i}", [f"input_blocks.{n}" for n in range(first, last)])
            at = Row(f"down.{i}.resample", f"down_blocks.{i}.downsamplers.0", original=f"input_blocks.{last}.0")
            yield from under(at, [Row("conv", "conv", original="op")])
        yield from resnet(Row("mid.resnets.0", "mid_block.resnets.0", original="middle_block.0"))
        yield from transformer(Row("mid.transformers.0", "mid_block.attentions.0", original="middle_block.1"))
        yield from resnet(Row("mid.resnets.1", "mid_block.resnets.1", original="middle_block.2"))
        yield Row("mid", "mid_block")
        for i in range(levels):
            first, last = i * (layers + 1), (i + 1) * (layers + 1) - 1
            yield from level(f"up.{i}", f"up_blocks.{i}", [f"output_blocks.{n}" for n in range(first, last + 1)])
            yield Row(
                f"up.{i}.resample",
                f"up_blocks.{i}.upsamplers.0",  # behind a transformer if there is one
                original=f"output_blocks.{last}.{2 if up[i] else 1}",
            )
        yield Row("norm_out", "conv_norm_out", original="out.0")
        yield Row("conv_out", "conv_out", original="out.2")

    return Keymap(rows())


def vae(levels: int, layers: int) -> Keymap:
    """`vae/diffusion_pytorch_model.*`, with the attention's names of today and of 2022.

    The original counts the levels of the decoder from the finest.
    """

    def level(place: Row, layers: int, resample: Row) -> Iterator[Row]:
        yield place
        for j in range(layers):
            yield from under(place, under(Row(f"resnets.{j}", f"resnets.{j}", original=f"block.{j}"), VAE_RESNET))
        yield from under(place, [resample])

    def half(place: Row, levels: Iterator[Row]) -> Iterator[Row]:
        yield from under(place, levels)
        yield from under(place, under(Row("mid.resnet1", "mid_block.resnets.0", original="mid.block_1"), VAE_RESNET))
        yield from under(place, under(Row("mid.resnet2", "mid_block.resnets.1", original="mid.block_2"), VAE_RESNET))
        attention = Row("mid.attention", "mid_block.attentions.0", original="mid.attn_1")
        yield from under(place, under(attention, PIXEL_ATTENTION))
        yield from under(place, [Row("norm_out", "conv_norm_out", original="norm_out")])

    def down() -> Iterator[Row]:
        for i in range(levels):
            at = Row(f"down.{i}", f"down_blocks.{i}", original=f"down.{i}")
            yield from level(at, layers, Row("resample", "downsamplers.0", original="downsample"))

    def up() -> Iterator[Row]:
        for i in range(levels):
            at = Row(f"up.{i}", f"up_blocks.{i}", original=f"up.{levels - 1 - i}")
            yield from level(at, layers + 1, Row("resample", "upsamplers.0", original="upsample"))

    def rows() -> Iterator[Row]:
        yield from half(Row("encoder", "encoder"), down())
        yield from half(Row("decoder", "decoder"), up())

    return Keymap(rows(), {Dialect.ORIGINAL: VAE_TRAINING})


def clip_tower(layers: int, *, older: tuple[str, ...] = ()) -> Iterator[Row]:
    """A vision tower and its projection."""

    def tower() -> Iterator[Row]:
        yield Row("class_token", "embeddings.class_embedding", original="class_embedding")
        yield Row("patch", "embeddings.patch_embedding", original="conv1")
        yield Row("positions", "embeddings.position_embedding.weight", original="positional_embedding")
        yield Row("norm_in", "pre_layrnorm", original="ln_pre")
        for i in range(layers):
            at = Row(f"layers.{i}", f"encoder.layers.{i}", original=f"transformer.resblocks.{i}")
            yield from under(at, CLIP_LAYER)
        yield Row("norm_out", "post_layernorm", original="ln_post")

    yield from under(Row("tower", "vision_model", older=older, original="visual"), tower())
    yield Row("proj", "visual_projection")
    yield Row("proj.weight", "visual_projection.weight", original="visual.proj", form=TRANSPOSED)


def image_encoder(layers: int) -> Keymap:
    """`image_encoder/model.*`, or the vision half of a whole CLIP model."""
    return Keymap(
        clip_tower(layers), {Dialect.PUBLISHED: (POSITION_IDS, *TEXT_TOWER), Dialect.ORIGINAL: ORIGINAL_TEXT_TOWER}
    )


def safety_checker(layers: int) -> Keymap:
    """`safety_checker/model.*`: the tower's prefix was doubled until transformers 5."""
    return Keymap(clip_tower(layers, older=("vision_model.vision_model",)), {Dialect.PUBLISHED: (POSITION_IDS,)})
