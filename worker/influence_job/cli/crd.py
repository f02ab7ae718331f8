"""`influence crd`: the CustomResourceDefinition as YAML, for `kubectl apply` and for `make manifests`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option(
    "--keep",
    is_flag=True,
    help="Add the annotation helm.sh/resource-policy: keep, for a chart's templates.",
)
def crd(keep: bool) -> None:
    """Print the CustomResourceDefinition of InfluenceJob.

    The API server checks every job against it. Deleting it from a cluster deletes all jobs there.

    \b
    influence crd | kubectl apply --server-side -f -
    """  # noqa: D301 - `\b` is click's mark for lines to be left as they are
    import yaml

    from influence_job.crd import KEPT_BY_HELM, custom_resource_definition

    definition = custom_resource_definition(KEPT_BY_HELM if keep else None)
    # Through JSON, so that equal parts are copies: shared ones would become anchors.
    copied = json.loads(json.dumps(definition))
    click.echo("# Made by `influence crd` from the models of influence_job.spec and influence_job.status.")
    click.echo(yaml.safe_dump(copied, sort_keys=False, allow_unicode=True, width=110), nl=False)
