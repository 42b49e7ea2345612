"""The dictionary: what each place of ours is called in the published files.

Only names that differ have a row; within a place, equal names need none.
"""

from __future__ import annotations

from collections.abc import Iterator

from .keymap import Keymap, Row, under

POSITION_IDS = "*embeddings.position_ids"  # int64 numbers from 0, once saved as a buffer
TEXT_TOWER = ("text_model.*", "text_projection.weight", "logit_scale")  # of a whole CLIP model

RESNET = [
    Row("time", "time_emb_proj"),
    Row("skip", "conv_shortcut"),
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
    Row("norm", "group_norm"),
    Row("to_q", "to_q", older=("query",)),
    Row("to_k", "to_k", older=("key",)),
    Row("to_v", "to_v", older=("value",)),
    Row("to_out", "to_out.0", older=("proj_attn",)),
]

CLIP_LAYER = [
    Row("attn", "self_attn"),
    Row("attn.norm", "layer_norm1"),
    Row("attn.to_q", "self_attn.q_proj"),
    Row("attn.to_k", "self_attn.k_proj"),
    Row("attn.to_v", "self_attn.v_proj"),
    Row("attn.to_out", "self_attn.out_proj"),
    Row("mlp", "mlp"),
    Row("mlp.norm", "layer_norm2"),
    Row("mlp.widen", "mlp.fc1"),
    Row("mlp.narrow", "mlp.fc2"),
]


def unet(levels: int, layers: int, depth: int) -> Keymap:
    """`unet/diffusion_pytorch_model.*`: `depth` transformer blocks after each of `layers` resnets a level."""

    def level(place: Row, resnets: int, transformers: int, resample: str) -> Iterator[Row]:
        yield place
        for i in range(resnets):
            yield from under(place, under(Row(f"resnets.{i}", f"resnets.{i}"), RESNET))
        for i in range(transformers):
            at = Row(f"transformers.{i}", f"attentions.{i}")
            yield from under(place, [at])
            for j in range(depth):
                block = Row(f"{at.ours}.blocks.{j}", f"{at.theirs}.transformer_blocks.{j}")
                yield from under(place, under(block, TRANSFORMER_BLOCK))
        yield from under(place, [Row("resample", f"{resample}.0")])

    def rows() -> Iterator[Row]:
        yield Row("time.linear1", "time_embedding.linear_1")
        yield Row("time.linear2", "time_embedding.linear_2")
        for i in range(levels):
            yield from level(Row(f"down.{i}", f"down_blocks.{i}"), layers, layers, "downsamplers")
            yield from level(Row(f"up.{i}", f"up_blocks.{i}"), layers + 1, layers + 1, "upsamplers")
        yield from level(Row("mid", "mid_block"), 2, 1, "samplers")
        yield Row("norm_out", "conv_norm_out")

    return Keymap(rows())


def vae(levels: int, layers: int) -> Keymap:
    """`vae/diffusion_pytorch_model.*`, with the attention's names of today and of 2022."""

    def half(place: str, path: str, blocks: str, layers: int, resample: str) -> Iterator[Row]:
        at = Row(place, place)
        yield at
        for i in range(levels):
            yield from under(at, [Row(f"{path}.{i}", f"{blocks}.{i}")])
            for j in range(layers):
                block = Row(f"{path}.{i}.resnets.{j}", f"{blocks}.{i}.resnets.{j}")
                yield from under(at, under(block, RESNET))
            yield from under(at, [Row(f"{path}.{i}.resample", f"{blocks}.{i}.{resample}.0")])
        yield from under(at, under(Row("mid.resnet1", "mid_block.resnets.0"), RESNET))
        yield from under(at, under(Row("mid.resnet2", "mid_block.resnets.1"), RESNET))
        yield from under(at, under(Row("mid.attention", "mid_block.attentions.0"), PIXEL_ATTENTION))
        yield from under(at, [Row("norm_out", "conv_norm_out")])

    def rows() -> Iterator[Row]:
        yield from half("encoder", "down", "down_blocks", layers, "downsamplers")
        yield from half("decoder", "up", "up_blocks", layers + 1, "upsamplers")

    return Keymap(rows())


def clip_tower(layers: int, *, older: tuple[str, ...] = ()) -> Iterator[Row]:
    """A vision tower and its projection."""

    def tower() -> Iterator[Row]:
        yield Row("class_token", "embeddings.class_embedding")
        yield Row("patch", "embeddings.patch_embedding")
        yield Row("positions", "embeddings.position_embedding.weight")
        yield Row("norm_in", "pre_layrnorm")
        for i in range(layers):
            yield from under(Row(f"layers.{i}", f"encoder.layers.{i}"), CLIP_LAYER)
        yield Row("norm_out", "post_layernorm")

    yield from under(Row("tower", "vision_model", older=older), tower())
    yield Row("proj", "visual_projection")


def image_encoder(layers: int) -> Keymap:
    """`image_encoder/model.*`, or the vision half of a whole CLIP model."""
    return Keymap(clip_tower(layers), droppable=(POSITION_IDS, *TEXT_TOWER))


def safety_checker(layers: int) -> Keymap:
    """`safety_checker/model.*`: the tower's prefix was doubled until transformers 5."""
    return Keymap(clip_tower(layers, older=("vision_model.vision_model",)), droppable=(POSITION_IDS,))
