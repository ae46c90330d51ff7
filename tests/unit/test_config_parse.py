"""Layers, origins, and every kind of mistake on the command line and in the file of --config_file."""

import dataclasses
from pathlib import Path

import pytest

from flux_train import ENTRY
from library.config.parse import OutputWritten, parse, to_toml
from library.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with what the checks want to find."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "data.toml", "prompts.txt"):
        Path(name).write_text("")
    return tmp_path


REQUIRED = ["--pretrained_model_name_or_path", "model.safetensors", "--dataset_config", "data.toml", "--output_dir", "out"]


def read(*argv, env=None):
    return parse(ENTRY, [*REQUIRED, *argv], env or {})


def mistakes(*argv, env=None):
    with pytest.raises(UserError) as caught:
        read(*argv, env=env)
    for line in caught.value.problems:
        assert "\n" not in line
        assert ";" in line or "not valid TOML" in line, f"no remedy: {line}"
    return list(caught.value.problems)


def write(text, name="train.toml"):
    Path(name).write_text(text, encoding="utf-8")
    return ["--config_file", name]


def test_defaults_of_the_architecture(place):
    config = read()
    assert config.objective.timestep_sampling == "shift" and config.objective.model_prediction_type == "raw"
    assert config.objective.discrete_flow_shift == 3.1582 and config.architecture.guidance_scale == 1.0
    assert config.general.seed == 42 and config.precision.mixed_precision == "no"
    assert config.origins["seed"] == "default" and config.notes == ()


def test_layers_and_origins(place):
    file = write('learning_rate = 1\n[any]\nseed = 7\nsave_every_n_steps = 10\nmax_train_steps = 5\nmixed_precision = "no"\n')
    config = read(*file, "--seed", "8", "--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99",
                  env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert (config.general.seed, config.training.max_train_steps) == (8, 5)
    assert config.optimizer.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.99")
    assert config.origins["seed"] == "command line" and config.origins["learning_rate"] == "train.toml:1"
    assert config.place("max_train_steps") == "train.toml:5: max_train_steps" and config.place("seed") == "--seed"
    assert config.precision.mixed_precision == "no"
    assert [note for note in config.notes if "overrules accelerate launch --mixed_precision bf16" in note]


def test_launcher_precision(place):
    config = read(env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert config.precision.mixed_precision == "bf16" and config.origins["mixed_precision"] == "accelerate launch"
    assert config.weights_dtype == "bf16"
    assert read("--weights_dtype", "fp32", env={"ACCELERATE_MIXED_PRECISION": "bf16"}).weights_dtype == "fp32"
    assert read("--mixed_precision=fp16", env={"ACCELERATE_MIXED_PRECISION": "bf16"}).weights_dtype == "fp32"
    assert "fp8" in mistakes(env={"ACCELERATE_MIXED_PRECISION": "fp8"})[0]
    assert "ACCELERATE_USE_FSDP" in mistakes(env={"ACCELERATE_USE_FSDP": "true"})[0]
    assert read(env={"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_DEEPSPEED": "false"}).notes == ()


def test_ways_of_writing(place):
    config = read("--learning_rate=1e-5", "--logit_mean", "-0.5", "--timestep_sampling", "sigma", "--cache_latents",
                  "--weighting_scheme=logit_normal", "--gradient_checkpointing=False", "--optimizer_args", "a=1", "--seed", "1",
                  "--seed", "2", "--metadata_title=--odd = title", "--resolution", "768, 512", "--lr_warmup_steps", "5%",
                  "--lr_scheduler", "cosine")
    assert config.optimizer.learning_rate == 1e-5 and config.objective.logit_mean == -0.5
    assert config.caching.cache_latents is True and config.memory.gradient_checkpointing is False
    assert config.general.seed == 2 and config.metadata.metadata_title == "--odd = title"
    assert config.dataset.resolution == "768,512"
    assert config.optimizer.lr_warmup_steps == 0.05


def test_switch_of_the_file_turned_off_and_value_brought_back(place):
    file = write('cache_latents = true\nlearning_rate = 1e-3\nmetadata_title = "x"\nmetadata_author = ""\n'
                 'save_every_n_steps = 0\n')
    config = read(*file, "--cache_latents=false", "--learning_rate=", "--metadata_title", "")
    assert config.caching.cache_latents is False and config.optimizer.learning_rate == 2e-6
    assert config.metadata.metadata_title is None and config.metadata.metadata_author is None
    assert config.origins["learning_rate"] == "default" and config.saving.save_every_n_steps is None


def test_the_command_of_the_issue(place):
    Path("FLUX.1-dev.safetensors").write_text("")
    Path("dataset_config.toml").write_text("")
    command = """--pretrained_model_name_or_path FLUX.1-dev.safetensors --dataset_config dataset_config.toml --output_dir output
        --output_name flux1_finetuned --save_model_as safetensors --max_train_steps 10000 --learning_rate 1e-5
        --optimizer_type AdamW8bit --blocks_to_swap 18 --blockwise_fused_optimizers""".split()
    config = parse(ENTRY, command, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert (config.memory.blocks_to_swap, config.memory.unit, config.memory.recomputes) == (18, "block", True)
    assert config.memory.max_grad_norm(config.optimizer.max_grad_norm) == 0 and len(config.notes) == 2
    assert config.training.max_train_steps == 10000 and config.optimizer.optimizer_type == "AdamW8bit"
    assert config.saving.output_dir == Path("output") and config.weights_dtype == "bf16"


@pytest.mark.parametrize("argv, expected", [
    (["--learning_rat", "1"], "--learning_rat: unknown flag; did you mean --learning_rate?"),
    (["--learning-rate", "1"], "--learning-rate: unknown flag; did you mean --learning_rate?"),
    (["--learning"], "--learning: unknown flag"),
    (["--zzzqqq", "1"], "--zzzqqq: unknown flag; --help lists all of them"),
    (["-learning_rate", "1"], "write --learning_rate with two plain hyphens"),
    (["\u2014seed", "1"], "write --seed with two plain hyphens"),
    (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
    (["--learning_rate", "1,5"], "write 1.5"),
    (["--learning_rate", "nan"], "--learning_rate: nan is out of all proportion"),
    (["--learning_rate"], "--learning_rate: needs a value"),
    (["--learning_rate", "--cache_latents"], "--learning_rate: needs a value"),
    (["--optimizer_args"], "--optimizer_args: needs a value"),
    (["--max_train_steps", "1e3"], "'1e3' is not a whole number; write 1000"),
    (["--max_train_steps", "0"], "--max_train_steps: 0 is less than 1"),
    (["--max_train_steps", "1" + "0" * 5000], "is not a"),
    (["--max_timestep", "1001"], "--max_timestep: 1001 is more than 1000"),
    (["--discrete_flow_shift", "0"], "--discrete_flow_shift: 0 is not above 0"),
    (["--mixed_precision", "bf61"], "'bf61' is not one of no, fp16, bf16; did you mean 'bf16'?"),
    (["--cache_latents=maybe"], "'maybe' is not true or false"),
    (["--cache_latents", "true"], "--cache_latents takes no value; write --cache_latents=true"),
    (["--metadata_title", "My", "model"], "unexpected argument 'model'; --metadata_title takes one value; put it in quotes"),
    (["stray", "--seed", "1"], "unexpected argument 'stray'"),
    (["--resolution", "big"], "--resolution: 'big' is not a size in pixels"),
    (["--resolution", "1,2,3"], "--resolution: '1,2,3' is not a size in pixels"),
    (["--lr_warmup_steps", "100%"], "--lr_warmup_steps: '100%' is not"),
    (["--output_name", "a\ud800b"], "not text"),
    (["--output_config"], "--output_config: there is no file to write to"),
    (["--config_file", "nowhere"], "nowhere: no such file"),
])
def test_mistakes_on_the_command_line(place, argv, expected):
    lines = mistakes(*argv)
    assert [line for line in lines if expected in line], lines


@pytest.mark.parametrize("text, expected", [
    ('learning_rat = 1\n', "train.toml:1: learning_rat: unknown key; did you mean 'learning_rate'?"),
    ('# note\n[s]\nlearning_rate = "1"\n', "train.toml:3: learning_rate: '1' is not a number; write 1"),
    ('seed = 1.5\n', "train.toml:1: seed: 1.5 is not a whole number"),
    ('seed = true\n', "train.toml:1: seed: true is not a whole number"),
    ('cache_latents = "true"\n', "'true' is not true or false; write true without quotes"),
    ('cache_latents = 1\n', "train.toml:1: cache_latents: 1 is not true or false"),
    ('output_name = 5\n', 'train.toml:1: output_name: 5 is not text; write "5" in quotes'),
    ('ae = true\n', "train.toml:1: ae: true is not text"),
    ('optimizer_args = "a=1"\n', 'write optimizer_args = ["...", "..."]'),
    ('optimizer_args = [1]\n', "is not a list of texts"),
    ('learning_rate = inf\n', "learning_rate: inf is out of all proportion"),
    ('lr_scheduler = "cosin"\n', "did you mean 'cosine'?"),
    ('a = 1\nb = \n', "train.toml:2: not valid TOML"),
    ('output_dir = "C:\\data\\users"\n', "'single quotes'"),
    ('seed = 1\nseed = 2\n', "train.toml:2: not valid TOML"),
    ('[a]\nseed = 1\n[b]\nseed = 2\n', "train.toml:4: seed: stands a second time; the first is on line 2"),
    ('[a.b]\nseed = 1\n', "tables inside sections are not read"),
    ('config_file = "x"\n', "train.toml:1: config_file: belongs on the command line"),
    ('[[datasets]]\nresolution = 512\n', "give it to --dataset_config"),
    ('torch_compile = true\n', "train.toml:1: torch_compile: not built yet"),
    ('[net]\nnetwork_module = "networks.x"\n', "train.toml:2: network_module: belongs to the *_train_network.py scripts"),
])
def test_mistakes_in_the_file(place, text, expected):
    lines = mistakes(*write(text))
    assert [line for line in lines if expected in line], lines


def test_everything_is_gathered_without_follow_up_mistakes(place):
    file = write('learning_rate = "x"\nmax_train_stepps = 3\n')
    with pytest.raises(UserError) as caught:
        parse(ENTRY, [*file, "--output_dirr", "out", "--dataset_config", "nowhere.toml", "--sample_every_n_steps", "5"], {})
    places = sorted(line.split(":")[0] + ":" + line.split(":")[1].strip() for line in caught.value.problems)
    # output_dir is not reported as missing as well: it was misspelt
    assert [one.split(" ")[0] for one in places] == [
        "--dataset_config:no", "--output_dirr:unknown", "--pretrained_model_name_or_path:is", "--sample_every_n_steps:there",
        "train.toml:1", "train.toml:2"]


def test_suffix_of_the_file_may_be_left_out(place):
    write("seed = 5\n")
    assert read("--config_file", "train").general.seed == 5


def test_file_written_on_windows(place):
    Path("train.toml").write_bytes(b"\xef\xbb\xbfseed = 5\r\n# caf\xc3\xa9\r\nlearning_rate = 'x'\r\n")
    assert mistakes("--config_file", "train.toml")[0].startswith("train.toml:3: learning_rate:")


def test_config_is_frozen_and_known_by_section(place):
    config = read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.general.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.general = None


def test_round_trip(place):
    argv = ["--learning_rate", "1e-5", "--metadata_title", 'a "b" \\ \x7f \u00e9\nc', "--optimizer_args", "x=1", "--seed", "9",
            "--cache_latents", "--save_every_n_steps", "5", "--lr_scheduler", "cosine", "--lr_warmup_steps", "10%", "--full_bf16",
            "--mixed_precision", "bf16", "--resolution", "64", "--max_grad_norm", "0"]
    first = read(*argv)
    text = to_toml(first)
    again = parse(ENTRY, write(text), {})
    for section in ENTRY.sections():
        if section != "general":
            assert getattr(first, section) == getattr(again, section)
    assert again.general.seed == 9 and to_toml(again) == text
    assert "config_file" not in text


def test_secrets_stay_inside(place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = read("--wandb_api_key", "SECRET", "--log_with", "wandb")
    assert config.logging.wandb_api_key == "SECRET"
    assert "SECRET" not in to_toml(config) + repr(config) + str(config.notes)
    lines = mistakes("--huggingface_token", "SECRET", "--wandb_api_keyy=SECRET") + mistakes(*write("wandb_api_key = 5\n"))
    assert "SECRET" not in "".join(lines) and "this value is not text" in lines[-1]
    assert "SECRET" not in "".join(mistakes("--wandb_api_key", "SECRET\0"))


def test_output_config(place):
    with pytest.raises(OutputWritten, match="new.toml"):
        parse(ENTRY, ["--output_config", "--config_file", "new", "--seed", "3"], {})
    assert read("--config_file", "new").general.seed == 3
    before = Path("new.toml").read_bytes()
    assert "already exists" in _refused("--output_config", "--config_file", "new.toml", "--seed", "4")[0]
    assert Path("new.toml").read_bytes() == before
    assert "is not a whole number" in _refused("--output_config", "--config_file", "other", "--seed", "x")[0]
    assert not Path("other.toml").exists()


def _refused(*argv):
    with pytest.raises(UserError) as caught:
        parse(ENTRY, list(argv), {})
    return caught.value.problems


def test_help_tells_default_and_off_value(capsys):
    with pytest.raises(SystemExit) as left:
        parse(ENTRY, ["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    for flag in ENTRY.settings():
        assert f"--{flag}" in text
    assert "--max_grad_norm X scale gradients down to this global norm; 0: never (default: 1, or 0 when weights are updated" in text
    assert "(default: 3.1582; off: 1)" in text and "one of no, fp16, bf16" in text and "(required)" in text
    titles = [cls.title for cls in ENTRY.sections().values()]
    assert all(f"{title}:" in text for title in titles)
