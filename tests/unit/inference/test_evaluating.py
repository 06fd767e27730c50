"""The verb `eval`: figures of any weights on any data set, without training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import convert
from pipeline.config import validate
from pipeline.data.images.transforms import EvalImage
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluate.knn import knn_scores
from pipeline.inference.evaluating import KnnOptions
from pipeline.stages.base import DataFacts
from pipeline.stages.classify import ClassifyOptions, ClassifyStage
from pipeline.stages.flip import FlipOptions, FlipStage
from pipeline.stages.mae import MaeOptions, MaeStage
from tests.support.saved_run import save_checkpoint
from tests.support.weight_verbs import evaluate
from tests.unit.data.conftest import numbered, sample, write_data_set

MODEL = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
MAE: dict[str, Any] = {"model": MODEL, "decoder": {"width": 16, "depth": 1, "heads": 2}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_data_set(str(tmp_path / "train"), numbered([12, 9]))
    write_data_set(str(tmp_path / "heldout"), numbered([10]))
    return tmp_path


def mae() -> MaeStage:
    torch.manual_seed(0)
    return MaeStage(MaeOptions.model_validate(MAE), DataFacts()).eval()


def classifier(classes: tuple[str, ...]) -> ClassifyStage:
    torch.manual_seed(0)
    options = ClassifyOptions.model_validate({"model": MODEL, "head_init_std": 0.5})
    return ClassifyStage(options, DataFacts(classes)).eval()


def said(_: str) -> None:
    pass


def pixels(i: int) -> torch.Tensor:
    image = next(data for ending, data in sample(i).items() if ending in ("jpg", "png", "webp"))
    return EvalImage(size=(32, 32))(image, 0)


def test_a_run_is_measured_on_its_own_sets_by_its_stages_evaluations(place: Path) -> None:
    run = place / "run"
    run.mkdir()
    data = {"train": str(place / "train"), "evaluate": {"held": str(place / "heldout")}}
    (run / "config.yaml").write_text(yaml.safe_dump({"stage": "classify", "options": {"model": MODEL}, "data": data}))
    (run / "status.json").write_text("{}")
    stage = classifier(tuple(f"class {i}" for i in range(7)))
    save_checkpoint(str(run / "checkpoints"), {name: value.detach() for name, value in stage.state_dict().items()})
    document, lines = evaluate(str(run), [], said, out=str(place / "figures.json"))
    with torch.no_grad():
        best = stage.scores(torch.stack([pixels(i) for i in range(10)])).argmax(1)
    right = (best == torch.arange(10) % 7).double().mean().item()
    assert document["figures"]["held/top1"] == pytest.approx(right)
    assert document["details"]["classes"][:2] == ["class 0", "class 1"]
    assert json.loads((place / "figures.json").read_text())["figures"] == document["figures"]
    assert any(line.startswith("held/top1") for line in lines)


def test_neighbours_need_no_head_and_no_labels_of_the_weights(place: Path) -> None:
    """Any weights' trunk: here an encoder alone, against the same votes counted over features made here."""
    stage = mae()
    convert.save(stage, str(place / "encoder.pth"), "mae_encoder")
    flags = {"train": str(place / "train"), "source_format": "mae_encoder", "known": ["heads=2"]}
    with pytest.raises(CheckpointError, match="add --knn"):
        evaluate(str(place / "encoder.pth"), [str(place / "heldout")], said, **flags)
    knn = KnnOptions(pooling="cls", k=3)
    document, _ = evaluate(str(place / "encoder.pth"), [str(place / "heldout")], said, knn=knn, batch=4, **flags)
    with torch.no_grad():
        train = stage.encode(torch.stack([pixels(i) for i in range(21)])).prefix[:, 0]
    votes = knn_scores(train[:10], train, torch.arange(21) % 7, 7, k=3)
    right = (votes.argmax(1) == torch.arange(10) % 7).double().mean().item()
    assert document["figures"] == {"heldout/knn_top1": pytest.approx(right)}
    with pytest.raises(ConfigError, match="--train"):
        evaluate(
            str(place / "encoder.pth"), [str(place / "heldout")], said, knn=knn, source_format="mae_encoder",
            known=["heads=2"],
        )  # fmt: skip


def test_options_can_be_changed_and_sets_named(place: Path) -> None:
    convert.save(mae(), str(place / "w.safetensors"), "vitrail")
    settings = ["mask_ratio=0.5"]
    document, _ = evaluate(str(place / "w.safetensors"), [f"mine={place / 'heldout'}"], said, settings=settings)
    assert list(document["figures"]) == ["mine/reconstruction_mse"]
    assert document["options"]["mask_ratio"] == 0.5


def test_labels_that_mean_other_classes_are_refused(place: Path) -> None:
    convert.save(classifier(tuple("abcdefg")), str(place / "w.safetensors"), "vitrail")
    with pytest.raises(ConfigError, match=r"aren't those of the weights: class 0 is 'class 0', not 'a'; .*classify"):
        evaluate(str(place / "w.safetensors"), [str(place / "heldout")], said)
    convert.save(classifier(("0", "1", "2")), str(place / "w.safetensors"), "vitrail")
    with pytest.raises(ConfigError, match="aren't those of the weights: 7 classes, not 3 classes"):
        evaluate(str(place / "w.safetensors"), [str(place / "heldout")], said)


def test_classes_of_which_the_weights_know_the_number_are_called_as_the_data_call_them(place: Path) -> None:
    convert.save(classifier(tuple("0123456")), str(place / "w.safetensors"), "vitrail")
    document, _ = evaluate(str(place / "w.safetensors"), [str(place / "heldout")], said)
    assert document["details"]["classes"][:2] == ["class 0", "class 1"]
    write_data_set(str(place / "few"), numbered([3]), classes=("0", "1", "2"))  # as `vitrail index` counts them
    document, _ = evaluate(str(place / "w.safetensors"), [str(place / "few")], said)
    assert len(document["details"]["classes"]) == 7
    write_data_set(str(place / "few"), numbered([3]), classes=("cat", "dog", "owl"))
    with pytest.raises(ConfigError, match="3 classes, not 7 classes"):
        evaluate(str(place / "w.safetensors"), [str(place / "few")], said)


def test_a_set_that_does_not_say_what_its_labels_mean_is_warned_of(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_data_set(str(place / "plain"), numbered([5]), classes=())
    convert.save(classifier(tuple(f"class {i}" for i in range(7))), str(place / "w.safetensors"), "vitrail")
    document, _ = evaluate(str(place / "w.safetensors"), [str(place / "plain"), str(place / "heldout")], said)
    assert set(document["figures"]) > {"plain/top1", "heldout/top1"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{place / 'plain'} names no classes: if it has labels they are taken for numbers of the training data's"
    ]


def test_sets_of_other_classes_are_measured_by_what_reads_no_labels(place: Path) -> None:
    write_data_set(str(place / "other"), numbered([6]), classes=tuple("abcdefg"))
    write_data_set(str(place / "plain"), numbered([5]), classes=())
    sets = [str(place / name) for name in ("heldout", "other", "plain")]
    weights = str(place / "w.safetensors")
    convert.save(mae(), weights, "vitrail")
    document, _ = evaluate(weights, sets, said, train=str(place / "train"))
    assert list(document["figures"]) == [f"{name}/reconstruction_mse" for name in ("heldout", "other", "plain")]
    with pytest.raises(ConfigError, match=r"class 0 is 'a', not 'class 0'; and stage 'mae' compares labels"):
        evaluate(weights, sets, said, train=str(place / "train"), settings=["evaluate=[reconstruction, knn]"])


def test_neighbours_vote_with_the_training_sets_labels_and_for_no_others(place: Path) -> None:
    """Whatever classes the weights learnt: only their trunk takes part."""
    write_data_set(str(place / "other"), numbered([6]), classes=tuple("abcdefg"))
    write_data_set(str(place / "plain"), numbered([5]), classes=())
    weights = str(place / "w.safetensors")
    convert.save(classifier(("cat", "dog")), weights, "vitrail")
    document, _ = evaluate(weights, [str(place / "heldout")], said, train=str(place / "train"), knn=KnnOptions(k=3))
    assert list(document["figures"]) == ["heldout/knn_top1"]
    for name, message in (("other", "class 0 is 'a', not 'class 0'"), ("plain", "none, not 7 classes")):
        with pytest.raises(ConfigError, match=message):
            evaluate(weights, [str(place / name)], said, train=str(place / "train"), knn=KnnOptions())
    with pytest.raises(ConfigError, match="no labels for neighbours to vote with"):
        evaluate(weights, [str(place / "heldout")], said, train=str(place / "plain"), knn=KnnOptions())


def test_zero_shot_measures_each_set_by_its_own_classes_and_names(place: Path) -> None:
    write_data_set(str(place / "other"), numbered([9]), classes=("cat", "dog", "owl", "hen", "cow", "pig", "bee"))
    write_data_set(str(place / "few"), numbered([3]), classes=("cat", "dog", "owl"))
    sets = [str(place / name) for name in ("heldout", "other", "few")]
    weights = str(place / "w.safetensors")
    options = {
        "model": MODEL, "embed_dim": 8, "templates": ["a {}"], "evaluate": ["zeroshot"],
        "text": {"context_length": 8, "width": 16, "heads": 2, "layers": 1, "vocab_size": 600},
    }  # fmt: skip
    torch.manual_seed(0)
    stage = FlipStage(validate(FlipOptions, options, where="test"), DataFacts(tuple("xyz"))).eval()
    convert.save(stage, weights, "vitrail")
    names = "class_names={few: [a cat, a dog, an owl]}"
    document, _ = evaluate(weights, sets, said, settings=[names])
    assert document["details"]["heldout/classes"] == [f"class {i}" for i in range(7)]
    assert document["details"]["other/classes"][2:4] == ["owl", "hen"]
    assert document["details"]["few/classes"] == ["a cat", "a dog", "an owl"]
    with torch.no_grad():
        texts = stage.embed_texts(stage.tokenizer([f"a {name}" for name in document["details"]["other/classes"]]))
        best = (stage.embed_images(torch.stack([pixels(i) for i in range(9)])) @ texts.T).argmax(1)
    right = (best == torch.arange(9) % 7).double().mean().item()
    assert document["figures"]["other/zeroshot_top1"] == pytest.approx(right)
    message = "one list of names, but sets few and heldout and other have different classes"
    with pytest.raises(ConfigError, match=message):
        evaluate(weights, sets, said, settings=["class_names=[a, b, c]"])
    write_data_set(str(place / "few"), numbered([9]), classes=("cat", "dog", "owl"))
    with pytest.raises(DataError, match=r"evaluation set 'few': label 6, but the data name 3 classes"):
        evaluate(weights, sets, said)


def test_mistakes_of_the_command_are_named(place: Path) -> None:
    convert.save(mae(), str(place / "w.safetensors"), "vitrail")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    for words, message in (
        ("eval w.safetensors", "nothing to measure on"),
        ("eval w.safetensors heldout --knn --pooling max", "no pooling 'max'"),
    ):
        command = [sys.executable, "-m", "launch", *words.split()]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
