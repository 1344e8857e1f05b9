"""Loads, saves, casts and moves very large PyTorch optimizer states, with torch's meaning at the memory's speed."""

from fastopt import startup as startup  # before anything that imports torch
from fastopt.audit import AuditCount
from fastopt.backends import BackendInfo, backend
from fastopt.batch import copy_, to
from fastopt.checkpoint import load, save
from fastopt.errors import (
    BackgroundSaveError,
    CheckpointError,
    NoChecksumsError,
    NoStateDictError,
    OverlapError,
    UnsafeGlobalsError,
)
from fastopt.inspection import Diff, Problem, Summary, check, diff, summary
from fastopt.matching import MatchReport, match
from fastopt.patch import install, installed, uninstall
from fastopt.recast import cast_state, to_device
from fastopt.report import LoadReport, SaveReport
from fastopt.snapshot import Snapshot, snapshot
from fastopt.state_dict import id_map, load_state_dict, state_dict

__all__ = [
    "AuditCount",
    "BackendInfo",
    "BackgroundSaveError",
    "CheckpointError",
    "Diff",
    "LoadReport",
    "MatchReport",
    "NoChecksumsError",
    "NoStateDictError",
    "OverlapError",
    "Problem",
    "SaveReport",
    "Snapshot",
    "Summary",
    "UnsafeGlobalsError",
    "backend",
    "cast_state",
    "check",
    "copy_",
    "diff",
    "id_map",
    "install",
    "installed",
    "load",
    "load_state_dict",
    "match",
    "save",
    "snapshot",
    "state_dict",
    "summary",
    "to",
    "to_device",
    "uninstall",
]
__version__ = "0.1.0"
