"""A run whose machine is lost goes on elsewhere, from the state on the hub, bit for bit; the token is written nowhere."""

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from tests.contract.conftest import dataset_file, losses, make_pictures
from tests.hub_stub import GOOD_TOKEN, HubStub, serving

CHOOSE = lambda case: case.name == "flux-dev"  # noqa: E731  the loop is the same for all
REPO = "me/runs"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    stub = HubStub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serving(stub) as address:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield stub


def test_a_run_goes_on_elsewhere(train, tmp_path, hub, monkeypatch):
    import huggingface_hub.hf_api as client

    monkeypatch.setattr(client, "ENDPOINT", hub.address, raising=False)
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 3))
    log = tmp_path / "log.txt"
    flags = ("--cache_latents", "--cache_text_encoder_outputs", "--save_state_every_n_steps", "2", "--save_last_n_steps_state", "1",
             "--console_log_level", "DEBUG", "--console_log_file", str(log))
    there = ("--huggingface_repo_id", REPO, "--huggingface_path_in_repo", "one", "--huggingface_token", GOOD_TOKEN,
             "--save_state_to_huggingface", "--resume", "latest", "--resume_from_huggingface")
    whole = train(tmp_path / "whole", data, *flags, "--max_train_steps", "6", "--save_last_n_steps_state", "9")
    first = train(tmp_path / "lost", data, *flags, *there, "--max_train_steps", "4")  # there is none yet
    kept = {path.split("/")[1] for _, path in hub.files if "-state/" in path}
    assert kept == {"last-step00000004-state"} and (REPO, "one/last.safetensors") in hub.files
    again = train(tmp_path / "elsewhere", data, *flags, *there, "--max_train_steps", "6")
    assert losses(again) == losses(whole)[4:]
    ours, theirs = load_file(again / "last.safetensors"), load_file(whole / "last.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.split("/")[1] for _, path in hub.files if "-state/" in path} == {"last-step00000006-state"}
    written = [path for folder in (first, again, tmp_path / "cache") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(GOOD_TOKEN.encode() in path.read_bytes() for path in (*written, log))
    assert not any(GOOD_TOKEN.encode() in content for content in hub.files.values())
