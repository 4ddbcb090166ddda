"""Which subnets a training step runs: sampling schedules, as data.

A sampler is a frozen dataclass with ``names``, a name for each subnet of a step, and
``choices(key, progress, domain)``, their choices in order; ``progress`` goes from 0 to 1 over a training and may be
traced. `gpg_loss` passes guidance down this order, so a sampler puts the subnet with the most bits first. Yours needs
no more than those two and being a dataclass of plain values, of which the job's description is made.

Source: EQ-Net (Xu et al. 2023, arXiv:2308.07650), section 3.3: highest, random, lowest. Bits that fall as training goes
on are after the progressive shrinking of Once-for-All (Cai et al. 2020, arXiv:1908.09791), section 3.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from qjax.errors import RecipeError
from qjax.supernet.choices import sample_choice
from qjax.supernet.space import Domain, listed


class Sampler(Protocol):
    """What `Schedule.sampling` takes."""

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each subnet of a step, in the order that guidance is passed on; of the columns of metrics."""
        ...

    def choices(self, key: Array, progress: Any, domain: Domain) -> list[Array]:
        """The choices of a step, int32 [N, 5 or 6] each.

        Args:
            key: PRNG key of the step.
            progress: the share of steps that are done, 0 up to 1; may be traced.
            domain: of the supernet.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Sandwich:
    """The highest subnet, random ones, the lowest (EQ-Net).

    Attributes:
        subnets: of a step; 1 is the highest alone, 2 the highest and the lowest.
    """

    subnets: int = 3

    def __post_init__(self) -> None:
        _count("Sandwich: subnets", self.subnets)

    @property
    def names(self) -> tuple[str, ...]:
        """``highest, random1, ..., lowest``."""
        random = (f"random{n}" for n in range(1, self.subnets - 1))
        return ("highest", *random, *(("lowest",) if self.subnets > 1 else ()))

    def choices(self, key: Array, progress: Any, domain: Domain) -> list[Array]:
        """As `Sampler.choices`."""
        keys = jax.random.split(key, self.subnets)
        kinds = [name.rstrip("0123456789") for name in self.names]
        return [sample_choice(k, domain, kind) for k, kind in zip(keys, kinds, strict=True)]


@dataclasses.dataclass(frozen=True)
class Descending:
    """A sandwich whose lowest bits come in one after the other: first the most, then fewer and fewer.

    The lowest bits allowed fall evenly with progress, from each site's most to its fewest; random and lowest subnets
    keep above them. Float activations count as above 8 bits.

    Attributes:
        subnets: as for `Sandwich`.
        until: the share of the steps after which all bits are in.
    """

    subnets: int = 3
    until: float = 0.5

    def __post_init__(self) -> None:
        _count("Descending: subnets", self.subnets)
        if not 0 < self.until <= 1:
            raise RecipeError(f"Descending: until={self.until!r}; a share of the steps, above 0 and up to 1")

    @property
    def names(self) -> tuple[str, ...]:
        """As of `Sandwich`."""
        return Sandwich(self.subnets).names

    def choices(self, key: Array, progress: Any, domain: Domain) -> list[Array]:
        """As `Sampler.choices`."""
        table = jnp.asarray(domain.table)[:, :2]
        order = jnp.where(table == 0, 9, table)
        high, low = order.max(-1), order.min(-1)
        share = jnp.clip(jnp.asarray(progress, jnp.float32) / self.until, 0, 1)
        floor = high - share * (high - low)
        allowed = order >= jnp.where(share >= 1, low, floor)[..., None] - 1e-4
        least = jnp.where(allowed, order, 99).min(-1)  # of the allowed bits, so that there always are some

        def raised(choice: Array) -> Array:
            bits = choice[:, :2]
            fine = jnp.where(bits == 0, 9, bits) >= least
            return choice.at[:, :2].set(jnp.where(fine, bits, jnp.where(least == 9, 0, least)))

        return [raised(choice) for choice in Sandwich(self.subnets).choices(key, progress, domain)]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """One subnet in every step: a network trained for one form (LSQ, Esser et al. 2020), by the same quantizers.

    Attributes:
        weight_bits, act_bits, form: as for `Domain.uniform`.
    """

    weight_bits: int
    act_bits: int | None = None
    form: tuple[bool, bool, bool] = (True, True, True)

    @property
    def names(self) -> tuple[str, ...]:
        """``("fixed",)``."""
        return ("fixed",)

    def choices(self, key: Array, progress: Any, domain: Domain) -> list[Array]:
        """As `Sampler.choices`."""
        return [jnp.asarray(domain.uniform(self.weight_bits, self.act_bits, self.form))]


def described(sampler: Sampler) -> dict[str, Any]:
    """A sampler as plain values, for a job's description.

    Raises:
        RecipeError: it is not a dataclass with names and choices.
    """
    whole: Any = sampler
    if not dataclasses.is_dataclass(whole) or isinstance(whole, type) or not hasattr(whole, "choices"):
        raise RecipeError(
            f"Schedule: sampling={sampler!r}; Sandwich(), Descending(), Fixed(...), or a dataclass of yours with "
            "`names` and `choices(key, progress, domain)`"
        )
    return {"kind": type(sampler).__name__, **{k: listed(v) for k, v in dataclasses.asdict(whole).items()}}


def _count(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"{what}={value!r}; a whole number from 1 on")
