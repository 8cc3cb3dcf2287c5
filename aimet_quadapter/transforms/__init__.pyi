from .prefix import set_prefix as set_prefix
from .prefix_choice import choose_prefix as choose_prefix
from .rotation import rotate as rotate
from .rotation_choice import choose_rotation as choose_rotation
