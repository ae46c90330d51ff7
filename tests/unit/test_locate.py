"""Where parts are looked for, in which order, and what is said when they are not there."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import library.checkpoint.hub as hub_module
from library.checkpoint.hub import Hub, HubFile
from library.checkpoint.locate import PartSpec, fetch, find
from library.checkpoint.source import open_source
from library.errors import UserError, raise_all


def locate(checkpoint, parts, looks_like, hub):
    """Every part by name, as the adapters find theirs: search first, download only when nothing is missing."""
    found, errors = find(checkpoint, parts, looks_like, hub)
    raise_all(errors)
    return {name: part.source for name, part in fetch(found, parts, looks_like, hub).items()}


def looks_like(tensors):
    return f"a box of {next(iter(tensors))}"


def spec(name="wheel", given=None, hub=(("org/cars", "wheel.safetensors"),)):
    return PartSpec(name, f"{name} part", f"--{name}", given, (f"parts.{name}.",),
                    (f"{name}.safetensors", f"sub/{name}.safetensors"), (f"{name}s",), hub,
                    lambda tensors: f"{name}.weight" in tensors)


def write(path, *names, value=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2,), value) for name in names}, str(path))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return open_source(write(tmp_path / "models" / "unet" / "car.safetensors", "body.weight"))


class FakeHub(Hub):
    """Offers what ``files`` holds and notes what was downloaded."""

    def __init__(self, cache, files):
        super().__init__(cache=cache, offline=False)
        self.files, self.downloaded = files, []

    def offer(self, repo, name):
        return HubFile(repo, name) if (repo, name) in self.files else f"{repo} has no {name}"

    def download(self, file):
        self.downloaded.append(str(file))
        return self.files[(file.repo, file.name)]


def offline(tmp_path):
    return Hub(cache=tmp_path / "hub", offline=True)


def test_a_flag_comes_before_everything_else(tmp_path, checkpoint):
    write(checkpoint.path.parent / "wheel.safetensors", "wheel.weight")
    given = write(tmp_path / "mine.safetensors", "wheel.weight", value=3.0)
    found = locate(checkpoint, [spec(given=given)], looks_like, offline(tmp_path))
    assert found["wheel"].path == given
    assert found["wheel"].read("wheel.weight").tolist() == [3.0, 3.0]


def test_inside_the_checkpoint_comes_before_beside_it(tmp_path):
    path = write(tmp_path / "all.safetensors", "body.weight", "parts.wheel.wheel.weight", value=2.0)
    write(tmp_path / "wheel.safetensors", "wheel.weight")
    found, errors = find(open_source(path), [spec()], looks_like, offline(tmp_path))
    assert not errors and found["wheel"].origin == "inside all.safetensors"
    assert list(found["wheel"].source.tensors) == ["wheel.weight"]


def test_a_given_file_may_hold_the_part_among_others(tmp_path, checkpoint):
    given = write(tmp_path / "all.safetensors", "body.weight", "parts.wheel.wheel.weight")
    assert list(locate(checkpoint, [spec(given=str(given))], looks_like, offline(tmp_path))["wheel"].tensors) == ["wheel.weight"]


@pytest.mark.parametrize("place", ["models/unet/wheel.safetensors", "models/unet/sub/wheel.safetensors",
                                   "models/wheels/wheel.safetensors", "models/wheels/brand/wheel.safetensors"])
def test_usual_names_beside_and_in_a_shared_tree(tmp_path, checkpoint, place):
    path = write(tmp_path / place, "wheel.weight")
    assert locate(checkpoint, [spec()], looks_like, offline(tmp_path))["wheel"].path == path


def test_shared_tree_is_found_from_a_deeper_folder(tmp_path):
    source = open_source(write(tmp_path / "checkpoints" / "brand" / "car.safetensors", "body.weight"))
    path = write(tmp_path / "wheels" / "wheel.safetensors", "wheel.weight")
    assert locate(source, [spec()], looks_like, offline(tmp_path))["wheel"].path == path


def test_beside_the_target_of_a_link_as_well(tmp_path):
    target = write(tmp_path / "store" / "car.safetensors", "body.weight")
    path = write(tmp_path / "store" / "wheel.safetensors", "wheel.weight")
    link = tmp_path / "work" / "car.safetensors"
    link.parent.mkdir()
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")
    assert locate(open_source(link), [spec()], looks_like, offline(tmp_path))["wheel"].path.name == path.name


def test_a_component_folder_is_searched_from_its_pipeline(tmp_path):
    source = open_source(write(tmp_path / "transformer" / "car.safetensors", "body.weight").parent)
    path = write(tmp_path / "sub" / "wheel.safetensors", "wheel.weight")
    assert locate(source, [spec()], looks_like, offline(tmp_path))["wheel"].path == path


def test_a_file_of_another_kind_is_passed_over_and_named(tmp_path, checkpoint):
    write(checkpoint.path.parent / "wheel.safetensors", "door.weight")
    with pytest.raises(UserError, match=r"wheel\.safetensors looks like a box of door\.weight"):
        locate(checkpoint, [spec()], looks_like, offline(tmp_path))
    path = write(checkpoint.path.parent / "sub" / "wheel.safetensors", "wheel.weight")
    assert locate(checkpoint, [spec()], looks_like, offline(tmp_path))["wheel"].path == path


def test_a_broken_file_under_a_usual_name_is_an_error(tmp_path, checkpoint):
    (checkpoint.path.parent / "wheel.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        locate(checkpoint, [spec()], looks_like, offline(tmp_path))
    assert "wheel.safetensors" in str(caught.value) and len(caught.value.problems) == 1


def test_given_but_missing_names_the_nearest_file(tmp_path, checkpoint):
    write(tmp_path / "wheel_v1.safetensors", "wheel.weight")
    with pytest.raises(UserError, match=r"--wheel: .*wheel_v2\.safetensors does not exist; did you mean 'wheel_v1\.safetensors'"):
        locate(checkpoint, [spec(given=tmp_path / "wheel_v2.safetensors")], looks_like, offline(tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        locate(checkpoint, [spec(given=tmp_path / "nowhere" / "wheel.safetensors")], looks_like, offline(tmp_path))


def test_given_file_of_the_wrong_kind_says_what_it_is(tmp_path, checkpoint):
    given = write(tmp_path / "door.safetensors", "door.weight")
    with pytest.raises(UserError, match=r"--wheel: .*door\.safetensors is not the wheel part: it looks like a box of door"):
        locate(checkpoint, [spec(given=given)], looks_like, offline(tmp_path))


def test_all_missing_parts_in_one_error(tmp_path, checkpoint):
    with pytest.raises(UserError) as caught:
        locate(checkpoint, [spec("wheel"), spec("door"), spec("seat", given=tmp_path / "none")], looks_like, offline(tmp_path))
    problems = caught.value.problems
    assert len(problems) == 3
    for problem, flag in zip(problems, ("--wheel", "--door", "--seat"), strict=True):
        assert flag in problem and "\n" not in problem
    for text in ("car.safetensors", "wheel.safetensors", str(checkpoint.path.parent), "wheels", "org/cars", "HF_HUB_OFFLINE"):
        assert text in problems[0]


def snapshot(cache, repo, commit, *names, main=True):
    """What huggingface_hub's cache looks like on disk: files of a snapshot are links to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for name, keys in names:
        blob = write(root / "blobs" / f"{commit}-{name.replace('/', '-')}", *keys)
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:
            blob.replace(path)
    if main:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


@pytest.mark.parametrize("main", [True, False])
def test_hub_cache(tmp_path, checkpoint, main):
    snapshot(tmp_path / "hub", "org/cars", "a1", ("wheel.safetensors", ["wheel.weight"]), main=main)
    found, errors = find(checkpoint, [spec()], looks_like, offline(tmp_path))
    assert not errors and found["wheel"].origin == "the hub cache: org/cars/wheel.safetensors"


def test_hub_cache_with_shards_missing_is_not_used(tmp_path, checkpoint):
    index = "wheel.safetensors.index.json"
    part = spec(hub=(("org/cars", index),))
    folder = snapshot(tmp_path / "hub", "org/cars", "a1", ("wheel-00001-of-00002.safetensors", ["wheel.weight"]))
    shards = {"wheel.weight": "wheel-00001-of-00002.safetensors", "wheel.bias": "wheel-00002-of-00002.safetensors"}
    (folder / index).write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="not found"):
        locate(checkpoint, [part], looks_like, offline(tmp_path))
    snapshot(tmp_path / "hub", "org/cars", "a1", ("wheel-00002-of-00002.safetensors", ["wheel.bias"]))
    assert set(locate(checkpoint, [part], looks_like, offline(tmp_path))["wheel"].tensors) == set(shards)


def test_a_given_folder_that_is_not_clear_is_told_with_its_flag(tmp_path, checkpoint):
    for name in ("one", "two"):
        write(tmp_path / "wheels" / f"{name}.safetensors", "wheel.weight")
    with pytest.raises(UserError) as caught:
        locate(checkpoint, [spec(given=tmp_path / "wheels")], looks_like, offline(tmp_path))
    assert str(caught.value) == (f"--wheel: {tmp_path / 'wheels'}: several safetensors files: one.safetensors, two.safetensors; "
                                 "give the one that is meant")


def test_nothing_is_downloaded_while_something_is_missing(tmp_path, checkpoint):
    there = write(tmp_path / "remote" / "wheel.safetensors", "wheel.weight")
    hub = FakeHub(tmp_path / "hub", {("org/cars", "wheel.safetensors"): there})
    with pytest.raises(UserError, match="the door part was not found"):
        locate(checkpoint, [spec(), spec("door", hub=(("org/cars", "door.safetensors"),))], looks_like, hub)
    assert hub.downloaded == []
    assert locate(checkpoint, [spec()], looks_like, hub)["wheel"].path == there
    assert hub.downloaded == ["org/cars/wheel.safetensors"]


def test_a_download_of_something_else_is_refused(tmp_path, checkpoint):
    hub = FakeHub(tmp_path / "hub", {("org/cars", "wheel.safetensors"): write(tmp_path / "x.safetensors", "door.weight")})
    with pytest.raises(UserError, match="org/cars/wheel.safetensors on the hub is not the wheel part"):
        locate(checkpoint, [spec()], looks_like, hub)


def test_an_unreachable_hub_is_asked_once(tmp_path, checkpoint, monkeypatch):
    import huggingface_hub
    asked = []

    def refuse(repo, name, **_):
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub_module, "_probe", lambda endpoint: "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError) as caught:
        locate(checkpoint, [spec(), spec("door")], looks_like, Hub(cache=tmp_path / "hub", offline=False))
    assert len(asked) == 1 and len(caught.value.problems) == 2
    assert all("the hub cannot be reached" in problem for problem in caught.value.problems)


def test_without_a_network_huggingface_hub_is_not_even_asked(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(hub_module, "getproxies", dict)
    monkeypatch.setattr(hub_module.socket, "create_connection", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    reason = Hub(cache=tmp_path, offline=False).offer("org/cars", "wheel.safetensors")
    assert reason.endswith("cannot be reached (Network is unreachable)")


def test_reasons_of_the_hub_in_words(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.setattr(hub_module, "_probe", lambda endpoint: "")
    response = SimpleNamespace(headers={}, request=None, status_code=403, text="")
    for error, text in ((errors.GatedRepoError("x", response=response), "gated"),
                        (errors.RepositoryNotFoundError("x", response=response), "private"),
                        (errors.RemoteEntryNotFoundError("x", response=response), "has no f"),
                        (errors.HFValidationError("x"), "not the name")):
        def fail(*_, error=error, **__):
            raise error
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        assert text in Hub(cache=tmp_path, offline=False).offer("org/cars", "f")
