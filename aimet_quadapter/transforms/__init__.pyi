from .prefix import set_prefix as set_prefix
from .rotation import rotate as rotate
