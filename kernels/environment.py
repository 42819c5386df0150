"""Environment variables that every call reads."""

import os

from vidl.kernels.constant import assume_constant

# Behind os.environ, whose `get` raises two exceptions where a variable is missing: a microsecond.
_variables: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]


@assume_constant
def variable(name: str) -> str | None:
    """The value of a variable now, as of os.environ.get."""
    value = _variables.get(name.encode())
    return None if value is None else os.fsdecode(value)
