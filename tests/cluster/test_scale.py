"""What many jobs cost the API server, in requests, never in seconds; `make bench` runs more of the same."""

from __future__ import annotations

import pytest

import scale
from api_requests import WRITES, by_verb, writes
from cluster import Cluster
from cluster_storage import ClusterStorage
from scale import CHILDREN, SMALL

pytestmark = pytest.mark.host

MOST_UNTIL_CHILDREN = 10
"""Requests of the operator per job until it has its children: six children, some Events and statuses."""


def test_a_job_costs_its_children_and_few_requests_more_and_none_while_it_waits(
    cluster: Cluster, operator: None
) -> None:
    found = scale.waiting(cluster, SMALL.waiting)

    for kind, number in CHILDREN.items():
        assert found.until_settled["create", kind] == number * found.jobs
    verbs = by_verb(found.until_children)
    assert verbs.total() <= MOST_UNTIL_CHILDREN * found.jobs, found.until_children
    assert verbs["update"] + verbs["delete"] == 0, found.until_children
    assert found.until_settled["patch", "influencejobs/status"] <= 5 * found.jobs, found.until_settled
    assert writes(found.while_waiting) == {}
    # What the warnings in their namespace say is looked up for all of them together.
    assert found.while_waiting.total() <= scale.WATCHED_SECONDS / 5 + 1, found.while_waiting


@pytest.mark.alone
def test_a_restart_writes_nothing_about_jobs_that_rest(cluster: Cluster, operator: None) -> None:
    found = scale.resting(cluster, SMALL.suspended, SMALL.finished)

    assert found.phases == ("Complete", "Failed", "Suspended")
    assert writes(found.restart) == {}
    assert found.restart.total() <= 1, found.restart


def test_pods_of_others_are_never_told_of(cluster: Cluster, operator: None) -> None:
    found = scale.foreign(cluster, SMALL.foreign)

    assert found.requests == {}
    assert found.told < found.pods, "the watch of pods selects nothing"


def test_running_jobs_cost_a_bounded_number_of_requests(
    cluster: Cluster, operator: None, storage: ClusterStorage
) -> None:
    found = scale.running(cluster, storage, SMALL.running)

    assert found.ours["create", "daskclusters"] == found.jobs
    assert by_verb(found.ours).total() <= 60 * found.jobs, found.ours


def test_a_dask_job_does_the_same_work_unknown_to_our_operator(
    cluster: Cluster, operator: None, storage: ClusterStorage
) -> None:
    found = scale.running_dask_jobs(cluster, storage, SMALL.running)

    assert found.ours == {}
    assert not WRITES.isdisjoint(by_verb(found.theirs))
