"""Downloads from a local server that breaks connections, ignores ranges, lies, or serves hostile archives."""

import hashlib
import http.server
import io
import multiprocessing
import re
import resource
import tarfile
import threading
from dataclasses import dataclass, field

import pytest

from cpc_ext.data import DownloadError
from cpc_ext.data.download import Archive, download_archive, require_folder
from cpc_ext.data.images.published import cifar10, cifar100, stl10

CONTENT = bytes(range(256)) * 4000


def tar_gz(*members: tuple[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@dataclass
class Site:
    """The content and behaviour of the server, and the ranges that were requested."""

    payload: bytes = b""
    break_after: list[int] = field(default_factory=list)
    ignore_range: bool = False
    status: int | None = None
    statuses: list[int] = field(default_factory=list)
    length: str | None = None
    no_length: bool = False
    surplus: bytes = b""
    content_range: str | None = None
    redirects: int = 0
    asked: list[str | None] = field(default_factory=list)
    port: int = 0

    def archive(self, sha256: str | None = None, size: int | None = None, unpacked: int = len(CONTENT)) -> Archive:
        return Archive(
            url=f"http://127.0.0.1:{self.port}/data.tar.gz",
            sha256=sha256 or hashlib.sha256(self.payload).hexdigest(),
            size=len(self.payload) if size is None else size,
            unpacked=unpacked,
            folder="data",
        )


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr("cpc_ext.data.download.time.sleep", lambda seconds: None)
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            site.asked.append(asked)
            if site.redirects:
                site.redirects -= 1
                self.send_response(302)
                self.send_header("Location", "/elsewhere/data.tar.gz")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status = site.statuses.pop(0) if site.statuses else site.status
            if status:
                self.send_error(status)
                return
            start = 0
            if asked and not site.ignore_range:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                if start >= len(site.payload):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(site.payload)}")
                    self.end_headers()
                    return
                self.send_response(206)
                whole = f"bytes {start}-{len(site.payload) - 1}/{len(site.payload)}"
                self.send_header("Content-Range", site.content_range or whole)
            else:
                self.send_response(200)
            body = site.payload[start:]
            if not site.no_length:
                self.send_header("Content-Length", site.length or str(len(body)))
            self.end_headers()
            if site.break_after:
                self.wfile.write(body[: site.break_after.pop(0)])
                return
            self.wfile.write(body + site.surplus)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.port = server.server_port
    site.payload = tar_gz(("data/images.bin", CONTENT))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def visible(root) -> list[str]:
    """Return the entries of root, except lock files."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


def test_fetches_verifies_and_unpacks(site, tmp_path):
    folder = download_archive(site.archive(), tmp_path / "new")
    assert (folder / "images.bin").read_bytes() == CONTENT
    assert visible(tmp_path / "new") == ["data"]


def test_what_is_there_is_not_fetched(site, tmp_path):
    (tmp_path / "data").mkdir()
    assert require_folder(site.archive(), tmp_path, download=True) == tmp_path / "data"
    assert site.asked == []


def test_default_place_is_the_cache_folder(site, tmp_path, monkeypatch):
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path))
    assert require_folder(site.archive(), None, download=True) == tmp_path / "datasets" / "data"


def test_broken_connections_are_resumed(site, tmp_path):
    size = len(site.payload)
    site.break_after = [size // 3, size // 3]
    folder = download_archive(site.archive(), tmp_path)
    assert (folder / "images.bin").read_bytes() == CONTENT
    assert site.asked == [None, f"bytes={size // 3}-", f"bytes={size // 3 * 2}-"]


def test_a_later_run_resumes(site, tmp_path):
    site.break_after = [100, 100, 100, 100]
    with pytest.raises(DownloadError, match=r"connection closed early \(4 attempts; 400 bytes kept"):
        download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data.tar.gz.partial"]
    download_archive(site.archive(), tmp_path)
    assert site.asked[-1] == "bytes=400-"
    assert visible(tmp_path) == ["data"]


def test_a_server_without_ranges_starts_over(site, tmp_path):
    site.break_after = [1000]
    site.ignore_range = True
    folder = download_archive(site.archive(), tmp_path)
    assert (folder / "images.bin").read_bytes() == CONTENT


def test_a_complete_partial_file_is_used(site, tmp_path):
    (tmp_path / "data.tar.gz.partial").write_bytes(site.payload)
    download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data"]


def test_a_partial_file_that_is_too_long_is_fetched_anew(site, tmp_path):
    (tmp_path / "data.tar.gz.partial").write_bytes(site.payload + b"more")
    folder = download_archive(site.archive(), tmp_path)
    assert (folder / "images.bin").read_bytes() == CONTENT
    assert site.asked[-1] is None


def test_wrong_checksum_deletes_and_tells(site, tmp_path):
    found = hashlib.sha256(site.payload).hexdigest()
    size = len(site.payload)
    message = f"expected {size} bytes of SHA-256 {'0' * 64}, found {size} bytes of {found}; the file has been deleted"
    with pytest.raises(DownloadError, match=message):
        download_archive(site.archive(sha256="0" * 64), tmp_path)
    assert visible(tmp_path) == []


def test_an_archive_put_there_by_hand_is_verified_and_used(site, tmp_path):
    (tmp_path / "data.tar.gz").write_bytes(site.payload)
    download_archive(site.archive(), tmp_path)
    assert site.asked == []
    assert visible(tmp_path) == ["data"]


@pytest.mark.parametrize("member", ["../outside", "data/../../outside"])
def test_members_outside_the_folder_are_refused(site, tmp_path, member):
    site.payload = tar_gz(("data/images.bin", b"1"), (member, b"2"))
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        download_archive(site.archive(), tmp_path / "root")
    assert visible(tmp_path / "root") == ["data.tar.gz"]
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_absolute_members_stay_inside(site, tmp_path):
    outside = tmp_path / "outside"
    site.payload = tar_gz(("data/images.bin", b"1"), (str(outside), b"2"))
    download_archive(site.archive(), tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_an_archive_without_its_folder_is_an_error(site, tmp_path):
    site.payload = tar_gz(("elsewhere/images.bin", b"1"))
    with pytest.raises(DownloadError, match="expected a folder 'data' inside"):
        download_archive(site.archive(), tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:20] + b"no archive at all"])
def test_a_damaged_archive_leaves_no_folder(site, tmp_path, damage):
    site.payload = damage(site.payload)
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data.tar.gz"]


def test_interrupted_unpacking_leaves_no_folder(site, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data.tar.gz"]
    download_archive(site.archive(), tmp_path)
    assert len(site.asked) == 1


def test_missing_file_is_not_tried_again(site, tmp_path):
    site.status = 404
    with pytest.raises(DownloadError, match="HTTP 404"):
        download_archive(site.archive(), tmp_path)
    assert len(site.asked) == 1


def test_server_trouble_is_tried_again(site, tmp_path):
    site.status = 503
    with pytest.raises(DownloadError, match=r"HTTP 503.*4 attempts"):
        download_archive(site.archive(), tmp_path)
    assert len(site.asked) == 4


def test_no_server(tmp_path, site):
    archive = Archive(url="http://127.0.0.1:1/data.tar.gz", sha256="", size=1, unpacked=1, folder="data")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:1.*refused"):
        download_archive(archive, tmp_path)


def test_a_place_that_is_no_folder(site, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"cannot fetch data\.tar\.gz into .*file"):
        download_archive(site.archive(), tmp_path / "file" / "data")


def test_a_full_disk_is_told_and_resumed_from(site, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DownloadError, match=r"cannot fetch data\.tar\.gz into .*File too large"):
            download_archive(site.archive(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert visible(tmp_path) == ["data.tar.gz.partial"]
    download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data"]


def test_two_processes_fetch_once(site, tmp_path):
    # fork: the second process finds the same server and no time goes into importing.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=download_archive, args=(site.archive(), tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(site.asked) == 1
    assert visible(tmp_path) == ["data"]


def test_an_answer_of_416_at_once_is_an_error(site, tmp_path):
    site.status = 416
    with pytest.raises(DownloadError, match="HTTP 416"):
        download_archive(site.archive(), tmp_path)
    assert len(site.asked) == 1


def test_a_server_whose_file_is_shorter_than_what_is_there_is_asked_anew(site, tmp_path):
    """The part at hand is no part of the server's file; the server's has another length than published."""
    whole, site.payload = site.archive(), site.payload[:500]
    (tmp_path / "data.tar.gz.partial").write_bytes(b"x" * 600)
    with pytest.raises(DownloadError, match=rf"expected {whole.size} bytes, the server has 500"):
        download_archive(whole, tmp_path)
    assert site.asked == ["bytes=600-", None]


@pytest.mark.parametrize("length", ["lots", "-5", "1e3", "", "9" * 40])
def test_a_content_length_that_is_no_number_is_passed_over(site, tmp_path, length):
    site.length, site.no_length = length, not length
    folder = download_archive(site.archive(), tmp_path)
    assert (folder / "images.bin").read_bytes() == CONTENT


def test_another_length_is_an_error_before_anything_is_fetched(site, tmp_path):
    size = len(site.payload)
    with pytest.raises(DownloadError, match=rf"expected {size - 1} bytes, the server has {size}"):
        download_archive(site.archive(size=size - 1), tmp_path)
    assert visible(tmp_path) == []


def test_nothing_is_written_beyond_the_size(site, tmp_path, monkeypatch):
    monkeypatch.setattr("cpc_ext.data.download.CHUNK_BYTES", 1000)
    site.no_length, site.surplus = True, b"z" * 100_000
    size = len(site.payload)
    with pytest.raises(DownloadError, match=f"expected {size} bytes, got more"):
        download_archive(site.archive(), tmp_path)
    assert (tmp_path / "data.tar.gz.partial").stat().st_size <= size
    site.surplus = b""
    download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data"]


def test_a_page_in_place_of_the_archive_is_told(site, tmp_path):
    archive, site.payload, site.no_length = site.archive(), b"<!DOCTYPE html><title>Log in</title>", True
    with pytest.raises(DownloadError, match=r"expected a \.tar\.gz, got something that begins b'<!DOCTYPE"):
        download_archive(archive, tmp_path)
    assert len(site.asked) == 1


@pytest.mark.parametrize("found", ["bytes 0-99/100", "bytes 99-500/501", "nonsense", "bytes 100-199/200"])
def test_another_range_than_asked_for_is_an_error(site, tmp_path, found):
    site.content_range = found
    (tmp_path / "data.tar.gz.partial").write_bytes(site.payload[:100])
    with pytest.raises(DownloadError, match=rf"expected bytes from 100 of {len(site.payload)}, got '{found}'"):
        download_archive(site.archive(), tmp_path)
    assert (tmp_path / "data.tar.gz.partial").read_bytes() == site.payload[:100]


@pytest.mark.parametrize("status", [408, 429, 500])
def test_what_passes_is_tried_again(site, tmp_path, status):
    site.statuses = [status, status]
    download_archive(site.archive(), tmp_path)
    assert len(site.asked) == 3


def test_a_redirect_is_followed_and_a_circle_of_them_is_an_error(site, tmp_path):
    site.redirects = 1
    download_archive(site.archive(), tmp_path / "one")
    assert visible(tmp_path / "one") == ["data"]
    site.redirects = 100
    with pytest.raises(DownloadError, match="HTTP 302"):
        download_archive(site.archive(), tmp_path / "many")


def test_a_resumed_part_of_something_else_is_told_by_the_checksum(site, tmp_path):
    (tmp_path / "data.tar.gz.partial").write_bytes(b"x" * 100)
    with pytest.raises(DownloadError, match="of SHA-256"):
        download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == []
    download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data"]


def test_unpacking_is_bounded(site, tmp_path):
    """Zeros pack a thousand times: what unpacks to more than the images is stopped on the way."""
    site.payload = tar_gz(("data/images.bin", bytes(40 << 20)))
    with pytest.raises(DownloadError, match=r"cannot be unpacked: .*more than was published"):
        download_archive(site.archive(unpacked=1 << 20), tmp_path)
    assert visible(tmp_path) == ["data.tar.gz"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_refused(site, tmp_path, kind):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        first = tarfile.TarInfo("data/images.bin")
        archive.addfile(first)
        other = tarfile.TarInfo("data/other")
        other.type, other.linkname = kind, "data/images.bin"
        archive.addfile(other)
    site.payload = packed.getvalue()
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        download_archive(site.archive(), tmp_path)
    assert visible(tmp_path) == ["data.tar.gz"]


def test_published_archives_hold_their_files():
    """Bytes of the files that the loaders open, by the formats' own arithmetic."""
    assert stl10.ARCHIVE.unpacked == 113_000 * 96 * 96 * 3
    assert cifar10.ARCHIVE.unpacked == cifar100.ARCHIVE.unpacked == 60_000 * 32 * 32 * 3
    for archive in (stl10.ARCHIVE, cifar10.ARCHIVE, cifar100.ARCHIVE):
        assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
        assert archive.size < archive.unpacked
