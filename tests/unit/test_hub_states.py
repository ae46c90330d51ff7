"""States go to a small hub of our own and come back from it, through the real huggingface_hub."""

import shutil

import pytest
import torch
from huggingface_hub import HfApi, constants

from library.checkpoint.hub import Hub
from library.checkpoint.hub_states import HubStates
from library.checkpoint.train_state import save
from library.config.hub_place import HubPlace, hub_place
from library.config.schema import HubOptions, SavingOptions
from library.config.state_options import StateOptions
from library.errors import UserError
from library.log import log
from library.state_saving import StateSaver
from library.state_upload import StateUploads
from library.upload import Uploader
from tests.hub_stub import GOOD_TOKEN, HubStub, serving
from tests.unit.state_helpers import facts

REPO = "me/runs"
SMALL = {"a": torch.arange(4.0)}


@pytest.fixture
def hub(monkeypatch):
    stub = HubStub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(log, "propagate", True)
    with serving(stub) as address:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield stub


def uploads(hub, **options):
    up = Uploader(HubOptions(huggingface_repo_id=REPO, huggingface_token=GOOD_TOKEN, **options),
                  api=lambda token: HfApi(endpoint=hub.address, token=token))
    up.check()
    return StateUploads(up)


def put(path, step, epoch=1):
    save(path, facts(step, epoch=epoch, serial=step), SMALL, {})


def write(path, step, epoch, then, at_once=False):
    put(path, step, epoch)
    then()


def saver(folder, states, **options):
    return StateSaver(folder, "run", StateOptions(save_state=True, **options), SavingOptions(save_every_n_steps=1), total_epochs=1,
                      write=write, on_saved=states.upload, in_use=states.in_use)


def folders(hub):
    return sorted({path.rpartition("/")[0] for _, path in hub.files})


def finder(hub, tmp_path, name="latest", token=GOOD_TOKEN, folder="", **more):
    return HubStates(HubPlace(REPO, folder, name, **more), HfApi(endpoint=hub.address, token=token), cache=tmp_path / "cache")


@pytest.mark.parametrize(("text", "expected"), [
    ("latest", HubPlace("me/mine", "a/b", "latest", None, "dataset")),
    ("x-state", HubPlace("me/mine", "a/b", "x-state", None, "dataset")),
    ("you/repo/x-state", HubPlace("you/repo", "", "x-state")),
    ("you/repo/deep/er/x-state:v1", HubPlace("you/repo", "deep/er", "x-state", "v1")),
    ("you/repo/latest::space", HubPlace("you/repo", "", "latest", None, "space")),
    ("you/repo/x-state:main:dataset", HubPlace("you/repo", "", "x-state", "main", "dataset")),
    ("you/repo", "is a repository, and a state in it is wanted"), ("a/b/c:d:model:e", "more than two colons"),
    ("a/b/c:main:modle", "'modle' is not a type"), ("a/b/../c", "is no place in a repository"), ("a b/c/d", "not the name of a repository"),
])
def test_what_resume_names(text, expected):
    options = HubOptions(huggingface_repo_id="me/mine", huggingface_path_in_repo="/a/b/", huggingface_repo_type="dataset")
    if isinstance(expected, HubPlace):
        assert hub_place(text, options) == expected
    else:
        with pytest.raises(ValueError) as caught:
            hub_place(text, options)
        assert expected in caught.value.args[0] and caught.value.args[1]


def test_a_name_alone_needs_a_repository():
    with pytest.raises(ValueError, match="of which repository 'latest' is"):
        hub_place("latest", HubOptions())


def test_states_arrive_whole_and_old_ones_go_after_that(hub, tmp_path):
    states = uploads(hub, huggingface_path_in_repo="runs/one")
    keep = saver(tmp_path / "run", states, save_last_n_steps_state=1)
    for step in (1, 2, 3):
        keep.after_step(step, 1)
        states._uploader.thread.wait()
    states.close()
    assert folders(hub) == [f"runs/one/run-step0000000{step}-state" for step in (2, 3)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"run-step0000000{step}-state" for step in (2, 3)]
    kinds = [{line[0] for line in commit} for commit in hub.commits]
    assert kinds == [{"+"}, {"+"}, {"+"}, {"-"}]  # each state in one commit, and what is old only after the third
    assert all(commit[-1].endswith("-state/weights.safetensors") or any("manifest" in line for line in commit) for commit in hub.commits[:3])


def test_the_newest_comes_back_bit_for_bit(hub, tmp_path, caplog):
    caplog.set_level("INFO")
    states = uploads(hub)
    keep = saver(tmp_path / "run", states)
    for step in (9, 10):
        keep.after_step(step, 1)
    states.close()
    found = finder(hub, tmp_path).find("run")
    weights = {"a": torch.zeros(4)}
    found.load_weights(weights)
    assert found.facts.step == 10 and torch.equal(weights["a"], SMALL["a"]) and tmp_path / "cache" in found.path.parents
    assert finder(hub, tmp_path, "run-step00000009-state").find("run").facts.step == 9
    assert finder(hub, tmp_path).find("other") is None and "no state of other" in caplog.text
    assert GOOD_TOKEN not in caplog.text
    # a run that began anew counts its states from 1 again: the later upload is the newer one
    put(tmp_path / "again" / "run-step00000002-state", 2)
    states.upload(tmp_path / "again" / "run-step00000002-state", lambda names: [])
    states.close()
    assert finder(hub, tmp_path).find("run").facts.step == 2


def test_states_of_one_commit_are_told_apart_by_what_they_say(hub, tmp_path):
    states = uploads(hub)
    keep = saver(tmp_path / "run", states)
    for step in (1, 2):
        keep.after_step(step, 1)
    states.close()
    hub.dates = dict.fromkeys(hub.dates, 5)
    assert finder(hub, tmp_path).find("run").facts.step == 2


@pytest.mark.parametrize(("harm", "words"), [
    (lambda files: files.pop("manifest.json"), "it has no manifest.json"),
    (lambda files: files.pop("weights.safetensors"), "weights.safetensors is missing"),
    (lambda files: files.update({"weights.safetensors": files["weights.safetensors"][:-1] + b"\x07"}), "does not hold what was written"),
    (lambda files: files.update({"manifest.json": files["manifest.json"].replace(b'"state.json"', b'"../state.json"')}), "names files elsewhere"),
])
def test_what_is_not_whole_is_passed_over_or_refused(hub, tmp_path, caplog, harm, words):
    states = uploads(hub)
    keep = saver(tmp_path / "run", states)
    for step in (1, 2):
        keep.after_step(step, 1)
    states.close()
    newest = "run-step00000002-state"
    files = {path.rpartition("/")[2]: data for (_, path), data in hub.files.items() if path.startswith(newest)}
    hub.files = {key: data for key, data in hub.files.items() if not key[1].startswith(newest)}
    harm(files)
    hub.files |= {(REPO, f"{newest}/{name}"): data for name, data in files.items()}
    assert finder(hub, tmp_path).find("run").facts.step == 1
    assert f"passed over me/runs/{newest}" in caplog.text and words in caplog.text
    with pytest.raises(UserError, match="this state is broken"):
        finder(hub, tmp_path, newest).find("run")


def test_a_damaged_copy_is_fetched_again(hub, tmp_path, caplog):
    states = uploads(hub)
    saver(tmp_path / "run", states).after_step(1, 1)
    states.close()
    place = finder(hub, tmp_path).find("run").path
    blob = (place / "weights.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x07")
    assert finder(hub, tmp_path).find("run").facts.step == 1 and "fetching it once more" in caplog.text


@pytest.mark.parametrize(("more", "words"), [
    ({"token": "hf_wrongTOKEN0123456789"}, "may not read"), ({"name": "run-step00000007-state"}, "there is no run-step00000007-state"),
    ({"revision": "v9"}, "has no revision v9"),
])
def test_what_cannot_be_had_is_told(hub, tmp_path, more, words):
    states = uploads(hub)
    saver(tmp_path / "run", states).after_step(1, 1)
    states.close()
    with pytest.raises(UserError, match=words) as caught:
        finder(hub, tmp_path, **more).find("run")
    assert "hf_" not in str(caught.value) and (not more.get("name") or "run-step00000001-state" in str(caught.value))


def test_unknown_repositories_and_a_hub_out_of_reach_do_not_start_a_training_anew(hub, tmp_path):
    with pytest.raises(UserError, match="me/runs is not on the hub as a model"):
        finder(hub, tmp_path).find("run")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        HubStates(HubPlace(REPO, "", "latest"), HfApi(), hub=Hub(offline=True)).find("run")


def test_a_state_that_was_removed_before_its_turn_is_left_out_and_a_failed_one_tried_again(hub, tmp_path, caplog):
    states = uploads(hub)
    gone, kept = tmp_path / "run-step00000001-state", tmp_path / "run-step00000002-state"
    put(kept, 2)
    states.upload(gone, lambda names: [])
    hub.broken = 400
    states.upload(kept, lambda names: pytest.fail("nothing is removed before the new state is there"))
    states._uploader.thread.wait()
    assert not hub.files and "NOT UPLOADED, training goes on: run-step00000002-state" in caplog.text and GOOD_TOKEN not in caplog.text
    hub.broken = None
    states._owed = (kept, lambda names: [])
    states.close()
    assert folders(hub) == ["run-step00000002-state"]


def test_the_same_name_again_leaves_nothing_of_the_old(hub, tmp_path):
    states, path = uploads(hub), tmp_path / "run-state"
    save(path, facts(1), SMALL, {"scaler": {"scale": 1.0}})
    states.upload(path, lambda names: [])
    states.close()
    assert (REPO, "run-state/scaler.json") in hub.files
    shutil.rmtree(path)
    put(path, 2)
    states.upload(path, lambda names: [])
    states.close()
    assert (REPO, "run-state/scaler.json") not in hub.files and finder(hub, tmp_path).find("run").facts.step == 2


def test_what_is_being_uploaded_is_not_removed(tmp_path):
    reading = {tmp_path / "run-step00000001-state"}
    keep = StateSaver(tmp_path, "run", StateOptions(save_state=True, save_last_n_steps_state=1), SavingOptions(save_every_n_steps=1),
                      total_epochs=1, write=write, in_use=reading.__contains__)
    for step in (1, 2, 3):
        keep.after_step(step, 1)
    assert (tmp_path / "run-step00000001-state").is_dir()
    reading.clear()
    keep.after_step(4, 1)
    assert sorted(path.name[8:16] for path in tmp_path.iterdir()) == ["00000003", "00000004"]
