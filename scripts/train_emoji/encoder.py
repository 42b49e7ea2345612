"""The image encoder: a small vision transformer, distilled from a convolutional network.

At 64 pixels and a few thousand drawings a convolutional network learns to classify much sooner than a transformer. So
it is trained first, and the transformer is trained to predict its embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imvar import CLIPImageProcessor, CLIPVisionModelWithProjection
from train_emoji.catalogue import codes
from train_emoji.classifiers import Pairs, info_nce
from train_emoji.drawings import Drawings
from train_emoji.loop import Job, use_unfused_attention_on_cpu
from train_emoji.networks import Classifier, top
from train_emoji.views import view

WIDTH = 128
LENGTH = math.sqrt(WIDTH)  # norm of an embedding, so that its elements, inputs of the UNet, are about 1
SETTINGS = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
EXTRACTOR = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}


def pixels(rgb: Tensor) -> Tensor:
    """Normalise RGB in [0, 1] of the right size as CLIPImageProcessor does."""
    processor = CLIPImageProcessor(**EXTRACTOR)
    mean, deviation = (rgb.new_tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    return (rgb - mean) / deviation


def job(
    name: str,
    model: nn.Module,
    embed: Callable[[nn.Module, Tensor], Tensor],
    drawings: Drawings,
    teacher: Classifier,
    preferred: list[str],
    check: Drawings,
    device: torch.device,
    *,
    share: float = 0.6,
    batch: int = 128,
) -> Job:
    """Distil the teacher's embedding of each drawing into `embed(model, pixels)` of any view of it.

    The `preferred` characters are sampled with probability `share`; `check` are drawings of these to evaluate on.
    """
    use_unfused_attention_on_cpu(model, device)
    classes, teacher = codes(preferred), teacher.to(device).eval()
    pairs = Pairs(drawings, teacher.names, classes, share, device)
    table, among = teacher.table().detach(), teacher.table(classes).detach()
    rgb, labels = check.rgb().to(device), torch.tensor([classes.index(point) for point in check.codes], device=device)
    with torch.no_grad():
        targets = torch.cat([teacher.embedding(chunk) for chunk in drawings.rgb().to(device).split(256)])

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        concept, first, second = pairs.draw(batch // 2, generator)
        both = torch.cat([first, second])
        embedding = embed(model, pixels(view(pairs.images[both], generator))).float() / LENGTH
        length = embedding.norm(dim=-1)
        embedding = F.normalize(embedding, dim=-1)
        cosine = (embedding * targets[both]).sum(-1).mean()
        classification = F.cross_entropy(embedding @ table.T * teacher.scale, concept.repeat(2), label_smoothing=0.1)
        total = 4 * (1 - cosine) + 0.5 * classification + 0.5 * info_nce(*embedding.chunk(2), concept)
        return total + 0.1 * ((length - 1) ** 2).mean(), {"cosine": cosine.detach()}

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = F.normalize(embed(model, pixels(rgb)).float(), dim=-1) @ among.T
        return {"top-1": top(scores, labels, 1), "top-5": top(scores, labels, 5)}

    return Job(
        name,
        model,
        loss,
        batch,
        rate=1e-3,
        decay=0.05,
        average=0.998,
        evaluate=evaluate,
        evaluate_every=120,
        compiled=(model.vision_model,),
    )  # type: ignore[arg-type]


@torch.no_grad()
def normalize(model: CLIPVisionModelWithProjection, rgb: Tensor) -> None:
    """Scale the projection, in place, so that embeddings have a mean norm of sqrt(128)."""
    length = torch.cat([model(pixels(chunk)).image_embeds.norm(dim=-1) for chunk in rgb.split(256)]).mean()
    model.visual_projection.weight *= LENGTH / length


def image_embeds(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixels).image_embeds
