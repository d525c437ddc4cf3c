"""``python -m fastedit`` is the ``fastedit`` command."""

import sys

from .cli.main import main

sys.exit(main())
