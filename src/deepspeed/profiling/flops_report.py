"""The text of a flops profile: pure functions of measured figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))


@dataclass(frozen=True)
class ModuleProfile:
    """A module's forward: its figures include those of its ``children``. ``seconds`` and ``macs`` (multiply-accumulate
    operations) are of all ``calls`` together; ``name`` is its attribute in the parent, ``kind`` its class."""

    name: str
    kind: str
    parameters: int
    macs: int
    seconds: float
    calls: int
    children: tuple[ModuleProfile, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What the report says about the run: ``batch_size`` is in samples per device, None where unknown."""

    step: int
    world_size: int
    batch_size: int | None


def number_to_string(value: float, unit: str = "", precision: int = 2) -> str:
    """``value`` with a decimal prefix: 3139930000000, "MACs" is ``3.14 TMACs``; 0.0767, "s" is ``76.70 ms``."""
    if value == 0:
        return f"0 {unit}".strip()
    scale, prefix = next(((s, p) for s, p in _UNITS if abs(value) >= s), _UNITS[-1])
    if not unit and scale < 1:
        scale, prefix = 1.0, ""
    whole = scale == 1.0 and float(value).is_integer()
    digits = f"{value:.0f}" if whole else f"{value / scale:.{precision}f}"
    return f"{digits} {prefix}{unit}".strip()


def render(
    profile: ModuleProfile, summary: Summary, *, module_depth: int = -1, top_modules: int = 1, detailed: bool = True
) -> str:
    """The whole report: summary, aggregated profile and, where ``detailed``, the profile of every module."""
    lines = [_rule("DeepSpeed Flops Profiler"), *_summary(profile, summary), ""]
    lines += [_rule("Aggregated Profile per GPU"), *_aggregated(profile, module_depth, top_modules)]
    if detailed:
        lines += ["", _rule("Detailed Profile per GPU"), *_detailed(profile, module_depth)]
    return "\n".join([*lines, "-" * 78])


def _rule(title: str) -> str:
    return f" {title} ".center(78, "-")


def _summary(profile: ModuleProfile, summary: Summary) -> Iterator[str]:
    yield f"Profile Summary at step {summary.step}:"
    yield "MACs: multiply-accumulate operations; flops: floating-point operations; FLOPS: flops per second;"
    yield "fwd: forward, over all profiled passes"
    rows = [("world size", str(summary.world_size))]
    if summary.batch_size is not None:
        rows.append(("batch size per GPU", str(summary.batch_size)))
    rows += [
        ("params per GPU", number_to_string(profile.parameters)),
        ("fwd MACs per GPU", number_to_string(profile.macs, "MACs")),
        ("fwd flops per GPU", number_to_string(2 * profile.macs, "FLOPs")),
        ("fwd latency", number_to_string(profile.seconds, "s")),
        ("fwd FLOPS per GPU = fwd flops per GPU / fwd latency", _speed(profile)),
    ]
    if summary.batch_size is not None and profile.seconds:
        rate = summary.batch_size * max(profile.calls, 1) / profile.seconds
        rows.append(("fwd samples/second per GPU", f"{rate:.2f}"))
    for label, value in rows:
        yield f"{label + ':':<60}{value:>18}"


def _speed(profile: ModuleProfile) -> str:
    return number_to_string(2 * profile.macs / profile.seconds if profile.seconds else 0, "FLOPS")


_METRICS: tuple[tuple[str, Callable[[ModuleProfile], float], str], ...] = (
    ("params", lambda profile: profile.parameters, ""),
    ("MACs", lambda profile: profile.macs, "MACs"),
    ("fwd latency", lambda profile: profile.seconds, "s"),
)


def _aggregated(profile: ModuleProfile, module_depth: int, top_modules: int) -> Iterator[str]:
    yield f"Top {top_modules} modules in terms of params, MACs or fwd latency at different model depths:"
    level, depth = [profile], 0
    while level and (module_depth < 0 or depth <= module_depth):
        yield f"depth {depth}:"
        for label, metric, unit in _METRICS:
            sums: dict[str, float] = {}
            for module in level:
                sums[module.kind] = sums.get(module.kind, 0) + metric(module)
            top = sorted(sums.items(), key=lambda item: -item[1])[:top_modules]
            yield f"    {label:<11} - { {kind: number_to_string(value, unit) for kind, value in top} }"
        level, depth = [child for module in level for child in module.children], depth + 1


def _detailed(root: ModuleProfile, module_depth: int) -> Iterator[str]:
    header = ("params", "share", "MACs", "share", "latency", "share", "FLOPS", "calls")
    yield _row("module", header)
    stack = [(root, 0)]
    while stack:
        module, depth = stack.pop()
        label = "  " * depth + (f"({module.name}): " if module.name else "") + module.kind
        figures = (
            number_to_string(module.parameters),
            _share(module.parameters, root.parameters),
            number_to_string(module.macs),
            _share(module.macs, root.macs),
            number_to_string(module.seconds, "s"),
            _share(module.seconds, root.seconds),
            _speed(module),
            str(module.calls),
        )
        yield _row(label, figures)
        if module_depth < 0 or depth < module_depth:
            stack += [(child, depth + 1) for child in reversed(module.children)]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def _row(label: str, figures: tuple[str, ...]) -> str:
    widths = (11, 9, 11, 9, 11, 9, 15, 6)
    cells = (f"{figure:>{width}}" for figure, width in zip(figures, widths, strict=True))
    return f"{label:<40}" + "".join(cells)
