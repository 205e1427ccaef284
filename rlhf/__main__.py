"""`python -m rlhf` is `rlhf`."""

import sys

from rlhf.cli import main

sys.exit(main())
