"""Where weights rest that no memory holds: a file on a local disk, mapped into memory.

The system reads pages of it when a layer is gathered and drops them when it needs the room. The
file has no name once it is open: whatever ends a process, nothing of it stays behind.
"""

import errno
import mmap
import os
import tempfile

import torch
from torch import Tensor

from mlkd_dist.config import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Weights:
    """A file of this process in `folder`, that grows by a tensor at a time."""

    def __init__(self, folder: str):
        self.folder = folder
        try:
            os.makedirs(folder, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)
        except OSError as error:
            raise UserError(
                f"teacher.offload_dir: {folder!r} cannot be written ({error.strerror}); name a "
                f"folder on a local disk of this machine."
            ) from error
        self.size = 0

    def place(self, tensor: Tensor) -> Tensor:
        """The same values, resting in the file. Raises UserError where the disk is full."""
        if tensor.numel() == 0:
            return tensor
        size = -(-tensor.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Room is taken here: a mapped page that the disk has no room for ends the process.
            os.posix_fallocate(self.file.fileno(), self.size, size)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"teacher.offload_dir: {self.folder!r} is full after {self.size / 2**30:.2f} GiB "
                f"of one process's share of a model; name a folder with more room, or use more "
                f"machines."
            ) from error
        pages = mmap.mmap(self.file.fileno(), size, offset=self.size)
        self.size += size
        placed = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel())
        return placed.copy_(tensor)
