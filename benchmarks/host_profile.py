# SPDX-License-Identifier: Apache-2.0
"""Where the CPU's time goes in a step that waits for kernels to be launched, by Python function."""

import cProfile
import io
import pstats
from collections.abc import Callable

import torch


def host_profile(step: Callable[[], None], *, num_functions: int = 80) -> str:
    """Tables of the functions with the most time, inside themselves and with all they call, in one step.

    The backward pass runs on the calling thread here, where it can be seen; Python's own share is overstated, as the
    profiler is called at every function.
    """
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profiler.enable()
        step()
        profiler.disable()
    text = io.StringIO()
    statistics = pstats.Stats(profiler, stream=text).strip_dirs()
    for order in ("tottime", "cumtime"):
        statistics.sort_stats(order).print_stats(num_functions)
    return text.getvalue()
