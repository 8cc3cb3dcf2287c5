from .adapter import fold_adapter as fold_adapter
from .checkpoint_folder import save_huggingface as save_huggingface
from .generation import export_generation as export_generation
from .whole_model import export as export
