"""give_up_signal_stack: let signal handlers run on the stack of their thread again."""

from __future__ import annotations

import ctypes

_SS_DISABLE = 2


class _Stack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def give_up_signal_stack() -> None:
    """Take the alternate signal stack from this thread.

    Compiles for openvino leave one that is freed, and the next signal would end the process. The children that
    compile for users handle no signals.
    """
    ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(ss_flags=_SS_DISABLE)), None)
