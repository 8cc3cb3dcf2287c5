"""`python -m aimet_quadapter`: the command line."""

import sys

from .cli import main

sys.exit(main())
