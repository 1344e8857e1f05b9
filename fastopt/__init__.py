"""Loads, saves, casts and moves very large PyTorch optimizer states, with torch's meaning at the memory's speed."""

from fastopt.backends import BackendInfo, backend
from fastopt.batch import copy_, to
from fastopt.matching import match
from fastopt.patch import install, installed, uninstall
from fastopt.report import LoadReport
from fastopt.snapshot import Snapshot, snapshot
from fastopt.state_dict import id_map, load_state_dict, state_dict

__all__ = [
    "BackendInfo",
    "LoadReport",
    "Snapshot",
    "backend",
    "copy_",
    "id_map",
    "install",
    "installed",
    "load_state_dict",
    "match",
    "snapshot",
    "state_dict",
    "to",
    "uninstall",
]
__version__ = "0.1.0"
