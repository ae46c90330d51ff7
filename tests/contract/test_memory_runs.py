"""The memory engine from the command line: every way to save memory trains to the same weights as the plain run."""

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library import run
from library.app import main
from tests.cli.runs import column
from tests.contract.conftest import dataset_file, losses, make_pictures

STEPS = ("--max_train_steps", "4", "--cache_latents", "--max_grad_norm", "0", "--learning_rate", "1e-4")
MODES = {
    "parameter": ("--fused_backward_pass",),
    "block": ("--blockwise_fused_optimizers",),
    "swap": ("--blocks_to_swap", "2"),
    "swap-all": ("--blocks_to_swap", "ALL", "--swap_look_ahead", "1", "--stream_optimizer_states"),
    "swap-parameter": ("--blocks_to_swap", "2", "--fused_backward_pass", "--cpu_offload_checkpointing"),
    "selective": ("--gradient_checkpointing", "--recompute_policy", "selective", "--recompute_every", "2"),
    "offload": ("--cpu_offload_checkpointing",),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return dataset_file(folder / "data.toml", make_pictures(folder / "pictures", 5))


@pytest.fixture(scope="module")
def plain(case, checkpoint, tmp_path_factory):
    """The weights and losses of the run without any of it, by further flags."""
    return {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [(), ("--gradient_accumulation_steps", "2"), ("--mixed_precision", "bf16", "--full_bf16")],
                         ids=["float32", "accumulation", "bf16-weights"])
def test_the_same_weights_as_a_plain_run(case, train, plain, data, blocks, tmp_path, mode, more):
    """The cases that are one more variant of an architecture go through the hardest modes only."""
    if case.variant and (more or mode not in ("swap-all", "swap-parameter")):
        pytest.skip("the architecture's first case goes through all of them")
    if more and (mode in ("swap", "selective", "offload") or case.name not in ("flux-dev", "sdxl")):
        pytest.skip("with accumulation and with bf16 weights the harder modes of two architectures show it")
    cached = ("--cache_text_encoder_outputs",)
    if more not in plain:
        out = train(tmp_path / "plain", data, *STEPS, *cached, *more)
        plain[more] = load_file(out / "last.safetensors"), losses(out)
    weights, curve = plain[more]
    flags = [str(blocks) if word == "ALL" else word for word in MODES[mode]]
    out = train(tmp_path / "saved", data, *STEPS, *cached, *more, *flags)
    assert losses(out) == curve
    ours = load_file(out / "last.safetensors")
    assert all(torch.equal(ours[name], weights[name]) for name in weights), mode


def test_more_blocks_than_there_are(case, checkpoint, data, blocks, tmp_path, monkeypatch, capfd):
    def begin(*_args, **_more):
        raise AssertionError("the run had begun")
    monkeypatch.setattr(run, "join", begin)
    status = main(case.entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(data), "--output_dir",
                               str(tmp_path / "out"), "--blocks_to_swap", str(blocks + 1)])
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and error.startswith(f"error: --blocks_to_swap: {blocks + 1} blocks") and f"at most {blocks}," in error


@pytest.fixture(scope="session")
def blocks(case, checkpoint):
    from tests.contract.test_oracle import opened

    arch, _ = opened(case, checkpoint)
    return len(arch.blocks(arch.load_denoiser(torch.device("cpu"), torch.float32)))


def test_previews_and_held_out_pictures_pass_through_the_ring(case, train, tmp_path):
    if case.variant:
        pytest.skip("the architecture's first case shows it")
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 5), validation_split=0.4)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red box --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    more = ("--cache_text_encoder_outputs", "--validate_every_n_steps", "2", "--sample_prompts", str(prompts),
            "--sample_every_n_steps", "2", "--sample_at_first", "--save_every_n_steps", "2")
    plain = train(tmp_path / "plain", data, *STEPS, *more)
    swapped = train(tmp_path / "swapped", data, *STEPS, *more, "--blocks_to_swap", "3", "--stream_optimizer_states")
    assert losses(swapped) == losses(plain)
    for name in ("grad_norm", "validation_loss"):  # sums in another order; kernels for weights that lie elsewhere
        assert column(swapped, name) == pytest.approx(column(plain, name), rel=1e-5)
    assert len(column(swapped, "validation_loss")) == 2
    names = sorted(path.relative_to(plain) for kind in ("sample/*.png", "*.safetensors") for path in plain.glob(kind))
    assert len(names) == 4 + 3
    for name in names:
        if name.suffix == ".safetensors":
            one, two = load_file(plain / name), load_file(swapped / name)
            assert all(torch.equal(one[key], two[key]) for key in one), name
        elif "contact_sheet" not in name.name:
            one, two = (numpy.asarray(Image.open(folder / name), dtype=int) for folder in (plain, swapped))
            assert abs(one - two).max() <= 1, name


CASE = "flux-dev"  # flags are the same in all scripts


@pytest.mark.parametrize(("flags", "words"), [
    ("--fused_backward_pass --blockwise_fused_optimizers", "contradicts"),
    ("--blocks_to_swap 2 --max_grad_norm 1", "--max_grad_norm 0"),
    ("--blockwise_fused_optimizers --mixed_precision fp16", "use bf16"),
    ("--stream_optimizer_states", "--blocks_to_swap"),
    ("--recompute_policy selective", "--gradient_checkpointing"),
    ("--cpu_offload_checkpointing --recompute_policy selective", "leave one of the two out"),
    ("--blocks_to_swap 1000", "the model has"),
])
def test_what_cannot_work_together_is_refused(case, checkpoint, data, tmp_path, capfd, flags, words):
    if case.name != CASE:
        pytest.skip(f"shown on {CASE}")
    from library.app import main

    status = main(case.entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(data), "--output_dir",
                               str(tmp_path / "out"), *flags.split()])
    assert status == 2 and words in capfd.readouterr().err
