"""Stages `classify` and `probe`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config import Config, validate
from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.models.feature_norm import FeatureNorm
from pipeline.stages import STAGES, stage_class
from pipeline.stages.base import DataFacts, Stage

MODEL = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
CLASSES = tuple(f"class {i}" for i in range(7))


def build(name: str, **changes: object) -> Stage:
    torch.manual_seed(0)
    cls = stage_class(name)
    options: type[Config] = cls.options_class
    return cls(validate(options, {"model": MODEL} | changes, where="test"), DataFacts(classes=CLASSES))


def batch_of(num: int = 8) -> Batch:
    images = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(num)
    return Batch(ids, ids + 50, torch.ones(num), position=0, images=images, labels=ids % 7)


def gradients(stage: Stage) -> dict[str, Tensor]:
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def test_average_pooling_norms_after_the_mean_and_drops_the_trunks_norm() -> None:
    stage = build("classify", head_init_std=0.1)
    names = set(stage.state_dict())
    assert "trunk.norm.weight" not in names
    assert {"fc_norm.weight", "head.weight"} <= names
    batch = batch_of()
    patches = stage.trunk(_pixels(batch)).patches
    torch.testing.assert_close(stage.scores(batch.images), stage.head(stage.fc_norm(patches.mean(1))))


def test_cls_pooling_keeps_the_trunks_norm() -> None:
    stage = build("classify", pooling="cls", head_init_std=0.1)
    assert "trunk.norm.weight" in stage.state_dict()
    assert "fc_norm.weight" not in stage.state_dict()
    batch = batch_of()
    torch.testing.assert_close(stage.scores(batch.images), stage.head(stage.trunk(_pixels(batch)).prefix[:, 0]))


def test_label_smoothing_is_torchs_and_only_in_the_loss() -> None:
    stage = build("classify", label_smoothing=0.1, head_init_std=0.1)
    batch = batch_of()
    scores = stage.scores(batch.images)
    smoothed = torch.nn.functional.cross_entropy(scores, batch.labels, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(stage.loss(batch).total, smoothed)
    plain = torch.nn.functional.cross_entropy(scores, batch.labels, reduction="none")
    torch.testing.assert_close(stage.predict(batch)["loss"], plain)


def test_fine_tuning_exempts_tokens_from_weight_decay_and_pretraining_does_not() -> None:
    classify = build("classify", model=MODEL | {"position": "learned"})
    mae = build("mae", decoder={"width": 16, "depth": 1, "heads": 2})
    for stage, expected in ((classify, True), (mae, False)):
        exempt = {n: stage.weight_decay_exempt(n, p) for n, p in stage.named_parameters()}
        assert exempt["trunk.cls_token"] is expected
        assert exempt["trunk.blocks.0.norm1.weight"]
        assert exempt["trunk.blocks.0.mlp.fc1.bias"]
        assert not exempt["trunk.blocks.0.mlp.fc1.weight"]
    assert classify.weight_decay_exempt("trunk.pos_embed", classify.trunk.pos_embed)
    assert not mae.weight_decay_exempt("decoder.mask_token", mae.decoder.mask_token)


def test_a_probes_heads_are_independent() -> None:
    batch = batch_of()
    three = build("probe", lr_multipliers=(0.1, 1.0, 10.0)).train()
    three.loss(batch).total.backward()
    single = build("probe", lr_multipliers=(1.0,)).train()
    single.heads[0].load_state_dict(three.heads[1].state_dict())
    single.loss(batch).total.backward()
    torch.testing.assert_close(single.heads[0].weight.grad, three.heads[1].weight.grad)
    assert [three.lr_scale(f"heads.{i}.weight") for i in range(3)] == [0.1, 1.0, 10.0]


def test_a_probe_trains_its_heads_alone_and_its_trunk_never_drops_paths() -> None:
    stage = build("probe", model=MODEL | {"drop_path": 0.9}).train()
    batch = batch_of()
    stage.loss(batch).total.backward()
    assert set(gradients(stage)) == {n for n, _ in stage.named_parameters() if stage.trainable(n)}
    assert all(name.startswith("heads.") for name in gradients(stage))
    assert not stage.trunk.training
    assert stage.feature_norm.training


def test_shuffled_labels_say_nothing_and_stay_the_same() -> None:
    stage = build("probe", shuffled_labels=True)
    ids = torch.arange(7000)
    labels = stage._shuffled(ids)
    assert torch.equal(labels[100:200], stage._shuffled(ids[100:200]))
    assert labels.bincount(minlength=7).sub(1000).abs().max() < 120
    assert abs((labels == ids % 7).float().mean().item() - 1 / 7) < 0.02
    truthful = build("probe")
    assert stage.loss(batch_of()).total != truthful.loss(batch_of()).total
    assert torch.equal(stage.predict(batch_of())["labels"], batch_of().labels), "measured against the truth"


def test_raw_pixels_as_features() -> None:
    stage = build("probe", features="pixels", pixels_side=4)
    features = stage.features(batch_of().images)
    assert features.shape == (8, 48)
    means = features.view(8, 3, -1).mean(-1)
    torch.testing.assert_close(means, _pixels(batch_of()).mean((2, 3)), atol=0.1, rtol=0)


def test_the_chosen_head_is_the_validation_sets_and_reported_on_the_others() -> None:
    stage = build("probe", lr_multipliers=(1.0, 2.0)).eval()
    labels = torch.arange(7)
    right, wrong = labels.view(-1, 1), (labels.view(-1, 1) + 1) % 7
    best = {"validation": torch.stack([wrong, right], 1), "heldout": torch.stack([right, wrong], 1)}
    batch = Batch(labels, labels, torch.ones(7), position=0, labels=labels)
    at: list[str] = []

    def sweep(name: str) -> list[Batch]:
        at.append(name)
        return [batch]

    def predict(batch: Batch) -> dict[str, Tensor]:
        return {"best": best[at[-1]], "labels": labels}

    evaluation = stage.evaluations()["probe"]
    measured = evaluation(predict, sweep, ("heldout", "validation"))
    assert measured["validation/top1"] == 1
    assert measured["heldout/top1"] == 0
    assert measured["heldout/top1_lr_x1"] == 1
    assert measured["heldout/top1_lr_x2"] == 0
    assert measured.details["chosen_head"] == "lr_x2"
    best["train"] = best["validation"]
    assert evaluation(predict, sweep, ("heldout",)).details["chosen_on"] == "train"


def test_feature_norm_is_batch_norm_without_absent_rows() -> None:
    ours, theirs = FeatureNorm(5), torch.nn.BatchNorm1d(5, affine=False, eps=1e-6, momentum=0.1)
    x = torch.randn(9, 5) * 3 + 2
    weight = torch.ones(9)
    weight[4] = 0
    there = weight > 0
    torch.testing.assert_close(ours(x, weight)[there], theirs(x[there]))
    torch.testing.assert_close(ours.running_mean, x[there].mean(0))  # the first update is a plain mean
    torch.testing.assert_close(ours.running_var, x[there].var(0))
    frozen = ours.eval()(x, weight)
    torch.testing.assert_close(frozen, (x - x[there].mean(0)) / (x[there].var(0) + 1e-6).sqrt())
    assert ours(x.bfloat16(), torch.zeros(9)).isfinite().all()


def test_feature_norm_keeps_its_averages_in_fp32() -> None:
    norm = FeatureNorm(3)
    norm(torch.randn(4, 3), torch.ones(4))
    before = norm.running_mean.clone()
    norm.bfloat16()
    assert norm.running_mean.dtype == torch.float32
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("name", ["classify", "probe"])
def test_data_without_labels_are_refused(name: str) -> None:
    cls = stage_class(name)
    with pytest.raises(ConfigError, match="needs labels"):
        cls(validate(cls.options_class, {"model": MODEL}, where="test"), DataFacts())


def test_a_misspelt_stage_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'classify'"):
        stage_class("clasify")


def test_trunks_are_equal_over_stages_for_the_same_seed() -> None:
    """So that a random trunk in a probe is the one another stage would have started from."""
    dense = {"model": MODEL | {"cls_token": False, "final_norm": False}}
    options_of: dict[str, dict[str, object]] = {
        "classify": {"pooling": "cls"},
        "flip": {"text": {"context_length": 8, "width": 16, "heads": 2, "layers": 1}},
        **dict.fromkeys(("vitdet", "segment", "sam"), dense),
    }
    trunks = {name: build(name, **options_of.get(name, {})).trunk.state_dict() for name in STAGES}
    for name, trunk in trunks.items():
        other = trunks["vitdet" if options_of.get(name) is dense else "mae"]
        assert trunk.keys() == other.keys(), name
        assert all(torch.equal(trunk[key], other[key]) for key in trunk), name


def _pixels(batch: Batch) -> Tensor:
    from pipeline.models.pixels import normalize

    return normalize(batch.images, "imagenet")
