"""What seconds on devices cost: energy and money, of a step, of a million tokens, of a whole training run.

Energy is that of the devices alone at the most that they may draw (TDP): an upper bound of theirs, without hosts, network and cooling. What a device
draws on average is less and is not known here; published accounts of training runs take the TDP too.
Source: Touvron et al. 2023 (arXiv:2302.13971), section 6: the TDP, times 1.1 for the data centre (PUE).
"""

from __future__ import annotations

from dataclasses import dataclass

from lighten.device.device import Device
from lighten.errors import ConstraintError, DeviceError
from lighten.units import COUNT_UNITS, parse_quantity

DAY_S = 86_400.0
JOULES_PER_MWH = 3.6e9


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What devices cost for a time. None: not known, for want of a power or a price.

    Attributes:
        joules: at most, of the devices alone.
        usd: at the device's list price, or the given one.
        tokens: that came of it, where one asks by tokens.
    """

    seconds: float
    devices: int
    joules: float | None
    usd: float | None
    tokens: float | None = None

    @property
    def days(self) -> float:
        return self.seconds / DAY_S

    @property
    def megawatt_hours(self) -> float | None:
        return None if self.joules is None else self.joules / JOULES_PER_MWH

    @property
    def usd_per_million_tokens(self) -> float | None:
        return None if self.usd is None or not self.tokens else self.usd / self.tokens * 1e6

    @property
    def joules_per_token(self) -> float | None:
        return None if self.joules is None or not self.tokens else self.joules / self.tokens


def energy_joules(device: Device, count: int, seconds: float) -> float | None:
    """The most that the devices may draw: power_w · count · seconds. None: their power is not known.

    >>> from lighten.device.catalog import read_device
    >>> energy_joules(read_device("h100-sxm"), 8, 3600.0) / 3.6e6  # kWh
    5.6
    """
    return None if device.power_w is None else device.power_w * _checked(count, seconds)


def cost_usd(device: Device, count: int, seconds: float) -> float | None:
    """What the devices cost by the hour: usd_per_hour · count · hours. None: no price is known.

    >>> from lighten.device.catalog import read_device, with_price
    >>> cost_usd(with_price(read_device("h100-sxm"), "2.10/h"), 8, 1800.0)
    8.4
    """
    return None if device.price is None else device.price.usd_per_hour * _checked(count, seconds) / 3600


def bill_of(device: Device, count: int, seconds: float, tokens: float | None = None) -> Bill:
    """Energy and money of a time on devices, and what each token of it costs.

    >>> from lighten.device.catalog import read_device, with_price
    >>> one = bill_of(with_price(read_device("h100-sxm"), "2.00/h"), 8, 3600.0, tokens=4e6)
    >>> one.usd, one.usd_per_million_tokens, one.joules_per_token
    (16.0, 4.0, 5.04)
    """
    return Bill(seconds=seconds, devices=count, joules=energy_joules(device, count, seconds), usd=cost_usd(device, count, seconds), tokens=tokens)


def training_run(device: Device, count: int, *, tokens: float, tokens_per_s: float) -> Bill:
    """A training run of so many tokens at so many a second, of all devices together; without restarts, evaluations and failures.

    Raises:
        ConstraintError: no tokens, or no speed.

    >>> from lighten.device.catalog import read_device, with_price
    >>> run = training_run(with_price(read_device("h100-sxm"), "2.00/h"), 1024, tokens=parse_tokens("2T"), tokens_per_s=1e7)
    >>> round(run.days, 3), round(run.megawatt_hours, 2), round(run.usd)
    (2.315, 39.82, 113778)
    """
    if not tokens > 0 or not tokens_per_s > 0:
        raise ConstraintError(f"a training run of {tokens:g} tokens at {tokens_per_s:g} tokens/s: both have to be positive.")
    return bill_of(device, count, tokens / tokens_per_s, tokens)


def parse_tokens(text: str) -> int:
    """How many tokens `text` says: 2T, 300B, 15.6T, 5000000.

    Raises:
        ConstraintError: not a number of tokens.

    >>> parse_tokens("15.6T"), parse_tokens("300B")
    (15600000000000, 300000000000)
    """
    count = round(parse_quantity(text, COUNT_UNITS, "tokens"))
    if not 1 <= count <= 10**18:
        raise ConstraintError(f"tokens: {text!r} is not between 1 and 1e18.")
    return count


def _checked(count: int, seconds: float) -> float:
    """Device-seconds."""
    if count < 1:
        raise DeviceError(f"{count} devices: at least 1.")
    return count * seconds
