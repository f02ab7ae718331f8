"""A spec that the API server let through, but that is none, stalls the job and names the field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from operator_objects import SETTINGS, World, computing, driver_ends, influence_job, pods_end


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"workers": {"replicas": "many"}}, "spec.workers.replicas"),
        ({"method": {"name": "Magic"}}, "spec.method.name"),
        ({"method": {"name": "Ekfac", "regularization": "much"}}, "spec.method.regularization"),
        ({"output": {"url": "ftp://somewhere"}}, "spec.output.url"),
        ({"operation": "InfluencesFromFactors"}, "spec.factors"),
        ({"backoffLimit": -1}, "spec.backoffLimit"),
        ({"unknown": 1}, "spec.unknown"),
    ],
)
def test_the_field_is_named(change: dict, field: str):
    world = World()
    world.job["spec"] |= change
    decision = world.step()
    assert not decision.actions
    assert world.condition("Stalled") == "True InvalidSpec"
    assert world.condition("Ready") == "False InvalidSpec"
    assert world.message("Stalled").startswith(f"{field}: ")
    assert world.status["observedGeneration"] == 1
    assert world.status["phase"] == "Pending"
    assert world.events == ["InvalidSpec"]
    assert world.step(100).status == world.job["status"]


def token_for(audience: object) -> dict:
    """Settings of pods with a ServiceAccount's token."""
    sources = [{"configMap": {"name": "a"}}, {"serviceAccountToken": {"audience": audience, "path": "token"}}]
    return {"volumes": [{"name": "cache", "emptyDir": {}}, {"name": "t", "projected": {"sources": sources}}]}


ROLES = ("driver", "scheduler", "workers", "podDefaults")


@pytest.mark.parametrize("role", ROLES)
def test_a_token_that_this_clusters_api_server_accepts_is_refused_wherever_it_is_asked_for(role: str):
    settings = replace(SETTINGS, api_audiences=("https://issuer.example", "k3s"))
    world = World(influence_job(**{role: token_for("k3s")}), settings=settings)
    assert not world.step().actions
    assert world.condition("Stalled") == "True InvalidSpec"
    field = f"spec.{role}.volumes[1].projected.sources[1].serviceAccountToken.audience"
    assert world.message("Stalled").startswith(
        f"{field}: expected the audience of whom the token is for, got 'k3s'"
    )


@pytest.mark.parametrize("audience", ["https://bucket", "K3S", "k3s.example", 7])
def test_a_token_for_somebody_else_is_the_jobs_own_affair(audience: object):
    settings = replace(SETTINGS, api_audiences=("k3s",))
    world = World(influence_job(driver=token_for(audience)), settings=settings)
    world.step()
    assert world.attempt == 1


def test_every_problem_is_named_up_to_five():
    world = World()
    world.job["spec"] |= {f"unknown{index}": 1 for index in range(9)}
    world.step()
    assert world.message("Stalled").endswith("and 4 more")


def test_a_spec_that_is_no_mapping_or_missing_is_refused_too():
    for spec in (None, [], "text", 7):
        world = World()
        world.job["spec"] = spec
        world.step()
        assert world.condition("Stalled") == "True InvalidSpec"


def test_mending_the_spec_starts_the_job():
    world = World()
    good = world.job["spec"]
    world.job["spec"] = good | {"unknown": 1}
    world.step()
    world.change()
    world.job["spec"] = good
    world.step(1)
    assert world.condition("Stalled") == ""
    assert world.attempt == 1


def test_what_runs_goes_on_while_the_spec_is_wrong():
    world = computing()
    before = world.objects
    world.change(workers={"replicas": -3})
    assert not world.step(1).actions
    assert world.objects == before
    assert world.status["attempts"]["current"] == 1


def test_a_result_stays_a_result():
    world = computing()
    driver_ends(world, 0)
    world.step(1)
    world.change(unknown=1)
    world.step(1)
    assert world.condition("Complete") == "True Complete"
    assert world.condition("Stalled") == ""
    assert world.status["observedGeneration"] == 2


def test_labels_and_annotations_are_anybodys():
    world = World(influence_job())
    world.job["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "x" * 200_000}
    world.job["metadata"]["labels"] = {f"label{index}": "x" for index in range(200)}
    world.step()
    assert world.attempt == 1


def test_managed_by_us_is_no_other_manager():
    world = World(influence_job(managedBy="influence-operator.dev/influence-operator"))
    assert world.decide().actions


TOKENS = [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]


def test_suspending_a_job_counts_while_its_spec_is_wrong_and_nothing_begins():
    world = computing()
    world.change(podDefaults={"volumes": TOKENS})
    world.step(1)
    assert (world.condition("Stalled"), world.status["phase"]) == ("True InvalidSpec", "Running")
    assert world.condition("ClusterReady").startswith("True")
    world.change(suspend=True)
    assert {"DaskCluster", "Job"} <= {action.kind for action in world.step(1).actions}
    pods_end(world)
    world.step(1)
    assert world.condition("Suspended") == "True Suspended"
    world.change(suspend=False)
    world.step(10)
    assert (world.attempt, world.condition("Stalled")) == (1, "True InvalidSpec")
    world.step(10 * 3600)
    assert world.condition("Failed") == ""
    world.change(podDefaults={})
    world.step(1)
    assert (world.attempt, world.condition("Stalled")) == (2, "")


def test_a_job_ends_as_it_began_while_its_spec_is_wrong():
    world = computing(activeDeadlineSeconds=100)
    world.change(podDefaults={"volumes": TOKENS})
    world.step(1)
    driver_ends(world, 0)
    world.step(1)
    assert world.condition("Complete") == "True Complete"
    assert not world.find("DaskCluster")
    late = computing(activeDeadlineSeconds=100)
    late.change(podDefaults={"volumes": TOKENS})
    late.step(200)
    assert late.condition("Failed") == "True DeadlineExceeded"


def test_what_somebody_deleted_is_made_again_while_the_spec_is_wrong():
    world = computing()
    world.change(podDefaults={"volumes": TOKENS})
    world.step(1)
    world.remove("NetworkPolicy")
    world.step(1)
    assert world.find("NetworkPolicy")
