"""Objects in S3, or in a store that speaks its protocol: listed, and read whole or in pieces.

Endpoint, region and credentials come from where every AWS tool has them: AWS_ENDPOINT_URL, AWS_PROFILE, ~/.aws and so
on (Boto3 documentation: Credentials, Configuration). Errors come out as OSErrors: those of an object that cannot be had
are the ones a file would give, those of the store as a whole are StorageDown.

n  objects
"""

import errno
import hashlib
import io
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

SCHEME = "s3://"
CONNECTIONS = 32  # threads of a process that wait for the store at once
ATTEMPTS = 5  # of a request that the store does not answer, refuses for a moment or breaks off, at most
CONNECT_S, READ_S = 10, 20  # without a sign of the store, after which an attempt is given up
FORBIDDEN, NOT_FOUND, NO_SUCH_RANGE = 403, 404, 416  # what HTTP says of one object; all else is the store's own trouble

_lock = threading.Lock()


class StorageDown(OSError):
    """The store as a whole fails or does not answer, which says nothing about the object that was asked for."""


def is_s3(place: str) -> bool:
    """Whether it is an address in S3 and no path."""
    return place.startswith(SCHEME)


def split(address: str) -> tuple[str, str]:
    """Bucket and key: `s3://bucket/a/b` -> `bucket`, `a/b`."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    return bucket, key


def refusal(root: str, error: OSError) -> ValueError:
    """What to tell a user whose data.root led to one of this module's errors."""
    return ValueError(f"data.root={root} cannot be read: {error.strerror}.")


def read(address: str, offset: int = 0, length: int | None = None) -> bytes:
    """These bytes of an object, up to its end without a length; as of a file, those beyond the end are not there.

    Raises:
        OSError: the object cannot be had.
        StorageDown: no object can.
    """
    bucket, key = split(address)
    span = {} if length is None else {"Range": f"bytes={offset}-{offset + length - 1}"}
    try:
        with _client_for(address) as client:
            return _content(client, {"Bucket": bucket, "Key": key, **span})
    except EOFError:
        return b""


def _content(client: Any, wanted: dict[str, str]) -> bytes:
    """The body of an answer, asked for again while it breaks: the client itself tries requests again, not bodies.

    Raises:
        BotoCoreError, urllib3.exceptions.HTTPError: at the last attempt, too.
    """
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    attempts = 0
    while True:
        body = client.get_object(**wanted)["Body"]
        try:
            content: bytes = body.read()
            return content
        except (BotoCoreError, HTTPError):
            attempts += 1
            if attempts == ATTEMPTS:
                raise


class _Raw(io.RawIOBase):
    """An object as a file that is read in pieces, each a request."""

    def __init__(self, address: str) -> None:
        self.address, self.position = address, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            raise io.UnsupportedOperation("the end of an object is not known before it is reached")
        self.position = offset + (self.position if whence == os.SEEK_CUR else 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)
        content = read(self.address, self.position, len(wanted))
        wanted[: len(content)] = content
        self.position += len(content)
        return len(content)


def open_object(address: str, ahead: int) -> io.BufferedReader:
    """An object as a file, read `ahead` bytes at a time; its errors are those of `read`."""
    return io.BufferedReader(_Raw(address), ahead)


def list_objects(bucket: str, prefix: str, deep: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The objects whose keys begin with `prefix`.

    Args:
        deep: whether also those with a `/` after it.

    Returns:
        keys, bytes [n], encoded as by os.fsencode; sizes in bytes and hashes of the ETags, which change with the
        content (Amazon S3 API reference: Object), int64 [n, 2]; the prefixes up to the next `/` that are left out.

    Raises:
        OSError: the bucket cannot be listed.
        StorageDown: nothing can.
    """
    keys, states, folders = [np.empty(0, "S1")], [np.empty((0, 2), np.int64)], []
    with _client_for(SCHEME + bucket) as client:
        options = {"Bucket": bucket, "Prefix": prefix} | ({} if deep else {"Delimiter": "/"})
        for page in client.get_paginator("list_objects_v2").paginate(**options):
            # Consoles stand for a folder with an empty object whose key ends like this.
            found = [each for each in page.get("Contents", ()) if not each["Key"].endswith("/")]
            keys.append(np.array([os.fsencode(each["Key"]) for each in found], "S"))
            states.append(np.array([(each["Size"], _hashed(each["ETag"])) for each in found], np.int64).reshape(-1, 2))
            folders += [each["Prefix"] for each in page.get("CommonPrefixes", ())]
    return np.concatenate(keys), np.concatenate(states), folders


def look_up(beginnings: Iterable[str], deep: bool = False) -> dict[str, tuple[int, int]]:
    """Sizes and hashes of ETags, by address, of all objects whose addresses begin like one of these, and maybe others.

    Whatever lies in one folder is listed at once, by what the beginnings have in common.

    Args:
        deep: whether also those with a further `/`.

    Raises:
        OSError: as `list_objects`.
    """
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for bucket, key in map(split, beginnings):
        together[bucket, os.path.dirname(key)].append(key)
    found: dict[str, tuple[int, int]] = {}
    for (bucket, _), group in together.items():
        keys, states, _ = list_objects(bucket, os.path.commonprefix(group), deep)
        found |= {
            f"{SCHEME}{bucket}/{os.fsdecode(key)}": (size, tag)
            for key, (size, tag) in zip(keys.tolist(), states.tolist(), strict=True)
        }
    return found


def _hashed(tag: str) -> int:
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "little", signed=True)


@contextmanager
def _client_for(address: str) -> Iterator[Any]:
    """The client, whose errors become OSErrors; EOFError for a range beyond the end of an object."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
        from urllib3.exceptions import HTTPError
    except ImportError as error:
        remedy = "S3 takes boto3, which is missing; pip install 'mixmim_ds[s3]'"
        raise StorageDown(errno.ENOSYS, remedy, address) from error
    try:
        with _lock:  # sessions, unlike clients, are not for many threads (Boto3 documentation: Session)
            client = _client_of(os.getpid())
        yield client
    except ClientError as error:
        raise _as_of_a_file(error.response, address) from error
    except NoCredentialsError as error:
        remedy = "no credentials are found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise StorageDown(errno.EACCES, remedy, address) from error
    except ParamValidationError as error:
        raise StorageDown(errno.EINVAL, "that names no bucket; write s3://bucket/prefix", address) from error
    except (BotoCoreError, HTTPError) as error:  # botocore lets the latter through where TLS fails in a body
        reason = " ".join(str(error).split()).rstrip(".")
        raise StorageDown(errno.EIO, f"{reason}; see AWS_ENDPOINT_URL, AWS_PROFILE and the network", address) from error


@lru_cache(1)
def _client_of(process: int) -> Any:
    """The client of this process; after a fork a new one, whose connections are not shared with the parent."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
    )
    return boto3.Session().client("s3", config=config)


def _as_of_a_file(response: dict[str, Any], address: str) -> Exception:
    code, status = response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]
    if code == "NoSuchBucket":
        remedy = f"there is no such bucket ({code}); correct its name or AWS_ENDPOINT_URL"
        return FileNotFoundError(errno.ENOENT, remedy, address)
    if status == NOT_FOUND:
        return FileNotFoundError(errno.ENOENT, f"there is no such object ({code})", address)
    if status == FORBIDDEN:
        remedy = f"access is refused ({code}); take credentials with s3:ListBucket and s3:GetObject"
        return PermissionError(errno.EACCES, remedy, address)
    if status == NO_SUCH_RANGE:
        return EOFError(address)
    reason = " ".join(response["Error"].get("Message", "").split()).rstrip(".")
    return StorageDown(errno.EIO, f"S3 answers {code} ({reason}); see AWS_ENDPOINT_URL and AWS_PROFILE", address)
