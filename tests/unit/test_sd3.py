"""The SD3 adapter: its flags and their conflicts, what trains and what is frozen, where T5 runs, a preview, steps end to end."""

import math

import pytest
import torch

from library.architectures.base import DENOISER
from library.architectures.sd3 import open_architecture
from library.architectures.sd3_options import Sd3Options
from library.config.check import check
from library.config.loss_options import LossOptions
from library.config.parse import parse
from library.config.schema import ModelOptions
from library.config.weighted_flow_options import WeightedFlowOptions
from library.errors import UserError
from library.memory.recompute import Recompute
from library.objectives.noise import draw
from library.optim.groups import assert_partition
from library.prompts import Prompt
from sd3_train import ENTRY
from tests.tiny_sd3 import DEPTH, ENCODERS, VARIANTS, make_sd3_files

CPU, F32 = torch.device("cpu"), torch.float32
GEOMETRY = torch.zeros(2, 6, dtype=torch.int64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_sd3_files(tmp_path_factory.mktemp("sd3")).checkpoint


def opened(checkpoint, objective=WeightedFlowOptions(), **options):
    return open_architecture(ModelOptions(str(checkpoint)), Sd3Options(**options), objective)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.toml").write_text("")

    def run(*argv):
        return parse(ENTRY, [*"--pretrained_model_name_or_path org/model --dataset_config data.toml --output_dir out".split(),
                             *argv], {})
    return run


def test_learning_rates_of_the_encoders(read):
    assert read().architecture.encoder_rates(1e-5) == {}
    both = read("--train_text_encoder", "--learning_rate_te1", "5e-6").architecture
    assert both.encoder_rates(1e-5) == {"clip_l": 5e-6, "clip_g": 1e-5}
    three = read("--train_text_encoder", "--train_t5xxl", "--learning_rate_te2", "0", "--learning_rate_te3", "1e-6").architecture
    assert three.encoder_rates(1e-5) == {"clip_l": 1e-5, "t5xxl": 1e-6}
    assert read("--train_text_encoder", "--clip_g", "none").architecture.encoder_rates(1e-5) == {"clip_l": 1e-5}


@pytest.mark.parametrize("argv, expected", [
    ("--learning_rate_te1 1e-5", "--learning_rate_te1: has no effect without --train_text_encoder"),
    ("--learning_rate_te3 1e-5", "--learning_rate_te3: has no effect without --train_t5xxl"),
    ("--train_text_encoder --learning_rate_te1 0 --learning_rate_te2 0", "every text encoder has a learning rate of 0"),
    ("--train_text_encoder --train_t5xxl --cache_text_encoder_outputs", "there is nothing to cache"),
    ("--use_t5xxl_cache_only", "--use_t5xxl_cache_only: has no effect without caching; add --cache_text_encoder_outputs"),
    ("--use_t5xxl_cache_only --train_t5xxl --cache_text_encoder_outputs", "T5 cannot be cached while it trains"),
    ("--clip_l none --clip_g none --t5xxl none", "no text encoder is left"),
    ("--t5xxl none --t5_dropout_rate 0.1", "--t5_dropout_rate: has no effect with --t5xxl none"),
    ("--t5xxl none --train_t5xxl", "--train_t5xxl: has no effect with --t5xxl none"),
    ("--clip_l none --clip_g none --train_text_encoder", "there is no CLIP-L and no CLIP-G to train"),
    ("--clip_l none --clip_g none --apply_lg_attn_mask", "has no effect without CLIP-L and CLIP-G"),
    ("--clip_g nowhere.safetensors", "--clip_g: no such file or folder"),
    ("--train_t5xxl --t5xxl_device cpu", "an encoder that trains stands where the training runs"),
    ("--train_t5xxl --t5xxl_dtype bf16", "an encoder that trains is kept in --weights_dtype"),
    ("--t5xxl_device gpu", "'gpu' is not a device"), ("--t5xxl_dtype int8", "--t5xxl_dtype: 'int8' is not one of"),
    ("--clip_l_dropout_rate 1.5", "--clip_l_dropout_rate"), ("--logit_mean 1", "--weighting_scheme logit_normal"),
    ("--mode_scale 1", "--weighting_scheme mode"), ("--min_timestep 500 --max_timestep 400", "leaves nothing below"),
    ("--discrete_flow_shift 3", "write --training_shift"),
    ("--timestep_sampling shift", "--weighting_scheme and --training_shift set the levels"),
    ("--block_lr 1", "belongs to the script of another"), ("--torch_compile", "not built yet"),
    ("--save_model_as ckpt", "--save_model_as")])
def test_mistakes(read, argv, expected):
    with pytest.raises(UserError) as caught:
        check(read(*argv.split(" ")))
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


def test_t5_alone_may_train_while_the_clips_are_cached(read):
    config = read("--train_t5xxl", "--cache_text_encoder_outputs")
    assert config.architecture.encoder_rates(1e-5) == {"t5xxl": 1e-5}
    cached = read("--train_text_encoder", "--use_t5xxl_cache_only", "--cache_text_encoder_outputs_to_disk")
    assert cached.caching.text_cached and set(cached.architecture.encoder_rates(1e-5)) == {"clip_l", "clip_g"}


# --- what trains ------------------------------------------------------------------------------------------------------


def step(arch, denoiser, encoders, seed=0):
    """Losses and gradients of one step with everything that the adapter does in one."""
    objective = arch.objective(LossOptions())
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = draw(seed, 0, ["a", "b"], (16, 8, 8))
    noisy = objective.noise(latents, draws, objective.level(draws, 16))
    names = [name for name in arch.text_encoders if name not in encoders.modules]
    with torch.no_grad():
        text = arch.encode_text(arch.load_text_encoders(names, CPU, F32), ["a red cat", "a dog"]) if names else {}
    text = arch.vary_text(text | arch.encode_text(encoders, ["a red cat", "a dog"]), draws)
    output = arch.predict(denoiser, noisy.x_t, noisy.level, text, GEOMETRY)
    return (objective.losses(output, noisy) * objective.weight(noisy.level)).mean()


def prepared(checkpoint, rate=1e-4, **options):
    arch = opened(checkpoint, **options)
    denoiser = arch.load_denoiser(CPU, F32)
    encoders = arch.load_text_encoders(tuple(arch.encoder_rates(rate)), CPU, F32)
    return arch, denoiser, encoders, arch.groups(denoiser, encoders, rate)


def everything(denoiser, encoders):
    return [*denoiser.named_parameters(), *((f"{name}.{key}", parameter) for name, module in encoders.modules.items()
                                            for key, parameter in module.named_parameters())]


@pytest.mark.parametrize("frozen", [0, 1, 2, DEPTH])
@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_blocks_are_whole_blocks_and_keep_no_gradients(checkpoint, frozen, recompute):
    """Of the last blocks not a tensor has a gradient or moves; all others do. The picture still gets through them."""
    arch, denoiser, encoders, groups = prepared(checkpoint, num_last_block_to_freeze=frozen)
    assert_partition(groups, denoiser.named_parameters())
    if recompute:
        Recompute(arch.blocks(denoiser))
    optimizer = torch.optim.AdamW([p for group in groups for _, p in group.params], lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}
    step(arch, denoiser, encoders).backward()
    optimizer.step()
    still = {f"transformer_blocks.{index}." for index in range(DEPTH - frozen, DEPTH)}
    for name, parameter in denoiser.named_parameters():
        resting = any(name.startswith(block) for block in still)
        assert (parameter.grad is None) == resting, name
        assert torch.equal(before[name], parameter) == resting, name
    held = sum(parameter.numel() for parameter in denoiser.parameters() if parameter.grad is not None)
    blocks = sum(parameter.numel() for block in list(denoiser.transformer_blocks)[DEPTH - frozen:] for parameter in block.parameters())
    assert held == sum(parameter.numel() for parameter in denoiser.parameters()) - blocks


def test_more_frozen_blocks_than_there_are(checkpoint):
    with pytest.raises(UserError, match=f"--num_last_block_to_freeze: 4 blocks, but .* has {DEPTH}"):
        opened(checkpoint, num_last_block_to_freeze=DEPTH + 1)


@pytest.mark.parametrize("options, names", [
    ({"train_text_encoder": True}, ["transformer", "clip_l", "clip_g"]),
    ({"train_text_encoder": True, "learning_rate_te1": 0.0}, ["transformer", "clip_g"]),
    ({"train_text_encoder": True, "train_t5xxl": True}, ["transformer", *ENCODERS]), ({"train_t5xxl": True}, ["transformer", "t5xxl"])])
def test_encoders_train_by_their_flags(checkpoint, options, names):
    arch, denoiser, encoders, groups = prepared(checkpoint, **options)
    assert [group.name for group in groups] == names
    assert_partition(groups, everything(denoiser, encoders))
    step(arch, denoiser, encoders).backward()
    without = [name for group in groups for name, parameter in group.params if parameter.grad is None]
    assert not without


def test_encoders_alone(checkpoint):
    arch, denoiser, encoders, groups = prepared(checkpoint, 0.0, train_text_encoder=True, learning_rate_te1=1e-5)
    assert [group.name for group in groups] == ["clip_l"]
    step(arch, denoiser, encoders).backward()
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert all(parameter.grad is not None for parameter in encoders.modules["clip_l"].parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_lower_the_loss_in_every_variant(tmp_path, variant):
    checkpoint = make_sd3_files(tmp_path, variant).checkpoint
    arch, denoiser, encoders, groups = prepared(
        checkpoint, train_text_encoder=True, apply_lg_attn_mask=True, apply_t5_attn_mask=True, pos_emb_random_crop_rate=1.0,
        enable_scaled_pos_embed=True)
    optimizer = torch.optim.AdamW([{"params": [p for _, p in group.params], "lr": 1e-3} for group in groups])
    losses = []
    for _ in range(5):
        loss = step(arch, denoiser, encoders)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(math.isfinite(value) for value in losses)


def test_dropout_of_an_encoder_shows_zeros(checkpoint):
    """With every sample losing T5 the loss is that of a run without T5."""
    arch, denoiser, encoders, _ = prepared(checkpoint, t5_dropout_rate=1.0, t5xxl_max_token_length=8)
    other, _, _, _ = prepared(checkpoint, t5xxl="none", t5xxl_max_token_length=8)
    assert step(arch, denoiser, encoders).item() == pytest.approx(step(other, denoiser, encoders).item(), rel=1e-6)


# --- where T5 runs, what caches know it by, previews -------------------------------------------------------------------


def test_device_and_dtype_of_t5(checkpoint):
    arch = opened(checkpoint, t5xxl_dtype="bf16", t5xxl_device="cpu")
    modules = arch.load_text_encoders(ENCODERS, CPU, F32).modules
    assert modules["t5xxl"].dtype == torch.bfloat16 and modules["clip_l"].dtype == modules["clip_g"].dtype == F32
    half = opened(checkpoint, t5xxl_dtype="fp16").load_text_encoders(("t5xxl",), CPU, F32).modules["t5xxl"]
    kinds = {name.rsplit(".", 2)[-2]: parameter.dtype for name, parameter in half.named_parameters() if "wo" in name or ".q." in name}
    assert kinds == {"q": torch.float16, "wo": F32}  # what overflows in half precision is kept out of it


def test_identity_of_text_follows_what_changes_it(checkpoint):
    settings = [{}, {"apply_lg_attn_mask": True}, {"apply_t5_attn_mask": True}, {"t5xxl_max_token_length": 99}, {"t5xxl_dtype": "bf16"}]
    assert len({opened(checkpoint, **one).text_identity(ENCODERS, F32) for one in settings}) == len(settings)
    assert len({opened(checkpoint, **one).text_identity(("clip_l",), F32) for one in settings}) == 2  # T5's are nothing to CLIP-L


def test_caches_leave_hidden_padding_out(checkpoint):
    assert opened(checkpoint).text_trim == {}
    hidden = opened(checkpoint, apply_lg_attn_mask=True, apply_t5_attn_mask=True, clip_g="none")
    assert hidden.text_trim == {"clip_l": "clip_l_mask", "t5xxl": "t5xxl_mask"}


@pytest.mark.parametrize("options", [{}, {"enable_scaled_pos_embed": True}, {"t5xxl": "none"}])
def test_previews(checkpoint, options):
    arch = opened(checkpoint, t5xxl_max_token_length=8, **options)
    denoiser, vae = arch.load_denoiser(CPU, F32), arch.load_vae(CPU, F32)
    text = [{name: value.detach() for name, value in arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), [words]).items()}
            for words in ("a red cat", "blurry")]

    def draw_one(cfg, negative=text[1]):
        prompt = Prompt("a red cat", width=64, height=48, steps=2, cfg=cfg, seed=1)
        return arch.sample(denoiser, vae, [prompt], text[0], negative, F32)[0]

    guided, plain = draw_one(5.0), draw_one(1.0)
    assert guided.size == (64, 48) and guided.tobytes() == draw_one(5.0).tobytes() != plain.tobytes()
    assert plain.tobytes() == draw_one(1.0, {}).tobytes()  # without guidance the negative prompt is not read


def test_latents_are_shifted_and_scaled(checkpoint):
    arch = opened(checkpoint)
    vae = arch.load_vae(CPU, F32)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(arch.encode_image(vae, pixels), (mean - 0.0609) * 1.5305)
    assert arch.latent.pixel_step == 16


def test_export_keys_of_a_run_with_encoders(checkpoint, tmp_path):
    arch, denoiser, encoders, _ = prepared(checkpoint, train_text_encoder=True)
    arch.export({DENOISER: denoiser, **encoders.modules}, tmp_path / "x.safetensors", None, {}, arch.save_format)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "x.safetensors", "x_clip_g.safetensors", "x_clip_l.safetensors"]
    assert arch.modelspec()["architecture"] == "stable-diffusion-3-medium"
