"""tools/install_detectron2.py and its edits, without a network."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import install_detectron2 as installer
import pytest
from detectron2_release_0_5 import EDITS, MISSING_SOURCE, REVISION, Edit, EditError, apply_edits

TOOL = Path(installer.__file__)


def run_tool(*arguments, **env):
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def edit_named(name):
    (edit,) = [edit for edit in EDITS if edit.name == name]
    return edit


def write(root, files):
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


def test_edit_replaces_every_line_it_was_written_for(tmp_path):
    write(tmp_path, {"a.py": "old = 1\nbold = 2\nold = 3\n", "b.py": "old = 4\n"})
    Edit("rename", "", {"a.py": 2, "b.py": 1}, r"^old\b", "new").apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "new = 1\nbold = 2\nnew = 3\n"
    assert (tmp_path / "b.py").read_text() == "new = 4\n"


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_every_edit_fails_loudly_without_its_target(edit, tmp_path):
    write(tmp_path, dict.fromkeys(edit.files, "pass\n"))
    with pytest.raises(EditError) as error:
        edit.apply(tmp_path)
    first = next(iter(edit.files))
    assert edit.name in str(error.value) and first in str(error.value)
    assert f"{edit.files[first]} times, but holds it 0 times" in str(error.value)


def test_edit_fails_on_one_target_too_many(tmp_path):
    write(tmp_path, {"a.py": "old\nold\n"})
    with pytest.raises(EditError, match=r"'rename': a\.py .* 1 times, but holds it 2 times"):
        Edit("rename", "", {"a.py": 1}, "old", "new").apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "old\nold\n"


def test_edits_fail_on_another_archive(tmp_path):
    with pytest.raises(EditError, match=r"setup\.py is not in the source archive"):
        apply_edits(tmp_path)


def test_names_and_reasons_tell_the_edits_apart():
    assert len({edit.name for edit in EDITS}) == len(EDITS)
    assert all(edit.why.endswith(".") and sum(edit.files.values()) for edit in EDITS)


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("NumPy's aliases of builtins", "np.int", "int"),
        ("Pillow's LINEAR", "Image.LINEAR", "Image.BILINEAR"),
        ("requirement of black", '"black==21.4b2"', '"black"'),
    ],
)
def test_renames_leave_similar_names_alone(name, before, after, tmp_path):
    edit = edit_named(name)
    similar = "np.int64 np.bool_ Image.BILINEAR black\n"
    write(tmp_path, {file: f"{before}\n" * n + similar for file, n in edit.files.items()})
    edit.apply(tmp_path)
    for file, n in edit.files.items():
        assert (tmp_path / file).read_text() == f"{after}\n" * n + similar


def test_what_is_missing_explains_itself_on_use():
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
    result = run_tool()
    assert result.returncode == 0, result.stderr
    assert "works: nothing to do" in result.stdout


def test_archive_with_another_checksum_is_refused(tmp_path):
    index, wheels = tmp_path / "index", tmp_path / "wheels"
    index.mkdir()
    with tarfile.open(index / "detectron2-cdo-0.5.tar.gz", "w:gz") as tar:
        setup = b"raise SystemExit('setup.py of the wrong archive was run')"
        member = tarfile.TarInfo("detectron2-cdo-0.5/setup.py")
        member.size = len(setup)
        tar.addfile(member, io.BytesIO(setup))
    result = run_tool("--wheel", str(wheels), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index))
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


@pytest.fixture
def broken_detectron2(monkeypatch):
    """As if detectron2 were there but broken, with nothing really built or installed."""
    monkeypatch.setattr(sys, "argv", ["install_detectron2.py"])
    monkeypatch.setattr(installer, "probe", lambda: "it is broken")
    monkeypatch.setattr(installer, "installed_version", lambda: "0.6")


def closed(reason):
    def build(folder):
        raise installer.InstallError(reason)

    return build


def test_archive_follows_git(broken_detectron2, monkeypatch, capsys):
    installed = []
    monkeypatch.setattr(installer, "build_from_git", closed("no GitHub"))
    monkeypatch.setattr(installer, "build_from_archive", lambda folder: folder / "archive.whl")
    monkeypatch.setattr(
        installer, "install", lambda wheel, constraints: installed.append(wheel.name)
    )
    installer.main()
    assert installed == ["archive.whl"]
    printed = capsys.readouterr().out
    assert (
        printed.index("it is broken") < printed.index("no GitHub") < printed.index("is installed")
    )


def test_one_message_names_all_that_failed(broken_detectron2, monkeypatch, capsys):
    monkeypatch.setattr(installer, "build_from_git", closed("no GitHub"))
    monkeypatch.setattr(installer, "build_from_archive", closed("no index"))
    with pytest.raises(SystemExit) as error:
        installer.main()
    assert error.value.code == 2
    message = "detectron2 could not be installed:\n  no GitHub\n  no index\n"
    assert capsys.readouterr().err == message
