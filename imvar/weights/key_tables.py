"""The dictionary: what each place of ours is called in the published files, and in the original ones.

Only names that differ have a row; within a place, equal names need none. Where a row has no
`original`, the original files use the published name. The original UNet and autoencoder are
CompVis', the original image encoder is OpenAI's CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .keymap import POINTWISE, TRANSPOSED, Chunk, Dialect, Keymap, KeyRow, nest

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
    KeyRow("norm1", "norm1", original="in_layers.0"),
    KeyRow("conv1", "conv1", original="in_layers.2"),
    KeyRow("time", "time_emb_proj", original="emb_layers.1"),
    KeyRow("norm2", "norm2", original="out_layers.0"),
    KeyRow("conv2", "conv2", original="out_layers.3"),
    KeyRow("skip", "conv_shortcut", original="skip_connection"),
]

VAE_RESNET = [
    KeyRow("skip", "conv_shortcut", original="nin_shortcut"),
]

TRANSFORMER_BLOCK = [
    KeyRow("self_attn", "attn1"),
    KeyRow("self_attn.norm", "norm1"),
    KeyRow("self_attn.to_out", "attn1.to_out.0"),
    KeyRow("cross_attn", "attn2"),
    KeyRow("cross_attn.norm", "norm2"),
    KeyRow("cross_attn.to_out", "attn2.to_out.0"),
    KeyRow("feed_forward", "ff"),
    KeyRow("feed_forward.norm", "norm3"),
    KeyRow("feed_forward.widen", "ff.net.0.proj"),
    KeyRow("feed_forward.narrow", "ff.net.2"),
]

PIXEL_ATTENTION = [
    KeyRow("norm", "group_norm", original="norm"),
    KeyRow("to_q", "to_q", older=("query",), original="q", form=POINTWISE),
    KeyRow("to_k", "to_k", older=("key",), original="k", form=POINTWISE),
    KeyRow("to_v", "to_v", older=("value",), original="v", form=POINTWISE),
    KeyRow("to_out", "to_out.0", older=("proj_attn",), original="proj_out", form=POINTWISE),
]

CLIP_LAYER = [
    KeyRow("attn", "self_attn", original="attn"),
    KeyRow("attn.norm", "layer_norm1", original="ln_1"),
    *(KeyRow(f"attn.to_{x}", f"self_attn.{x}_proj") for x in "qkv"),
    *(
        KeyRow(f"attn.to_{x}.{kind}", f"self_attn.{x}_proj.{kind}", original=f"attn.in_proj_{kind}", form=Chunk(i))
        for i, x in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    KeyRow("attn.to_out", "self_attn.out_proj", original="attn.out_proj"),
    KeyRow("mlp", "mlp"),
    KeyRow("mlp.norm", "layer_norm2", original="ln_2"),
    KeyRow("mlp.widen", "mlp.fc1", original="mlp.c_fc"),
    KeyRow("mlp.narrow", "mlp.fc2", original="mlp.c_proj"),
]


def unet(down: Sequence[bool], up: Sequence[bool], layers: int, depth: int) -> Keymap:
    """`unet/diffusion_pytorch_model.*`: which levels have attention on the way `down` and `up`.

    Each of `layers` resnets of a level (one more on the way up) is followed by a transformer of `depth` blocks there.
    The original counts resnets and changes of size through, so what a level starts with depends on those before.
    """
    levels = len(down)

    def resnet(place: KeyRow) -> Iterator[KeyRow]:
        yield from nest(place, UNET_RESNET)

    def transformer(place: KeyRow) -> Iterator[KeyRow]:
        yield place
        for j in range(depth):
            block = KeyRow(f"blocks.{j}", f"transformer_blocks.{j}")
            yield from nest(place, nest(block, TRANSFORMER_BLOCK))

    def level(ours: str, theirs: str, originals: Sequence[str]) -> Iterator[KeyRow]:
        yield KeyRow(ours, theirs)
        for j, original in enumerate(originals):
            yield from resnet(KeyRow(f"{ours}.resnets.{j}", f"{theirs}.resnets.{j}", original=f"{original}.0"))
            at = KeyRow(f"{ours}.transformers.{j}", f"{theirs}.attentions.{j}", original=f"{original}.1")
            yield from transformer(at)

    def rows() -> Iterator[KeyRow]:
        yield KeyRow("conv_in", "conv_in", original="input_blocks.0.0")
        yield KeyRow("time.linear1", "time_embedding.linear_1", original="time_embed.0")
        yield KeyRow("time.linear2", "time_embedding.linear_2", original="time_embed.2")
        for i in range(levels):
            first, last = 1 + i * (layers + 1), (i + 1) * (layers + 1)
            yield from level(f"down.{i}", f"down_blocks.{i}", [f"input_blocks.{n}" for n in range(first, last)])
            at = KeyRow(f"down.{i}.resample", f"down_blocks.{i}.downsamplers.0", original=f"input_blocks.{last}.0")
            yield from nest(at, [KeyRow("conv", "conv", original="op")])
        yield from resnet(KeyRow("mid.resnets.0", "mid_block.resnets.0", original="middle_block.0"))
        yield from transformer(KeyRow("mid.transformers.0", "mid_block.attentions.0", original="middle_block.1"))
        yield from resnet(KeyRow("mid.resnets.1", "mid_block.resnets.1", original="middle_block.2"))
        yield KeyRow("mid", "mid_block")
        for i in range(levels):
            first, last = i * (layers + 1), (i + 1) * (layers + 1) - 1
            yield from level(f"up.{i}", f"up_blocks.{i}", [f"output_blocks.{n}" for n in range(first, last + 1)])
            yield KeyRow(
                f"up.{i}.resample",
                f"up_blocks.{i}.upsamplers.0",  # behind a transformer if there is one
                original=f"output_blocks.{last}.{2 if up[i] else 1}",
            )
        yield KeyRow("norm_out", "conv_norm_out", original="out.0")
        yield KeyRow("conv_out", "conv_out", original="out.2")

    return Keymap(rows())


def vae(levels: int, layers: int) -> Keymap:
    """`vae/diffusion_pytorch_model.*`, with the attention's names of today and of 2022.

    The original counts the levels of the decoder from the finest.
    """

    def level(place: KeyRow, layers: int, resample: KeyRow) -> Iterator[KeyRow]:
        yield place
        for j in range(layers):
            yield from nest(place, nest(KeyRow(f"resnets.{j}", f"resnets.{j}", original=f"block.{j}"), VAE_RESNET))
        yield from nest(place, [resample])

    def half(place: KeyRow, levels: Iterator[KeyRow]) -> Iterator[KeyRow]:
        yield from nest(place, levels)
        yield from nest(place, nest(KeyRow("mid.resnet1", "mid_block.resnets.0", original="mid.block_1"), VAE_RESNET))
        yield from nest(place, nest(KeyRow("mid.resnet2", "mid_block.resnets.1", original="mid.block_2"), VAE_RESNET))
        attention = KeyRow("mid.attention", "mid_block.attentions.0", original="mid.attn_1")
        yield from nest(place, nest(attention, PIXEL_ATTENTION))
        yield from nest(place, [KeyRow("norm_out", "conv_norm_out", original="norm_out")])

    def down() -> Iterator[KeyRow]:
        for i in range(levels):
            at = KeyRow(f"down.{i}", f"down_blocks.{i}", original=f"down.{i}")
            yield from level(at, layers, KeyRow("resample", "downsamplers.0", original="downsample"))

    def up() -> Iterator[KeyRow]:
        for i in range(levels):
            at = KeyRow(f"up.{i}", f"up_blocks.{i}", original=f"up.{levels - 1 - i}")
            yield from level(at, layers + 1, KeyRow("resample", "upsamplers.0", original="upsample"))

    def rows() -> Iterator[KeyRow]:
        yield from half(KeyRow("encoder", "encoder"), down())
        yield from half(KeyRow("decoder", "decoder"), up())

    return Keymap(rows(), {Dialect.ORIGINAL: VAE_TRAINING})


def clip_tower(layers: int, *, older: tuple[str, ...] = ()) -> Iterator[KeyRow]:
    """A vision tower and its projection."""

    def tower() -> Iterator[KeyRow]:
        yield KeyRow("class_token", "embeddings.class_embedding", original="class_embedding")
        yield KeyRow("patch", "embeddings.patch_embedding", original="conv1")
        yield KeyRow("positions", "embeddings.position_embedding.weight", original="positional_embedding")
        yield KeyRow("norm_in", "pre_layrnorm", original="ln_pre")
        for i in range(layers):
            at = KeyRow(f"layers.{i}", f"encoder.layers.{i}", original=f"transformer.resblocks.{i}")
            yield from nest(at, CLIP_LAYER)
        yield KeyRow("norm_out", "post_layernorm", original="ln_post")

    yield from nest(KeyRow("tower", "vision_model", older=older, original="visual"), tower())
    yield KeyRow("proj", "visual_projection")
    yield KeyRow("proj.weight", "visual_projection.weight", original="visual.proj", form=TRANSPOSED)


def image_encoder(layers: int) -> Keymap:
    """`image_encoder/model.*`, or the vision half of a whole CLIP model."""
    return Keymap(
        clip_tower(layers), {Dialect.PUBLISHED: (POSITION_IDS, *TEXT_TOWER), Dialect.ORIGINAL: ORIGINAL_TEXT_TOWER}
    )


def safety_checker(layers: int) -> Keymap:
    """`safety_checker/model.*`: the tower's prefix was doubled until transformers 5."""
    return Keymap(clip_tower(layers, older=("vision_model.vision_model",)), {Dialect.PUBLISHED: (POSITION_IDS,)})
