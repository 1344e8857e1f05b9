"""Optimizer states of many ranks in folders of torch.distributed.checkpoint.

Either side may be plain torch: what `save` writes, `torch.distributed.checkpoint.load` reads, and the other way.
`FastReader` and `FastWriter` go into torch's own `dcp.load` and `dcp.save`, for whatever else is saved.
"""

from fastopt.distributed.loading import load
from fastopt.distributed.names import state_dict
from fastopt.distributed.ranks import RanksError
from fastopt.distributed.reader import FastReader
from fastopt.distributed.saving import async_save, save
from fastopt.distributed.writer import FastWriter

__all__ = ["FastReader", "FastWriter", "RanksError", "async_save", "load", "save", "state_dict"]
