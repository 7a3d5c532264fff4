"""The commands of dd2, one a module: its configuration (whose docstrings are its help), and the function that it runs."""

import dd2.baselines  # noqa: F401  (run folders may hold their networks)
