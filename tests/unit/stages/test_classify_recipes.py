"""Stage `classify`: what SimpleViT's and MAE's recipes add to it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.models.mixing import draw_mixing, mix_images, mix_labels
from pipeline.models.pixels import normalize
from pipeline.stages.base import DataFacts
from pipeline.stages.classify import ClassifyOptions, ClassifyStage

MODEL = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
CLASSES = tuple(f"class {i}" for i in range(7))


def build(**changes: object) -> ClassifyStage:
    torch.manual_seed(0)
    document = {"model": MODEL, "head_init_std": 0.1} | changes
    return ClassifyStage(validate(ClassifyOptions, document, where="test"), DataFacts(classes=CLASSES))


def batch_of(num: int = 8) -> Batch:
    images = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(num)
    return Batch(ids, ids + 50, torch.ones(num), position=0, images=images, labels=ids % 7)


def test_simple_vit_averages_after_the_norm_and_has_a_tanh_layer() -> None:
    stage = build(model=MODEL | {"cls_token": False}, pooling="avg_with_cls", pre_logits=True)
    assert isinstance(stage.fc_norm, nn.Identity)
    batch = batch_of()
    features = stage.trunk(normalize(batch.images, "imagenet")).patches.mean(1)
    expected = stage.head(torch.tanh(stage.pre_logits(features)))
    torch.testing.assert_close(stage.scores(batch.images), expected)


def test_a_head_of_zeros_gives_every_class_the_same_score_and_gradients_to_itself() -> None:
    stage = build(head_init_std=0)
    assert not stage.scores(batch_of().images).any()
    stage.loss(batch_of()).total.backward()
    assert stage.head.weight.grad.any()


def test_attention_pooling_reads_normed_tokens() -> None:
    stage, batch = build(pooling="map"), batch_of()
    tokens = stage.trunk(normalize(batch.images, "imagenet"))
    assert stage.trunk.norm is not None
    torch.testing.assert_close(stage.scores(batch.images), stage.head(stage.attn_pool(tokens)))
    assert stage.weight_decay_exempt("attn_pool.latent", stage.attn_pool.latent)
    stage.loss(batch).total.backward()
    assert [n for n, p in stage.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_mixes_images_and_labels_alike_and_smooths_on_top() -> None:
    stage, batch = build(mixup=0.8, cutmix=1.0, label_smoothing=0.1), batch_of()
    mixing = draw_mixing(batch.seeds, batch.weight, (32, 32), mixup=0.8, cutmix=1.0)
    scores = stage.scores_of_pixels(mix_images(normalize(batch.images, "imagenet"), mixing))
    target = 0.9 * mix_labels(batch.labels, mixing, 7) + 0.1 / 7
    expected = -(target * scores.log_softmax(-1)).sum()
    torch.testing.assert_close(stage.loss(batch).total, expected)
    plain = build()
    torch.testing.assert_close(stage.predict(batch)["best"], plain.predict(batch)["best"], msg="nothing is mixed here")
    with pytest.raises(ConfigError, match=r"(?s)7 samples.*even number"):
        stage.loss(batch_of(7))


def test_augmentation_is_for_training() -> None:
    stage = build(auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)
    train, plain = stage.transform(True), stage.transform(False)
    assert (train.image.policy, train.image.erase) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert not hasattr(plain.image, "policy")
    assert pickle.loads(pickle.dumps(train)) == train


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="no augmentation is called 'randaugment'"):
        build(auto_augment="randaugment")
