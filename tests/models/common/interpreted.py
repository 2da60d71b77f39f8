# SPDX-License-Identifier: Apache-2.0
"""Triton 3.6's interpreter with NumPy from 2.4 on: loops between bounds that a kernel has loaded.

There it makes integers of arrays with one element, which NumPy no longer does. Compiled kernels have no such problem.
"""

from typing import Any

from triton.runtime import interpreter


def allow_loaded_bounds() -> None:
    """For the rest of the process; a second call does nothing more."""
    inner: Any = interpreter
    original = inner._patch_lang_tensor
    if original.__module__ == __name__:
        return

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    inner._patch_lang_tensor = patch
