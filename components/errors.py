"""The error that a user can mend. Imports nothing: the command line needs it before torch is there."""


class UserError(Exception):
    """Something that the user can mend. The entry points print the message alone (no traceback) and exit with code 2.

    The message is one line: key path or file, the value, what is allowed, the nearest valid name where there is one.
    """
