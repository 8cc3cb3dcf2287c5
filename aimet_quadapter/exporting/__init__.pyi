from .generation import export_generation as export_generation
from .whole_model import export as export
