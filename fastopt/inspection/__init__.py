"""States looked at and not changed: what is wrong with one, what it holds, how two of them differ."""

from fastopt.inspection.check import check
from fastopt.inspection.diff import Diff, KeyDiff, diff
from fastopt.inspection.problems import Problem
from fastopt.inspection.summary import GroupSummary, KeySummary, Summary, summary

__all__ = ["Diff", "GroupSummary", "KeyDiff", "KeySummary", "Problem", "Summary", "check", "diff", "summary"]
