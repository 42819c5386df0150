from .op import space_time_attention as space_time_attention
from .replicated_global import ReplicatedGlobal as ReplicatedGlobal
