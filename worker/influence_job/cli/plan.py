"""`influence plan`: what a job would do and cost, before it does anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence_job.cli.options import (
    file_argument,
    job_options,
    json_option,
    only_the_document,
    read_job,
    verbose_option,
)
from influence_job.spec import InfluenceJob, InverseHarmonicMeanSpec, LissaSpec, MethodSpec
from influence_job.units import clock, in_words

if TYPE_CHECKING:
    from influence_job.plan import Plan, Sizes


@click.command()
@file_argument
@job_options
@json_option
@verbose_option
def plan(file: str, device: str | None, output: str | None, as_json: bool) -> None:
    """Plan the job in FILE: grid, groups, passes, bytes, memory per stage and a rough cost.

    Calls the entry point here, to measure model and data; reads nothing else but the stored factors or
    gradients that the job is for, and writes nothing. A result larger than output.maxBytes, or work that
    cannot fit the memory the spec grants, is refused with the numbers.

    \b
    influence plan examples/digits.yaml
    influence plan job.yaml --device cuda
    influence plan job.yaml --json | jq .regions
    """  # noqa: D301 - `\b` is click's mark for lines to be left as they are
    job = read_job(file, device=device, output=output)
    from influence_job.driver import earlier_job
    from influence_job.driver.preflight import rooted
    from influence_job.methods import method_of
    from influence_job.plan import make_plan
    from influence_job.worker.loading import measure_job

    sys.path.insert(0, str(Path.cwd()))  # where `run` finds the entry point too
    with only_the_document(as_json):
        # Refused in the words of a run.
        spec = rooted(job).spec
        earlier_job.refuse_own_store(spec)
        earlier_job.read_record(spec)
        sizes = measure_job(spec)
        earlier_job.refuse_other_rows(spec, sizes.blocks)
    made = make_plan(job.spec, method_of(job.spec), sizes)
    if as_json:
        click.echo(json.dumps(as_document(job, sizes, made), indent=2))
    else:
        draw(job, sizes, made, Console(highlight=False))


def as_document(job: InfluenceJob, sizes: Sizes, plan: Plan) -> dict[str, Any]:
    """The plan as it would be stored, and what follows from it."""
    from influence_job.plan import cost

    gflop = cost.gflop(job.spec, sizes, plan)
    return {
        **plan.to_json(),
        "groups": plan.groups,
        "groupRows": plan.group_rows,
        "regions": plan.regions,
        "trainingPasses": plan.training_passes,
        "passesPerIteration": plan.passes_per_iteration,
        "arrays": [array.model_dump(mode="json", by_alias=True) for array in plan.arrays],
        "resultBytes": plan.result_bytes,
        "factorBytes": plan.factor_bytes,
        "gflop": gflop,
        "seconds": cost.seconds(job.spec, gflop),
    }


def draw(job: InfluenceJob, sizes: Sizes, plan: Plan, console: Console) -> None:
    """The plan as a person reads it."""
    from influence_job.plan import cost, device_budget

    device, workers = job.spec.resolved_device, job.spec.workers.replicas
    for line in _lines(job, sizes, plan):
        console.print(escape(line), soft_wrap=True)
    console.print()
    console.print(_table(job, sizes, plan))
    console.print(
        f"Memory: of one worker, above an idle one; the budget on {device} is "
        f"{in_words(device_budget(job.spec))}. Store: beside the result. "
        f"Time: assumes {workers} × {cost.GFLOPS[device]:g} GFLOP/s.",
        soft_wrap=True,
    )


def _lines(job: InfluenceJob, sizes: Sizes, plan: Plan) -> list[str]:
    from influence_job.plan import top_lists

    method = job.spec.method.name
    what = f"{job.metadata.name}: {plan.operation} ({plan.mode}) with {method} on {job.spec.resolved_device}"
    tests = "" if plan.operation.is_of_training else f"{plan.test} test, "
    lines = [what, f"  examples   {tests}{plan.train} training; {sizes.shapes.width} parameters"]
    if plan.operation.is_of_training:
        lines.append(f"  grid       {plan.train_chunks} chunks of {plan.train_chunk_length} examples")
    elif plan.has_scores:
        parts = f" × {len(plan.blocks)} blocks" if plan.by_block else ""
        parts += f" × {plan.feature_shape[0]} tokens" if plan.by_token else ""
        lines.append(
            f"  grid       {plan.regions} regions of {plan.group_rows} × {plan.train_chunk_length} "
            f"examples{parts} (test chunks of {plan.test_chunk}, training chunks of {plan.train_chunk})"
        )
        groups = "1 group of test chunks" if plan.groups == 1 else f"{plan.groups} groups of test chunks"
        over = "the training set" if plan.operation.reads_training else "the stored gradients"
        why = ""
        if plan.groups > 1:
            with_one_less = -(-plan.test_chunks // (plan.groups - 1)) * plan.test_chunk
            if top_lists.most_rows(job.spec, sizes) < with_one_less:
                why = f"; of more test examples the top {plan.top_k} would not fit a worker's memory"
        lines.append(f"  groups     {groups}: one pass over {over} each{why}")
    purpose = "to differentiate" if plan.gradients_only else "to score"
    passes = (
        f"{plan.training_passes} over the training set ({plan.fit_passes} to fit, "
        f"{plan.training_passes - plan.fit_passes} {purpose})"
    )
    if plan.passes_per_iteration:
        passes += f", and {plan.passes_per_iteration} {_what_repeats(job.spec.method)}"
    if plan.solves_by_passes:
        passes += f", shared by the workers in {plan.fit_ranges} ranges"
    lines.append(f"  passes     {passes}")
    lines.append(f"  batches    {plan.micro_batch} examples at most; {plan.fit_ranges} ranges per fit pass")
    stored = " × ".join(str(extent) for extent in plan.result_shape)
    kept = f"{stored} of {plan.dtype}" if plan.arrays else f"top {plan.top_k} and statistics of {stored}"
    lines.append(f"  result     {kept}, {in_words(plan.result_bytes)}, in {job.spec.output.url}")
    return lines


def _what_repeats(method: MethodSpec) -> str:
    """For what solving all test chunks takes a pass each."""
    match method:
        case InverseHarmonicMeanSpec():
            return "to solve"
        case LissaSpec(batch_size=int()):
            return "for each epoch of the solver"
        case _:
            return "for each iteration of the solver"


def _table(job: InfluenceJob, sizes: Sizes, plan: Plan) -> Table:
    from influence_job.plan import cost

    gflop = cost.gflop(job.spec, sizes, plan)
    seconds = cost.seconds(job.spec, gflop)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("stage")
    for title in ("device", "host", "store, at most", "GFLOP", "time"):
        table.add_column(title, justify="right")
    for name, stage in plan.memory.items():
        amounts = (
            f"{gflop[name]:.3g}" if name in gflop else "",
            f"≈ {clock(seconds[name])}" if name in seconds else "",
        )
        table.add_row(name, in_words(stage.device), in_words(stage.host), in_words(stage.scratch), *amounts)
    return table
