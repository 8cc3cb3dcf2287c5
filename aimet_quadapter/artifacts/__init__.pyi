from .exported import check_export as check_export
