from .analytic import analytic_alphas as analytic_alphas
from .calibration import calibrate as calibrate
from .finetuning import finetune as finetune
