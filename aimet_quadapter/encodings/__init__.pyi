from .coverage_table import coverage as coverage
from .coverage_table import keep_module_sites as keep_module_sites
