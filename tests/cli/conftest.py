"""How the command is run in tests."""

import json

import pytest

from weightspace.cli import run


@pytest.fixture
def call(capfd):
    """Run the command in this process; everything on the two streams, from libraries as well."""

    def one(*arguments):
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return one


@pytest.fixture
def refuse(call):
    """The message of a command that the user can mend: exit code 2 and one line."""

    def one(*arguments):
        code, out, err = call(*arguments)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert err.count("\n") == 1, err
        assert err.startswith("weightspace: ")
        return err.removeprefix("weightspace: ").rstrip("\n")

    return one


@pytest.fixture
def document(call):
    """The one JSON object that a command prints."""

    def one(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    return one
