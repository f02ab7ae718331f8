"""`influence watch`: a job in a cluster, live."""

from __future__ import annotations

import json
import sys

import click

from influence_job.cli.job_view import JobView, ended, read_status
from influence_job.cli.options import verbose_option
from influence_job.exit_codes import ExitCode


@click.command()
@click.argument("name")
@click.option("-n", "--namespace", help="Its namespace. Default: that of the kubeconfig's context.")
@click.option("--context", "kube_context", help="Context of the kubeconfig. Default: its current one.")
@click.option("--kubeconfig", type=click.Path(dir_okay=False), help="Default: $KUBECONFIG, ~/.kube/config.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document per change, for scripts.")
@verbose_option
@click.pass_context
def watch(
    context: click.Context,
    name: str,
    namespace: str | None,
    kube_context: str | None,
    kubeconfig: str | None,
    as_json: bool,
) -> None:
    """Watch the InfluenceJob NAME in a cluster until it ends.

    Waits for it if it does not exist yet. Exit codes: 0 it is Complete; 64 it Failed or was deleted; 75 the
    cluster does not answer.

    \b
    influence watch digits -n research
    influence watch digits --json | jq .status.progress
    """  # noqa: D301 - `\b` is click's mark for lines to be left as they are
    from influence_job.cli.job_changes import ClusterLostError, Jobs

    def tell(message: str) -> None:
        click.echo(message, err=True)

    jobs = Jobs(kubeconfig, kube_context, namespace)
    with JobView(sys.stdout) as view:
        try:
            for change in jobs.changes(name, tell):
                if change.job is None:
                    tell(f"waiting for influencejob {name} in namespace {jobs.namespace}")
                    continue
                if as_json:
                    click.echo(json.dumps({"deleted": change.deleted, **_essentials(change.job)}))
                else:
                    view.show(change.job)
                outcome = ended(change.job, read_status(change.job), deleted=change.deleted)
                if outcome is not None:
                    view.close()
                    if not as_json:
                        click.echo(outcome.text)
                    context.exit(outcome.code)
        except KeyboardInterrupt:
            view.close()
            tell("no longer watching; the job goes on")
            context.exit(ExitCode.INTERRUPTED)
        except ClusterLostError as error:
            view.close()
            tell(f"error: {error}")
            context.exit(ExitCode.RETRY)


def _essentials(job: dict[str, object]) -> dict[str, object]:
    """What changes: `metadata` without the bookkeeping of field managers, and the status."""
    metadata = job["metadata"]
    assert isinstance(metadata, dict), metadata
    kept = {key: metadata.get(key) for key in ("name", "namespace", "uid", "generation")}
    return {"metadata": kept, "status": job.get("status", {})}
