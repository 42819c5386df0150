from .clip import FLOATING as FLOATING
from .clip import check_divides as check_divides
from .clip import check_ids as check_ids
from .clip import check_normalisation as check_normalisation
from .clip import check_video as check_video
from .clip import gather as gather
from .clip import per_channel as per_channel
