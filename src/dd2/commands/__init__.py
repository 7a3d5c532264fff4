"""The commands of dd2, one a module: its configuration (whose docstrings are its help), and the function that it runs."""
