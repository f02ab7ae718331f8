"""`influence show`: a result in words, and the training examples behind single test examples."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from influence_job.cli.options import json_option, verbose_option
from influence_job.spec import Mode, Operation
from influence_job.units import in_words

if TYPE_CHECKING:
    from influence_job.cli.summary import Ranked, Summary, TestCase


SHOWN_NAMES = 8
"""Names of blocks and of parameters that the headline tells; all are in the store."""


def _json_object(_: click.Context, __: click.Parameter, text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f'expected a JSON object such as {{"token": "anon"}}: {error}') from None
    if not isinstance(given, dict):
        raise click.BadParameter(f'expected a JSON object such as {{"token": "anon"}}, got {text}')
    return given


@click.command()
@click.argument("url")
@click.option(
    "--test",
    "tests",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="I",
    help="Show test example I; may be given several times. Default: up to three that the model gets wrong.",
)
@click.option(
    "--top", type=click.IntRange(1, 10_000), default=5, help="Training examples each way. Default 5."
)
@click.option(
    "--storage-options",
    metavar="JSON",
    default="{}",
    callback=_json_object,
    help="As output.storageOptions of the job, for storage that needs some.",
)
@json_option
@verbose_option
def show(url: str, tests: tuple[int, ...], top: int, storage_options: dict[str, Any], as_json: bool) -> None:
    """Show the result at URL: what it is, and which training examples made the model do that.

    A positive score helps: without that training example the test example's loss would be higher, by
    about score / N. Reads a few kilobytes, never the matrix.

    \b
    influence show digits.zarr
    influence show gs://bucket/digits.zarr --test 17 --top 10
    influence show digits.zarr --json | jq '.tests[0].mostHarmful[0].train'
    """  # noqa: D301 - `\b` is click's mark for lines to be left as they are
    from influence_job.cli.summary import read_summary
    from influence_job.storage.store import Store

    with Store.open(url, storage_options) as store:
        try:
            summary = read_summary(store, tests or None, top)
        except IndexError as error:
            raise click.BadParameter(str(error), param_hint="--test") from error
    if as_json:
        click.echo(json.dumps(as_document(summary), indent=2))
    else:
        draw(summary, Console(highlight=False))


def as_document(summary: Summary) -> dict[str, Any]:
    """The summary as a script reads it; camelCase, as all documents of a job."""
    record = summary.record
    return {
        "url": summary.url,
        "finished": summary.finished,
        "name": record.get("name"),
        "jobUid": record.get("jobUid"),
        "spec": record.get("spec"),
        "plan": record.get("plan"),
        "provenance": record.get("provenance"),
        "result": record.get("result"),
        "ledger": {"done": summary.done, "total": summary.total},
        "solver": summary.solver,
        "scores": None if summary.scores is None else asdict(summary.scores),
        "tests": [
            {
                "test": case.test,
                "coordinates": case.coordinates,
                "mean": case.mean,
                "std": case.std,
                "mostHelpful": [asdict(ranked) for ranked in case.most_helpful],
                "mostHarmful": [asdict(ranked) for ranked in case.most_harmful],
            }
            for case in summary.cases
        ],
        "selfInfluences": [asdict(ranked) for ranked in summary.largest],
    }


def draw(summary: Summary, console: Console) -> None:
    """The summary as a person reads it."""
    for line in _headline(summary):
        console.print(escape(line), soft_wrap=True)
    if summary.largest:
        _draw_largest(summary, console)
    if not summary.cases:
        return
    plan = summary.record["plan"]
    perturbs = plan["mode"] == Mode.PERTURBATION
    for case in summary.cases:
        console.print()
        _draw_case(case, console, ("moves most", "moves least") if perturbs else ("helps", "harms"))
    console.print()
    meaning = (
        "A score is the length of the gradient by the training input (#, counted from 0): the larger, the "
        "more a change of that input changes the loss."
        if perturbs
        else "A positive score helps: without that training example (#, counted from 0) the loss would be "
        f"higher, by about score / {plan['train']}."
    )
    console.print(meaning + _summed(plan), soft_wrap=True)


def _summed(plan: dict[str, Any]) -> str:
    """What a score is where the matrix holds its parts."""
    parts = {Operation.INFLUENCES_BY_BLOCK: "blocks", Operation.INFLUENCES_BY_TOKEN: "tokens"}
    if plan["operation"] not in parts:
        return ""
    over = parts[plan["operation"]]
    what = "The gradient" if plan["mode"] == Mode.PERTURBATION else "It"
    return f" {what} is the sum over the {over}; the part of each is in the array influences."


def _headline(summary: Summary) -> list[str]:
    record = summary.record
    if not record.get("plan"):
        return [f"{summary.url}: claimed by a job that has computed nothing yet"]
    plan, spec = record["plan"], record["spec"]
    method = spec["method"]
    state = "complete" if summary.finished else f"not finished: {_how_far(summary)}"
    lines = [
        f"{summary.url}: {record.get('name')}, {plan['operation']} ({plan['mode']}), {state}",
        f"  {_examples(plan)}, {sum(plan['blocks'].values())} {_columns(plan, method)}{_stored(summary)}",
        f"  method {method['name']}"
        + (f", regularization {method['regularization']}" if "regularization" in method else ""),
        *_left_out(record.get("provenance", {}).get("leftOut", {})),
        f"  {_made(record)}",
    ]
    if summary.solver:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary.solver.items())
        side = "training" if plan["operation"] == Operation.SELF_INFLUENCE else "test"
        lines.append(f"  solver, by {side} example: {counts}")
    if summary.scores is not None:
        scores = summary.scores
        lines.append(
            f"  scores: mean {scores.mean:.3g}, from {scores.minimum:.3g} to {scores.maximum:.3g}, "
            f"{scores.nonfinite} not finite"
        )
    if summary.finished and plan["operation"] == Operation.TRAINING_GRADIENTS:
        lines.append(
            "  score test examples from them, with the same task and method: operation: "
            f"InfluencesFromGradients, gradients: {{url: {summary.url}}}"
        )
    if not summary.finished:
        lines.append("  go on with: influence run FILE --output " + summary.url)
    return lines


def _examples(plan: dict[str, Any]) -> str:
    training = f"{plan['train']} training examples"
    alone = Operation(plan["operation"]).is_of_training
    return training if alone else f"{plan['test']} test × {training}{_parts(plan)}"


def _columns(plan: dict[str, Any], method: dict[str, Any]) -> str:
    """What the widths of blocks count: with methods that project, or have every parameter once per
    checkpoint, no parameters.
    """
    other = method["name"] in ("Logra", "TracIn", "Trak") or method.get("complement") is False
    return "columns" if other or plan["operation"] == Operation.TRAINING_GRADIENTS else "parameters"


def _parts(plan: dict[str, Any]) -> str:
    """The dimension `block` or `token` of the matrix, where it has one; blocks by their names."""
    if plan["operation"] == Operation.INFLUENCES_BY_TOKEN:
        return f" × {plan['featureShape'][0]} tokens"
    if plan["operation"] != Operation.INFLUENCES_BY_BLOCK:
        return ""
    return f" × {len(plan['blocks'])} blocks ({_named(plan['blocks'])})"


def _named(names: Collection[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return ", ".join(quoted if len(quoted) <= SHOWN_NAMES else [*quoted[:SHOWN_NAMES], "…"])


def _left_out(names: Mapping[str, Sequence[str]]) -> list[str]:
    """The model's parameters that contribute nothing, by why."""
    told = {"untracked": "not tracked", "excluded": "left out by the method"}
    return [
        f"  {words}: {len(names[why])} of the model's parameters ({_named(names[why])})"
        for why, words in told.items()
        if names.get(why)
    ]


def _stored(summary: Summary) -> str:
    result = summary.record.get("result")
    if not result:
        return ""
    return f", {result['dtype']}, {in_words(result['bytes'])}"


def _made(record: dict[str, Any]) -> str:
    provenance = record.get("provenance", {})
    versions = provenance.get("versions", {})
    named = [
        f"{name} {versions[name]}" for name in ("influence-operator", "torch", "zarr") if name in versions
    ]
    when = provenance.get("created", "at an unknown time")
    return f"made {when} with {', '.join(named)}; job {record.get('jobUid')}"


def _how_far(summary: Summary) -> str:
    """The first kind of row that is not complete, in a job's order."""
    fit = sum(count for kind, count in summary.done.items() if kind.startswith("fit/"))
    for kind, total in summary.total.items():
        done = summary.done.get(kind, 0)
        if kind in ("factors", "gradients", "self") and done == 0:
            return f"fitting, {fit} steps done" if fit else "loading"
        if done < total:
            names = {"factors": "factors", "gradients": "chunks", "region": "regions", "self": "chunks"}
            return f"{done} of {total} {names[kind]}"
    what = {
        Operation.INFLUENCE_FACTORS: "factors",
        Operation.TRAINING_GRADIENTS: "gradients",
        Operation.SELF_INFLUENCE: "self-influences",
    }
    return f"all {what.get(Operation(summary.record['plan']['operation']), 'regions')} are there, verifying"


def _draw_largest(summary: Summary, console: Console) -> None:
    """The training examples with the largest influence on themselves."""
    names = list(summary.largest[0].coordinates)
    console.print()
    _print_whole(_table(("on itself",), (summary.largest,), names), console)
    console.print()
    console.print(
        "A large score: without that training example (#, counted from 0) its own loss would be higher, by "
        f"about score / {summary.record['plan']['train']}. Outliers and wrong labels have large ones.",
        soft_wrap=True,
    )


def _draw_case(case: TestCase, console: Console, titles: tuple[str, str]) -> None:
    told = ", ".join(f"{name} {_short(value)}" for name, value in case.coordinates.items())
    console.print(escape(f"test {case.test}{': ' if told else ''}{told}"), style="bold")
    names = list((*case.most_helpful, *case.most_harmful)[0].coordinates) if case.most_helpful else []
    _print_whole(_table(titles, (case.most_helpful, case.most_harmful), names), console)


def _table(titles: Sequence[str], lists: Sequence[tuple[Ranked, ...]], names: list[str]) -> Table:
    """Ranked examples side by side, a list below each title."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in titles:
        for column in (title, "score", *names):
            table.add_column(escape(column), justify="right", no_wrap=True)
    for rank in range(max(map(len, lists))):
        table.add_row(*(cell for ranked in lists for cell in _cells(ranked, rank, names)))
    return table


def _print_whole(table: Table, console: Console) -> None:
    # Wider than a narrow terminal rather than with numbers cut off.
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(width, console.width)
    console.print(table)


def _cells(ranked: tuple[Ranked, ...], rank: int, names: list[str]) -> list[str]:
    if rank >= len(ranked):
        return [""] * (2 + len(names))
    example = ranked[rank]
    told = [escape(_short(example.coordinates[name])) for name in names]
    return [f"#{example.train}", f"{example.score:+.3g}", *told]


def _short(value: Any) -> str:
    """An annotation with as many digits as a person reads."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
