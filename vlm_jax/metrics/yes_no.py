"""Answers of yes and no: what a text says, and how often it is right (POPE, arXiv 2305.10355)."""

from __future__ import annotations

import re

import numpy as np

_STATED = re.compile(r"(?:(?:So t|T|t)he answer is |Answer: )(.+)")
_MARKER = "ASSISTANT: "  # of a whole conversation; only what follows the last one counts
_WORD = re.compile(r"\b(yes|no)\b")


def stated(text: str) -> str:
    """What a text says, as NExT-Chat's evaluation reads it.

    One "the answer is X" gives X without the point; else "yes" where the text has it, and "no"
    where not. Capitals count: "Yes, there is." is "no". Only "no" is counted as no, so that any
    other X is a yes.

    Args:
      text: an answer, or a conversation whose last answer is meant, which is read in small letters.
    """
    if _MARKER in text:
        text = text.rpartition(_MARKER)[2].lower()
    found = _STATED.findall(text)
    if len(found) == 1:
        return found[0].strip().rstrip(".").strip()
    return "yes" if "yes" in text else "no"


def first_word(text: str) -> str:
    """The first yes or no of a text in any case, or "" without one."""
    found = _WORD.search(text.lower())
    return found[1] if found else ""


def scores(said_n: np.ndarray, true_n: np.ndarray) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes; a share of nothing is 0.

    Args:
      said_n, true_n: bool, True is yes.
    """
    said_n, true_n = np.asarray(said_n, bool), np.asarray(true_n, bool)
    right = float((said_n & true_n).sum())
    precision = right / max(said_n.sum(), 1)
    recall = right / max(true_n.sum(), 1)
    both = precision + recall
    return {
        "accuracy": float((said_n == true_n).mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * precision * recall / both) if both else 0.0,
        "yes_rate": float(said_n.mean()),
    }
