"""`python -m octo_like` is the command `octo_like`."""

import sys

from octo_like.commands import main

sys.exit(main())
