"""MixMIM pretraining on DeepSpeed, DALI and timm; importing it registers the `mixmim_*` encoders with timm."""

from mixmim_ds import models as models
from mixmim_ds.version import __version__ as __version__
