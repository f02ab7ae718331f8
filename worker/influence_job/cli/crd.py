"""`influence crd`: the CustomResourceDefinition as YAML, for `kubectl apply` and for `make manifests`."""

from __future__ import annotations

import json

import click


@click.command()
def crd() -> None:
    """Print the CustomResourceDefinition of InfluenceJob.

    The API server checks every job against it. Deleting it from a cluster deletes all jobs there.

    \b
    influence crd | kubectl apply --server-side -f -
    """  # noqa: D301 - `\b` is click's mark for lines to be left as they are
    import yaml

    from influence_job.crd import custom_resource_definition

    # Through JSON, so that equal parts are copies: shared ones would become anchors.
    copied = json.loads(json.dumps(custom_resource_definition()))
    click.echo("# Made by `influence crd` from the models of influence_job.spec and influence_job.status.")
    click.echo(yaml.safe_dump(copied, sort_keys=False, allow_unicode=True, width=110), nl=False)
