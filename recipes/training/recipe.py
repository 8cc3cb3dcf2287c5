"""Every number that a trained model depends on."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outliers:
    """Outlier channels put into every LayerNorm before the first training step.

    ``gain_channels`` channels get a weight of ``gain`` (log-uniform) instead of 1. The range of
    the weight shows it, so cross-layer equalization can see these.

    ``offset_channels`` channels get a bias of ``offset`` (log-uniform, random sign) instead of 0
    and a weight of ``offset ** offset_gain_power``. Their activation is nearly constant and far
    from zero, as the massive activations of large models are, and the network reads it as a
    constant. What still varies in them is of no use (perplexity moves by under 1e-5 of itself
    without it), so after training their weight is set to ``offset_gain``. The smaller it is, the
    more a formula that looks at weights alone is misled; 0.004 is chosen so that cross-layer
    equalization helps, but not all the way.

    Both kinds are trained like everything else. The consumers' weights on a channel start smaller
    by the channel's size, so that the function at the start is that of an ordinary model.
    """

    gain_channels: int = 6
    gain: tuple[float, float] = (80.0, 200.0)
    offset_channels: int = 4
    offset: tuple[float, float] = (100.0, 400.0)
    offset_gain_power: float = -0.25
    offset_gain: float = 0.004
    step_power: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Every number the result depends on."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    positions: int = 512
    vocabulary: int = 2048
    steps: int = 700
    batch: int = 4
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup: int = 30
    seed: int = 20220
    excerpt_bytes: int = 90_000
    outliers: Outliers = field(default_factory=Outliers)
