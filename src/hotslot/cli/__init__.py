"""The command line: `hotslot inspect`, `check`, `demo`, `bench`, `top`.

Takes what a user types; gives text or JSON on stdout and exit code 0, 1 (refused) or 2 (usage). Computes nothing that
the library does not offer to a program as well. Importing any of its modules imports neither torch nor peft nor
transformers: `hotslot --help` must answer at once.
"""

from .app import main

__all__ = ["main"]
