"""Stage `sam`: its loop, its gradients, and what it is measured by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.evaluate.click_trials import click_trials
from pipeline.models.sam.predictor import EmbeddedImages
from pipeline.models.sam.prompts import ABSENT, Prompts
from pipeline.stages.dense import instances_of
from pipeline.stages.sam import SamStage
from tests.support.sam_batches import SIDE, batch, objects, tiny_stage

THREE = (objects((2, 3, 12, 14), (15, 1, 30, 20)), objects(), objects((0, 0, 9, 30)))


def gradients(stage: SamStage, some_batch: object) -> dict[str, Tensor | None]:
    stage.zero_grad()
    stage.loss(some_batch).total.backward()  # type: ignore[arg-type]
    return {name: parameter.grad for name, parameter in stage.named_parameters()}


def test_the_loop_asks_eleven_times_and_brings_eight_new_points(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tiny_stage()
    asked: list[Prompts] = []
    ask = SamStage.round

    def watched(self: SamStage, embedded: object, prompts: Prompts, *rest: object, **how: object) -> object:
        asked.append(prompts)
        return ask(self, embedded, prompts, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(SamStage, "round", watched)
    stage.loss(batch(*THREE))
    assert len(asked) == 11
    assert asked[0].masks is None
    assert all(prompts.masks is not None for prompts in asked[1:])
    points = torch.stack([(prompts.labels > ABSENT).sum(1) for prompts in asked])
    assert (points[0] == 2).all(), "a point and its companion, or a box's corners"
    assert (points[-1] == 2 + 8).all()
    new = points.diff(dim=0)
    assert (new.sum(0) == 8).all()
    assert (new[-1] == 0).all(), "the last round brings none"
    assert (new[:-1] == 0).sum(0).tolist() == [1, 1, 1], "and one other doesn't"


def test_every_parameter_gets_a_gradient_even_where_no_image_has_an_object() -> None:
    """Ranks would wait for one another for ever otherwise."""
    stage = tiny_stage()
    for some_batch in (batch(*THREE), batch(objects(), objects((3, 3, 9, 9), crowd=1))):
        assert [name for name, gradient in gradients(stage, some_batch).items() if gradient is None] == []
    assert all(not gradient.any() for gradient in gradients(stage, batch(objects())).values() if gradient is not None)


@pytest.mark.parametrize("point_share", [0.0, 1.0])
def test_only_the_best_masks_path_gets_the_gradient_of_the_mask_loss(point_share: float) -> None:
    """Of the first round's three masks one is trained for one object; IoU's own loss is off here."""
    stage = tiny_stage(point_share=point_share, iou_weight=0.0)
    by_name = gradients(stage, batch(objects((2, 3, 12, 14))))
    tokens = by_name["mask_decoder.mask_tokens.weight"]
    assert tokens is not None
    trained = [
        number
        for number in range(4)
        if any(
            gradient is not None and gradient.any()
            for name, gradient in by_name.items()
            if f"hypernetworks_mlps.{number}." in name
        )
    ]
    assert len([number for number in trained if number > 0]) == 1
    assert 0 in trained, "the mask for several prompts answers the later rounds"


def test_the_loss_of_a_batch_is_the_sum_of_its_images_losses() -> None:
    stage = tiny_stage().double()
    together = stage.loss(batch(*THREE))
    alone = [stage.loss(batch(*THREE).at(slice(i, i + 1))) for i in range(3)]
    assert together.total.item() == pytest.approx(sum(losses.total.item() for losses in alone), rel=1e-6)
    for name, value in together.parts.items():
        assert value.item() == pytest.approx(sum(losses.parts[name].item() for losses in alone), rel=1e-5, abs=1e-7)


def test_an_absent_image_counts_for_nothing() -> None:
    stage = tiny_stage()
    absent = batch(*THREE, weight=torch.tensor([1.0, 1.0, 0.0]))
    assert stage.loss(absent).total.item() == pytest.approx(stage.loss(batch(*THREE[:2])).total.item(), rel=1e-5)


def test_padding_counts_for_nothing() -> None:
    """Neither its pixels nor what the model says about them."""
    stage = tiny_stage()
    wide = objects((2, 3, 12, 14), size=(16, 32))
    mask = dict(objects((2, 3, 12, 14)).masks[0])
    some_batch = batch(wide._replace(masks=(mask,)))
    before = stage.loss(some_batch).total.item()
    assert some_batch.images is not None
    some_batch.images[:, :, 16:] = 255
    assert stage.loss(some_batch).total.item() == before


def test_too_many_objects_are_drawn_from_and_too_small_and_too_large_ones_left_out() -> None:
    stage = tiny_stage(max_objects=2, min_area=12, max_area=0.5)
    many = objects((0, 0, 32, 31), (0, 20, 11, 21), *((x, 2, x + 5, 9) for x in range(0, 25, 5)))
    chosen = stage.objects(batch(many))
    assert len(chosen.image) == 2
    assert (chosen.masks.flatten(1).sum(1) == 35).all()
    assert chosen.weight.tolist() == [0.5, 0.5]
    others = {tuple(stage.objects(batch(objects(), many)).boxes[:, 0].tolist()), tuple(chosen.boxes[:, 0].tolist())}
    assert len(others) == 2, "another seed, another choice"


@pytest.mark.parametrize("freeze", [["trunk"], ["trunk", "neck", "prompt_encoder"]])
def test_frozen_parts_get_no_gradient(freeze: list[str]) -> None:
    stage = tiny_stage(freeze=freeze)
    for name, gradient in gradients(stage, batch(*THREE)).items():
        assert (gradient is None) == (name.split(".")[0] in freeze), name
        assert stage.trainable(name) == (name.split(".")[0] not in freeze)


def test_recomputing_activations_changes_no_gradient() -> None:
    from tests.support.sam_batches import MODEL

    plain = gradients(tiny_stage(), batch(*THREE))
    again = gradients(tiny_stage(model={**MODEL, "activation_checkpointing": True}), batch(*THREE))
    for name, gradient in plain.items():
        assert gradient is not None
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_predictions_measure_every_object_of_the_stored_image() -> None:
    stage = tiny_stage(max_objects=1, evaluate_objects=4).eval()
    predictions = stage.predict(batch(*THREE, objects((2, 3, 12, 14), (3, 3, 9, 9), crowd=1)))
    assert (~predictions["area"].isnan()).sum(1).tolist() == [2, 0, 1, 1]
    assert predictions["area"][0, :2].tolist() == [110, 285]
    assert torch.equal(predictions["clicks"].isnan().any(2), predictions["area"].isnan())
    annotated = ~predictions["area"].isnan()
    assert (predictions["oracle"][annotated] >= predictions["clicks"][annotated][:, 0]).all()
    x, y, label = predictions["places"][2, 0].tolist()
    assert label == 1
    assert x < 9
    assert y < 30
    assert len(stage.pictures(batch(*THREE), {k: v[:3] for k, v in predictions.items()})) == 2


def test_objects_asked_about_in_several_calls_fare_as_in_one() -> None:
    stage = tiny_stage().eval()
    some_batch = batch(*THREE)
    embedded, instances = stage.embed(some_batch), instances_of(some_batch)
    whole, parts = (click_trials(stage.model, embedded, instances, most=4, at_once=n) for n in (64, 1))
    torch.testing.assert_close(parts, whole, equal_nan=True)
    assert int((~whole["area"].isnan()).sum()) == 3


def test_objects_that_an_evaluation_passes_over_are_counted() -> None:
    stage = tiny_stage(evaluate_objects=1).eval()
    (evaluation,) = stage.evaluations().values()
    measured = evaluation(stage.predict, lambda name: [batch(*THREE)], ("seen",))
    assert (measured["seen/num_objects"], measured["seen/objects_left_out"]) == (2, 1)
    every = tiny_stage().eval()
    measured = evaluation(every.predict, lambda name: [batch(*THREE)], ("seen",))
    assert measured["seen/num_objects"] == 3
    assert "seen/objects_left_out" not in measured


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clicks": 0, "repeats": 0}, "at least 1"),
        ({"freeze": ["trunk", "neck", "prompt_encoder", "mask_decoder"]}, "nothing to train"),
        ({"jitter": [2.0, 0.1]}, "low <= high"),
        ({"sam": {"channels": 20}}, "multiple of 8"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_stage(**options)


def test_the_image_a_click_is_about_may_be_larger_than_the_input() -> None:
    stage = tiny_stage().eval()
    large = objects((10, 20, 60, 90), size=(100, 80))
    predictions = stage.predict(batch(large))
    assert predictions["area"][0, 0] == 3500
    assert (predictions["places"][0, 0, :2] <= SIDE).all()


@pytest.mark.parametrize("source", ["mae", "flip", "classify", "vitdet"])
def test_any_stages_trunk_may_start_it(source: str) -> None:
    """Of another image and patch size, with a cls token or without, before relative positions or after."""
    from pipeline.config import validate
    from pipeline.convert.loading import load_initial
    from pipeline.stages import stage_class
    from pipeline.stages.base import DataFacts
    from tests.support.sam_batches import MODEL

    plain = {"width": 32, "depth": 2, "heads": 2, "image_size": 24, "patch_size": 4, "position_trained": True}
    options: dict[str, dict[str, object]] = {
        "mae": {"model": plain, "decoder": {"width": 16, "depth": 1, "heads": 2}},
        "flip": {"model": plain, "text": {"context_length": 8, "width": 16, "heads": 2, "layers": 1}, "embed_dim": 16},
        "classify": {"model": plain},
        "vitdet": {"model": MODEL, "detector": {"pyramid_channels": 16, "box_width": 16}},
    }
    cls = stage_class(source)
    torch.manual_seed(1)
    giver = cls(validate(cls.options_class, options[source], where="test"), DataFacts(("a", "b")))
    with torch.no_grad():
        for parameter in giver.trunk.parameters():
            parameter.add_(0.1)
    stage = tiny_stage()
    report = load_initial(stage, dict(giver.state_dict()), ("trunk.",), where="there")
    assert torch.equal(stage.trunk.blocks[1].mlp.fc1.weight, giver.trunk.blocks[1].mlp.fc1.weight)
    new = {name for name in report.new if name.startswith("trunk.")}
    assert all(".rel_pos_" in name for name in new)
    assert bool(new) == (source != "vitdet")
    resized = set() if source == "vitdet" else {"trunk.patch_embed.proj.weight", "trunk.pos_embed"}
    assert set(report.resized) == resized
    assert not torch.equal(stage.trunk.pos_embed, tiny_stage().trunk.pos_embed)


def test_masks_of_everything_are_measured_where_they_are_asked_for() -> None:
    """The figure is COCO's recall of what `automatic_masks` finds, padding and crowds apart."""
    from pipeline.evaluate.coco import Truth, annotations_of, proposal_recalls
    from pipeline.models.sam.automatic import automatic_masks

    settings = {"points_per_side": 4, "min_iou": 0.0, "min_stability": 0.0}
    stage = tiny_stage(evaluate=["clicks", "automatic"], automatic=settings).eval()
    with torch.no_grad():
        stage.mask_decoder.iou_prediction_head.layers[2].bias.fill_(0.5)
    some_batch = batch(*THREE, weight=torch.tensor([1.0, 1.0, 0.0]))
    (evaluation,) = stage.evaluations().values()
    measured = evaluation(stage.predict, lambda name: [some_batch], ("seen",))
    assert measured["seen/num_objects"] == 2
    truth, masks = {}, []
    for i, image in enumerate(stage_images(stage, some_batch)):
        instances = THREE[i]
        truth[i] = Truth((SIDE, SIDE), annotations_of(instances, i))
        automatic = automatic_masks(stage.predictor(), image, stage.options.automatic)
        masks += [
            {"image_id": i, "category_id": 0, "segmentation": mask.segmentation, "score": mask.predicted_iou}
            for mask in automatic
        ]
    assert measured["seen/masks_per_image"] == len(masks) / 2 > 2
    wanted = proposal_recalls(truth, masks)
    assert {name: measured[f"seen/{name}"] for name in wanted} == pytest.approx(wanted)
    assert "seen/ar1000" not in tiny_stage().evaluations()["promptable"](
        tiny_stage().eval().predict, lambda name: [some_batch], ("seen",)
    )


def stage_images(stage: SamStage, some_batch: Batch) -> list[EmbeddedImages]:
    """The first two images, embedded."""
    assert some_batch.instances is not None
    views = tuple(instances.view for instances in some_batch.instances if instances.view is not None)
    return EmbeddedImages(stage.embed(some_batch), views).each()[:2]


def test_crops_are_refused_in_an_evaluation() -> None:
    with pytest.raises(ConfigError, match="crop_layers to 0"):
        tiny_stage(automatic={"crop_layers": 1})
