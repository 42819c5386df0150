from .op import frame_difference as frame_difference
from .run_length import RunLengths as RunLengths
from .run_length import run_length_ids as run_length_ids
