"""Report drive.py's figures: each variant's gain by case, and whether it exceeds the noise."""

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from variants import Variant

# Kinds of cases that a constant may help or hurt, by patterns of their names.
GROUPS = {
    "large": r"/float32/(16M|64M|256M|gpt2)$",
    "16-bit": r"(float16|master|remainder|stochastic).*/(64M|gpt2)$",
    "small": r"/(64K|256K|1M|4M|1000x\d+)$",
    "device": r"/(device|counters)$",
    "offset": r"/(odd|apart)$",
}
_MOST_LISTED = 5  # cases listed for a variant


@dataclass(frozen=True)
class Gain:
    """A variant's gain in a case.

    Attributes:
        case: The case's name.
        gain: How much longer the shipped constants take, as a fraction; negative if less long.
        spread: The spread of the shipped constants' runs, as a fraction.
    """

    case: str
    gain: float
    spread: float

    @property
    def counts(self) -> bool:
        """Whether the gain exceeds the spread."""
        return abs(self.gain) > self.spread


def seconds(variant: Variant, case: str) -> list[float]:
    """Return a variant's times in a case, run by run."""
    lines = (run.get(case, {}) for run in variant.runs)
    return [line["seconds"] for line in lines if line.get("seconds")]


def spread(variant: Variant, case: str) -> float | None:
    """Return the spread of a variant's runs as a fraction; None for fewer than two runs."""
    times = seconds(variant, case)
    if len(times) < 2:
        return None
    return max(times) / min(times) - 1


def gains(shipped: Variant, variant: Variant) -> list[Gain]:
    """Return a variant's gain in each case with enough runs."""
    if variant.status != "measured":
        return []
    result = []
    for case in shipped.runs[0] if shipped.runs else ():
        times, noise = seconds(variant, case), spread(shipped, case)
        if times and noise is not None and case.startswith(("apply/", "store/")):
            gain = statistics.median(seconds(shipped, case)) / statistics.median(times) - 1
            result.append(Gain(case, gain, noise))
    return result


def is_promising(shipped: Variant, variant: Variant) -> bool:
    """Whether a variant is better in some case."""
    return any(g.counts and g.gain > 0 for g in gains(shipped, variant))


def text(shipped: Variant, others: list[Variant]) -> str:
    """Return all tables, the verdicts last."""
    lines = list(_builds([shipped, *others]))
    if shipped.runs:
        lines = [*_cases(shipped), "", *lines, "", *_verdicts(shipped, others)]
    return "\n".join(lines)


def _cases(shipped: Variant) -> Iterable[str]:
    yield f"{'the shipped numbers':<34}{'us':>10}{'GB/s':>8}{'of copy':>9}{'spread':>8}"
    for case, line in shipped.runs[0].items():
        times, noise = seconds(shipped, case), spread(shipped, case)
        if not times:
            yield f"{case:<34}{line.get('skipped', ''):>10}"
            continue
        median = statistics.median(times)
        part = statistics.median(r[case]["part_of_copy"] for r in shipped.runs if case in r)
        gigabytes = line["bytes"] / median * 1e-9
        noisy = "" if noise is None else f"{noise:.1%}"
        yield f"{case:<34}{median * 1e6:>10.2f}{gigabytes:>8.0f}{part:>9.1%}{noisy:>8}"


def _builds(variants: list[Variant]) -> Iterable[str]:
    yield f"{'registers (spilled bytes)':<28}{'float32, device':<24}{'float64, device':<24}seconds"
    for variant in variants:
        if "error" in variant.build:
            error = re.search(r".*\berror\b.*", variant.build["error"])
            why = error[0].strip() if error else variant.build["error"].strip()
            yield f"{variant.name:<28}{variant.status}: {why}"
            continue
        cells = []
        for real in ("float32", "float64"):
            kinds = []
            for numbers in (False, True):
                kernels = [
                    kernel
                    for kernel in variant.build.get("kernels", ())
                    if f"apply {real}" in kernel["kernel"]
                    and kernel["kernel"].endswith("device") == numbers
                ]
                if kernels:
                    worst = max(kernels, key=lambda k: (k["spilled"], k["registers"]))
                    spilled = f" ({worst['spilled']})" if worst["spilled"] else ""
                    kinds.append(f"{worst['registers']}{spilled}")
            cells.append(", ".join(kinds))
        yield f"{variant.name:<28}{cells[0]:<24}{cells[1]:<24}{variant.build.get('seconds', '')}"


def _verdicts(shipped: Variant, others: list[Variant]) -> Iterable[str]:
    header = "".join(f"{group:>9}" for group in GROUPS)
    yield f"{'mean gain, by kind of case':<28}{'better':>7}{'worse':>7}{header}"
    for variant in others:
        found = gains(shipped, variant)
        if not found:
            yield f"{variant.name:<28}{variant.status}"
            continue
        better = sum(g.counts and g.gain > 0 for g in found)
        worse = sum(g.counts and g.gain < 0 for g in found)
        cells = ""
        for pattern in GROUPS.values():
            ratios = [1 + g.gain for g in found if re.search(pattern, g.case)]
            cells += f"{statistics.geometric_mean(ratios) - 1:>+9.1%}" if ratios else f"{'':>9}"
        yield f"{variant.name:<28}{better:>7}{worse:>7}{cells}"
    for variant in others:
        best = sorted(gains(shipped, variant), key=lambda g: -g.gain)
        best = [g for g in best if g.counts and g.gain > 0][:_MOST_LISTED]
        if best:
            listed = ", ".join(f"{g.case} {g.gain:+.1%} (spread {g.spread:.1%})" for g in best)
            yield f"better with {variant.name}: {listed}"
    if shipped.status != "measured":
        yield f"shipped: {shipped.status}"
