import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import redact

ROOT = Path(__file__).parents[2]

CANARY = "c4n4ry/Pa+ss=w0rd"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://user:{CANARY}@bucket/train/000000.tar: no answer",
        f"cannot open 'https://me:{CANARY}@host:443/x'",
        f"s3://user:{CANARY}@again@bucket/x",
        "https://c4n4ry@host/x",
        "https://b.s3.amazonaws.com/k?X-Amz-Signature=c4n4ry&X-Amz-Expires=60",
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=c4n4ry%2F2026%2Fs3&x-amz-security-token=c4n4ry",
        "https://storage.googleapis.com/b/k?GoogleAccessId=c4n4ry@x.iam&Signature=c4n4ry%3D",
        "https://storage.googleapis.com/b/k?X-Goog-Credential=c4n4ry&X-Goog-Signature=c4n4ry",
        "https://a.blob.core.windows.net/c/b?sv=2024&sig=c4n4ry%2Bx&se=2026",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=c4n4ry/x==;EndpointSuffix=x",
        "BlobEndpoint=https://a/;SharedAccessSignature=sv=c4n4ry",
        "AWS4-HMAC-SHA256 Credential=c4n4ry/2026/us/s3, SignedHeaders=host, Signature=c4n4ry",
        "{'Authorization': 'Bearer c4n4ry.x.y'}",
        "Authorization: SharedKey c4n4ry:x=",
        "aws_secret_access_key = c4n4ry".replace(" = ", "="),
        "-----BEGIN PRIVATE KEY-----\nc4n4ry\n-----END PRIVATE KEY-----\n",
    ],
)
def test_credentials_are_taken_out(text: str) -> None:
    assert "c4n4ry" not in redact(f"before {text} after")
    assert redact(f"before {text} after").startswith("before ")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/train/000000.tar: there is no such object",
        "abfs://container@account.dfs.core.windows.net/run: access denied",
        "http://127.0.0.1:8333/bucket?list-type=2&prefix=run%2F",
        "file:///data/a@b/x.tar and more@mail.example",
        "[batch] micro_size = 3: must divide global_size = 16",
        "step 4 tokens: 123456, key pixloom-000004",
        "",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


def test_credentials_of_the_environment_are_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "service-account.json"
    key_file.touch()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", "c4n4ry-2")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key_file))
    monkeypatch.setenv("MY_KEY", "true")
    monkeypatch.setenv("OUTPUT_DIR", "some-folder")
    assert redact(f"x {CANARY} c4n4ry-2 c4n4ry%2FPa%2Bss%3Dw0rd y") == "x *** *** *** y"
    stays = f"true: {key_file} some-folder"
    assert redact(stays) == stays


@pytest.mark.parametrize(
    "action",
    [
        "raise UserError(TEXT)",
        "raise RuntimeError(TEXT)",
        "try: raise OSError(TEXT)\n  except OSError as error: raise ValueError('x') from error",
        "in_thread(); return 3",
        "logging.getLogger('third.party').error(TEXT); return 3",
        "try: fail()\n  except Exception: logging.getLogger('x').exception('y'); return 3",
    ],
)
def test_no_output_of_a_command_shows_credentials(action: str) -> None:
    program = f"""
import logging, sys, threading
from shards.storage import UserError, command
TEXT = "s3://user:c4n4ry@bucket?X-Amz-Signature=c4n4ry " + sys.argv[1]
def fail(): raise RuntimeError(TEXT)
def in_thread():
  thread = threading.Thread(target=fail)
  thread.start()
  thread.join()
def action():
  {action}
sys.exit(command("train", action))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "c4n4ry-3"],
        cwd=ROOT,
        env={"MY_TOKEN": "c4n4ry-3", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "c4n4ry" not in done.stdout + done.stderr
    assert "s3://***@bucket" in done.stderr


@pytest.mark.parametrize("number", [10, 100_000])
def test_a_reader_who_has_seen_enough_is_no_error(number: int) -> None:
    program = f"""
import os, sys
from shards.storage import command
def action():
  assert os.read(0, 1) == b"x"  # our reader is gone by now
  for _ in range({number}): print("a key")
  return 0
sys.exit(command("order", action))
"""
    pipe = subprocess.PIPE
    words = [sys.executable, "-W", "error", "-c", program]
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
