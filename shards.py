"""Tar shards: ten million small files defeat network storage, so frames may lie in uncompressed tars.

A shard is read as a folder of its name: `videos/007.tar/colon/0001.jpg` is the member colon/0001.jpg of
videos/007.tar. Every shard has an index, which is made once: see shard_index.
"""
import bisect
import contextlib
import functools
import io
import os
import tarfile

import numpy as np
from tqdm import tqdm

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif")
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def visible(name):
    """Whether a file or folder of this name is a user's: not hidden, and none of those that
    systems leave behind."""
    return not name.startswith(".") and name not in SYSTEM


class Sentence:
    """An error whose text is its own sentence, also where a loader's worker has wrapped its
    traceback around it."""

    def __str__(self):
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class BadShard(Sentence, OSError):
    """A tar that cannot be relied on. No BadImage: it concerns all of its frames, so the run
    ends."""


def split_shard(path):
    """("a/b.tar", "c/d.jpg") of a/b.tar/c/d.jpg; (None, path) of a path that leads through no
    tar file."""
    path = os.fspath(path)
    head, mark, member = path.partition(".tar/")
    return (head + ".tar", member) if mark and os.path.isfile(head + ".tar") else (None, path)


def open_file(path):
    """What Image.open takes for a path: the path itself, or the bytes of a shard's member. Every
    reader of pixels asks here."""
    shard, member = split_shard(path)
    if shard is None:
        return path
    offset, size = locate(shard, member)
    with open(shard, "rb") as file:
        check_unchanged(shard, os.fstat(file.fileno()))
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise BadShard(f"{shard}: cut short, {member} should end at byte {offset + size}: "
                       "copy it anew")
    return io.BytesIO(content)


def stamp(path):
    """(bytes, time of last change in ns) of a file or of a shard's member, to tell whether it is
    still the same."""
    shard, member = split_shard(path)
    found = os.stat(shard or path)
    return found.st_size if shard is None else locate(shard, member)[1], found.st_mtime_ns


def locate(shard, member):
    """(offset, bytes) of a member's content in its tar."""
    index, name = shard_index(shard), os.fsencode(member)
    row = bisect.bisect_left(index["name"], scan_order(name), lo=1, key=scan_order)
    if row == len(index) or index["name"][row] != name:
        raise FileNotFoundError(f"{shard}: has no member {member}")
    return int(index["offset"][row]), int(index["size"][row])


def scan_order(name):
    """The key by which `scan` sorts a relative path (bytes): a folder's files come before its
    folders."""
    *folders, last = name.split(b"/")
    return [(1, folder) for folder in folders] + [(0, last)]


def check_unchanged(shard, found):
    """BadShard if the index does not describe the tar with this os.stat result."""
    _, changed, size = shard_index(shard)[0]
    if (changed, size) != (found.st_mtime_ns, found.st_size):
        raise BadShard(f"{shard}: changed since it was indexed; give the command again, which indexes it "
                       "anew")


@functools.lru_cache(maxsize=None)
def shard_index(shard):
    """(1 + n,) rows (name, offset, size) of a tar's images, in the order of `scan`. Row 0 is the
    tar itself: ("", its time of last change in ns, its size). Kept beside it as
    <shard>.index.npy, which all processes map into memory."""
    file = f"{shard}.index.npy"
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # not there, or not whole
        index, found = np.load(file, mmap_mode="r"), os.stat(shard)
        if tuple(index[0])[1:] == (found.st_mtime_ns, found.st_size):
            return index
        print(f"{shard}: changed since it was indexed, so it is indexed anew")
    index = index_shard(shard)
    temporary = f"{file}.tmp{os.getpid()}.npy"
    try:
        np.save(temporary, index)
        os.replace(temporary, file)
    except OSError as error:  # a read-only folder, say
        print(f"{file}: cannot be written ({error.strerror}), so every run indexes it anew")
        return index
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return np.load(file, mmap_mode="r")


def index_shard(shard):
    """Read the headers of a tar: see shard_index. BadShard for one that is compressed, cut short
    or damaged."""
    found, rows = os.stat(shard), {}
    bar = tqdm(total=found.st_size, unit="B", unit_scale=True, desc=f"index of {shard}",
               disable=None)
    try:
        with bar, tarfile.open(shard, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # tarfile would keep an object of a kilobyte for each
                name = os.path.normpath(member.name)
                image = member.isreg() and name.lower().endswith(SUFFIXES)
                if image and all(map(visible, name.split("/"))):  # of one name the last counts, as in tar
                    rows[os.fsencode(name)] = member.offset_data, member.size
                bar.update(tar.offset - bar.n)
            end = tar.offset  # where tarfile saw no header: a whole tar has empty blocks there
            tar.fileobj.seek(end)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise BadShard(f"{shard}: cut short or damaged at byte {end} of {found.st_size}: "
                               "copy it anew")
    except tarfile.TarError as error:
        words = f"{shard}: cut short, or no uncompressed tar as `tar -cf` writes it ({error})"
        raise BadShard(words) from error
    names = sorted(rows, key=scan_order)
    longest = max(map(len, names), default=1)
    kind = [("name", f"S{longest}"), ("offset", np.int64), ("size", np.int64)]
    itself = (b"", found.st_mtime_ns, found.st_size)
    return np.array([itself, *((name, *rows[name]) for name in names)], kind)


def is_shard(path):
    return str(path).endswith(".tar") and os.path.isfile(path)


def shard_members(shard):
    """Names of a shard's images, in the order in which `scan` would find them in a folder."""
    shard_index.cache_clear()  # who looks again sees what has changed since
    return (os.fsdecode(name) for name in shard_index(str(shard))["name"][1:])
