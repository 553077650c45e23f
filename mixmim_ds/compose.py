"""From words on a command line to the options of a run, by Hydra."""

import difflib
import os
import re
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixmim_ds.config import ROOT, PretrainConfig, RunConfig, flatten, one_of
from mixmim_ds.finetune_config import FinetuneConfig

CONF = ROOT / "launch" / "conf"
PATHS = {"run_dir", "init", "ds", "data.root", "data.val", "data.index_dir", "probe.data"}
GROUPS = ("model", "data")  # options that stand for a file of CONF
RECIPES = {"pretrain": "mixmim_*.yaml", "finetune": "finetune_*.yaml"}  # those of each script in CONF/experiment


def load_config(overrides: list[str]) -> PretrainConfig:
    """The options of a pretraining run: Hydra's composition of launch/conf and `key=value` overrides.

    Raises:
        ValueError: one sentence that names the option, for whatever Hydra or a check refuses.
    """
    config: PretrainConfig = _compose("pretrain", PretrainConfig, overrides)
    return config


def load_finetune_config(overrides: list[str]) -> FinetuneConfig:
    """As `load_config`, of a fine-tuning run."""
    config: FinetuneConfig = _compose("finetune", FinetuneConfig, overrides)
    return config


def _compose(name: str, schema: type[RunConfig], overrides: list[str]) -> Any:
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    for each in overrides:
        key, _, value = each.lstrip("+~").partition("=")
        if re.match(r"hydra\b", key):
            raise ValueError(f"{key} has no effect, for Hydra only puts the options together; take it out.")
        if each.startswith("~") and key not in GROUPS:
            raise ValueError(f"{each} takes an option out, which would give it its default; give a value instead.")
        if key in GROUPS:
            one_of(key, value, _choices(f"{key}/*.yaml"))
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(name, [_with_quotes(each) for each in _with_recipe(name, overrides)])
        known = _names(OmegaConf.structured(schema))
        unknown = min(_names(composed) - known, default=None)  # Hydra adds whatever stands behind a +
        if unknown:
            raise ValueError(_no_option(unknown, known))
        return OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, schema)) from error


def _with_recipe(name: str, overrides: list[str]) -> list[str]:
    """The overrides with one recipe at most: the last that is given, as experiment=NAME or, in Hydra's words, with a +.
    A job's own recipe stands before the user's."""
    given = [each for each in overrides if each.partition("=")[0].lstrip("+") == "experiment"]
    if not given:
        return overrides
    recipe = given[-1].partition("=")[2]
    one_of("experiment", recipe, _choices(f"experiment/{RECIPES[name]}"))
    return [*(each for each in overrides if each not in given), f"+experiment={recipe}"]


def _choices(pattern: str) -> tuple[str, ...]:
    """The names of the files of launch/conf that match."""
    return tuple(sorted(path.stem for path in CONF.glob(pattern)))


def _with_quotes(override: str) -> str:
    """The override, a path in quotes, for much that names and patterns hold means something else to Hydra; a home
    folder at its beginning, ~, is written out, which shells do not do behind a =."""
    option, _, value = override.partition("=")
    if option.lstrip("+") not in PATHS or value in ("", "null") or value[0] in "'\"":
        return override
    return f"{option}={QuotedString(os.path.expanduser(value), Quote.single).with_quotes()}"


def _names(options: Any) -> set[str]:
    """The options of a config by dotted name."""
    nested: Any = OmegaConf.to_container(options)
    return set(flatten(nested))


def _no_option(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known | {"model", "data"}), 1, 0.5)
    return f"{name} is no option" + (f"; did you mean {near[0]}?" if near else ".")


def _explain(error: Exception, schema: type[RunConfig]) -> str:
    """Hydra's complaint of several lines, as one sentence that names the option."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, OverrideParseException):
        return f"{error.override} is not of the form key=value (quote values that hold = or a comma)."
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        return f"{several[1]} gives several values to one option; start a run for each (quote a text with commas)."
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown:
        return _no_option(unknown[1], _names(OmegaConf.structured(schema)))
    cause = str(error.__cause__ or error)
    key = re.search(r"full_key: (\S+)", cause)
    return f"{key[1]}: {cause.splitlines()[0].rstrip('.')}." if key else text
