"""The operator's settings, read from the environment."""

import subprocess
import sys

import pytest

from influence_job.spec import Quantity
from influence_operator.settings import Defaults, Settings, read

IMAGE = {"INFLUENCE_OPERATOR_IMAGE": "registry/worker:1"}


def test_the_image_is_all_that_must_be_said():
    assert read({**IMAGE, "HOME": "/"}) == Settings(Defaults("registry/worker:1"))


def test_every_kind_of_field_is_read():
    settings = read(
        {
            **IMAGE,
            "INFLUENCE_OPERATOR_WORKER_MEMORY": "8Gi",
            "INFLUENCE_OPERATOR_IMAGE_PULL_POLICY": "Always",
            "INFLUENCE_OPERATOR_LEASE_NAME": "own-influence-operator",
            "INFLUENCE_OPERATOR_WATCH_NAMESPACES": "a,b",
            "INFLUENCE_OPERATOR_OPERATOR_SELECTOR": "app=x,tier=y",
            "INFLUENCE_OPERATOR_LEASE_SECONDS": "30",
            "INFLUENCE_OPERATOR_RESYNC_SECONDS": "12.5",
            "INFLUENCE_OPERATOR_LOG_FORMAT": "plain",
        }
    )

    assert settings == Settings(
        Defaults("registry/worker:1", image_pull_policy="Always", worker_memory=Quantity("8Gi")),
        lease_name="own-influence-operator",
        watch_namespaces=("a", "b"),
        operator_selector={"app": "x", "tier": "y"},
        lease_seconds=30,
        resync_seconds=12.5,
        log_format="plain",
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("IMAGE", "", "expected the image"),
        ("LEASE_SECONDS", "soon", "expected a whole number above 0"),
        ("LEASE_SECONDS", "0", "expected a whole number above 0"),
        ("RESYNC_SECONDS", "nan", "expected a number above 0"),
        ("WORKER_MEMORY", "4GB", "expected a quantity such as 16Gi, 500m or 1, got '4GB'"),
        ("WORKER_MEMORY", "", "expected a quantity such as 16Gi, 500m or 1, got ''"),
        ("DRIVER_CPU", "-1", "expected a quantity"),
        ("SCHEDULER_MEMORY", "<nil>", "expected a quantity"),
        ("IMAGE_PULL_POLICY", "Sometimes", "expected Literal['Always', 'IfNotPresent', 'Never']"),
        ("LOG_FORMAT", "xml", "expected Literal['json', 'plain']"),
        ("OPERATOR_SELECTOR", "app", "expected key=value"),
        ("NAMSPACE", "x", "no such setting"),
        ("DEFAULTS", "x", "no such setting"),
        ("METRICS_PORT", "tcp://10.96.0.7:9090", "set enableServiceLinks: false"),
        ("SERVICE_HOST", "10.96.0.7", "set enableServiceLinks: false"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(name, value, expected):
    with pytest.raises(ValueError, match="INFLUENCE_OPERATOR_" + name) as caught:
        read({**IMAGE, "INFLUENCE_OPERATOR_" + name: value})

    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**IMAGE, "INFLUENCE_OPERATOR_LEASE_SECONDS": "x"},
        {**IMAGE, "INFLUENCE_OPERATOR_WORKER_MEMORY": "4GB"},
        {**IMAGE, "KUBECONFIG": "/nowhere"},
    ],
    ids=["no image", "wrong number", "wrong quantity", "no cluster"],
)
def test_the_process_ends_with_64_and_one_line_when_its_settings_are_wrong(environment):
    command = [sys.executable, "-c", "from influence_operator.cli import main; main()"]
    ended = subprocess.run(
        command, env={**environment, "HOME": "/nowhere"}, capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == 64
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
