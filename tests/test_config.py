"""The options: schema, recipes, what identifies a run."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mixmim_ds.compose import CONF, PATHS, load_config, load_finetune_config
from mixmim_ds.config import FREE, PretrainConfig, flatten, identity
from mixmim_ds.finetune_config import FinetuneConfig

RUN = ["run_dir=DIR", "data.root=DIR"]


def test_every_free_option_exists() -> None:
    known = [flatten(OmegaConf.to_container(OmegaConf.structured(each))) for each in (PretrainConfig, FinetuneConfig)]
    assert set().union(*known) >= FREE


def test_a_run_is_identified_by_what_it_computes_not_by_where_it_runs() -> None:
    config = load_config(RUN)
    assert identity(config) == identity(load_config(["run_dir=B", "data.root=B", "ds=zero3", "train.max_steps=3"]))
    for change in (
        "train.seed=1",
        "train.epochs=1",
        "model=large",
        "optim.base_lr=1",
        "precision=fp32",
        "data.flip=false",
    ):
        assert identity(config) != identity(load_config([*RUN, change]))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_recipe_composes_and_its_batch_divides_over_its_gpus(recipe: str) -> None:
    header = (CONF / "experiment" / f"{recipe}.yaml").read_text()
    config: PretrainConfig | FinetuneConfig
    if recipe.startswith("finetune"):
        config = load_finetune_config([*RUN, f"+experiment={recipe}", "init=random"])
    else:
        config = load_config([*RUN, f"+experiment={recipe}"])
    size = {"b": "base", "l": "large", "h": "huge"}[recipe.split("_")[1]]
    assert config.model.encoder == f"mixmim_{size}" + ("_384" if recipe.endswith("384") else "")
    assert config.train.epochs == int(re.search(r"(\d+)\s+epochs", header)[1]) and config.compile
    gpus, images = map(int, re.search(r"(\d+)\s+GPUs x (\d+)", header).groups())
    assert images == config.train.micro_batch and config.train.global_batch % (images * gpus) == 0
    assert all(word in header for word in ("published", "our choice", "expected", f"+experiment={recipe}"))


def test_the_authors_recipe_is_the_default_but_for_its_length() -> None:
    default, recipe = load_config(RUN), load_config([*RUN, "+experiment=mixmim_b"])
    assert recipe.train.epochs == 600 and default.train.epochs == 300
    assert (recipe.optim, recipe.model, recipe.data) == (default.optim, default.model, default.data)
    assert recipe.train.global_batch == 2048 and recipe.optim.base_lr == 1.5e-4 and recipe.optim.betas == [0.9, 0.95]


def test_the_last_recipe_holds_with_a_plus_or_without() -> None:
    for words in (
        ["experiment=mixmim_b_300"],
        ["+experiment=mixmim_b", "experiment=mixmim_h", "+experiment=mixmim_b_300"],
    ):
        assert load_config([*RUN, *words]) == load_config([*RUN, "+experiment=mixmim_b_300"])
    with pytest.raises(ValueError, match="experiment=mixmim_b must be one of finetune_b, finetune_b_384, finetune_h"):
        load_finetune_config([*RUN, "init=random", "experiment=mixmim_b"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.max_steps=0", "train.max_steps=0 must be positive"),
        ("train.seed=-1", "train.seed=-1 must be a whole number from 0 to 2^63-1."),
        (f"train.seed={2**63}", f"train.seed={2**63} must be a whole number from 0 to 2^63-1."),
        ("train.profile=[5,4]", "train.profile=[5, 4] must be the first and the last of at most 100 steps"),
        ("train.profile=[1,101]", "train.profile=[1, 101] must be the first and the last of at most 100 steps"),
        ("train.keep_last=1", "train.keep_last=1 must be at least 2"),
        ("train.keep_every=500", "train.keep_every=500 must be 0 or a multiple of train.save_every=1000"),
        ("model.mask_ratio=1", "model.mask_ratio=1.0 must lie between 0 and 1"),
        ("model.decoder_num_heads=7", "model.decoder_dim=512 must be a multiple of 4 and of model.decoder_num_heads=7"),
        ("data.crop_scale=[0.5,0.2]", "data.crop_scale=[0.5, 0.2] must be two positive numbers"),
        ("data.crop_scale=[0.5,2]", "data.crop_scale=[0.5, 2.0] must not exceed 1"),
        ("data.mean=[0.5]", "data.mean=[0.5] must be three numbers"),
        ("data.std=[1,1,1,1]", "data.std=[1.0, 1.0, 1.0, 1.0] must be three numbers"),
        ("data.std=[1,0,1]", "data.std=[1.0, 0.0, 1.0] must be positive numbers"),
        ("data.max_bad_share=2", "data.max_bad_share=2.0 must lie in 0 .. 1."),
        ("optim.clip_grad=0", "optim.clip_grad=0.0 must be positive, or null"),
        ("optim.base_lr=inf", "optim.base_lr=inf must be finite."),
        ("optim.base_lr=nan", "optim.base_lr=nan must be positive."),
        ("data.mean=[0.5,nan,0.5]", "data.mean=[0.5, nan, 0.5] must be finite."),
        ("optim.betas=[0.9]", "optim.betas=[0.9] must be two numbers"),
        ("precision=int8", "precision=int8 must be one of bf16, fp32, fp16"),
        ("activation_checkpointing=some", "activation_checkpointing=some must be one of none, selective, full"),
        ("experiment=none_such", "experiment=none_such must be one of mixmim_b, mixmim_b_300, mixmim_h, mixmim_h_300"),
        ("+experiment=finetune_b", "experiment=finetune_b must be one of mixmim_b, mixmim_b_300, mixmim_h, "),
        ("data=synthetic", "data.root has no effect with data=synthetic"),
        ("+optim.lr=1", "optim.lr is no option; did you mean optim."),
        ("+lr=3", "lr is no option."),
        ("+lr={}", "lr is no option."),
        ("++train.lr=3", "train.lr is no option"),
        ("data=null", "data=null must be one of folder, shards, synthetic."),
        ("~model", "model= must be one of base, "),
        ("model=[tiny,base]", "model=[tiny,base] must be one of base, "),
        ("hydra.run.dir=x", "hydra.run.dir has no effect"),
        ("optim.base_lr=1e-3,1e-4", "optim.base_lr=1e-3,1e-4 gives several values to one option"),
        ("data.threads=9999999", "data.threads=9999999 must lie in 0 .. 1024"),
        ("run_dir=", "run_dir is not set; add run_dir=DIR, the folder that the run is kept in."),
        ("train.epochs", "train.epochs is not of the form key=value"),
    ],
)
def test_a_value_out_of_bounds_is_one_sentence_that_names_the_option(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config([*RUN, override])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("/data/train-{000000..001281}.tar", None),
        ("'/data/train-{000000..001281}.tar'", "/data/train-{000000..001281}.tar"),
        ("/data/{a,b c}/[0-9]*.tar", None),
        ("/it's=/x (1).tar", None),
        ("${run_dir}/{a,b}.tar", "DIR/{a,b}.tar"),
    ],
)
def test_the_pattern_of_shards_is_taken_as_it_is_written(written: str, meant: str | None) -> None:
    config = load_config(["run_dir=DIR", "data=shards", f"data.root={written}"])
    assert (config.data.kind, config.data.root) == ("shards", meant or written)


@pytest.mark.parametrize("option", sorted(PATHS))
def test_a_path_is_taken_as_it_is_written_and_a_home_folder_is_found(option: str) -> None:
    path = Path.home() / "é=(1) [2]{3},'4'\\.json"
    path.parent.mkdir(exist_ok=True)
    path.touch()  # ds must be a file
    for written in (path, f"~/{path.name}"):
        config: PretrainConfig | FinetuneConfig
        if option == "probe.data":
            config = load_config([*RUN, f"{option}={written}"])
        else:
            config = load_finetune_config([*RUN, "init=random", f"{option}={written}"])
        assert flatten(asdict(config))[option] == str(path)


def test_shards_without_a_pattern_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"data\.root is not set; .*, or of tar files their pattern, data\.root='DIR"):
        load_config(["run_dir=DIR", "data=shards"])


def test_fine_tuning_without_run_dir_or_init_is_one_sentence() -> None:
    for words, sentence in (
        (
            ["init=", "run_dir=DIR"],
            "init is not set; add init=DIR, an exported folder or a run to start from, or init=",
        ),
        (["init=random", "run_dir="], "run_dir is not set; add run_dir=DIR, the folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_finetune_config(["data.root=DIR", *words])


def test_a_ds_file_of_ones_own_is_taken_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    assert load_config([*RUN, f"ds={path}"]).ds_path == path
