"""Arrays out of an npz, quickly and without trust: headers without inflating, members inflated at once, nothing unpickled."""

from __future__ import annotations

import io
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib  # half of zlib's time; libdeflate takes a fifth less again, a tenth of a whole packing

_parsing = threading.Lock()  # CPython 3.11's ast, which numpy parses headers with, fails now and then in threads ("recursion depth mismatch")
HEADER_PEEK = 65536  # compressed bytes read for a header: an npy header is 128 bytes unless its dtype is exotic


class BadNpz(ValueError):
    """The file is not an npz that can be read; the text is the reason, without the path."""


@dataclass(frozen=True)
class ArrayHeader:
    """What an npy member says of itself before its data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    data_offset: int  # bytes of the member before the data

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_headers(path: Path) -> dict[str, ArrayHeader]:
    """Name to header of every array in the file; raises BadNpz. Inflates only the first bytes of each member."""
    with _opened(path) as archive:
        return {_array_name(info): _header(_peek(archive, info), info.filename) for info in archive.infolist()}


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Name to array, read-only and C-contiguous, for `names` or for all; raises BadNpz, also on a wrong checksum."""
    arrays = {}
    with _opened(path) as archive:
        for info in archive.infolist():
            name = _array_name(info)
            if names is None or name in names:
                arrays[name] = _array(_member(archive, info), info.filename)
    return arrays


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # the last two: damage in the directory at the end
        raise BadNpz(f"not a whole npz ({error}); it was probably cut short") from error
    except OSError as error:
        raise BadNpz(f"cannot be read ({error.strerror or error})") from error


def _array_name(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def _compressed(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int | None = None) -> bytes:
    """The stored bytes of a member, as they lie in the file; `most` of them at the most."""
    if archive.fp is None:
        raise BadNpz("was closed while it was read")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise BadNpz(f"member {info.filename} is neither stored nor deflated; save it with np.savez_compressed")
    try:
        descriptor = archive.fp.fileno()
        local = os.pread(descriptor, 30, info.header_offset)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise BadNpz(f"member {info.filename} has no local header")
        name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
        size = info.compress_size if most is None else min(most, info.compress_size)
        blob = os.pread(descriptor, size, info.header_offset + 30 + name_bytes + extra_bytes)
    except OSError as error:
        raise BadNpz(f"cannot be read ({error.strerror or error})") from error
    if len(blob) < size:
        raise BadNpz(f"member {info.filename} ends after {len(blob)} of {size} bytes")
    return blob


def _peek(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    blob = _compressed(archive, info, HEADER_PEEK)
    if info.compress_type == zipfile.ZIP_STORED:
        return blob
    try:
        return zlib.decompressobj(-15).decompress(blob, HEADER_PEEK)
    except zlib.error as error:
        raise BadNpz(f"member {info.filename} does not inflate ({error})") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The whole member, inflated in one call into one buffer of the known size, its checksum compared."""
    blob = _compressed(archive, info)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            # One byte more than it holds: a buffer that is exactly full is doubled before the end is seen, 1.36 times the CPU time.
            blob = isal_zlib.decompress(blob, -15, info.file_size + 1)
        except (isal_zlib.error, MemoryError, OverflowError) as error:  # type: ignore[misc]  # isal's stub does not say that it is an exception
            raise BadNpz(f"member {info.filename} does not inflate ({error})") from error
    if len(blob) != info.file_size or isal_zlib.crc32(blob) != info.CRC:
        raise BadNpz(f"member {info.filename} is damaged: its checksum or size is not the recorded one")
    return blob


def _header(member: bytes, name: str) -> ArrayHeader:
    stream = io.BytesIO(member[:HEADER_PEEK])
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _parsing:
            shape, fortran_order, dtype = read(stream)
    except Exception as error:  # numpy hands the text to Python's parser: TokenError, TypeError, RecursionError, … where it is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadNpz(f"member {name} is not an npy array ({reason})") from error
    return ArrayHeader(dtype, shape, fortran_order, stream.tell())


def _array(member: bytes, name: str) -> np.ndarray:
    header = _header(member, name)
    if header.dtype.hasobject:
        raise BadNpz(f"array {name} holds pickled objects, which are never loaded")
    try:
        flat = np.frombuffer(member, header.dtype, offset=header.data_offset)
        array = flat.reshape(header.shape, order="F" if header.fortran_order else "C")
    except ValueError as error:
        raise BadNpz(f"array {name}: {len(member) - header.data_offset} bytes do not make {header} ({error})") from error
    return np.require(array, requirements="C")  # not ascontiguousarray, which gives a number one dimension
