"""What the doctor says: a finding, with its evidence, its reason, what to do, and the command that confirms it.

for finding in worst_first(findings):
    print(finding.severity, finding.what, finding.confirm)
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note", "ok"]
# The worst first: an error gives wrong answers, a warning costs quality or speed, a note is worth knowing.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "ok")


@dataclass(frozen=True)
class Finding:
    """One answer to one question.

    Args:
        severity: one of `SEVERITIES`.
        check: the question, in a word or two; docs/guide/doctor.md lists all.
        what: what was found, one sentence.
        evidence: the figures or words that show it.
        why: why it matters, or how it is known.
        confirm: a command that shows it.
        advice: what to do; empty where nothing is to be done.
    """

    severity: Severity
    check: str
    what: str
    evidence: str
    why: str
    confirm: str
    advice: str = ""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by severity; those of one severity stay in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def count(findings: Iterable[Finding]) -> dict[Severity, int]:
    """How many findings there are of each severity."""
    found = [finding.severity for finding in findings]
    return {severity: found.count(severity) for severity in SEVERITIES}


def command(*words: object) -> str:
    """A command as one types it."""
    return shlex.join(map(str, words))


def listed(names: list[str], most: int = 3) -> str:
    """The first names or clauses of a list, and how many more there are."""
    shown = ("; " if any("," in name for name in names) else ", ").join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
