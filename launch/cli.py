"""The command line: `vitrail VERB`.

Nothing heavy is imported here but inside the verb that needs it, so that `--help` answers at once. Results go to
stdout, everything said on the way to stderr; with `--json` the last line of stdout is one JSON object. Exit codes: 0
done, 2 the user's input is wrong, 75 stopped but resumable, 1 anything else.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.errors import Stopped, UserError

if TYPE_CHECKING:
    from launch.chain.records import ChainStepResult

app = typer.Typer(
    name="vitrail",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From raw image-text pairs in object storage to pretrained and fine-tuned vision transformers.",
    epilog="Exit codes: 0 done, 2 wrong input, 75 stopped but resumable by the same command, 1 anything else.",
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration.")]
WeightSource = Annotated[
    str,
    typer.Argument(metavar="RUN|WEIGHTS", help="A run directory, one checkpoint's folder, or a weight file or folder."),
]
From = Annotated[
    str | None, typer.Option("--from", metavar="FORMAT", help="The weights' format; default: our own, or a run.")
]
KnownFacts = Annotated[
    list[str] | None,
    typer.Option("--known", metavar="NAME=VALUE", help="What tensors don't tell, such as heads=12."),
]
StageSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change an option of the stage, such as mask_ratio=0.5."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on stdout.")]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="An existing Ray; default: RAY_ADDRESS, else one of our own."),
]
Redo = Annotated[
    list[str] | None, typer.Option("--redo", metavar="STEP", help="Do this step over, and what builds on it.")
]
Machines = Annotated[int | None, typer.Option("--machines", min=1, help="Machines to train on; default: 1.")]
FormerMachines = Annotated[int | None, typer.Option("--nodes", min=1, hidden=True)]
Which = Annotated[
    str, typer.Option("--weights", help="Of a run: ema, raw (as trained), or auto: the moving average if it keeps one.")
]
Work = Annotated[str | None, typer.Option("--work", metavar="DIR", help="Folder for runs, logs and what is finished.")]


class _Reply(Exception):  # noqa: N818 -- ends a verb, with or without success
    """A verb's result: what to print, and the exit code."""

    def __init__(self, document: dict[str, Any], lines: list[str], code: int = 0) -> None:
        super().__init__()
        self.document = document
        self.lines = lines
        self.code = code


@app.command()
def demo(
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter runs: shows the way, teaches little.")] = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="Your own table of pairs (url, caption) instead of rendered scenes."),
    ] = None,
    work: Work = None,
    redo: Redo = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """The whole way through on this machine: S3 server, pairs, shards, MAE, FLIP, fine-tunes, report."""
    from launch.demo import DemoOptions, key_figures, run_demo
    from launch.display import open_display
    from launch.stopping import StopRequest

    chosen = DemoOptions(work, quick, data, overrides or [], redo or [], ray)
    with StopRequest().on_signals() as stop, open_display() as display:
        result = run_demo(chosen, stop=stop, display=display)
    lines = [f"{step:<16} {figure:<32} {value:.4g}" for step, figure, value in key_figures(result.steps)]
    if result.report:
        lines.append(f"report: {result.report}")
    _reply_of_chain(result.steps, lines, as_json, {"report": result.report})


@app.command()
def run(
    chain: Annotated[str, typer.Argument(help="The chain's YAML file.")],
    overrides: Overrides = None,
    work: Work = None,
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="Folder or s3:// prefix for data and checkpoints.")
    ] = None,
    redo: Redo = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Run a chain of steps; run again to resume, finished steps are skipped."""
    from launch.chain.graph import load_chain
    from launch.chain.runner import ChainRunner, only_one
    from launch.display import open_display
    from launch.stopping import StopRequest

    loaded = load_chain(chain, overrides or [], work=work, store=store)
    with StopRequest().on_signals() as stop, only_one(loaded.folders.work), open_display() as display:
        results = ChainRunner(loaded, stop=stop, display=display, ray_address=ray).run(redo or [])
    _reply_of_chain(results, [f"{r.name:<24} {r.state:<12} {r.output}" for r in results.values()], as_json)


@app.command()
def prep(
    config: Annotated[str, typer.Argument(help="The data set's YAML file.")],
    overrides: Overrides = None,
    retry: Annotated[
        list[str] | None,
        typer.Option("--retry", metavar="REASON", help="Try inputs refused for this reason again (may be repeated)."),
    ] = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Build a data set of shards; run again to resume, or to append what the source has gained."""
    from launch.chain.kinds.prep import run_prep
    from launch.stopping import StopRequest
    from pipeline.config import load

    _log_to_stderr()
    with StopRequest().on_signals() as stop:
        document = load(config, overrides or [])
        summary = run_prep(document, where=config, retry=retry or [], ray_address=ray, stop=stop)
    lines = [
        f"{name}: {split['samples']} samples in {split['shards']} shards" for name, split in summary["splits"].items()
    ]
    account = f"{summary['written']} of {summary['inputs']} inputs written"
    for kind in ("filtered", "failed"):
        counts = ", ".join(f"{count} {reason}" for reason, count in summary[kind].items())
        account += f"; {kind}: {counts}" if counts else ""
    lines.append(account)
    _reply(summary, [*lines, f"data set: {summary['output']}"], as_json)


@app.command()
def index(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder of the tars; s3:// too.")],
    to: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where manifest and indices go; default: beside the tars.")
    ] = None,
    match: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only tars with such names, such as 'train-*.tar'.")
    ] = "*",
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="A JSON list, names of the labels 0, 1, ...; default: numbers.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out tars that can't be used.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Tars read at a time.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Make existing WebDataset tars a data set as they are; run again to resume, or after they have changed."""
    from launch.index import index_dataset
    from launch.stopping import StopRequest

    with StopRequest().on_signals() as stop:
        document, lines = index_dataset(
            url, to=to, match=match, classes=classes, skip_bad=skip_bad, workers=workers, stop=stop, say=_say
        )
    _reply(document, lines, as_json)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="The run's YAML file, or a run directory to go on with.")],
    overrides: Overrides = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Ranks on each machine, or over all machines as many as fit; default: one per GPU, without GPUs one.",
        ),
    ] = None,
    machines: Machines = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(min=1, help="Cores for each rank; default: a machine's, shared out equally.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="MACHINE", help="One not to use: Ray's id, or address.")
    ] = None,
    ray: Ray = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Start the ranks from here, on this machine.")] = False,
    as_json: AsJson = False,
    workers: Annotated[str | None, typer.Option("--workers", hidden=True)] = None,  # former names of options
    nodes: FormerMachines = None,
    cpus_per_worker: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
) -> None:
    """Train one stage; the same command resumes it."""
    from launch.stopping import StopRequest
    from launch.train import Where, train_one
    from launch.workers.placement import PlacementRequest, parse_ranks

    written = ranks or workers
    request = PlacementRequest(
        machines or nodes or 1,
        None if written is None else parse_ranks(written),
        cpus_per_rank or cpus_per_worker,
    )
    where = Where(request, ray, not no_ray, exclude or [])
    with StopRequest().on_signals() as stop:
        result = train_one(config, overrides or [], where, stop=stop, say=_say)
    lines = [f"{result.status} at step {result.step} ({result.samples} samples): {result.run}"]
    _reply(result._asdict(), lines, as_json, code=0 if result.status == "done" else Stopped.exit_code)


@app.command()
def verify(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set (with manifest.json), or of its splits.")],
    as_json: AsJson = False,
) -> None:
    """Check every shard and sample of a data set against its manifest."""
    from launch.inspect import verify_dataset

    document, lines, good = verify_dataset(dataset, _say)
    _reply(document, lines, as_json, code=0 if good else 2)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A run's, a data set's or a chain's YAML file.")],
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks on each machine.")] = None,
    machines: Machines = None,
    work: Work = None,
    as_json: AsJson = False,
    workers: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,  # former names of options
    nodes: FormerMachines = None,
) -> None:
    """Show what a configuration comes to on this machine; runs nothing."""
    from launch.plan import plan_of

    document, lines = plan_of(
        config, overrides or [], ranks=ranks or workers, machines=machines or nodes or 1, work=work
    )
    _reply(document, lines, as_json)


@app.command()
def doctor(
    storage: Annotated[
        list[str] | None, typer.Argument(metavar="URL", help="Folders or s3:// prefixes to try as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine offers, and whether storage can be reached."""
    from launch.doctor import examine

    findings = examine(storage or [])
    lines = [f"{'ok ' if f.good else 'BAD'} {f.name:<12} {f.finding}" for f in findings]
    _reply(
        {"findings": [f._asdict() for f in findings]}, lines, as_json, code=0 if all(f.good for f in findings) else 1
    )


@app.command()
def show(
    place: Annotated[str, typer.Argument(help="A run directory or a data set.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a run: read every checkpoint and compare its hashes.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Of a data set: samples of each split to show.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Show a run's state, figures and checkpoints, or a data set's counts and samples."""
    from launch.inspect import describe

    document, lines = describe(place, verify=verify, num_samples=samples)
    _reply(document, lines, as_json)


@app.command()
def runs(
    folder: Annotated[str, typer.Argument(help="Folder of run directories.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from launch.inspect import list_runs

    documents, lines = list_runs(folder)
    _reply({"runs": documents}, lines, as_json)


@app.command()
def predict(
    source: WeightSource,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, globs, s3:// or http(s):// URLs.")
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for pictures and predictions.json; s3:// too.")
    ] = "predictions",
    source_format: From = None,
    known: KnownFacts = None,
    settings: StageSettings = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="KEY=VALUE", help="What the stage wants to be asked, such as 'texts=[a cat]'."),
    ] = None,
    which: Which = "auto",
    attention: Annotated[bool, typer.Option("--attention", help="Show where the trunk looks, head by head.")] = False,
    block: Annotated[int, typer.Option(help="Block whose attention is shown; -1 is the last.")] = -1,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of masks and whatever else is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a trained stage makes of images: reconstructions, classes, attention, as pictures and JSON."""
    from launch import inference
    from launch.replies import SourceFlags, mapping_of
    from pipeline.inference.predicting import PredictRequest

    request = PredictRequest(mapping_of(questions or []), attention, block, batch, seed)
    flags = SourceFlags(source, source_format, known or [], settings or [], which)
    document, lines, good = inference.predict(flags, images, out, request, _say)
    _reply(document, lines, as_json, code=0 if good else 2)


@app.command("eval")
def evaluate(
    source: WeightSource,
    sets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]DATASET", help="Data sets to measure on; default: those of the run."),
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="DATASET", help="The training set, for neighbours; default: the run's.")
    ] = None,
    knn: Annotated[
        bool, typer.Option("--knn", help="Nearest neighbours on the trunk's features, whatever the stage.")
    ] = False,
    pooling: Annotated[str, typer.Option(help="Of the neighbours' features: avg, cls or avg_with_cls.")] = "avg",
    k: Annotated[int, typer.Option(min=1, help="Neighbours.")] = 20,
    temperature: Annotated[float, typer.Option(min=1e-4, help="Of the neighbours' votes.")] = 0.07,
    source_format: From = None,
    known: KnownFacts = None,
    settings: StageSettings = None,
    which: Which = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0: this one.")] = 0,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write figures and details as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run, or any weights, on data sets, without training."""
    from typing import get_args

    from launch import inference
    from launch.replies import SourceFlags
    from pipeline.errors import ConfigError
    from pipeline.inference.evaluating import KnnOptions
    from pipeline.models.trunk.pooling import Pooling

    _log_to_stderr()
    if pooling not in get_args(Pooling):
        raise ConfigError(f"no pooling {pooling!r}", where="--pooling", fix=f"use {', '.join(get_args(Pooling))}")
    document, lines = inference.evaluate(
        SourceFlags(source, source_format, known or [], settings or [], which),
        sets or [],
        _say,
        train=train,
        knn=KnnOptions(pooling, k, temperature) if knn else None,  # type: ignore[arg-type]  # checked above
        batch=batch,
        workers=workers,
        out=out,
    )
    _reply(document, lines, as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A weight file, a folder of one, or a run directory.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The file to write, or a folder for some formats.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="Whose names and layout to write.")],
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="SRC's format; default: our own, or a run.")
    ] = None,
    known: KnownFacts = None,
    which: Which = "auto",
    as_json: AsJson = False,
) -> None:
    """Translate weights from and to other projects' formats."""
    from launch import inference
    from launch.replies import SourceFlags

    flags = SourceFlags(source, source_format, known or [], which=which)
    document, lines = inference.convert(flags, target, to)
    _reply(document, lines, as_json)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="A run of stage sam, or a weight file of one.")],
    target: Annotated[str, typer.Argument(metavar="DIR", help="Folder for encoder.onnx and decoder.onnx; s3:// too.")],
    source_format: From = None,
    known: KnownFacts = None,
    which: Which = "auto",
    as_json: AsJson = False,
) -> None:
    """Write Segment Anything as ONNX graphs, checked against the model."""
    from launch import inference
    from launch.replies import SourceFlags

    flags = SourceFlags(source, source_format, known or [], which=which)
    document, lines = inference.export(flags, target)
    _reply(document, lines, as_json)


@app.command()
def report(
    sources: Annotated[list[str], typer.Argument(metavar="SPEC|RUN", help="A report's YAML file, or run directories.")],
    out: Annotated[str, typer.Option(metavar="PATH", help="HTML file or folder to write.")] = "report",
    as_json: AsJson = False,
) -> None:
    """Write an HTML report on one run or several."""
    from launch.inspect import report_on

    written = report_on(sources, out)
    _reply({"report": written}, [f"report: {written}"], as_json)


def main() -> NoReturn:
    """Entry point: run a verb, print its reply or its one error message, exit."""
    as_json = "--json" in sys.argv[1:]
    os.environ["VITRAIL_COMMAND"] = shlex.join(["vitrail", *sys.argv[1:]])  # for pipeline.run_dir, in the workers
    try:
        app(prog_name="vitrail")  # exits by itself after --help (0) or a wrong option (2)
        code = 0
    except _Reply as reply:
        code = _print_reply(reply, as_json)
    except UserError as error:
        code = _print_error(error, as_json)
    except Stopped as stopped:
        _say(f"stopped: {stopped}")
        code = stopped.exit_code
    except ModuleNotFoundError as error:
        from launch.extras import missing_library

        missing = missing_library(error)
        if missing is None:
            raise
        code = _print_error(missing, as_json)
    sys.stdout.flush()
    sys.exit(code)


def _reply(document: dict[str, Any], lines: list[str], as_json: bool, *, code: int = 0) -> NoReturn:
    raise _Reply(document, lines, code)


def _reply_of_chain(
    results: dict[str, ChainStepResult], lines: list[str], as_json: bool, extra: dict[str, Any] | None = None
) -> NoReturn:
    from launch.chain.records import exit_code, results_document

    for result in results.values():
        if result.state == "failed":
            _say(f"{result.name}: {result.error}")
    _reply({**(extra or {}), "steps": results_document(results)}, lines, as_json, code=exit_code(results))


def _print_reply(reply: _Reply, as_json: bool) -> int:
    if as_json:
        print(json.dumps({**reply.document, "exit_code": reply.code}, default=str))
    else:
        for line in reply.lines:
            print(line)
    return reply.code


def _print_error(error: UserError, as_json: bool) -> int:
    from launch.workers.attempts import error_document

    _say(str(error))
    if as_json:
        print(json.dumps({"error": error_document(error), "exit_code": error.exit_code}))
    return error.exit_code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
