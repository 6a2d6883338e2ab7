"""tools/install_detectron2.py and its edits, without a network."""

import io
import subprocess
import sys
import tarfile

import install_detectron2 as installer
import pytest
from detectron2_release_0_5 import MISSING_SOURCE, REVISION, Edit, EditError


def test_edit_replaces_every_match(tmp_path):
    (tmp_path / "a.py").write_text("old = 1\nbold = 2\nold = 3\n")
    (tmp_path / "b.py").write_text("old = 4\n")
    Edit("rename", "", {"a.py": 2, "b.py": 1}, r"^old\b", "new").apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "new = 1\nbold = 2\nnew = 3\n"
    assert (tmp_path / "b.py").read_text() == "new = 4\n"
    with pytest.raises(EditError, match=r"'again': a\.py .* 1 times, but holds it 2 times"):
        Edit("again", "", {"a.py": 1}, "^new", "old").apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "new = 1\nbold = 2\nnew = 3\n"
    with pytest.raises(EditError, match=r"'absent': c\.py is not in the source archive"):
        Edit("absent", "", {"c.py": 1}, "", "").apply(tmp_path)


def test_missing_modules_raise_the_reason_on_use():
    namespace = {}
    source = MISSING_SOURCE.replace("from detectron2 import _C", "raise ImportError")
    exec(source, namespace)
    compiled, caffe2 = namespace["_C"], namespace["caffe2"]
    with pytest.raises(ImportError, match=r"detectron2\._C\.nms_rotated is not available: .* git"):
        compiled.nms_rotated()
    with pytest.raises(ImportError, match=r"caffe2 is not available: .*TracingAdapter"):
        caffe2()
    assert not hasattr(compiled, "__wrapped__")  # inspect and doctest ask for it


def test_nothing_to_do_where_detectron2_works():
    command = [sys.executable, installer.__file__]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "works: nothing to do" in output


def test_archive_with_another_checksum_is_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "detectron2-cdo-0.5.tar.gz", "w:gz") as tar:
        setup = b"raise SystemExit('setup.py of the wrong archive was run')"
        member = tarfile.TarInfo("detectron2-cdo-0.5/setup.py")
        member.size = len(setup)
        tar.addfile(member, io.BytesIO(setup))
    wheels = tmp_path / "wheels"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    command = [sys.executable, installer.__file__, "--wheel", str(wheels)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"with SHA-256 {installer.ARCHIVE_SHA256} cannot be downloaded" in result.stderr
    assert "Got        " in result.stderr  # pip's own message has both sums
    assert "was run" not in result.stderr
    assert not wheels.exists()


def test_builds_with_other_edits_are_replaced():
    assert installer.is_outdated(f"0.5+nl.{REVISION - 1}")
    assert not installer.is_outdated(f"0.5+nl.{REVISION}")
    assert not installer.is_outdated("0.6")


def test_git_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(installer, "GIT_URL", (tmp_path / "nowhere.git").as_uri())
    with pytest.raises(installer.InstallError, match=r"nowhere\.git cannot be reached"):
        installer.build_from_git(tmp_path)


def test_archive_follows_git(monkeypatch, capsys):
    """If both fail, one message has both reasons."""

    def fail(reason):
        raise installer.InstallError(reason)

    monkeypatch.setattr(sys, "argv", ["install_detectron2.py"])
    monkeypatch.setattr(installer, "probe", lambda: "it is broken")
    monkeypatch.setattr(installer, "build_from_git", lambda folder: fail("no GitHub"))
    monkeypatch.setattr(installer, "build_from_archive", lambda folder: fail("no index"))
    with pytest.raises(SystemExit) as exit_info:
        installer.main()
    assert exit_info.value.code == 2
    message = "detectron2 could not be installed:\n  no GitHub\n  no index\n"
    assert capsys.readouterr().err == message

    installed = []
    monkeypatch.setattr(installer, "build_from_archive", lambda folder: "a.whl")
    monkeypatch.setattr(installer, "install", lambda wheel, constraints: installed.append(wheel))
    installer.main()
    assert installed == ["a.whl"]
