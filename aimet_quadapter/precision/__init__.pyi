from .bits import assign_bits as assign_bits
from .bits import set_norm_weight_bits as set_norm_weight_bits
from .bits import set_residual_bits as set_residual_bits
from .bits import set_table_bits as set_table_bits
from .clipping import choose_ranges as choose_ranges
from .softmax import compensate_softmax as compensate_softmax
