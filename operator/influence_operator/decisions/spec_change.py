"""A spec that was changed while its attempt's driver has not started: the attempt starts anew with it.

Such a driver has done nothing that could be lost, and what it lacks may be what the change mends: an image
that cannot be pulled, a node selector that no node fits, a setting that the API server refuses.
"""

from __future__ import annotations

from influence_job.status import ConditionType
from influence_operator.decisions import observed
from influence_operator.decisions.course import Course
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.view import View
from influence_operator.manifests.config_map import begun_with
from influence_operator.manifests.names import Role

_OF_PODS = ("output", "driver", "scheduler", "workers", "pod_defaults")
"""Fields that may change and that pods are made from, beside the image."""


def changed_before_start(view: View, course: Course, default_image: str) -> bool:
    """Whether this generation is new and its pods are others than those of an attempt that did not start."""
    ready = view.condition(ConditionType.READY)
    if ready is None or ready.observed_generation in (None, view.generation):
        return False
    if not all(map(_waits, view.pods(course.number, Role.DRIVER))):
        return False
    return any(_differs(view, copy, default_image) for copy in view.of(course.number).config_maps[:1])


def _waits(pod: Object) -> bool:
    return observed.text(pod, "status", "phase") in ("", "Pending")


def _differs(view: View, copy: Object, default_image: str) -> bool:
    begun = begun_with(copy, view.spec)
    if begun is view.spec:
        return False  # the copy cannot be read
    image = view.spec.image or default_image
    return begun.image != image or any(getattr(begun, f) != getattr(view.spec, f) for f in _OF_PODS)
