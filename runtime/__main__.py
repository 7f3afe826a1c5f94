"""``python -m runtime`` is the ``relinear`` command."""

import sys

from runtime.cli import main

sys.exit(main())
