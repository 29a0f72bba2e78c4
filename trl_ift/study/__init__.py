"""The comparison study: which method, from which start, with how much data."""

from importlib import import_module
from typing import Any


# Public name -> module; imported on first use
_NAMES = {
    "Measure": "measures",
    "Study": "plan",
    "StudyError": "plan",
    "collect_results": "run",
    "describe_plan": "costs",
    "generate_answers": "judged",
    "judge_answers": "judged",
    "paired_difference": "statistics",
    "print_commands": "run",
    "report_text": "report",
    "run_harness": "harness",
    "run_study": "run",
    "score_judgments": "judged",
    "write_report": "report",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
