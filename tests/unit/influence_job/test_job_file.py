"""Reading a job's YAML: every mistake is named at once, with its line, its field and the cure."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from influence_job import yaml_lines
from influence_job.errors import PermanentError, Reason
from influence_job.exit_codes import ExitCode
from influence_job.job_file import load_job
from influence_job.spec import Device, EkfacSpec

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits.yaml"

JOB = """\
apiVersion: influence-operator.dev/v1alpha1
kind: InfluenceJob
metadata: {name: digits}
spec:
  task:
    entrypoint: package.module:task
  method:
    name: Ekfac
    regularization: 0.01
  output:
    url: gs://bucket/digits.zarr
"""


def complaint(text: str) -> str:
    """The message of the error that `text` raises."""
    with pytest.raises(PermanentError) as caught:
        load_job(text, "job.yaml")
    assert caught.value.reason is Reason.INVALID_SPEC
    assert caught.value.exit_code is ExitCode.PERMANENT
    return caught.value.message


def changed(old: str, new: str) -> str:
    """The job with `old` replaced by `new`."""
    assert old in JOB
    return JOB.replace(old, new)


def test_a_manifest_becomes_a_job() -> None:
    job = load_job(JOB, "job.yaml")
    assert (job.metadata.name, job.spec.output.url) == ("digits", "gs://bucket/digits.zarr")


def test_the_example_is_a_manifest_that_a_cluster_takes_and_asks_for_no_gpu() -> None:
    job = load_job(EXAMPLE.read_text(), "digits.yaml")
    assert job.spec.device is None
    assert job.spec.resolved_device is Device.CPU
    assert job.spec.output.url.startswith("gs://")
    assert job.spec.method == EkfacSpec(name="Ekfac", regularization=0.01)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.5E3", 1500.0), (".5e-2", 0.005), ("1", 1.0)])
def test_numbers_are_read_as_kubernetes_reads_them(text: str, value: float) -> None:
    """YAML 1.1 calls `1e-4` text; the API server calls it a number."""
    assert load_job(changed("0.01", text), "job.yaml").spec.method.regularization == value


def test_dates_stay_text_as_in_json() -> None:
    text = changed("package.module:task", "package.module:task\n    arguments: {day: 2026-01-31}")
    assert load_job(text, "job.yaml").spec.task.arguments == {"day": "2026-01-31"}


@pytest.mark.parametrize(
    "text", ["1:30", "190:20:30", "1:30.5", "-1:30", "=", "2026-01-31", "1e", "e5", "._1"]
)
def test_what_yaml_once_called_a_number_or_more_is_text_as_it_is_to_kubernetes(text: str) -> None:
    arguments = changed("package.module:task", f"package.module:task\n    arguments: {{limit: {text}}}")
    assert load_job(arguments, "job.yaml").spec.task.arguments == {"limit": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0x1F", 31),
        ("010", 8),
        ("0b11", 3),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("+.5", 0.5),
        ("1_0.5", 10.5),
        ("1.5e3", 1500.0),
        ("!!float 1", 1.0),
        ("!!int '5'", 5),
        ("!!str 5", "5"),
        ("!!null ~", None),
    ],
)
def test_numbers_and_tags_of_other_forms_are_read(text: str, value: object) -> None:
    arguments = changed("package.module:task", f"package.module:task\n    arguments: {{limits: [{text}]}}")
    (read,) = load_job(arguments, "job.yaml").spec.task.arguments["limits"]
    assert (type(read), read) == (type(value), value)


def test_values_may_be_nested_as_deep_as_anybody_writes() -> None:
    deep = f"{'[' * 90}1{']' * 90}"
    arguments = changed("package.module:task", f"package.module:task\n    arguments: {{deep: {deep}}}")
    assert str(load_job(arguments, "job.yaml").spec.task.arguments["deep"]).replace(" ", "") == deep


def test_anchors_and_merge_keys_are_followed() -> None:
    text = changed(
        "  output:",
        "  driver: &small {resources: {limits: {memory: 1Gi}}}\n  scheduler: {<<: *small}\n  output:",
    )
    job = load_job(text, "job.yaml")
    assert job.spec.scheduler == job.spec.driver
    assert job.spec.driver.resources.limits["memory"].bytes == 2**30


def test_the_status_of_a_manifest_from_a_cluster_is_ignored() -> None:
    assert load_job(JOB + "status: {phase: Complete}\n", "job.yaml") == load_job(JOB, "job.yaml")


def test_an_unknown_field_is_named_with_its_line_and_what_was_meant() -> None:
    text = changed("    url:", "    onExistng: Fail\n    url:")
    assert (
        complaint(text) == "job.yaml, line 11: spec.output.onExistng: unknown field; did you mean onExisting?"
    )


def test_snake_case_is_no_field_because_the_api_server_knows_none() -> None:
    text = changed("    url:", "    on_existing: Fail\n    url:")
    assert "line 11: spec.output.on_existing: unknown field; did you mean onExisting?" in complaint(text)


def test_a_field_in_the_wrong_place_is_told_where_it_belongs() -> None:
    assert "line 12: spec.topK: unknown field; it belongs under spec.output" in complaint(JOB + "  topK: 5\n")


def test_a_required_field_with_a_typo_is_found_beside_the_gap() -> None:
    message = complaint(changed("regularization", "regularisation"))
    assert "spec.method.regularization: required, but absent" in message
    assert "the file says regularisation" in message
    assert "line 9: spec.method.regularisation: unknown field; did you mean regularization?" in message


def test_a_wrong_choice_lists_the_choices() -> None:
    message = complaint(changed("name: Ekfac", "name: ekfak"))
    assert message == (
        "job.yaml, line 8: spec.method.name: expected Direct | Cg | Lissa | InverseHarmonicMean | Arnoldi | "
        'NystroemSketch | Ekfac | GradDot | TracIn | Trak | Logra, got "ekfak"; did you mean Ekfac?'
    )


def test_a_method_without_a_name_says_so() -> None:
    assert "spec.method.name: required, but absent" in complaint(changed("    name: Ekfac\n", ""))


def test_a_value_of_the_wrong_kind_says_expected_and_got() -> None:
    message = complaint(changed("regularization: 0.01", "regularization: true"))
    assert message.startswith("job.yaml, line 9: spec.method.regularization: expected a number, got true (λ")


def test_chunk_size_zero_is_refused_with_its_limit() -> None:
    message = complaint(JOB + "  chunks: {test: 0, train: 4}\n")
    assert "line 12: spec.chunks.test: expected a value greater than or equal to 1, got 0" in message


def test_a_rule_between_fields_names_the_field_to_change() -> None:
    message = complaint(JOB + "  factors:\n    url: x\n")
    assert message.startswith("job.yaml, line 12: spec.factors: only for operation InfluencesFromFactors")


@pytest.mark.parametrize(
    ("blocks", "where"),
    [
        ('{a: ["0.weight"], b: ["0.bias", "0.weight"]}', "in 'a' and in 'b'"),
        ('{a: ["0.weight", "0.weight"]}', "twice in 'a'"),
    ],
)
def test_a_parameter_stands_in_one_custom_block_once(blocks: str, where: str) -> None:
    text = changed("name: Ekfac", f"name: Direct\n    blocks: Custom\n    customBlocks: {blocks}")
    assert complaint(text) == (
        f"job.yaml, line 10: spec.method.customBlocks: parameter '0.weight' stands {where}; blocks are "
        "disjoint, name it once"
    )


def test_an_item_of_a_list_is_named_by_its_index() -> None:
    text = JOB + "  workers:\n    tolerations:\n      - {key: a}\n      - 7\n"
    assert "line 15: spec.workers.tolerations[1]: expected a mapping, got 7" in complaint(text)


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = changed("0.01", "-1").replace("gs://", "ftp://") + "  suspend: 'yes'\n"
    lines = complaint(text).splitlines()
    assert lines[0] == "job.yaml: 3 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["line 9", "line 11", "line 12"]


@pytest.mark.parametrize(
    ("text", "number"),
    [(".nan", "nan"), (".inf", "inf"), ("-.Inf", "-inf"), ("1e400", "inf"), ("!!float .nan", "nan")],
)
def test_a_number_that_json_lacks_is_refused_with_its_line_however_deep_it_stands(
    text: str, number: str
) -> None:
    """No cluster could hold it, and a fingerprint would differ from itself."""
    said = f"expected a finite number, got {number}, which JSON lacks"
    task = changed("package.module:task", f"package.module:task\n    arguments:\n      a: [1, {{b: {text}}}]")
    assert f"line 8: spec.task.arguments.a[1].b: {said}" in complaint(task)
    options = changed("    url:", f"    storageOptions: {{timeout: {text}}}\n    url:")
    assert f"line 11: spec.output.storageOptions.timeout: {said}" in complaint(options)
    pod = f"{JOB}  workers:\n    env:\n      - {{name: A, value: {text}}}\n"
    assert f"line 14: spec.workers.env[0].value: {said}" in complaint(pod)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job.yaml, expected one document, an InfluenceJob manifest, got none; keep one job per file"),
        ("# a comment\n---\n", "got none"),
        (f"{JOB}---\n{JOB}", "got 2; keep one job per file"),
        ("- a\n", "line 1: expected a mapping with apiVersion, kind, metadata and spec, got a list"),
        ("seven\n", 'got "seven"'),
        (JOB.replace("kind: InfluenceJob", "kind: Job"), 'line 2: kind: expected InfluenceJob, got "Job"'),
        (
            f"{JOB}  suspend: true\n  suspend: false\n",
            "line 13: field 'suspend' stands twice, first in line 12",
        ),
        ("a:\n\tb: 1\n", "the line holds a tab: indent with spaces"),
        ("a: b: c\n", "line 1: expected YAML, but mapping values are not allowed here"),
        ("a: !!python/object:os.system {}\n", "expected a plain value, got a mapping tagged"),
        ("a: &a [*a]\n", "aliases expand without end"),
        ("{[1, 2]: 3}\n", "expected text as a field's name"),
        ("a: !!int\n  abc\n", "line 1: expected a whole number, got 'abc'; quote it if it is text"),
        ("\na: !!int 1:30\n", "line 2: expected a whole number, got '1:30'"),
        ("\na: !!int ''\n", "line 2: expected a whole number, got ''"),
        ("\na: !!float abc\n", "line 2: expected a number, got 'abc'"),
        ("\na: !!bool abc\n", "line 2: expected true or false, got 'abc'"),
        ("\na: !!null abc\n", "line 2: expected nothing, got 'abc'"),
        ("\na: 0x_\n", "line 2: expected a whole number, got '0x_'"),
        (f"\na: {'9' * 5000}\n", f"line 2: expected a whole number, got '{'9' * 39}…'"),
        (
            "\na: !!int [1]\n",
            "line 2: expected a plain value, got a list tagged tag:yaml.org,2002:int; remove the tag",
        ),
        ("\na: !!seq {a: 1}\n", "line 2: expected a plain value, got a mapping tagged tag:yaml.org,2002:seq"),
        ("\na: !!str {a: 1}\n", "line 2: expected a plain value, got a mapping tagged tag:yaml.org,2002:str"),
        ("\na: !!map x\n", "line 2: expected a plain value, got a value tagged tag:yaml.org,2002:map"),
        (f"\na: {'[' * 5000}{']' * 5000}\n", "line 2: expected a manifest, got values nested more than 100"),
        (f"\na: {'{a: ' * 101}1{'}' * 101}\n", "line 2: expected a manifest, got values nested more than"),
        ("a: \x00\n", "expected YAML text"),
    ],
)
def test_what_is_no_single_manifest_is_refused_in_one_sentence(text: str, message: str) -> None:
    assert message in complaint(text)


def test_aliases_that_multiply_are_refused_before_they_fill_memory() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "aliases expand without end" in complaint("\n".join(lines))


def test_a_chain_of_merges_is_refused_before_it_fills_the_stack() -> None:
    links = "\n".join(f"  p{i}: &p{i} {{<<: *p{i - 1}}}" for i in range(1, 3000))
    message = complaint(f"a:\n  p0: &p0 {{x: 1}}\n{links}\n  <<: *p2999\n")
    assert message == "job.yaml, line 2: expected a manifest, got mappings merged (<<) without end"


def test_many_values_are_not_called_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_lines, "MOST_NODES", 100)
    assert "line 1: expected a manifest, got more than 100 values" in complaint(f"a: [{'0, ' * 100}]\n")


def test_a_message_is_readable_when_values_are_long() -> None:
    text = textwrap.dedent(JOB).replace("package.module:task", "x" * 600)
    assert len(complaint(text)) < 400
