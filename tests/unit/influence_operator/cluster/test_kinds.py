"""How objects are addressed, and what the operator may do."""

import pytest

from influence_operator.cluster.kinds import (
    DASK_CLUSTER,
    INFLUENCE_JOB,
    KINDS,
    POD,
    RIGHTS,
    SECRET,
    WATCHED_KINDS,
    allowed,
    kind_of,
)


def test_core_and_group_kinds_have_their_own_paths():
    assert POD.path("ns", "p") == "/api/v1/namespaces/ns/pods/p"
    assert POD.path(None) == "/api/v1/pods"
    assert (
        INFLUENCE_JOB.path("ns", "j", "status")
        == "/apis/influence-operator.dev/v1alpha1/namespaces/ns/influencejobs/j/status"
    )


def test_a_manifest_names_its_kind():
    assert kind_of("kubernetes.dask.org/v1", "DaskCluster") is DASK_CLUSTER
    assert all(kind_of(kind.api_version, kind.kind) is kind for kind in KINDS)
    with pytest.raises(LookupError, match="ClusterRole: expected one of"):
        kind_of("rbac.authorization.k8s.io/v1", "ClusterRole")


def test_secrets_can_be_made_and_deleted_but_never_read():
    assert [right.verbs for right in RIGHTS if right.kind == SECRET] == [("create", "delete")]


def test_what_is_watched_may_be_listed_and_watched():
    for kind in WATCHED_KINDS:
        assert allowed(kind, "list")
        assert allowed(kind, "watch")


def test_neither_the_spec_of_a_job_nor_a_childs_template_can_be_written():
    for right in RIGHTS:
        if right.kind == INFLUENCE_JOB and not right.subresource:
            assert "patch" not in right.verbs
            assert "update" not in right.verbs
