"""difference: what differs between two artifacts or reports, the cache miss, and what makes figures unfair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from pydantic import BaseModel, ConfigDict, Field, JsonValue, computed_field

from compileflow.artifact.manifest import ArtifactManifest
from compileflow.contracts import ComponentRecord
from compileflow.steps.cache import changed_parts
from compileflow.steps.compile import flat_spec, recorded_parts
from compileflow.validation.report import Report

# Groups of rows, in order.
GROUPS = (
    "source", "spec", "graph", "toolchain", "files", "size", "verdict", "gates", "latency", "inputs", "machine",
)  # fmt: skip
_SOURCE = ("uri", "revision", "digest", "architecture")
_SPEC = ("target", "hf_task", "precision")
# Parts of a report's environment that change latencies.
_MACHINE = ("machine", "processor", "system", "threads", "torch", "transformers")

Facts = dict[tuple[str, str], JsonValue]


@dataclass(frozen=True)
class Side:
    """An artifact with the last report on it, or a report with the artifact that it is about.

    Attributes:
        digest: Digest of the artifact.
        manifest: Manifest of the artifact; None if it is not on record.
        report: The report; None if it is not on record.
    """

    digest: str
    manifest: ArtifactManifest | None
    report: Report | None


class Row(BaseModel):
    """One value of both sides; None where a side does not have it."""

    model_config = ConfigDict(frozen=True)

    group: str
    name: str
    a: JsonValue
    b: JsonValue

    @computed_field  # type: ignore[prop-decorator]
    @property
    def equal(self) -> bool:
        """Whether both sides have the same value."""
        return self.a == self.b


class Difference(BaseModel):
    """The comparison of two sides. All sentences call them A and B."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[Row, ...] = Field(description="All values, by group.")
    cache: tuple[str, ...] = Field(description="Why the compile of B did not find A in the cache.")
    unfair: tuple[str, ...] = Field(description="Why the figures of the reports do not compare.")
    not_compared: tuple[str, ...] = Field(description="What is not on record.")


def compare(a: Side, b: Side) -> Difference:
    """Compare two sides by what their manifests and reports record."""
    has_manifests = a.manifest is not None and b.manifest is not None
    has_reports = a.report is not None and b.report is not None
    facts = [_facts(side, in_full=has_manifests, with_report=has_reports) for side in (a, b)]
    names = sorted(dict.fromkeys([*facts[0], *facts[1]]), key=lambda name: GROUPS.index(name[0]))
    return Difference(
        rows=tuple(Row(group=key[0], name=key[1], a=facts[0].get(key), b=facts[1].get(key)) for key in names),
        cache=tuple(_cache(a, b)),
        unfair=tuple(_unfair(a.report, b.report)) if a.report and b.report else (),
        not_compared=tuple(_not_compared(a, b)),
    )


def _facts(side: Side, *, in_full: bool, with_report: bool) -> Facts:
    facts = _identity(side)
    if in_full and side.manifest is not None:
        facts |= _manifest_facts(side.manifest)
    if side.report is not None:
        facts["verdict", "outcome"] = side.report.verdict.outcome
        facts["verdict", "reason"] = side.report.verdict.reason
        if with_report:
            facts |= _report_facts(side.report)
    return facts


def _identity(side: Side) -> Facts:
    """Return what both a manifest and a report say about an artifact."""
    source: Mapping[str, JsonValue]
    spec: Mapping[str, JsonValue]
    toolchain: Mapping[str, str]
    if side.manifest is not None:
        source, spec = side.manifest.source.model_dump(), flat_spec(side.manifest.spec)
        toolchain = side.manifest.target.toolchain
    elif side.report is not None:
        spec, toolchain = side.report.subject.model_dump(), side.report.subject.toolchain
        source = {name.removeprefix("source_"): value for name, value in spec.items()}
    else:
        return {}
    facts: Facts = {("source", name): source[name] for name in _SOURCE}
    facts |= {("spec", name): spec[name] for name in _SPEC}
    return facts | {("toolchain", name): version for name, version in toolchain.items()}


def _manifest_facts(manifest: ArtifactManifest) -> Facts:
    facts: Facts = {("spec", name): value for name, value in flat_spec(manifest.spec).items()}
    for spec in manifest.spec.components:
        facts["spec", f"{spec.name}.shape_buckets"] = [str(bucket) for bucket in spec.shape_buckets]
    if manifest.calibration is not None:
        for name, value in manifest.calibration.model_dump().items():
            facts["spec", f"calibration {name}"] = value
    for component, record in manifest.components.items():
        facts |= {("graph", f"{component}.{name}"): value for name, value in _graph(record).items()}
    facts["toolchain", "target version"] = manifest.target.version
    facts["toolchain", "cpu features"] = list(manifest.target.cpu_features)
    facts["toolchain", "manifest schema"] = manifest.schema_version
    for file in manifest.files:
        facts["files", file.path] = {"size_bytes": file.size_bytes, "sha256": file.sha256}
    facts["size", "artifact"] = manifest.size_bytes
    return facts


def _graph(record: ComponentRecord) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = record.model_dump(mode="json")
    values["shape_buckets"] = [str(bucket) for bucket in record.shape_buckets]
    for name, tensors in (("inputs", record.inputs), ("outputs", record.outputs)):
        values[name] = [
            f"{tensor.name} {tensor.dtype} ({' x '.join(map(str, tensor.axes))})" for tensor in tensors
        ]
    return values


def _report_facts(report: Report) -> Facts:
    facts: Facts = {("size", "serving memory"): report.figures.get("serving_memory_bytes")}
    for gate in report.verdict.gates:
        name = f"{gate.gate} (suite {gate.suite})" if gate.suite else gate.gate
        facts["gates", name] = gate.model_dump(include={"outcome", "measured", "comparison", "limit"})
    if report.score is not None:
        facts["verdict", report.score.name] = report.score.model_dump(include={"source", "compiled", "examples"})
    for latency in report.latencies:
        facts["latency", latency.shape] = {
            name: value for name, value in asdict(latency).items() if name != "shape"
        }
    facts["inputs", "component"] = report.subject.component
    facts["inputs", "examples"] = f"{report.examples_count} from {report.examples_origin}"
    facts["inputs", "examples digest"] = report.examples_digest or None
    facts["inputs", "measurement version"] = report.measurement_version
    facts["inputs", "suite"] = report.suite_digest
    facts["inputs", "user's suite"] = report.user_suite_digest or None
    for covered in report.coverage:
        facts["inputs", covered.subject] = f"{covered.count} of {covered.total}"
    return facts | {("machine", name): value for name, value in report.environment.items()}


def _cache(a: Side, b: Side) -> Iterator[str]:
    if a.manifest is None or b.manifest is None:
        return
    if a.digest == b.digest:
        yield "A and B are the same artifact, by their records; `compileflow verify` checks their files."
        return
    changes = changed_parts(recorded_parts(a.manifest), recorded_parts(b.manifest))
    if not changes:
        yield (
            "The cache keys of A and B are equal, but their files differ: either the compile does not repeat its "
            "files, or a file was changed. In one store, the later compile is a hit."
        )
        return
    yield f"A is not a hit for B: changed: {', '.join(changes)}."
    if a.manifest.source.digest != b.manifest.source.digest:
        yield "The manifests record the source model as a whole, so they do not name its changed files."


def _unfair(a: Report, b: Report) -> Iterator[str]:
    if a.subject.source_digest != b.subject.source_digest:
        yield "The reports compare with different source models."
    if a.subject.component != b.subject.component:
        yield f"A is about component {a.subject.component}, B about component {b.subject.component}."
    inputs = [f"{report.examples_count} examples from {report.examples_origin}" for report in (a, b)]
    digests = {report.examples_digest for report in (a, b) if report.examples_digest}
    if inputs[0] != inputs[1]:
        yield f"The inputs differ: {inputs[0]} in A, {inputs[1]} in B."
    elif len(digests) > 1:
        yield f"The inputs differ: A and B have other content in {inputs[0]}."
    versions = [report.measurement_version for report in (a, b)]
    if None not in versions and versions[0] != versions[1]:
        yield f"The measurements have other versions: {versions[0]} in A, {versions[1]} in B."
    if (a.suite_digest, a.user_suite_digest) != (b.suite_digest, b.user_suite_digest):
        yield "The suites differ, so the same gate may have another limit or meaning."
    for side, report in (("A", a), ("B", b)):
        if shapes := [latency.shape for latency in report.latencies if latency.busy]:
            yield f"Latencies of {side} were measured on a busy machine: {', '.join(shapes)}."
    machine = [name for name in _MACHINE if a.environment.get(name) != b.environment.get(name)]
    if machine and a.latencies and b.latencies:
        yield f"The latencies come from different machines or settings: {', '.join(machine)}."


def _not_compared(a: Side, b: Side) -> Iterator[str]:
    for name, side in (("A", a), ("B", b)):
        if side.manifest is None:
            yield f"The store does not hold the artifact of {name}: its files, size and cache key are unknown."
        if side.report is None:
            yield f"The store has no report on {name}: gates and latencies are unknown."
        elif a.report is not None and b.report is not None:
            unknown = ["examples"] if not side.report.examples_digest else []
            unknown += ["version of the measurements"] if side.report.measurement_version is None else []
            if unknown:
                yield f"The report of {name} is older and does not record the {' and the '.join(unknown)}."
