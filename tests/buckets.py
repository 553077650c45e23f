"""Buckets of an S3 server on loopback (moto's), for tests."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer
from tars import picture


def write_images(folder: Path) -> None:
    """40 images of three classes, and what is none."""
    for i in range(40):
        path = folder / f"{'ä' * (i % 3)}class" / f"deep{i % 2}" / f"{i}.{('jpg', 'png')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(40 + 7 * i, 90 - i, ("JPEG", "PNG")[i % 2]))
    (folder / "broken.jpg").write_bytes(b"text")
    (folder / "readme.txt").write_bytes(b"text")


def stocked(client: Any, disk: Path, bucket: str) -> str:
    """A bucket with a copy of the disk, and with what a console and a careless user leave there."""
    client.create_bucket(Bucket=bucket)
    for path in (path for part in ("images", "shards") for path in (disk / part).rglob("*") if path.is_file()):
        client.put_object(Bucket=bucket, Key=str(path.relative_to(disk)), Body=path.read_bytes())
    for key in ("images/", "images/.hidden/x.jpg", "shards/.train-000009.tar", "shards/old/"):
        client.put_object(Bucket=bucket, Key=key)
    return bucket


def serve(port: int = 0) -> ThreadedMotoServer:
    """A server whose buckets are those of all others in this process."""
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    return server


class BreakingServer(ThreadingHTTPServer):
    """Answers all that is asked for with ten digits, `bad` times with half of them; serves until the block ends."""

    def __init__(self, way: str) -> None:
        super().__init__(("127.0.0.1", 0), _Breaking)
        self.way, self.asked, self.bad = way, 0, 0

    def __enter__(self) -> "BreakingServer":
        threading.Thread(target=self.serve_forever).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        super().__exit__()

    def get_host_and_port(self) -> tuple[str, int]:
        return self.server_address


class _Breaking(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked += 1
        breaks = self.server.asked <= self.server.bad and self.server.way != "TLS"
        self.send_response(206)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"01234" if breaks else b"0123456789")
        if breaks and self.server.way == "silent":
            time.sleep(0.5)  # the connection is closed after that

    def log_message(self, *_: object) -> None:
        """Nothing."""


def endpoint_of(server: ThreadedMotoServer | BreakingServer) -> str:
    return "http://{}:{}".format(*server.get_host_and_port())


def log_in(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "someone")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def forbid(client: Any, bucket: str, key: str) -> None:
    policy = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/{key}"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
    client.put_bucket_policy(Bucket=bucket, Policy=policy)
