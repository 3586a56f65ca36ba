"""Downloads, from web servers on this machine: fast, slow, dead, truncating, lying, redirecting, without ranges."""

import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import utils
from common.command_line import exit_status
from common.files import lock
from dataset import download
from dataset.download import Source
from tests.helpers import ROOT, error_line
from tests.imitation import assert_same, png, read_records, refusal, write_records
from utils import load_cifar100

ARCHIVE = "/cifar-100-binary.tar.gz"
PUBLIC = download.SOURCES  # tests replace them


@dataclass
class Mirror:
    """A web server's files and faults.

    ranges: whether it continues a download. per_connection: bytes after which it hangs up. pause: seconds between
    pieces. stop: bytes after which it sends nothing more. promises: sends a Content-Length. versions: ETags of its
    answers, the last one for all that follow. asked: the Range header of each request, "" without.
    """

    files: dict[str, bytes]
    ranges: bool = True
    per_connection: int | None = None
    pause: float = 0.0
    stop: int | None = None
    promises: bool = True
    versions: list[str] = field(default_factory=lambda: ['"1"'])
    asked: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def __init__(self, mirror: Mirror, *arguments: object) -> None:
        self.mirror = mirror
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        mirror = self.mirror
        content, asked = mirror.files.get(self.path), self.headers.get("Range", "")
        version = mirror.versions.pop(0) if len(mirror.versions) > 1 else mirror.versions[0]
        mirror.asked.append(asked)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if mirror.ranges and asked and self.headers["If-Range"] == version:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", version)
        if mirror.promises:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:][:mirror.per_connection]
        with suppress(OSError):  # the client may have left
            for place in range(0, len(body), 2**19):
                self.wfile.write(body[place : place + 2**19])
                time.sleep(mirror.pause)
                if mirror.stop is not None and place >= mirror.stop:
                    self.rfile.read()  # until the client leaves

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def running(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a web server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(mirror: Mirror) -> Iterator[Mirror]:
    with running(partial(Handler, mirror)) as mirror.url:
        yield mirror


@pytest.fixture(scope="module")
def archive(official_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return packed(official_data_dir / "cifar-100-binary", tmp_path_factory.mktemp("packed"))


def packed(folder: Path, below: Path) -> bytes:
    path = below / "x.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        archive.add(folder, folder.name)
    return path.read_bytes()


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and limits of time that suit a test."""
    monkeypatch.setattr(download, "NETWORK_TIMEOUT", 0.5)
    monkeypatch.setattr(download, "STALL_SECONDS", 0.2)
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def sources(monkeypatch: pytest.MonkeyPatch, *mirrors: Mirror) -> None:
    """Let these be the public sources, called A, B and so on."""
    named = zip("ABC", mirrors, strict=False)
    monkeypatch.setattr(download, "SOURCES", tuple(Source(name, (mirror.url + ARCHIVE,)) for name, mirror in named))


def assert_complete(data_dir: Path, official_data_dir: Path) -> None:
    """The data folder holds the official binary files, byte for byte, and nothing else."""
    assert [path.name for path in data_dir.iterdir()] == ["cifar-100-binary"]
    assert sorted(path.name for path in (data_dir / "cifar-100-binary").iterdir()) == ["test.bin", "train.bin"]
    for part in ("train", "test"):
        assert np.array_equal(read_records(data_dir, part), read_records(official_data_dir, part))


# ---- Sources that work ----------------------------------------------------------------------------------------------


def test_a_download_leaves_only_the_official_files(archive, data_dir, official_data_dir, parts, monkeypatch, capsys):
    with serving(Mirror({ARCHIVE: archive})) as mirror:
        sources(monkeypatch, mirror)
        train, val = load_cifar100(data_dir)
    assert_same(train, parts[0])
    assert_same(val, parts[1])
    assert_complete(data_dir, official_data_dir)
    assert capsys.readouterr() == (f"CIFAR-100 is not in {data_dir}: downloading it (up to 170 MB) from A\n", "")


@pytest.mark.parametrize("options", [{"ranges": False}, {"promises": False}, {"versions": ['W/"1"']}])
def test_a_simple_server_is_enough(options, archive, data_dir, official_data_dir, monkeypatch):
    with serving(Mirror({ARCHIVE: archive}, **options)) as mirror:
        sources(monkeypatch, mirror)
        load_cifar100(data_dir)
    assert_complete(data_dir, official_data_dir)


def test_a_redirect_is_followed(archive, data_dir, official_data_dir, monkeypatch):
    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", mirror.url + ARCHIVE)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    size = len(archive) // 2 + 1
    with serving(Mirror({ARCHIVE: archive}, per_connection=size)) as mirror, running(Redirecting) as url:
        sources(monkeypatch, Mirror({}, url=url))
        load_cifar100(data_dir)
    assert mirror.asked == ["", f"bytes={size}-"]
    assert_complete(data_dir, official_data_dir)


@pytest.mark.parametrize(("version", "named_by"), [("python", "flag"), ("files", "environment"), ("parquet", "flag")])
def test_a_mirror_of_ones_own_comes_first(version, named_by, python_data_dir, official_data_dir, data_dir, monkeypatch):
    files = {f"/x/{part}.bin": (official_data_dir / "cifar-100-binary" / f"{part}.bin").read_bytes()
             for part in ("train", "test")}
    if version == "python":
        files = {"/x/my.tgz": (python_data_dir / "cifar-100-python.tar.gz").read_bytes()}
    if version == "parquet":
        files = {f"/x/{file}": content for file, content in parquet_files(official_data_dir).items()}
    with serving(Mirror(files)) as mirror:
        url = f"{mirror.url}/x/" + ("my.tgz" if version == "python" else "")
        if named_by == "environment":
            monkeypatch.setenv("CIFAR100_URL", url)
        flags = ["--data-url", url] if named_by == "flag" else []
        assert exit_status(lambda: utils.main(["--data-dir", str(data_dir), *flags])) == 0
    assert_complete(data_dir, official_data_dir)


def parquet_files(official_data_dir: Path) -> dict[str, bytes]:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = {}
    for part in ("train", "test"):
        records = read_records(official_data_dir, part)
        pq.write_table(pa.table({"img": [{"bytes": png(record)} for record in records], "fine_label": records[:, 1]}),
                       sink := pa.BufferOutputStream())
        files[f"{part}-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
    return files


@pytest.mark.parametrize("url", ["x", "ftp://host/a.tgz", "file:///a.tgz", "http://host/a.zip", "http://host",
                                 "http://[host/a.tgz"])
def test_an_address_that_cannot_be_a_mirror_is_refused(url, data_dir, official_data_dir, capsys):
    for folder in (data_dir, official_data_dir):  # even if nothing needs to be downloaded
        assert exit_status(lambda folder=folder: utils.main(["--data-dir", str(folder), "--data-url", url])) == 2
        assert url in error_line(capsys)


def test_a_mirror_that_is_not_needed_is_mentioned(official_data_dir, capsys):
    assert utils.main(["--data-dir", str(official_data_dir), "--data-url", "http://user:secret@127.0.0.1:9/"]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    train = official_data_dir / "cifar-100-binary" / "train.bin"
    assert first == f"nothing is downloaded from --data-url: {train} is there"


def test_the_help_says_what_is_downloaded_and_from_where(capsys):
    with pytest.raises(SystemExit):
        utils.main(["--help"])
    description = capsys.readouterr().out.partition("\n\n")[2].partition("options:")[0]
    assert description.startswith("Download CIFAR-100") and "up to 170 MB" in description
    assert all(source.name in " ".join(description.split()) for source in PUBLIC)


def test_parquet_files_need_pyarrow(monkeypatch):
    hugging_face = Source("Hugging Face", ("https://host/train-00000-of-00001.parquet",))
    for found in (None, object()):
        monkeypatch.setattr(download.importlib.util, "find_spec", lambda name, found=found: found)
        assert hugging_face.is_readable == bool(found)
        assert Source("fast.ai", ("https://host/cifar100.tgz",)).is_readable


# ---- Sources that fail ----------------------------------------------------------------------------------------------


def changed(archive: bytes, official_data_dir: Path, below: Path) -> bytes:
    """The archive with one pixel changed."""
    below.mkdir()
    for part in ("train", "test"):
        records = read_records(official_data_dir, part)
        records[5, 2000] ^= 1
        write_records(below, part, records)
    return packed(below / "cifar-100-binary", below)


@pytest.fixture
def broken(request: pytest.FixtureRequest, archive: bytes, official_data_dir: Path, tmp_path: Path,
           monkeypatch: pytest.MonkeyPatch) -> Mirror:
    """A mirror with the fault named by the test's parameter."""
    monkeypatch.setattr(download, "MAX_BYTES", 2 * len(archive))
    return {
        "missing": lambda: Mirror({}),
        "half": lambda: Mirror({ARCHIVE: archive[: len(archive) // 2]}),
        "not an archive": lambda: Mirror({ARCHIVE: b"<html>please log in</html>"}),
        "lying": lambda: Mirror({ARCHIVE: changed(archive, official_data_dir, tmp_path / "lie")}),
        "hanging up": lambda: Mirror({ARCHIVE: archive}, per_connection=20, ranges=False),
        "hanging up at once": lambda: Mirror({ARCHIVE: archive}, per_connection=0),
        "changing": lambda: Mirror({ARCHIVE: archive}, per_connection=20, versions=[f'"{i}"' for i in range(50)]),
        "huge": lambda: Mirror({ARCHIVE: bytes(2 * len(archive) + 1)}),
        "endless": lambda: Mirror({ARCHIVE: bytes(3 * len(archive))}, promises=False),
        "stalling": lambda: Mirror({ARCHIVE: archive}, stop=0, versions=[""]),
    }[request.param]()


FAULTS = {"missing": "Not Found", "half": "damaged", "not an archive": "damaged", "lying": "not the official ones",
          "hanging up": "lost", "hanging up at once": "closed early", "changing": "lost", "huge": "bytes",
          "endless": "more than", "stalling": "timed out"}


@pytest.mark.parametrize(("broken", "complaint"), FAULTS.items(), indirect=["broken"], ids=FAULTS)
def test_a_source_that_fails_gives_way_with_one_line(
    broken, complaint, archive, data_dir, official_data_dir, monkeypatch, capsys
):
    with serving(broken), serving(Mirror({ARCHIVE: archive})) as good:
        sources(monkeypatch, broken, good)
        load_cifar100(data_dir)
    assert_complete(data_dir, official_data_dir)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: A: ") and complaint in line and line.endswith("; trying B")


@pytest.mark.parametrize(("broken", "complaint"), FAULTS.items(), indirect=["broken"], ids=FAULTS)
def test_a_failed_download_is_one_line_and_leaves_nothing(broken, complaint, data_dir, monkeypatch):
    with serving(broken):
        sources(monkeypatch, broken)
        text = refusal(load_cifar100, data_dir)
    assert text.startswith("cannot download") and str(data_dir) in text and complaint in text
    assert "data/README.md" in text and "--synthetic" in text
    assert list(data_dir.iterdir()) == []


def test_a_dead_server_gives_way(archive, data_dir, official_data_dir, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed, socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (closed, silent)]
        closed.close()
        with serving(Mirror({ARCHIVE: archive})) as good:
            sources(monkeypatch, *(Mirror({}, url=url) for url in addresses), good)
            load_cifar100(data_dir)
    assert_complete(data_dir, official_data_dir)
    refused, silence = capsys.readouterr().err.splitlines()
    assert "refused" in refused and "[" not in refused and "timed out" in silence  # no number such as [Errno 111]


def test_a_server_that_does_not_speak_http_is_one_line(data_dir, monkeypatch):
    class Mail(BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 mail.example\x1b[31m ESMTP\r\n")

    with running(Mail) as url:
        sources(monkeypatch, Mirror({}, url=url))
        text = refusal(load_cifar100, data_dir)
    assert "220 mail.example?" in text
    assert list(data_dir.iterdir()) == []


def test_a_slow_source_gives_way_and_the_last_has_its_time(archive, data_dir, official_data_dir, monkeypatch, capsys):
    monkeypatch.setattr(download, "MIN_RATE", 10**9)
    monkeypatch.setattr(download, "NETWORK_TIMEOUT", 5.0)
    with serving(Mirror({ARCHIVE: archive}, pause=0.02)) as slow, serving(Mirror(slow.files, pause=0.02)) as last:
        sources(monkeypatch, slow, last)
        load_cifar100(data_dir)
    assert_complete(data_dir, official_data_dir)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: A: only ") and line.endswith(" kB/s; trying B")


@pytest.mark.parametrize("fault", [{"pause": 0.02}, {"stop": 2**22}])
def test_a_slow_source_is_continued_if_all_others_fail(
    fault, archive, data_dir, official_data_dir, monkeypatch, capsys
):
    monkeypatch.setattr(download, "MIN_RATE", 10**9)
    monkeypatch.setattr(download, "NETWORK_TIMEOUT", 5.0)

    class Missing(Handler):
        def do_GET(self) -> None:
            slow.stop = None  # it only had to be waited for
            super().do_GET()

    with serving(Mirror({ARCHIVE: archive}, **fault)) as slow, running(partial(Missing, Mirror({}))) as url:
        sources(monkeypatch, slow, Mirror({}, url=url))
        load_cifar100(data_dir)
    assert_complete(data_dir, official_data_dir)
    first, second = slow.asked
    assert first == "" and second.startswith("bytes=")
    given_up, again = capsys.readouterr().err.splitlines()
    assert given_up.endswith("; trying B") and again == "warning: B: Not Found; trying A again"


def test_a_slow_source_is_tried_twice_at_most(archive, data_dir, monkeypatch, capsys):
    with serving(Mirror({ARCHIVE: archive}, stop=2**22)) as slow, serving(Mirror({})) as missing:
        sources(monkeypatch, slow, missing)
        assert "timed out" in refusal(load_cifar100, data_dir)
    assert len(slow.asked) == 2 and len(capsys.readouterr().err.splitlines()) == 2


def test_a_slow_mirror_of_ones_own_is_given_its_time(archive, data_dir, official_data_dir, monkeypatch, capsys):
    monkeypatch.setattr(download, "MIN_RATE", 10**9)
    monkeypatch.setattr(download, "NETWORK_TIMEOUT", 5.0)
    with serving(Mirror({ARCHIVE: archive}, pause=0.02)) as slow, serving(Mirror(slow.files)) as public:
        sources(monkeypatch, public)
        monkeypatch.setenv("CIFAR100_URL", slow.url + ARCHIVE)
        load_cifar100(data_dir)
    assert_complete(data_dir, official_data_dir)
    assert public.asked == [] and capsys.readouterr().err == ""


# ---- Downloads that go on -------------------------------------------------------------------------------------------


def test_a_truncated_download_goes_on_where_it_was(archive, data_dir, official_data_dir, monkeypatch):
    size = len(archive) // 4 + 1
    with serving(Mirror({ARCHIVE: archive}, per_connection=size)) as mirror:
        sources(monkeypatch, mirror)
        load_cifar100(data_dir)
    assert mirror.asked == ["", *(f"bytes={size * part}-" for part in (1, 2, 3))]
    assert_complete(data_dir, official_data_dir)


KILLED = """
import sys
from pathlib import Path
from dataset import download
download.SOURCES = (download.Source("A", (sys.argv[2],)),)
download.download(Path(sys.argv[1]), (), None)
"""


@pytest.mark.parametrize("changes", [False, True])
def test_a_killed_download_goes_on_unless_the_file_has_changed(
    changes, archive, data_dir, official_data_dir, monkeypatch
):
    with serving(Mirror({ARCHIVE: archive}, stop=2**22)) as mirror:
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(data_dir), mirror.url + ARCHIVE], cwd=ROOT)
        partial = data_dir / ".download" / "A" / "cifar100.tgz.part"
        until = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size >= 2**22) and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
        process.wait()
        had = partial.stat().st_size
        mirror.stop = None
        mirror.versions = ['"2"' if changes else '"1"']
        sources(monkeypatch, mirror)
        load_cifar100(data_dir)
    assert had >= 2**22 and mirror.asked == ["", f"bytes={had}-"]
    assert_complete(data_dir, official_data_dir)


def test_a_part_with_another_content_is_never_trusted(archive, data_dir, official_data_dir, monkeypatch, capsys):
    staged = data_dir / ".download" / "A"
    staged.mkdir(parents=True)
    (staged / "cifar100.tgz.part").write_bytes(bytes(len(archive) // 2))
    (staged / "cifar100.tgz.version").write_text('"1"')
    with serving(Mirror({ARCHIVE: archive})) as mirror:
        sources(monkeypatch, mirror, mirror)
        load_cifar100(data_dir)
    assert "damaged" in capsys.readouterr().err
    assert_complete(data_dir, official_data_dir)


def test_a_part_that_is_longer_than_the_file_starts_again(archive, data_dir, official_data_dir, monkeypatch):
    staged = data_dir / ".download" / "A"
    staged.mkdir(parents=True)
    (staged / "cifar100.tgz.part").write_bytes(bytes(len(archive)))
    (staged / "cifar100.tgz.version").write_text('"1"')
    with serving(Mirror({ARCHIVE: archive})) as mirror:
        sources(monkeypatch, mirror)
        load_cifar100(data_dir)
    assert mirror.asked == [f"bytes={len(archive)}-", ""]
    assert_complete(data_dir, official_data_dir)


def test_one_process_downloads_at_a_time(data_dir):
    (data_dir / ".download").mkdir()
    held = lock(data_dir / ".download" / ".lock", "")
    try:
        assert "another process is downloading" in refusal(load_cifar100, data_dir)
    finally:
        held.release()


def test_an_error_of_the_disk_is_not_blamed_on_the_source(archive, data_dir, monkeypatch):
    (data_dir / ".download" / "A" / "cifar100.tgz.part").mkdir(parents=True)
    with serving(Mirror({ARCHIVE: archive})) as mirror:
        sources(monkeypatch, mirror)
        assert refusal(load_cifar100, data_dir).startswith(f"cannot use the data folder {data_dir}")
