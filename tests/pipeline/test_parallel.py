"""What the launcher may ask for; how models are shared is in tests/distributed/test_fsdp2.py."""

import os

import pytest

from pipeline.parallel import check_launcher, unsharded_accelerate
from shards.storage import UserError


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of `accelerate launch` with fsdp2.yaml."""
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version = 2 alone"),
        ("FSDP_VERSION", None, "FSDP_VERSION = 1: pixloom"),  # Accelerate's default
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params = false alone"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "True", "fsdp_activation_checkpointing = false alone"),
    ],
)
def test_what_the_launcher_would_not_get_is_refused(
    name: str, value: str | None, message: str, launcher: pytest.MonkeyPatch
) -> None:
    check_launcher("bf16")
    if value is None:
        launcher.delenv(name)
    else:
        launcher.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_launcher("fp32")
    launcher.setenv("ACCELERATE_USE_FSDP", "false")  # then nothing of it counts
    check_launcher("fp16")


def test_accelerate_does_not_shard_by_itself(launcher: pytest.MonkeyPatch) -> None:
    with unsharded_accelerate():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    launcher.delenv("ACCELERATE_USE_FSDP")
    with unsharded_accelerate():
        pass
    assert "ACCELERATE_USE_FSDP" not in os.environ
