"""Verbs that train: one run, a chain, the demo, and what they come to."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.options import AsJson, FormerMachines, Machines, Overrides, Ray, Redo, Work
from launch.cli.output import reply, reply_of_chain, say
from pipeline.errors import Stopped


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
    reply_of_chain(result.steps, lines, as_json, {"report": result.report})


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
    reply_of_chain(results, [f"{r.name:<24} {r.state:<12} {r.output}" for r in results.values()], as_json)


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
        result = train_one(config, overrides or [], where, stop=stop, say=say)
    lines = [f"{result.status} at step {result.step} ({result.samples} samples): {result.run}"]
    reply(result._asdict(), lines, as_json, code=0 if result.status == "done" else Stopped.exit_code)


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
    reply(document, lines, as_json)
