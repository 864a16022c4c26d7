"""Several processes on this machine, with torch's own launcher."""

import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(processes: int, arguments: Sequence[str]) -> int:
    """`python *arguments` in `processes` processes that know each other as torchrun's do; the exit status."""
    # one share of the cores each, unless the user has said otherwise
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        # the process has said why; its launcher's summary would only bury that
        return next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
    return 0
