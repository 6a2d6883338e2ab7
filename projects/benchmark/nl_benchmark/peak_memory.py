"""The most memory that a call takes, in bytes of tensors."""

import os
import resource
from pathlib import Path
from typing import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler tells on stderr of every start and stop, and of the GPU that is not there.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Bytes of tensors at the worst moment of one call, beyond those that stood before it.

    On a GPU this is what torch's allocator says. On a CPU it adds up what the profiler records of
    every allocation that torch makes, inside of its operators too; scratch memory that oneDNN or
    BLAS take by themselves is not seen.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak


def limit_cpu_memory(share: float = 0.9) -> None:
    """Let this process have no more than that share of the memory that is free now.

    An allocation beyond it raises an error, which can be told, where Linux would kill the process.
    Elsewhere than on Linux this does nothing.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return
    kib = {}
    for path in (status, Path("/proc/meminfo")):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if value.endswith(" kB"):
                kib[key] = int(value[:-3])
    limit = int((kib["VmData"] + share * kib["MemAvailable"]) * 2**10)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an exception says that memory, of a GPU or a CPU, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in ("allocate memory", "bad_alloc", "out of memory"))
