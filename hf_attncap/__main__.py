"""`python -m hf_attncap`: the console script `attncap`."""

import sys

from .cli import main

sys.exit(main())
