"""The result of an examination, and its verdict in one line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nextn.config import ModelConfig, MTPConfig
from nextn.interop.doctor.finding import SEVERITIES, Finding, Severity, counted
from nextn.interop.doctor.stored import Kind
from nextn.mtp.layout import RELEASED_SCHEME

CONVENTIONS = ("concat", "trunk_hidden", "carry", "head_norm")
"""Fields of `MTPConfig` in which implementations differ, and which no tensor's name or shape shows."""


@dataclass(frozen=True)
class Diagnosis:
    """The findings of an examination, and the facts that the verdict needs.

    Attributes:
        path: what was examined.
        kind: folder, safetensors or gguf.
        model_type: the family, as the checkpoint names it; None where nothing does.
        num_declared: MTP modules declared to engines; None where nothing could declare them.
        num_stored: MTP modules of which some tensor is stored; those of a scheme that no engine runs count as one.
        num_mtp_tensors: their tensors.
        conventions: by name of `CONVENTIONS`, those that are known.
        findings: in the order of the examination.
        context: longest context in tokens; None where nothing says.
        settings: as nextn reads them, where the family is its own.
    """

    path: Path
    kind: Kind
    model_type: str | None = None
    num_declared: int | None = None
    num_stored: int = 0
    num_mtp_tensors: int = 0
    conventions: tuple[tuple[str, str], ...] = ()
    findings: tuple[Finding, ...] = ()
    context: int | None = None
    settings: tuple[ModelConfig, MTPConfig] | None = None

    @property
    def severity(self) -> Severity:
        """That of the worst finding."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="ok")

    @property
    def is_healthy(self) -> bool:
        """Nothing wrong: MTP as declared, or plainly none."""
        return self.severity != "problem"

    @property
    def has_mtp(self) -> bool:
        """Modules are stored, and nothing is wrong with them."""
        return self.is_healthy and self.num_stored > 0

    @property
    def verdict(self) -> str:
        """The whole of it in one line."""
        problems = [finding for finding in self.findings if finding.severity == "problem"]
        warnings = [finding.what for finding in self.findings if finding.severity == "warning"]
        if problems:
            return f"{problems[0].what}: {problems[0].detail}"
        shard = self.detail_of("one shard")
        if not self.num_stored:
            return f"one shard: {shard}" if shard else f"no MTP: {self.detail_of('no MTP')}"
        modules = f"{counted(self.num_stored, 'module')}, {counted(self.num_mtp_tensors, 'tensor')}"
        if self.settings and self.settings[1].scheme != RELEASED_SCHEME:
            modules = f"scheme {self.settings[1].scheme}, {counted(self.num_mtp_tensors, 'tensor')}"
        but = f", but look at: {', '.join(warnings)}" if warnings else ""
        if shard:
            return f"one shard: {shard}; {modules} in it, plausible{but}"
        complete = "" if "block unlike the trunk" in warnings else "complete and "
        return f"MTP healthy: {modules}, {complete}plausible{but}"

    def detail_of(self, what: str) -> str:
        """The detail of the finding of that name, empty where there is none."""
        return next((finding.detail for finding in self.findings if finding.what == what), "")

    def adding(self, *findings: Finding) -> Diagnosis:
        """The same with more findings."""
        return replace(self, findings=self.findings + findings)

    def to_table(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "verdict": self.verdict,
            "is_healthy": self.is_healthy,
            "model_type": self.model_type,
            "num_declared_modules": self.num_declared,
            "num_stored_modules": self.num_stored,
            "num_mtp_tensors": self.num_mtp_tensors,
            "conventions": dict(self.conventions),
            "findings": [asdict(finding) for finding in self.findings],
        }
