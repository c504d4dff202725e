"""Memory that this process has freed, given back to the system."""

import ctypes


def give_back() -> None:
    """What malloc keeps of what was freed, in pieces that a step's one large block does not fit
    into. Nothing happens where the C library has no `malloc_trim`, which is glibc's."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(ctypes.c_size_t(0))
