"""Faulty backends of select_tokens, for the process in which tuning checks them.

`vidl.bench.tuning.worker --import planted` registers them; no other process has them.
"""

import functools
import os
import time

import torch

from vidl import ops  # noqa: F401  declares the ops
from vidl.kernels import library

OP = "select_tokens"


def native(*args, suffix=""):
    return library.kernel(OP + suffix, "native")(*args)


def wrong(x, *args):
    tokens, *rest = native(x, *args)
    return tokens * 1.01, *rest


def other_ids(*args):
    tokens, ids, *rest = native(*args)
    return tokens, ids.flip(-1), *rest


def unwritten(*args):
    tokens, *rest = native(*args)
    return torch.empty_like(tokens), *rest


def raises(*args):
    raise RuntimeError("invalid argument\nat a line")


def crash(*args):
    print("the last words", flush=True)
    os.abort()


def hang(*args):
    time.sleep(600)


def wrong_gradient(*args):
    grad_x, grad_weights = native(*args, suffix="_bwd")
    return grad_x * 1.01, grad_weights


FORWARD = {f.__name__: f for f in (wrong, other_ids, unwritten, raises, crash, hang)}
BACKWARD = {"wrong_gradient": wrong_gradient}

for name in (*FORWARD, *BACKWARD):
    library.add_backend(name)
    library.BACKENDS = (*library.BACKENDS, name)
    backward = BACKWARD.get(name, functools.partial(native, suffix="_bwd"))
    library._library.impl(f"{OP}_{name}", FORWARD.get(name, native), "CPU")
    library._library.impl(f"{OP}_bwd_{name}", backward, "CPU")
