"""Metrics and protocols: what an edited model knows, what it forgot, and how far it has moved."""

from .drift import DriftMeter, DriftReference, WeightDrift, text_windows, weight_drift
from .evaluator import PROTOCOLS, TEACHER_FORCED, Before, Evaluator, evaluate
from .generation import Generation, Generator
from .metrics import Estimate
from .results import GUARD, MOMENTS, Report, Result, RetentionPoint, average, read_rows
from .scoring import Pair, PairScore, Scorer, Unscorable
from .sequential import run_sequential

__all__ = [
    "GUARD",
    "MOMENTS",
    "PROTOCOLS",
    "TEACHER_FORCED",
    "Before",
    "DriftMeter",
    "DriftReference",
    "Estimate",
    "Evaluator",
    "Generation",
    "Generator",
    "Pair",
    "PairScore",
    "Report",
    "Result",
    "RetentionPoint",
    "Scorer",
    "Unscorable",
    "WeightDrift",
    "average",
    "evaluate",
    "read_rows",
    "run_sequential",
    "text_windows",
    "weight_drift",
]
