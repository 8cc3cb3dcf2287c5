from .decoder import PreparedDecoder as PreparedDecoder
from .preparation import prepare as prepare
from .stock import LogitsOnly as LogitsOnly
