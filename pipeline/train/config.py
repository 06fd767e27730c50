"""The configuration of a training run, but for the stage's own options.

Lengths are counted in samples, never in steps, so that a recipe means the same at any batch size. The stage's own
options, with those of the model, stand under `options`; the stage's options class checks them.

A run that has begun keeps its settings, but for those of a type `ChangesOnResume[...]`: what is learned doesn't depend
on them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.config import ChangesOnResume, Config


class SourceConfig(Config):
    """One of the data sets that a run trains on."""

    url: str  # folder of a data set: a path or s3:// URL
    weight: float | None = Field(default=None, gt=0)  # relative share of the samples; for all sets or none
    repeat: int = Field(default=1, gt=0)  # without weights: times a sample comes in an epoch
    subset: int | float | None = Field(default=None, gt=0)  # number (int) or share (float) of its samples that is used

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if self.weight is not None and self.repeat != 1:
            raise ValueError("give weight or repeat, not both")
        if isinstance(self.subset, float) and self.subset > 1:
            raise ValueError(f"a subset is a share of at most 1.0 or a whole number of samples, found {self.subset}")
        return self


TrainingSets = Annotated[
    Annotated[str, Tag("folder")] | Annotated[tuple[SourceConfig, ...], Tag("sources")],
    Discriminator(lambda value: "folder" if isinstance(value, str) else "sources"),  # so that messages name one of them
]


class CacheConfig(Config):
    """A cache on this machine of what is read from S3."""

    folder: str  # a local path, shared by all processes of a machine
    limit_gb: float = Field(gt=0)  # in units of 1e9 bytes


class DataConfig(Config):
    """The data sets, and how they are read."""

    renamed = {"workers": "loader_workers"}

    train: TrainingSets  # folder of a data set: a path or s3:// URL; or several with their weights
    evaluate: dict[str, str] = {}  # name -> folder; figures carry the names
    global_batch: int = Field(gt=0)
    loader_workers: ChangesOnResume[int] = Field(default=1, ge=0)  # processes per rank; 0 reads in the training process
    block: int = Field(default=256, gt=0)  # neighbouring samples read as one range
    lanes: int = Field(default=16, gt=0)  # streams that a global batch is taken from; divides global_batch
    window: int = Field(default=1024, gt=0)  # samples shuffled among each other within a lane
    evaluate_batch: ChangesOnResume[int] = Field(default=256, gt=0)  # samples per rank and prediction
    max_unreadable: ChangesOnResume[float] = Field(default=0.01, ge=0, le=1)  # share of samples that ends the run
    crops_per_image: int = Field(default=1, gt=0)  # repeated augmentation: crops of each decoded image
    takedown: ChangesOnResume[str | None] = None  # a text file of sample keys, one a line, to exclude
    cache: ChangesOnResume[CacheConfig | None] = None  # for data sets on S3

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The training sets, one or several."""
        return (SourceConfig(url=self.train),) if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _sources(self) -> DataConfig:
        if not self.sources:
            raise ValueError("train names no data set")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("give every source of train a weight, or none")
        return self

    @model_validator(mode="after")
    def _lanes_divide(self) -> DataConfig:
        if self.global_batch % self.lanes:
            raise ValueError(f"lanes ({self.lanes}) must divide global_batch ({self.global_batch})")
        return self


class OptimConfig(Config):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float | None = Field(default=None, gt=0)  # peak; else base_lr * global_batch / 256
    base_lr: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # lars, sgd
    weight_decay: float = Field(default=0.05, ge=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    clip_grad: float = Field(default=0.0, ge=0)  # 0 = none
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup_samples: int = Field(default=0, ge=0)
    warmup_start: float = Field(default=0.0, ge=0, le=1)  # share of the peak at which warm-up begins
    min_lr: float = Field(default=0.0, ge=0)
    drops: tuple[float, ...] = ()  # step schedule: shares of the length at which lr falls by drop_factor
    drop_factor: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_rate(self) -> OptimConfig:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give exactly one of lr and base_lr")
        return self


class EngineConfig(Config):
    """How DeepSpeed runs the model."""

    zero_stage: ChangesOnResume[Literal[0, 1, 2, 3]] = 2
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware multiplies it, else fp32
    micro_batch: ChangesOnResume[int | None] = Field(
        default=None, gt=0
    )  # most samples per forward; None: a rank's whole share


class CheckpointConfig(Config):
    """When and where state is saved."""

    url: str | None = None  # None: checkpoints/ under the run directory
    every_samples: ChangesOnResume[int | None] = Field(default=None, gt=0)  # None: only at the end and when stopped
    keep_last: ChangesOnResume[int] = Field(default=2, gt=0)
    keep_every_samples: ChangesOnResume[int | None] = Field(default=None, gt=0)


class EmaConfig(Config):
    """A moving average of the weights, saved with them."""

    half_life_samples: int = Field(gt=0)  # after so many samples, half of the average is replaced
    rampup_ratio: float | None = Field(default=None, gt=0)  # the half-life is at most this share of the samples seen
    evaluate: ChangesOnResume[Literal["ema", "raw", "both"]] = "ema"  # weights measured; both: raw ones as NAME_raw


class NonFiniteConfig(Config):
    """Steps whose loss or gradient isn't finite are skipped on all ranks, and so are spikes."""

    max_consecutive: ChangesOnResume[int] = Field(default=5, gt=0)  # so many in a row roll the run back
    max_rollbacks: ChangesOnResume[int] = Field(default=2, ge=0)  # after so many the run stops


class SpikeConfig(Config):
    """Steps whose loss is far above the last ones are skipped like those whose loss isn't finite.

    The limit is median + deviations x max(scaled median absolute deviation, floor x |median|) of the last losses.
    """

    window: int = Field(default=64, ge=4)  # applied steps whose losses count; before there are so many, no limit
    deviations: float = Field(default=8.0, gt=0)
    floor: float = Field(default=0.01, ge=0)  # so that a very even loss doesn't make every ripple a spike


class WatchdogConfig(Config):
    """Seconds that each phase of a run may take before its processes are ended and a new attempt starts."""

    start_s: float = Field(default=1800, gt=0)  # to the end of the first step
    step_s: float = Field(default=900, gt=0)
    evaluate_s: float = Field(default=7200, gt=0)  # one evaluation
    save_s: float = Field(default=3600, gt=0)  # one checkpoint, in the background or at the end


class TrainConfig(Config):
    """One training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    stage: str  # a name in pipeline.stages.STAGES
    options: dict[str, Any] = {}  # the stage's own options, `model` among them
    data: DataConfig
    length_samples: int = Field(gt=0)
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ema: EmaConfig | None = None  # None: no moving average
    nonfinite: NonFiniteConfig = NonFiniteConfig()
    spikes: SpikeConfig | None = None  # None: any finite loss is trained on
    watchdog: ChangesOnResume[WatchdogConfig] = WatchdogConfig()
    max_fruitless_attempts: ChangesOnResume[int] = Field(default=3, gt=0)  # in a row without progress end the job
    seed: int = Field(default=0, ge=0)
    resume_from: str | None = None  # another run whose state to continue, until this run has its own
    init_from: str | None = None  # weights to start from: run directory or checkpoint, of any stage
    init_prefixes: tuple[str, ...] = ("trunk.",)  # of the parameters taken from there
    init_weights: Literal["auto", "ema", "raw"] = "auto"  # auto: the moving average where there is one
    log_every_samples: ChangesOnResume[int | None] = Field(default=None, gt=0)  # None: every step
    evaluate_every_samples: ChangesOnResume[int | None] = Field(default=None, gt=0)  # None: only at the end
    time_limit_s: ChangesOnResume[float | None] = Field(default=None, gt=0)  # save and stop (code 75) before it is over
    runs: ChangesOnResume[str] = "runs"  # folder (or s3:// URL) of run directories

    @property
    def run_url(self) -> str:
        """The run directory."""
        return f"{self.runs.rstrip('/')}/{self.name}"
