"""SSF (arXiv 2210.08823): scale and shift the features behind every operation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import AdapterLayer, LinearAdapter, Method, options, plain_linear
from wara.adapters.baselines import NORMS
from wara.adapters.bypass import chosen_blocks
from wara.adapters.targets import ALIASES, Blocks, Numbers, block_indices
from wara.errors import WaraError
from wara.vit import plain_name
