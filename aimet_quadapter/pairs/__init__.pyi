from .attachment import attach as attach
from .attachment import detach as detach
from .discovery import find_pairs as find_pairs
from .folding import fold as fold
from .folding import weights_restored as weights_restored
from .pair import Pair as Pair
from .pair import Pairs as Pairs
