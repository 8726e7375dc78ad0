"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """A mistake in what the user gave.

    Its message is one line that says what is wrong, where, and what to do. Recipes and the command line
    print it without a traceback and exit with status 2; everything else that is raised is a defect of ours.
    """
