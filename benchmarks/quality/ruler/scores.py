"""RULER's scores: the share of answers, or whether any of them, stands in what the model wrote."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """Between 0 and 1: the best answer for questions, the mean over all answers for the other tasks."""
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    found = [answer.lower() in text for answer in answers]
    return float(max(found)) if task.startswith("qa") else sum(found) / len(found)
