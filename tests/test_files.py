"""Atomic writing: a file is complete under its name, or it is not there."""

import pytest

from nl_detectron.files import SaveError, write_atomically


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    with write_atomically(path, "w") as file:
        file.write("Größe")
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt.partial"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_bytes() == "Größe".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_old_file_survives_an_error(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), write_atomically(str(path), "wb") as file:
        file.write(b"ne")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_system_errors(tmp_path):
    path = tmp_path / "missing" / "a.txt"
    message = rf"^{path} cannot be written \(No such file or directory\)$"
    with pytest.raises(SaveError, match=message), write_atomically(path, "w"):
        pass
    path = tmp_path / "a.txt"
    message = rf"^{path} cannot be written \(No space left\)$"
    with pytest.raises(SaveError, match=message), write_atomically(path, "w"):
        try:
            raise OSError(28, "No space left")
        except OSError:
            raise RuntimeError("as torch.save reports it")  # noqa: B904
    assert list(tmp_path.iterdir()) == []
