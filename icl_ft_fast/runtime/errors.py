"""The base of every error that a user can mend."""


class UserError(ValueError):
    """Input, settings or files that cannot be used; the message says what was expected, what was given, and where.

    Catch it to catch every such error of this package. On the command line it is one line and `exit_code`.
    """

    exit_code = 2
