"""Names, labels and owners of children."""

from __future__ import annotations

import pytest

from attempts import UID, all_of, build, job
from influence_operator.manifests import names
from influence_operator.manifests.attempt import AttemptManifests


def test_a_name_holds_job_uid_and_attempt() -> None:
    assert names.base_name("digits", UID, 7) == "digits-3f2a9-7"


def test_the_longest_job_name_leaves_room_for_a_million_attempts_below_dask_kubernetes_limit() -> None:
    assert len(names.base_name("j" * 40, UID, 999_999)) <= 53


def test_every_child_has_our_labels_its_owner_and_the_attempts_name(everything: AttemptManifests) -> None:
    for manifest in all_of(everything):
        metadata = manifest["metadata"]
        assert metadata["name"].startswith("everything-3f2a9-1")
        assert metadata["namespace"] == "research"
        ours = {names.JOB_UID: UID, names.JOB: "everything", names.ATTEMPT: "1"}
        assert {key: metadata["labels"][key] for key in ours} == ours
        (owner,) = metadata["ownerReferences"]
        assert owner["uid"] == UID
        assert owner["controller"] is True
        assert owner["blockOwnerDeletion"] is True


def test_no_label_and_no_annotation_of_the_job_is_copied(everything: AttemptManifests) -> None:
    for manifest in all_of(everything):
        assert all(key.startswith(names.PREFIX) for key in manifest["metadata"]["labels"])
        assert "annotations" not in manifest["metadata"]


def test_another_attempt_shares_no_name_with_the_first() -> None:
    def children(attempt: int) -> set[tuple[str, str]]:
        return {(m["kind"], m["metadata"]["name"]) for m in all_of(build(job(), attempt=attempt))}

    assert not children(1) & children(2)


@pytest.mark.parametrize("role", list(names.Role))
def test_a_selector_picks_the_pods_of_one_attempt(role: names.Role) -> None:
    selector = names.pod_selector(UID, 1, role)
    assert selector.items() <= names.labels("digits", UID, 1, role).items()
    assert not selector.items() <= names.labels("digits", UID, 2, role).items()
