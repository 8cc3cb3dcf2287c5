from .ranges import set_ranges as set_ranges
