"""`python -m pipemoe`: the `pipemoe` command."""

import sys

from pipemoe.cli import main

sys.exit(main())
