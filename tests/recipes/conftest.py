"""What the tests of the recipes share."""

import pytest


@pytest.fixture
def assert_one_line(capsys):
    """Checks that a refused command wrote one line, an error with the expected words."""

    def check(expected: str) -> None:
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert error.startswith("error: ")
        assert expected in error

    return check
