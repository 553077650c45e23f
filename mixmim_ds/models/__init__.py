"""What is trained: plain PyTorch, without a word about how it is trained."""

from mixmim_ds.models import mixmim_sizes as mixmim_sizes
from mixmim_ds.models.classifier import Classifier as Classifier
from mixmim_ds.models.encoder import MixMIMTransformer as MixMIMTransformer
from mixmim_ds.models.mixmim import MixMIM as MixMIM
from mixmim_ds.models.mixmim import build_model as build_model
