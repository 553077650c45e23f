"""S3, here a server on loopback that speaks its protocol: the same images, rows and pixels as from a disk."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.response import StreamingBody
from buckets import BreakingServer, endpoint_of, forbid, serve
from forks import in_fork
from launching import typed
from loading import CPU, assert_same, global_batches, loaders_of, read
from tars import picture, write_tar
from urllib3.exceptions import SSLError

from mixmim_ds.data import recover, s3
from mixmim_ds.data.central import CentralBatches
from mixmim_ds.data.index import open_index
from mixmim_ds.data.labelled import open_labelled
from mixmim_ds.data.loader import Normalise
from mixmim_ds.data.recover import DataFailed
from mixmim_ds.data.s3_folder import open_folder
from mixmim_ds.data.shards import Images, open_shards
from mixmim_ds.data.verify import verify
from mixmim_ds.finetune_config import LabelledDataConfig

PATTERNS = ["shards/train-{000000..000004}.tar", "shards/*.tar", "**/train-00000[0-4].tar", "s{hards/train,x}-*.tar"]


def told(index: Images) -> tuple:
    return (
        index.fingerprint, [index.name(i) for i in range(len(index))], index.sizes.tolist(), index.labels.tolist(),
        index.classes, index.broken, [index.open(i).read() for i in range(len(index))],
    )  # fmt: skip


def pair(kind: str, disk: Path, bucket: str, index_dir: Path) -> tuple[Images, Images]:
    """The images on the disk and those in the bucket."""
    if kind == "folder":
        return open_index(disk / "images", index_dir), open_folder(f"s3://{bucket}/images", index_dir)
    return open_shards(f"{disk}/shards/*.tar", index_dir), open_shards(f"s3://{bucket}/shards/*.tar", index_dir)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_what_is_told_and_every_pixel_are_those_of_the_disk(kind: str, disk: Path, bucket: str, tmp_path: Path) -> None:
    on_disk, in_s3 = pair(kind, disk, bucket, tmp_path / "index")
    assert told(in_s3) == told(on_disk) and len(in_s3) == 40 and in_s3.gives == "bytes"
    if kind == "folder":
        assert in_s3.others == on_disk.others == 1, "what a console leaves is none"
    batches = [global_batches(index, ranks, start=0, steps=2) for index, ranks in ((on_disk, 1), (in_s3, 2))]
    for left, right in zip(*batches, strict=True):
        assert_same(left, right)


def test_braces_and_globs_name_objects(disk: Path, bucket: str, tmp_path: Path) -> None:
    on_disk = told(open_shards(f"{disk}/shards/*.tar", tmp_path / "index"))
    for pattern in PATTERNS[:3]:
        assert told(open_shards(f"s3://{bucket}/{pattern}", tmp_path / "index")) == on_disk, pattern
    with pytest.raises(ValueError, match=r"names s3://.*/sx-\*\.tar, which does not exist \(1 of 2 are missing\)"):
        open_shards(f"s3://{bucket}/{PATTERNS[3]}", tmp_path / "index")


def test_an_object_is_read_as_a_file(bucket: str, client: Any) -> None:
    client.put_object(Bucket=bucket, Key="numbers", Body=b"0123456789")
    address = f"s3://{bucket}/numbers"
    assert (s3.read(address), s3.read(address, 3, 4), s3.read(address, 8, 9)) == (b"0123456789", b"3456", b"89")
    assert s3.read(address, 10, 1) == b""
    with s3.open_object(address, 4) as file:
        assert (file.read(1), file.seek(7), file.read(9), file.read(1)) == (b"0", 7, b"789", b"")


def test_a_forked_process_has_a_client_of_its_own(bucket: str, client: Any) -> None:
    """Connections that it shared with its parent would give each the other's answers."""
    address = f"s3://{bucket}/forked"
    client.put_object(Bucket=bucket, Key="forked", Body=b"0")
    with s3._client_for(address) as own:
        assert s3.read(address) == b"0"

    def use() -> tuple[bytes, bool]:
        with s3._client_for(address) as other:
            return s3.read(address), other is own

    assert in_fork(use) == (b"0", False)


@pytest.mark.parametrize("way", ["cut off", "silent", "TLS"])
def test_a_body_that_breaks_is_read_again(
    way: str, monkeypatch: pytest.MonkeyPatch, client: Any, forget: Callable[[], None]
) -> None:
    """TLS alone is staged."""

    def read_by_tls(body: StreamingBody) -> bytes:
        if server.asked <= server.bad:
            raise SSLError("DECRYPTION_FAILED_OR_BAD_RECORD_MAC")
        return read_body(body)

    read_body = StreamingBody.read
    if way == "TLS":
        monkeypatch.setattr(StreamingBody, "read", read_by_tls)
    monkeypatch.setattr(s3, "READ_S", 0.1)
    forget()
    with BreakingServer(way) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint_of(server))
        for bad, reads in ((0, 1), (1, 2), (s3.ATTEMPTS - 1, s3.ATTEMPTS)):
            server.asked, server.bad = 0, bad
            assert s3.read("s3://bucket/key", 3, 10) == b"0123456789" and server.asked == reads
        server.asked, server.bad = 0, s3.ATTEMPTS
        with pytest.raises(s3.StorageDown, match="see AWS_ENDPOINT_URL"):
            s3.read("s3://bucket/key", 3, 10)
        assert server.asked == s3.ATTEMPTS


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_only_changed_objects_are_looked_through_again(
    kind: str, disk: Path, changing: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> Images:
        return pair(kind, disk, changing, tmp_path / "index")[1]

    first, opened, open_object = look(), [], s3.open_object
    monkeypatch.setattr(s3, "open_object", lambda *arguments: opened.append(0) or open_object(*arguments))
    assert told(look()) == told(first) and not opened
    key = "shards/train-000001.tar" if kind == "shards" else "images/class/deep0/0.jpg"
    content = client.get_object(Bucket=changing, Key=key)["Body"].read()
    client.put_object(Bucket=changing, Key=key, Body=content[:-1] + b"!")  # of the same size
    assert look().fingerprint == first.fingerprint and opened
    if kind == "shards":
        content = write_tar(tmp_path / "x.tar", {"x.jpg": picture()}).read_bytes()
        client.put_object(Bucket=changing, Key=key, Body=content)
    else:
        client.delete_object(Bucket=changing, Key=key)
    assert len(look()) == (33 if kind == "shards" else 39)


@pytest.mark.parametrize(
    ("kind", "forbidden", "reason"),
    [
        ("folder", False, "there is no such object (NoSuchKey)"),
        ("folder", True, "access is refused (403); take credentials with s3:ListBucket and s3:GetObject"),
        ("shards", False, "empty file"),
    ],
)
def test_what_cannot_be_had_any_more_is_replaced_and_named(
    kind: str, forbidden: bool, reason: str, disk: Path, changing: str, client: Any, tmp_path: Path
) -> None:
    index = pair(kind, disk, changing, tmp_path / "index")[1]
    key = "shards/train-000002.tar" if kind == "shards" else "images/class/deep0/0.jpg"
    forbid(client, changing, key) if forbidden else client.delete_object(Bucket=changing, Key=key)
    (loader,) = loaders_of(index, 1)
    batches = read([loader], start=0, steps=2)
    lost = {i for i in range(40) if index.name(i).split(":")[0] in key}
    assert lost and not lost & {i for step in batches for batch in step for i in batch.ids.tolist()}
    assert loader.bad and loader.bad.keys() <= lost and set(loader.bad.values()) == {reason}


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_server_that_is_down_blames_no_image(
    kind: str, disk: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: Callable[[], None]
) -> None:
    server = serve()
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint_of(server))
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    monkeypatch.setattr(recover, "time", SimpleNamespace(sleep=lambda seconds: None))
    forget()
    on_disk, in_s3 = pair(kind, disk, bucket, tmp_path / "index")
    (expected,) = global_batches(on_disk, 1, start=0, steps=1)
    server.stop()
    (loader,) = loaders_of(in_s3, 1)
    with pytest.raises(DataFailed, match=r"^S3 failed 3 times in a row: .*see AWS_ENDPOINT_URL.* again\.$"):
        next(loader.batches(0))
    with pytest.raises(DataFailed, match=r"^S3 failed 3 times in a row: .*see AWS_ENDPOINT_URL.* again\.$"):
        next(iter(CentralBatches(in_s3, 32, Normalise([0.5], [0.5], CPU), CPU, 1, 8)))
    with pytest.raises(s3.StorageDown):
        list(verify(in_s3, progress=False))
    assert "Could not connect" in refusal(lambda: pair(kind, disk, bucket, tmp_path / "index"))
    port, back = server.get_host_and_port()[1], []
    monkeypatch.setattr(recover, "time", SimpleNamespace(sleep=lambda seconds: back.append(serve(port))))
    (batches,) = read([loader], start=0, steps=1)
    assert_same(batches, expected)
    assert loader.bad == {}
    back[0].stop()


# Mistakes of users


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as refused:
        call()
    sentence = str(refused.value)
    assert sentence.startswith("data.root=s3://") and "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


@pytest.mark.parametrize(
    ("root", "shards", "folder"),
    [
        ("nowhere/x", "there is no such bucket (NoSuchBucket); correct its name or AWS_ENDPOINT_URL.", None),
        ("/x", "that names no bucket; write s3://bucket/prefix.", None),
        ("BUCKET/no", "matches no file: give the tar files, as in 's3://bucket/train-*.tar'.", "only 0 other files;"),
    ],
)
def test_a_wrong_address_is_one_sentence(
    root: str, shards: str, folder: str | None, bucket: str, tmp_path: Path
) -> None:
    root = "s3://" + root.replace("BUCKET", bucket)
    assert shards in refusal(lambda: open_shards(root, tmp_path))
    assert (folder or shards) in refusal(lambda: open_folder(root, tmp_path))


def test_a_shard_that_may_not_be_read_is_one_sentence(changing: str, client: Any, tmp_path: Path) -> None:
    forbid(client, changing, "shards/train-000001.tar")
    sentence = refusal(lambda: open_shards(f"s3://{changing}/shards/*.tar", tmp_path))
    assert f"*.tar: s3://{changing}/shards/train-000001.tar cannot be read (access is refused (403); take" in sentence


def test_no_access_and_no_boto3_are_one_sentence(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: Callable[[], None]
) -> None:
    def refused() -> list[str]:
        forget()
        calls = (lambda: open_shards(f"s3://{bucket}/*", tmp_path), lambda: open_folder(f"s3://{bucket}", tmp_path))
        return [refusal(call).partition(" cannot be read: ")[2] for call in calls]

    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    remedy = "no credentials are found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
    assert refused() == [remedy, remedy]
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    remedy = "S3 takes boto3, which is missing; pip install 'mixmim_ds[s3]'."
    assert refused() == [remedy, remedy]


def test_labelled_sets_are_those_of_the_disk_and_are_probed(bucket: str, client: Any, tmp_path: Path) -> None:
    for i in range(24):
        name = f"{('train', 'val')[i % 4 == 0]}/{('cat', 'dog')[i // 4 % 2]}/{i}.jpg"
        path = tmp_path / "labelled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(40 + i))
        client.put_object(Bucket=bucket, Key=f"labelled/{name}", Body=path.read_bytes())
    roots = f"s3://{bucket}/labelled", str(tmp_path / "labelled")
    in_s3, on_disk = (open_labelled(LabelledDataConfig(root=root, index_dir=str(tmp_path / "index"))) for root in roots)
    for left, right in zip(in_s3, on_disk, strict=True):
        assert told(left.images) == told(right.images) and left.digest == right.digest
    assert [len(part) for part in in_s3] == [18, 6] and in_s3[0].classes == ["cat", "dog"]
    words = ["--data", roots[0], "--index-dir", tmp_path / "index", "--img-size", "32"]
    done = typed("launch/probe.py", "random:tiny", *words)
    assert done.returncode == 0 and "18 images to learn from, 6 to tell" in done.stdout, done.stderr


def test_the_command_looks_after_a_folder_in_s3(disk: Path, bucket: str, tmp_path: Path) -> None:
    done = typed("launch/index.py", f"s3://{bucket}/images/", "--verify", f"--index-dir={tmp_path}")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert open_index(disk / "images", tmp_path).fingerprint in lines[3]
    assert lines[5] == "broken: broken.jpg (neither JPEG, PNG, WebP nor BMP)" and lines[6].startswith("41 files: 1 bro")
