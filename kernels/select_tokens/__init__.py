from .op import Selected as Selected
from .op import kept_count as kept_count
from .op import select_tokens as select_tokens
