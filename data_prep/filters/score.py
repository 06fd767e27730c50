"""How well an image and a caption fit, by a CLIP model: any of open_clip's, or a FLIP run of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from PIL import Image

from data_prep.filters.clip_score import ClipScoreFilter
from pipeline.data.batch import RawSample
from pipeline.data.images.decode import decode
from pipeline.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

_NUM_DECODERS = 8
Scores = Callable[[Sequence[bytes], Sequence[str]], torch.Tensor]


class ClipScorer:
    """A model that scores pairs; see `ClipScoreFilter`.

    Args:
        where: the filter's key in the configuration, for messages.

    Raises:
        ConfigError: the model can't be had.
    """

    def __init__(self, options: ClipScoreFilter, *, where: str) -> None:
        wanted = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ConfigError("no GPU here", where=f"{where}.device", fix="set device: cpu, or run where there is one")
        self._device = torch.device(wanted)
        load = _open_clip if options.run is None else _flip_run
        self._scores = load(options, self._device, where)

    def scores(self, pairs: Sequence[tuple[bytes, str]]) -> list[float]:
        """Cosine similarity of each pair of encoded image and caption, in [-1, 1]."""
        if not pairs:
            return []
        images, captions = zip(*pairs, strict=True)
        with torch.inference_mode():
            return [float(score) for score in self._scores(images, captions).float().cpu()]


def _open_clip(options: ClipScoreFilter, device: torch.device, where: str) -> Scores:
    import open_clip

    assert options.model is not None
    if options.model not in open_clip.list_models() and ":" not in options.model:
        raise ConfigError(
            f"open_clip has no model {options.model!r}", where=f"{where}.model", fix="see open_clip.list_models()"
        )
    try:
        model, _, transform = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
        tokenize = open_clip.get_tokenizer(options.model)
    except (RuntimeError, OSError, ValueError) as error:
        what = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the model can't be loaded ({what})", where=where, fix="check model and pretrained"
        ) from error
    model = model.to(device).eval()

    def scores(images: Sequence[bytes], captions: Sequence[str]) -> torch.Tensor:
        pixels = torch.stack(_prepared(lambda data: transform(Image.fromarray(decode(data))), images, device)).to(
            device
        )
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokenize(list(captions)).to(device), normalize=True)
        return torch.sum(image * text, dim=-1)

    return scores


def _flip_run(options: ClipScoreFilter, device: torch.device, where: str) -> Scores:
    from pipeline.convert.weights import Weights, build
    from pipeline.run_dir import RunDir
    from pipeline.stages.flip import FlipStage
    from pipeline.train.checkpoints.restore import read_weights

    assert options.run is not None
    config = RunDir(options.run).config()
    if config is None or config.get("stage") != "flip":
        raise ConfigError(
            f"{options.run} is no run of stage flip", where=f"{where}.run", fix="name the directory of such a run"
        )
    weights = Weights(options.run, "flip", dict(config.get("options") or {}), read_weights(options.run), ())
    stage = build(weights)[0]
    assert isinstance(stage, FlipStage)
    stage = stage.to(device).eval()
    transform = stage.transform(train=False)

    def scores(images: Sequence[bytes], captions: Sequence[str]) -> torch.Tensor:
        raws = [
            RawSample(i, str(i), {"jpg": data, "txt": caption.encode()})
            for i, (data, caption) in enumerate(zip(images, captions, strict=True))
        ]
        examples = _prepared(lambda raw: transform(raw, 0), raws, device)
        pixels = torch.stack([example.image for example in examples if example.image is not None]).to(device)
        text = torch.stack([example.text for example in examples if example.text is not None]).to(device)
        return (stage.embed_images(pixels) * stage.embed_texts(text)).sum(-1)

    return scores


def _prepared(prepare: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """Each item prepared for the model. A GPU would wait for one core's decoding; on a CPU the model has the cores."""
    if device.type == "cpu":
        return [prepare(item) for item in items]
    with ThreadPoolExecutor(_NUM_DECODERS) as pool:
        return list(pool.map(prepare, items))
