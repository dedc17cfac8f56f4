"""Read by every Python that has this folder on its path: a disk that takes a second to sync, while a file says so."""

import os
import time

_fsync = os.fsync


def fsync(descriptor: int) -> None:
    if os.path.exists(os.environ.get("FBITRAIN_SOAK_SLOW_DISK", "")):
        time.sleep(1.0)
    _fsync(descriptor)


os.fsync = fsync  # type: ignore[assignment]
