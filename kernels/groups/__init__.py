from .membership import Grid as Grid
from .membership import Groups as Groups
from .membership import group_of as group_of
from .membership import lead as lead
