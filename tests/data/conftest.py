import pytest

from provgen.errors import InputError


@pytest.fixture
def message_of():
    """Call something that must refuse its input; return the message, which must be one line."""

    def call(function, *args, **kwargs) -> str:
        with pytest.raises(InputError) as caught:
            function(*args, **kwargs)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert ";" in message or "," in message, "says what to do"
        return message

    return call
