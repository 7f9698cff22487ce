"""`python -m hf_attncap` runs the command `attncap`."""

import sys

from .cli import main

sys.exit(main())
