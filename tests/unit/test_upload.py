"""Uploads against a small hub of our own, through the real huggingface_hub."""

import threading

import pytest
from huggingface_hub import HfApi, constants

from library.checkpoint.hub import Hub
from library.config.schema import HubOptions
from library.errors import UserError
from library.log import log
from library.upload import Uploader, find_token
from tests.hub_stub import GOOD_TOKEN, READING_TOKEN, HubStub, serving

REPO = "me/my-model"


@pytest.fixture
def hub(monkeypatch):
    """The stub; the client talks to it although HF_HUB_OFFLINE is set for the tests."""
    stub = HubStub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(log, "propagate", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    with serving(stub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield stub


def uploader(hub, token=GOOD_TOKEN, **options):
    return Uploader(HubOptions(huggingface_repo_id=REPO, huggingface_token=token, **options),
                    api=lambda token: HfApi(endpoint=hub.address, token=token))


def saved(folder, name="m.safetensors", data=b"weights"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_files_and_folders_arrive_where_they_are_wanted(hub, tmp_path):
    up = uploader(hub, huggingface_path_in_repo="/runs/one/")
    up.check()
    assert hub.repos == {REPO: True} and not hub.files
    up.upload(saved(tmp_path))
    saved(tmp_path / "pipeline", "unet/x.bin", b"1")
    saved(tmp_path / "pipeline", "model_index.json", b"{}")
    up.upload(tmp_path / "pipeline")
    up.upload(saved(tmp_path, "state.bin", b"2"), "states/last.bin")
    up.close()
    assert hub.files == {(REPO, "runs/one/m.safetensors"): b"weights", (REPO, "runs/one/pipeline/unet/x.bin"): b"1",
                         (REPO, "runs/one/pipeline/model_index.json"): b"{}", (REPO, "runs/one/states/last.bin"): b"2"}


@pytest.mark.parametrize(("options", "private"), [({}, True), ({"huggingface_repo_visibility": "public"}, False)])
def test_a_new_repository_is_private_unless_asked_otherwise(hub, options, private):
    uploader(hub, **options).check()
    assert hub.repos == {REPO: private}


def test_a_repository_that_is_there_is_used(hub, tmp_path):
    hub.repos[REPO] = False
    up = uploader(hub)
    up.check()
    up.upload(saved(tmp_path))
    assert hub.repos == {REPO: False} and (REPO, "m.safetensors") in hub.files


def test_datasets_have_addresses_of_their_own(hub, tmp_path):
    up = uploader(hub, huggingface_repo_type="dataset")
    up.check()
    up.upload(saved(tmp_path))
    assert any(path.startswith("/api/datasets/me/my-model/commit") for _, path in hub.requests)


@pytest.mark.parametrize(("token", "words"), [(None, "there is no access token"), ("hf_wrongTOKEN0123456789", "does not know this access token"),
                                              (READING_TOKEN, "may not write to me/my-model")])
def test_a_token_that_will_not_do_is_told_before_training(hub, caplog, token, words):
    with pytest.raises(UserError, match=words) as caught:
        uploader(hub, token).check()
    told = str(caught.value) + caplog.text
    assert told.startswith("--huggingface_token: ") and (token is None or token not in told)
    assert caught.value.__cause__ is None  # the client's own words quote what it was sent


def test_the_token_may_come_from_the_environment(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert find_token(HubOptions()) == GOOD_TOKEN and find_token(HubOptions(huggingface_token="other")) == "other"
    uploader(hub, token=None).check()
    assert hub.repos == {REPO: True}


def test_a_hub_that_cannot_be_reached_is_named_and_tried_again_later(hub, tmp_path, caplog):
    up = Uploader(HubOptions(huggingface_repo_id=REPO, huggingface_token=GOOD_TOKEN),
                  api=lambda token: HfApi(endpoint=hub.address, token=token), hub=Hub(offline=True))
    up.check()
    assert "it is tried after every save" in caplog.text and not hub.requests
    up.upload(saved(tmp_path))
    assert hub.files == {(REPO, "m.safetensors"): b"weights"} and hub.repos == {REPO: True}


@pytest.mark.parametrize("beside", [False, True])
def test_a_failed_upload_is_told_and_tried_once_more_at_the_end(hub, tmp_path, caplog, beside):
    up = uploader(hub, async_upload=beside)
    up.check()
    hub.broken = 400
    path = saved(tmp_path)
    up.upload(path)
    up.thread.wait()
    assert "NOT UPLOADED, training goes on: m.safetensors to me/my-model" in caplog.text and GOOD_TOKEN not in caplog.text
    assert "[secret]" in caplog.text  # the stub's answer quotes it
    hub.broken = None
    up.close()
    assert hub.files == {(REPO, "m.safetensors"): b"weights"} and not up.waiting


def test_what_was_removed_meanwhile_is_not_tried_again(hub, tmp_path):
    up = uploader(hub)
    up.check()
    hub.broken = 400
    path = saved(tmp_path)
    up.upload(path)
    path.unlink()
    before = len(hub.requests)
    up.close()
    assert len(hub.requests) == before


def test_training_goes_on_during_an_upload_and_its_file_stays(tmp_path):
    gate, names = threading.Event(), []

    class Slow:
        def create_repo(self, *given, **more): ...
        def whoami(self): ...
        def auth_check(self, **more): ...

        def upload_file(self, path_in_repo, **more):
            gate.wait()
            names.append(path_in_repo)

    up = Uploader(HubOptions(huggingface_repo_id=REPO, huggingface_token="t", async_upload=True), api=lambda token: Slow(),
                  hub=type("Reachable", (), {"why_not": lambda self: ""})())
    up.check()
    first, second = saved(tmp_path, "1"), saved(tmp_path, "2")
    up.upload(first)
    up.upload(second)
    assert names == [] and up.in_use(first) and up.in_use(second) and not up.in_use(tmp_path / "3")
    gate.set()
    up.close()
    assert names == ["1", "2"] and not up.in_use(first)


def test_without_a_repository_nothing_happens(tmp_path):
    up = Uploader(HubOptions(), api=lambda token: pytest.fail("no client is needed"))
    up.check()
    up.upload(saved(tmp_path))
    up.close()
    assert not up.waiting
