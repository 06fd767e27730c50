"""Zero-shot classification: an image gets the class whose prompts lie nearest to it.

Legend: B images, C classes, P prompts of a class, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pipeline import ranks
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError

PROMPTS_PER_BATCH = 256


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every class name, class by class.

    Raises:
        ConfigError: a template without its `{}`, or no template at all.
    """
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        what = f"{wrong[0]!r} must hold {{}} once, where the class name goes" if wrong else "no prompt template"
        raise ConfigError(what, where="options.templates", fix="write e.g. 'a photo of a {}.'")
    return [template.replace("{}", name) for name in classes for template in templates]


def prompt_batches(tokens: Int[Tensor, "n l"]) -> Iterator[Batch]:
    """Batches of text alone for this rank, so that prompts pass through the model as samples do. Padding gives all
    ranks the same number of batches.
    """
    world = ranks.world()
    for start in range(0, len(tokens), PROMPTS_PER_BATCH * world.size):
        ids = torch.arange(start, min(start + PROMPTS_PER_BATCH * world.size, len(tokens)))
        share = -(-len(ids) // world.size)
        ids = ids[world.rank * share : (world.rank + 1) * share]
        ids = torch.cat([ids, torch.full((share - len(ids),), -1)])
        yield Batch(
            ids=ids, seeds=torch.zeros_like(ids), weight=(ids >= 0).float(), position=0, text=tokens[ids.clamp(min=0)]
        )


def class_embeddings(embedded: Float[Tensor, "n e"], num_classes: int) -> Float[Tensor, "c e"]:
    """Class embeddings from prompt embeddings: normalise, average over templates, normalise again (as open_clip)."""
    by_class = F.normalize(embedded, dim=-1).view(num_classes, -1, embedded.shape[-1])
    return F.normalize(by_class.mean(1), dim=-1)
