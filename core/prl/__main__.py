"""`python -m prl` is the command line."""

import sys

from prl.cli import main

sys.exit(main())
