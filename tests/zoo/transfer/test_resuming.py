"""Kill an import at any moment, run it again: nothing is lost, and the digest is that of an undisturbed one."""

import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from weightspace.errors import OutputError
from weightspace.zoo import IMPORTERS, Zoo, import_zoo, verify_digest
from weightspace.zoo.transfer import _importer, _small_cnn_zoo

FORMATS = {
    "dwsnets": "dwsnets",
    "augmentation": "augmentation",
    "nfn": "nfn",
    "small-cnn-zoo": "small_cnn_zoo",
    "cnn-wild-park": "cnn_wild_park",
    "modelzoos": "modelzoos",
    "folder": "folder",
}


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_importer, "BLOCK_FILES", 2)
    monkeypatch.setattr(_small_cnn_zoo, "BLOCK_BYTES", 2 * 4 * 4970)


def kill_after(monkeypatch, kind, blocks):
    """An importer whose reading ends after some blocks."""
    whole = kind.blocks

    def some(self, listing, start):
        for count, block in enumerate(whole(self, listing, start)):
            if count == blocks:
                raise Killed
            yield block

    monkeypatch.setattr(kind, "blocks", some)


def test_every_format_is_here():
    assert set(FORMATS) == set(IMPORTERS)


@pytest.mark.parametrize("format", FORMATS)
def test_interrupted_imports_end_with_the_same_digest(tmp_path, request, monkeypatch, format):
    source = request.getfixturevalue(FORMATS[format]).folder
    undisturbed = import_zoo(format, source, tmp_path / "whole.h5", progress=False)
    total, done = undisturbed.read, 0
    for round_ in range(3):
        with monkeypatch.context() as patch:
            kill_after(patch, IMPORTERS[format], round_ % 2 or 1)
            try:
                import_zoo(format, source, tmp_path / "zoo.h5", progress=False)
            except Killed:
                done += 2 * (round_ % 2 or 1)
            else:
                break
        assert not (tmp_path / "zoo.h5").exists()
    if not (tmp_path / "zoo.h5").exists():
        report = import_zoo(format, source, tmp_path / "zoo.h5", progress=False)
        assert report.read == max(total - done, 0)
    assert Zoo.open(tmp_path / "zoo.h5").digest == undisturbed.digest == verify_digest(tmp_path / "zoo.h5")
    assert not (tmp_path / "zoo.h5.parts").exists()


def test_what_was_bad_is_counted_after_an_interruption_too(tmp_path, dwsnets, monkeypatch):
    for path in sorted(dwsnets.folder.rglob("*.pth"))[:2]:
        path.write_bytes(b"x")
    whole = import_zoo("dwsnets", dwsnets.folder, tmp_path / "whole.h5", skip_bad=True, progress=False)
    with monkeypatch.context() as patch:
        kill_after(patch, IMPORTERS["dwsnets"], 4)
        with pytest.raises(Killed):
            import_zoo("dwsnets", dwsnets.folder, tmp_path / "zoo.h5", skip_bad=True, progress=False)
    report = import_zoo("dwsnets", dwsnets.folder, tmp_path / "zoo.h5", skip_bad=True, progress=False)
    assert (report.digest, report.skipped, report.read) == (whole.digest, 2, 4)
    assert report.skipped_first == whole.skipped_first


def interrupted(tmp_path, folder, monkeypatch, **arguments):
    with monkeypatch.context() as patch:
        kill_after(patch, IMPORTERS["dwsnets"], 2)
        with pytest.raises(Killed):
            import_zoo("dwsnets", folder, tmp_path / "zoo.h5", progress=False, **arguments)


def test_other_options_another_format_and_a_changed_source_are_refused(tmp_path, dwsnets, nfn, monkeypatch):
    interrupted(tmp_path, dwsnets.folder, monkeypatch)
    again = {"source": dwsnets.folder, "output": tmp_path / "zoo.h5", "progress": False}
    with pytest.raises(
        OutputError, match=r"the beginning of other work \(options: .*\"w0\":30.0.* there, .*20.0.* now\)"
    ):
        import_zoo("dwsnets", options={"w0": 20.0}, **again)
    with pytest.raises(OutputError, match=r'other work \(format: "dwsnets" there, "nfn" now'):
        import_zoo("nfn", **{**again, "source": nfn.folder})
    with pytest.raises(OutputError, match="skip_bad: false there, true now"):
        import_zoo("dwsnets", skip_bad=True, **again)
    shutil.rmtree(dwsnets.folder / "mnist_png_training_0_0")
    with pytest.raises(OutputError, match="checkpoints in the source: 12 there, 11 now"):
        import_zoo("dwsnets", **again)
    shutil.copytree(dwsnets.folder / "mnist_png_training_1_1", dwsnets.folder / "mnist_png_training_1_0")
    with pytest.raises(OutputError, match="listing of the source: "):
        import_zoo("dwsnets", **again)
    assert import_zoo("dwsnets", overwrite=True, **again).read == 12


def test_an_interruption_while_the_zoo_is_written(tmp_path, dwsnets, monkeypatch):
    whole = import_zoo("dwsnets", dwsnets.folder, tmp_path / "whole.h5", progress=False)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Zoo, "save", killed)
        with pytest.raises(Killed):
            import_zoo("dwsnets", dwsnets.folder, tmp_path / "zoo.h5", progress=False)
    report = import_zoo("dwsnets", dwsnets.folder, tmp_path / "zoo.h5", progress=False)
    assert (report.digest, report.read) == (whole.digest, 0)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process(tmp_path, dwsnets, kind):
    """The real thing: the process dies after its second block."""
    program = textwrap.dedent(
        f"""
        import os
        from weightspace.zoo import IMPORTERS
        from weightspace.zoo.transfer import _importer
        from weightspace.cli import run
        _importer.BLOCK_FILES = 2
        whole = IMPORTERS["dwsnets"].blocks
        def some(self, listing, start):
            for count, block in enumerate(whole(self, listing, start)):
                if count == 2 and not start:
                    os.kill(os.getpid(), {int(kind)})
                yield block
        IMPORTERS["dwsnets"].blocks = some
        raise SystemExit(run(["import", "dwsnets", {str(dwsnets.folder)!r}, "-o", {str(tmp_path / "zoo.h5")!r}]))
        """
    )
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert died.returncode == (-9 if kind == signal.SIGKILL else 130), died.stderr
    if kind == signal.SIGINT:
        assert "what was finished is kept; the same command goes on from there" in died.stderr
    assert not (tmp_path / "zoo.h5").exists()
    report = import_zoo("dwsnets", dwsnets.folder, tmp_path / "zoo.h5", progress=False)
    assert report.read == 8
    assert (
        report.digest == import_zoo("dwsnets", dwsnets.folder, tmp_path / "whole.h5", progress=False).digest
    )
    assert sorted(path.name for path in tmp_path.glob("*zoo*")) == ["zoo.h5"]


def test_memory_does_not_grow_with_the_weights(tmp_path):
    """160 MB of weights with 90 MB to spare; what is mapped from the disk does not count."""
    source = tmp_path / "big"
    source.mkdir()
    for number in range(40):
        torch.save({"w": torch.full((1_000_000,), float(number))}, source / f"{number}.pt")
    program = textwrap.dedent(
        f"""
        import re, resource
        from weightspace.zoo import import_zoo
        import_zoo("folder", {str(source)!r}, {str(tmp_path / "warm.h5")!r}, options={{"table": None}}, progress=False)
        used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 90_000_000,) * 2)
        import_zoo("folder", {str(source)!r}, {str(tmp_path / "all.h5")!r}, progress=False)
        """
    )
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(source / "0.pt", few)
    program = program.replace(repr(str(source)), repr(str(few)), 1)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert Zoo.open(tmp_path / "all.h5")["networks"].weights[:, 7].tolist() == sorted(
        float(n) for n in range(40)
    )
