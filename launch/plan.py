"""What a configuration comes to on the machine at hand, without running anything."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.chain.graph import Chain, load_chain
from launch.chain.records import StepRecords
from launch.worker import set_defaults
from pipeline import config as configs
from pipeline.config import Document
from pipeline.errors import ConfigError, UserError
from pipeline.machine import available_cores
from pipeline.train.config import TrainConfig

if TYPE_CHECKING:
    from pipeline.data.order.mixture import TrainingSource
    from pipeline.stages.label_use import LabelUse

Plan = tuple[dict[str, Any], list[str]]  # as a document, and as lines for people

# Bytes per parameter. Under bf16: the bf16 copy and its gradient (2 + 2), and the fp32 master with AdamW's two moments
# (12). Under fp32: weights, gradient and moments (4 + 4 + 8). ZeRO 1 shares the optimizer's part among the ranks, 2 the
# gradients too, 3 the parameters as well (Rajbhandari et al. 2020, section 5).
_STATE_BYTES = {
    "bf16": {"parameters": 2, "gradients": 2, "optimizer": 12},
    "fp32": {"parameters": 4, "gradients": 4, "optimizer": 8},
}


def plan_of(path: str, overrides: Sequence[str], *, ranks: int | None, machines: int, work: str | None) -> Plan:
    """The resolved view of a chain, a training run or a data set build, as a document and as lines.

    Raises:
        ConfigError: the file is wrong, or it is none of the three.
    """
    document = configs.load(path, overrides)
    if document.keys() & {"steps", "nodes"}:
        return _plan_chain(load_chain(path, overrides, work=work))
    if "stage" in document:
        return plan_training(document, where=path, ranks=ranks, machines=machines)
    if "source" in document:
        from data_prep.config import PrepConfig

        config = configs.validate(PrepConfig, document, where=path)
        return {"kind": "prep", **config.model_dump(mode="json")}, configs.dump(config).splitlines()
    raise ConfigError(
        "neither a chain (`steps`), a training run (`stage`) nor a data set (`source`)",
        where=path,
        fix="name one of configs/chains, configs/pretrain, configs/finetune or configs/prep",
    )


def plan_training(document: Document, *, where: str, ranks: int | None, machines: int) -> Plan:
    """Steps, batch shares and memory of a training run."""
    set_defaults()
    import torch

    from pipeline.ranks import World
    from pipeline.stages import stage_class
    from pipeline.train.resolve import resolve

    config = configs.validate(TrainConfig, document, where=where)
    gpus = torch.cuda.device_count()
    world_size = machines * (ranks or gpus or 1)
    resolved = resolve(config, World(0, world_size, 0), torch.device("cuda" if gpus else "cpu"))
    cls = stage_class(config.stage)
    options = configs.validate(cls.options_class, config.options, where=config.name, prefix="options")
    sources, why_not = _read_sources(config, cls.label_use(options))
    lines = [f"run {config.run_url}, stage {config.stage}", *resolved.lines()]
    lines += _plan_reading(config, sources, world_size)
    plan: dict[str, Any] = {"kind": "train", "run": config.run_url, "stage": config.stage, **resolved.document()}
    counted, why_not = _count_parameters(config.stage, options, sources) if sources else (None, why_not)
    if counted is None:
        lines.append(f"parameters: not counted ({why_not})")
        return plan, lines
    total, trained = counted
    plan |= {"num_parameters": total, "num_trained": trained}
    lines.append(f"{total:,} parameters, {trained:,} of them trained")
    if config.optim.name == "adamw":
        states = state_bytes(total, trained, resolved.zero_stage, world_size, resolved.precision)
        plan["model_state_bytes_per_rank"] = states
        lines.append(f"{states / 2**20:.1f} MiB of model states per rank; activations and buffers come on top")
    return plan, lines


def _read_sources(config: TrainConfig, use: LabelUse | None) -> tuple[tuple[TrainingSource, ...], str]:
    """The training sets, or () and why they can't be read yet.

    Raises:
        ConfigError: sets that can be read name classes that this stage can't have side by side.
    """
    from pipeline.train.data import read_sources

    try:
        sources = read_sources(config.data.sources, config.stage, use)
    except ConfigError:
        raise
    except (UserError, FileNotFoundError) as error:
        return (), f"the data can't be read: {error}"
    _check_evaluation_sets(config, sources, use)
    return sources, ""


def _check_evaluation_sets(config: TrainConfig, sources: Sequence[TrainingSource], use: LabelUse | None) -> None:
    """Those that there are by now; the others' turn comes when the run begins."""
    from pipeline.classes import check_evaluation_sets
    from pipeline.data.manifest import Manifest, read_manifest

    sets: dict[str, Manifest] = {}
    for name, url in config.data.evaluate.items() if use is not None else ():
        with contextlib.suppress(UserError, FileNotFoundError):
            sets[name] = read_manifest(url)
    check_evaluation_sets([source.manifest for source in sources], sets, config.stage, use)


def _plan_reading(config: TrainConfig, sources: Sequence[TrainingSource], world_size: int) -> list[str]:
    """What reading the data comes to; nothing where they can't be read yet.

    Raises:
        ConfigError: ranks and workers that the data can't serve.
        DataError: sets too small for the global batch.
    """
    from pipeline.data.order.capacity import advice, check_batch, check_data, held_bytes

    data = config.data
    shape = {"world_size": world_size, "workers": data.loader_workers, "lanes": data.lanes}
    check_batch(data.global_batch, copies=data.crops_per_image, **shape)
    if not sources:
        return []
    check_data(sources, data.global_batch, data.crops_per_image)
    held = held_bytes(sources, window=data.window, **shape)
    return [
        f"{sum(source.num_samples for source in sources)} training samples, {data.loader_workers} loader worker(s) per "
        f"rank; a rank holds about {held / 2**20:.1f} MiB of encoded samples",
        *advice(data.global_batch, **shape),
    ]


def state_bytes(num_parameters: int, num_trained: int, zero_stage: int, world_size: int, precision: str) -> int:
    """Memory of parameters, gradients and AdamW's states on one rank under ZeRO, without activations and buffers."""
    sizes = _STATE_BYTES[precision]

    def share(sharded_from: int) -> float:
        return 1 / world_size if zero_stage >= sharded_from else 1.0

    return round(
        num_parameters * sizes["parameters"] * share(3)
        + num_trained * (sizes["gradients"] * share(2) + sizes["optimizer"] * share(1))
    )


def _count_parameters(
    name: str, options: configs.Config, sources: Sequence[TrainingSource]
) -> tuple[tuple[int, int] | None, str]:
    """(all, trained) parameters of the stage, built without memory; or why they can't be counted."""
    import torch

    from pipeline.classes import shared_classes
    from pipeline.stages import stage_class
    from pipeline.stages.base import DataFacts

    try:
        with torch.device("meta"):
            num_samples = sum(source.num_samples for source in sources)
            classes = shared_classes(source.manifest.classes for source in sources)
            stage = stage_class(name)(options, DataFacts(classes, num_samples))
    except (NotImplementedError, RuntimeError) as error:
        return None, f"{name} can't be built without data: {error}"
    counts = [(name, parameter.numel()) for name, parameter in stage.named_parameters()]
    total = sum(count for _, count in counts)
    return (total, sum(count for name, count in counts if stage.trainable(name))), ""


def _plan_chain(chain: Chain) -> Plan:
    steps: dict[str, Any] = {}
    records = StepRecords(chain.folders.work)
    lines = [f"work folder {chain.folders.work}, data and checkpoints in {chain.folders.store}"]
    for step in chain.steps.values():
        state = records.state_of(step.name)
        steps[step.name] = {"kind": step.kind, "state": state, "after": sorted(step.after), "output": step.output}
        detail = ""
        if step.kind == "train":
            config = configs.validate(TrainConfig, step.document, where=step.where)
            detail = f"{config.stage}, {config.length_samples} samples in batches of {config.data.global_batch}"
            detail += f", {step.request.ranks or 'default'} rank(s)"
            steps[step.name] |= {"stage": config.stage, "length_samples": config.length_samples}
        after = f"after {', '.join(sorted(step.after))}" if step.after else ""
        lines.append("  ".join(filter(None, [f"{step.name:<24} {step.kind:<7} {state:<9}", detail, after])))
    return {"kind": "chain", "steps": steps, "cores": available_cores()}, lines
