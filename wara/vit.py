"""What the toolkit asks of a timm ViT: its grid, its prefix tokens, its blocks, its classifiers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from wara.errors import WaraError
from wara.images import ImageSpec
from wara.schema import Section, from_list

_Side = Annotated[int, Field(ge=1, le=100_000)]
_Level = Annotated[float, Field(ge=-1000, le=1000)]
Size = Annotated[tuple[_Side, _Side], from_list]
Channels = Annotated[tuple[_Level, _Level, _Level], from_list]
Source = Literal["user", "card", "config", "tag", "layout", "package", "assumed"]
"""Who says what mean and std of the images are, from the surest to the least.

* `user`: `backbone.mean` and `backbone.std`.
* `card`: the card of a named backbone.
* `config`: a file beside the weights (`preprocessor_config.json`, `open_clip_config.json`,
  `config.json`).
* `tag`: the pretraining tag of the name, or the hub's own weights of that name.
* `layout`: the training code whose names the tensors of the file have.
* `package`: the weights that are shipped.
* `assumed`: nobody; they are those of the model's usual weights.
"""


class BackboneInfo(Section):
    """What a run must know and record about its backbone."""

    name: str = Field(description="timm model name, hf-hub:owner/name, a card, or wara_nano.")
    requested: str = Field(description="What was asked for, before a substitution offline.")
    architecture: str = Field(description="timm's name of it.")
    options: dict[str, Any] = Field(description="Arguments of its construction beside the head's.")
    part: str = Field(description="Where in the file the network lay; empty for the whole file.")
    pool: str = Field(description="How the tokens become features: token, avg or timm's own.")
    img_size: Size = Field(description="(H, W) of the input in pixels.")
    grid_size: Size = Field(description="(h, w) of the patch tokens.")
    num_prefix_tokens: int = Field(ge=0, le=100_000, description="Class and register tokens p.")
    embed_dim: int = Field(ge=1, le=1_000_000, description="Width of a token.")
    mean: Channels = Field(description="Per channel, of images in [0, 1].")
    std: Channels = Field(description="Per channel, of images in [0, 1].")
    statistics: Source = Field(description="Who says what mean and std are.")
    interpolation: str = Field(description="How images are resized.")
    layout: str = Field(description="Whose names the tensors of the file have.")
    left_out: list[str] = Field(description="Parts of the file that are not used.")
    weights_source: str = Field(description="Where the weights came from, for people.")
    weights_sha256: str = Field(description="Hash of the weights file.")

    @property
    def spec(self) -> ImageSpec:
        """What the network expects of its images."""
        return ImageSpec(self.img_size, self.mean, self.std, self.interpolation)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of `torch.compile` and of parallel training."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that compiled submodules add to it."""
    return name.replace("_orig_mod.", "")


def token_layout(model: nn.Module) -> tuple[tuple[int, int], int]:
    """Return the patch grid `(h, w)` and the number of prefix tokens of a timm ViT.

    Args:
        model: a timm model with `patch_embed.grid_size` and `num_prefix_tokens`.

    Returns:
        `((h, w), p)`.

    Raises:
        WaraError: kind `config` when the model has no fixed grid of tokens.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", None)
    if grid is None or prefix is None or len(tuple(grid)) != 2:
        what = f"{type(model).__name__} has no token grid, which token-domain methods need"
        remedy = "choose a timm ViT with patch_embed.grid_size, or a weight-domain method (lora)"
        raise WaraError("config", what, "backbone.name", remedy)
    return (int(grid[0]), int(grid[1])), int(prefix)


def prefix_count(tokens: int, grid: tuple[int, int], prefix_tokens: int) -> int:
    """Return how many of the tokens that a layer got are prefix tokens.

    Some models (CaiT) run their blocks on patch tokens alone.

    Args:
        tokens: `n + p` or `n`.
        grid: `(h, w)` of the patch tokens, `n = h w`.
        prefix_tokens: `p`.

    Raises:
        WaraError: kind `config` when the number of tokens does not fit the grid.
    """
    h, w = grid
    prefix = tokens - h * w
    if prefix in (0, prefix_tokens):
        return prefix
    what = f"a layer got {tokens} tokens where the grid {h}x{w} has {h * w}"
    remedy = "build the model for this img_size, and without patch dropping or windows"
    raise WaraError("config", what, f"{prefix_tokens} prefix tokens", remedy)


def block_names(model: nn.Module) -> list[str]:
    """Return the dotted paths of the transformer blocks, in order; empty without `blocks`."""
    stack = getattr(model, "blocks", None)
    # By name, for a slice of a larger stack keeps the numbers of its blocks.
    return [] if stack is None else [f"blocks.{name}" for name, _ in stack.named_children()]


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the heads of a timm model; distilled ones have two, other modules none."""
    getter = getattr(model, "get_classifier", None)
    if getter is None:
        return []
    found = getter()
    return [m for m in (found if isinstance(found, tuple | list) else [found]) if m is not None]


def classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters of the heads."""
    own = {id(p) for module in classifiers(model) for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds the parameter, buffer or child of that dotted name."""
    return model.get_submodule(name.rpartition(".")[0])


def pair(size: Any) -> tuple[int, int]:
    """Return `(H, W)` for one number or two."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
