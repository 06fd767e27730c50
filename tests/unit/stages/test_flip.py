"""Stage `flip`: masks that can be replayed, open_clip's text tower, its measures through the evaluation."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.config import validate
from pipeline.data.batch import Batch, RawSample
from pipeline.data.images.decode import UnreadableSample
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluate.prompts import class_names, templates
from pipeline.stages.base import DataFacts
from pipeline.stages.flip import FlipOptions, FlipStage, warn_alone

OPTIONS = {
    "model": {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8},
    "text": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    "embed_dim": 16,
}
CLASSES = ("red circle", "blue square", "green star")


def build(**changes: object) -> FlipStage:
    torch.manual_seed(0)
    return FlipStage(validate(FlipOptions, OPTIONS | changes, where="test"), DataFacts(classes=CLASSES))


def batch_of(stage: FlipStage, num: int = 6) -> Batch:
    images = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    captions = [f"a photo of a {CLASSES[i % 3]} number {i}" for i in range(num)]
    ids = torch.arange(num)
    text = stage.tokenizer(captions)
    return Batch(ids, ids + 50, torch.ones(num), position=0, images=images, text=text, labels=ids % 3)


def test_embedding_a_batch_twice_uses_the_same_masks() -> None:
    stage = build(mask_ratio=0.5).train()
    batch = batch_of(stage)
    first, again = stage.embed(batch), stage.embed(batch)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    torch.testing.assert_close(first[0].norm(dim=1), torch.ones(6))
    unmasked = stage.predict(batch)["image_embedding"]
    assert not torch.allclose(first[0], unmasked, atol=1e-4)


def test_without_masking_training_sees_what_prediction_sees() -> None:
    stage = build(mask_ratio=0.0)
    batch = batch_of(stage)
    torch.testing.assert_close(stage.embed(batch)[0], stage.predict(batch)["image_embedding"])


def test_the_loss_is_open_clips_on_the_same_features() -> None:
    from open_clip.loss import ClipLoss

    stage = build()
    batch = batch_of(stage)
    images, texts = stage.embed(batch)
    losses = stage.loss(batch)
    torch.testing.assert_close(losses.total / 6, ClipLoss()(images, texts, stage.logit_scale.exp().squeeze()))
    assert losses.parts["logit_scale"].item() / 6 == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_logit_scale_is_held_below_100() -> None:
    stage = build()
    stage.logit_scale.data.fill_(10.0)
    batch = batch_of(stage)
    assert stage.loss(batch).parts["logit_scale"].item() / 6 == pytest.approx(100, rel=1e-4)
    assert stage.limits["logit_scale"] == (0.0, math.log(100))
    assert stage.logit_scale.ndim == 1


@pytest.mark.parametrize("pooling", ["cls", "avg_with_cls"])
def test_pooling(pooling: str) -> None:
    stage = build(pooling=pooling, mask_ratio=0.0)
    batch = batch_of(stage)
    tokens = stage.trunk(stage_pixels(stage, batch))
    both = torch.cat([tokens.prefix, tokens.patches], 1)
    pooled = both[:, 0] if pooling == "cls" else both.mean(1)
    expected = F.normalize(stage.image_projection(pooled), dim=-1)
    torch.testing.assert_close(stage.predict(batch)["image_embedding"], expected)


def stage_pixels(stage: FlipStage, batch: Batch) -> torch.Tensor:
    from pipeline.models.pixels import normalize

    return normalize(batch.images, stage.options.pixels)


def test_evaluation_equals_open_clips_classifier() -> None:
    from open_clip import build_zero_shot_classifier

    stage = build().eval()
    batch = batch_of(stage, 30)
    calls = []

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        calls.append(batch.images is None)
        with torch.no_grad():
            return stage.predict(batch)

    measured = stage.evaluations()["image_text"](predict, lambda name: [batch], ("heldout",))
    assert calls == [True, False], "prompts take the same way as samples, once"

    class Model:
        encode_text = staticmethod(lambda texts, normalize: stage.embed_texts(texts))

    weights = build_zero_shot_classifier(Model, stage.tokenizer, CLASSES, stage.options.templates)
    with torch.no_grad():
        predicted = (stage.embed_images(batch.images) @ weights).argmax(1)
    assert measured["heldout/zeroshot_top1"] == pytest.approx((predicted == batch.labels).float().mean().item())
    assert sum(map(sum, measured.details["heldout/zeroshot_confusion"])) == 30
    assert "heldout/retrieval_t2i_r10" in measured


def test_absent_samples_are_not_measured() -> None:
    stage = build().eval()
    batch = batch_of(stage, 6)
    ids = torch.tensor([0, 1, 2, 3, -1, 5])
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
    padded = Batch(ids, batch.seeds, weight, 0, batch.images, batch.text, batch.labels)
    with torch.no_grad():
        measured = stage.evaluations()["image_text"](stage.predict, lambda name: [padded], ("v",))
    assert sum(map(sum, measured.details["v/zeroshot_confusion"])) == 4


def test_pictures_show_captions_with_the_images_found() -> None:
    stage = build().eval()
    batch = batch_of(stage)
    with torch.no_grad():
        pictures = stage.pictures(batch, stage.predict(batch))
    assert pictures[0].title == "a photo of a red circle number 0"
    assert torch.equal(pictures[1].panels[0][1], batch.images[1])
    assert len(pictures[0].panels) == 5


def test_long_and_empty_captions_fit() -> None:
    tokenizer = build().tokenizer
    long, empty = tokenizer(["word " * 100, ""])
    assert long.shape == empty.shape == (16,)
    assert long[-1] == 49407
    assert empty.tolist()[:3] == [49406, 49407, 0]


def test_the_transform_travels_to_workers_and_checks_labels() -> None:
    transform = pickle.loads(pickle.dumps(build().transform(train=False)))
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(buffer, "PNG")
    members = {"png": buffer.getvalue(), "txt": b"a red thing", "cls": b"2"}
    example = transform(RawSample(0, "k", members), 7)
    assert example.image.shape == (3, 32, 32)
    assert example.label == 2
    assert example.text.shape == (16,)
    with pytest.raises(DataError, match="label 3, but the data name 3 classes"):
        transform(RawSample(0, "k", members | {"cls": b"3"}), 7)
    assert build().transform(train=True)(RawSample(0, "k", members), 7).label is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.95}, "keeps none"),
        ({"pooling": "cls", "model": OPTIONS["model"] | {"cls_token": False}}, "cls_token"),
        ({"text": {"width": 30, "heads": 4}}, "heads"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def sample(**members: bytes) -> RawSample:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(buffer, "PNG")
    return RawSample(0, "k", {"png": buffer.getvalue(), **members})


def test_a_pair_without_a_caption_is_absent_in_training_and_measured_without_it() -> None:
    stage = build(evaluate=["zeroshot", "retrieval"])
    for members in ({}, {"txt": b"  "}):
        with pytest.raises(UnreadableSample, match=r"caption is empty|no txt member"):
            stage.transform(train=True)(sample(**members), 0)
        example = stage.transform(train=False)(sample(**members), 0)
        assert torch.equal(example.text, stage.tokenizer([""])[0])
        assert example.label == -1
    batch = batch_of(stage.eval(), 9)
    text, labels = batch.text.clone(), batch.labels.clone()
    text[:2], labels[5] = stage.tokenizer([""])[0], -1
    some = Batch(batch.ids, batch.seeds, batch.weight, 0, batch.images, text, labels)
    with torch.no_grad():
        measured = stage.evaluations()["image_text"](stage.predict, lambda name: [some], ("v",))
    assert sum(map(sum, measured.details["v/zeroshot_confusion"])) == 8
    assert measured["v/retrieval_i2t_mean_rank"] <= 7


def test_labels_of_the_evaluation_sets_serve_where_the_training_data_have_none() -> None:
    torch.manual_seed(0)
    stage = FlipStage(validate(FlipOptions, OPTIONS, where="test"), DataFacts((), 10, {"heldout": CLASSES}))
    assert stage.transform(train=False)(sample(txt=b"a", cls=b"2"), 0).label == 2
    assert stage.evaluations()["image_text"].classes == {"heldout": CLASSES}


def test_masks_follow_their_schedule_by_samples_seen() -> None:
    stage = build(mask_ratio=[{"from_samples": 0, "ratio": 0.75}, {"from_samples": 100, "ratio": 0.0}]).train()
    seen: list[int] = []
    stage.trunk.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    batch = batch_of(stage)
    for position in (0, 99, 100):
        stage.embed(dataclasses.replace(batch, position=position))
    assert seen == [5, 5, 17]


def test_frozen_parts_are_not_trained_and_a_misspelt_one_is_refused() -> None:
    stage = build(freeze=["trunk.", "logit_scale"])
    assert not stage.trainable("trunk.cls_token")
    assert stage.trainable("image_projection.weight")
    with pytest.raises(ConfigError, match=r"begins with 'trunks'"):
        build(freeze=["trunks"])


def test_siglip_has_a_bias_that_starts_as_the_papers() -> None:
    stage = build(loss="siglip")
    assert stage.logit_bias.item() == -10
    assert stage.logit_scale.exp().item() == pytest.approx(10)
    batch = batch_of(stage)
    losses = stage.loss(batch)
    from open_clip.loss import SigLipLoss

    images, texts = stage.embed(batch)
    theirs = SigLipLoss()(images, texts, stage.logit_scale.exp(), stage.logit_bias)
    torch.testing.assert_close(losses.total / 6, theirs)
    assert losses.parts["logit_bias"].item() / 6 == pytest.approx(-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.99}, "keeps none of 16 patches"),
        ({"mask_ratio": [{"from_samples": 5, "ratio": 0.5}]}, "must begin with from_samples 0"),
        ({"class_names": ["one", "two"]}, "2 names for the data's 3 classes"),
        ({"class_names": "nowhere.txt"}, "no such file"),
        ({"templates": "imagenets"}, "no list of templates"),
        ({"projection": False}, "must be the trunk's width"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build(**changes).evaluations()
    assert "Fix:" in str(refused.value)


def test_open_clips_templates_and_class_names_are_there_by_name() -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    assert len(templates("openai_imagenet")) == 80
    assert [t.replace("{}", "cat") for t in templates("openai_imagenet")] == [
        t("cat") for t in OPENAI_IMAGENET_TEMPLATES
    ]
    assert class_names("imagenet", ["x"] * 1000) == tuple(IMAGENET_CLASSNAMES)


def test_neighbours_and_a_linear_probe_are_measured_when_asked_for() -> None:
    """Images of three plain colours: both must name them."""
    stage = build(evaluate=["knn", "linear_probe"]).eval()
    assert set(stage.evaluations()) == {"knn", "linear_probe"}
    batch = batch_of(stage, 30)
    colours = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250]], dtype=torch.uint8)
    images = colours[batch.labels].view(30, 3, 1, 1).expand(-1, -1, 32, 32)
    plain = dataclasses.replace(batch, images=images.contiguous())
    figures: dict[str, float] = {}
    with torch.no_grad():
        for evaluation in stage.evaluations().values():
            figures |= evaluation(stage.predict, lambda name: [plain], ("heldout",))
    assert figures["heldout/knn_top1"] == figures["heldout/linear_probe_top1"] == 1


def test_a_batch_of_one_pair_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_alone.cache_clear()
    stage = build()
    assert stage.loss(batch_of(stage, 1)).total.isfinite()
    assert "no negatives" in caplog.text


def test_weights_with_other_tokens_are_refused() -> None:
    from pipeline.convert.loading import check_same_text

    with pytest.raises(CheckpointError, match="vocab_size 4096 there and None here"):
        check_same_text({"width": 32}, {"width": 32, "vocab_size": 4096}, where="a run")
