from .membership import SCHEMA as SCHEMA
from .membership import Arguments as Arguments
from .membership import Grid as Grid
from .membership import Groups as Groups
from .membership import group_of as group_of
from .membership import prepend_row as prepend_row
from .padded import Padded as Padded
from .padded import attention_weights as attention_weights
