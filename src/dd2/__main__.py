"""`python -m dd2`, for launchers such as torchrun."""

import sys

from dd2.cli import main

sys.exit(main())
