"""What people call a device: free text → words that tell devices apart, and figures (memory, watts) that have to agree.

Every word of a text has to be explained by the device, so an unknown variant (Laptop, Ti, D) is no device rather than a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from lighten.device.device import Device

NOISE = frozenset({
    "nvidia", "amd", "intel", "google", "aws", "amazon", "apple", "huawei", "qualcomm", "meta", "tenstorrent", "furiosa", "corporation", "inc",
    "geforce", "rtx", "gtx", "rx", "tesla", "instinct", "radeon", "arc", "xeon", "platinum", "epyc", "ryzen", "snapdragon", "jetson", "tpu",
    "raspberry", "ascend", "alveo", "neuron", "silicon", "gpu", "gpus", "cpu", "npu", "chip", "chips", "card", "accelerator", "accelerators",
    "core", "cores", "c", "tensor", "graphics", "generation", "edition", "series", "oam", "board", "system", "module", "the", "with", "w", "a", "of",
})  # fmt: skip
"""Words that tell no device from another one: vendors, families, parts."""
VENDORS = {
    **dict.fromkeys(("nvidia", "geforce", "gtx", "rtx", "tesla", "quadro"), "NVIDIA"), **dict.fromkeys(("amd", "radeon", "rx", "instinct"), "AMD"),
    **dict.fromkeys(("epyc", "ryzen"), "AMD"), **dict.fromkeys(("intel", "arc", "xeon"), "Intel"), "apple": "Apple", "qualcomm": "Qualcomm",
    "snapdragon": "Qualcomm", "huawei": "Huawei", "ascend": "Huawei",
}  # fmt: skip
"""Words that are one vendor's alone: a Radeon RX 6800 is not a GeForce 6800."""
VARIANTS = frozenset({
    "ti", "super", "xt", "xtx", "gre", "max", "pro", "ultra", "ada", "d", "nx", "nano", "elite", "quadro", "laptop", "mobile", "plus", "lite", "mini",
})  # fmt: skip
"""Words that make another device of one: a text without them does not mean the device that has them."""
FORMS = frozenset({"sxm", "pcie", "nvl"})
"""Words for how one chip is built in, with its own power and memory: what leaves them out is not certain."""
DOUBTS = frozenset({
    "not", "no", "or", "and", "unknown", "unspecified", "stated", "variant", "variants", "various", "mixed", "like", "class", "equivalent",
    "simulated", "emulated", "mig", "vgpu", "slice", "half", "partial", "shared", "capped", "limited", "underclocked", "undervolted",
    "overclocked", "only",
})  # fmt: skip
"""Words in brackets after which a text no longer means the plain device."""
_HOSTS = r"macbook (?:pro|air)|mac (?:studio|mini|pro|book)|imac|mainboard|desktop|dgx(?! spark)|hgx|mgx"
_INSTANCE = re.compile(r"\b[a-z]+\d+[a-z]*[.-](?:\d*x?large|\d*xl|metal|\d+xlarge)\b|\b[a-z]\d+-(?:high|mega|ultra)gpu-\d+g\b")
_MEMORY = re.compile(r"\b(\d+(?:\.\d+)?) ?(?:gb|gib|g)\b")
_WATTS = re.compile(r"\b(\d+) ?w\b")
_TYPE = re.compile(r"\b(hbm\d?e?|l?p?g?ddr\d+x?)\b")
_COUNT = re.compile(r"\b(?:\d+x(?= )|x\d+$|\d+ ?(?:gpus|chips|cards|devices)\b|\d+ x(?= ))")
_GLUED = [
    (re.compile(r"\b\d{1,4}x(?=[a-z]+\d)"), " "),  # 8xH100
    (re.compile(r"\b[dh]gx (?=[abhv]\d{3}\b)"), "sxm "),  # what DGX and HGX machines carry
    (re.compile(r"\b(rtx|gtx|rx|tesla|tpu|geforce|arc|radeon|quadro|xeon|epyc)(?=[a-z]?\d)"), r"\1 "),  # RTX4090, RTXA6000, TPUv5p
    (re.compile(r"\brtxpro(?=\d)"), "rtx pro "),
    (re.compile(r"(?<=\d)(ti|super|ada|xtx|xt|gre|sxm\d?|pcie|nvl|pro|max|ultra)\b"), r" \1"),  # 3080Ti, 4000Ada, H100SXM
    (re.compile(r"(?<=\d ti)(super)\b"), r" \1"),
    (re.compile(r"\b(sxm|pcie|nvlink)\d\b"), r"\1"),  # SXM4 is the SXM form of its generation
    (re.compile(r"\bpcie (?:gen ?)?\d(?:\.0)?(?: ?x\d+)?\b"), "pcie"),
    (re.compile(r"\b(gaudi|trainium|inferentia|atlas|pi|cm|orin|v) (\d+[a-z]?)\b"), r"\1\2"),  # Gaudi 2, TPU v 4
    (re.compile(r"\b(v\d[ep]?|v5litepod) \d+\b"), r"\1"),  # TPU v5e-8: a slice of 8
    (re.compile(r"\b(\d+)c\b"), r"\1"),  # 96c
    (re.compile(r"\btrn(\d)\b"), r"trainium\1"),
    (re.compile(r"\binf(\d)\b"), r"inferentia\1"),
    (re.compile(r"\bneuroncores?(?:-?v\d)?\b|\bneuron cores?\b"), "neuroncore"),
]
_IDENTIFYING = re.compile(r"[a-z]+\d|\d[a-z]|\d{3}|.*[a-z]{5}")


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """A text, read: what tells devices apart, and figures that have to agree where they are said."""

    words: frozenset[str]
    vendors: frozenset[str] = frozenset()
    memory_gb: float | None = None
    watts: float | None = None
    memory_type: str | None = None

    @classmethod
    def of(cls, text: str) -> Spelling:
        """
        >>> sorted(Spelling.of("NVIDIA H100-SXM-80GB-700W").words), Spelling.of("H100-SXM-80GB-700W").memory_gb
        (['h100', 'sxm'], 80.0)
        """
        plain = _INSTANCE.sub(" ", re.sub(r"[®™]|\((?:r|tm|c)\)", " ", text[:300].lower()))
        plain = re.sub(r"[^a-z0-9.+]+", " ", plain)
        for pattern, by in _GLUED:
            plain = pattern.sub(by, plain)
        plain = re.sub(rf"\b(?:{_HOSTS})\b", " ", plain)
        figures = {}
        for name, figure in (("memory_gb", _MEMORY), ("watts", _WATTS), ("memory_type", _TYPE)):
            found = figure.findall(plain)
            if len(set(found)) == 1:
                figures[name] = found[0]
                plain = figure.sub(" ", plain)
        words = _COUNT.sub(" ", plain.strip()).replace("+ ", " ").rstrip("+ ").split()
        return cls(
            words=frozenset(word.strip(".") for word in words) - NOISE - {""},
            vendors=frozenset(VENDORS[word] for word in words if word in VENDORS),
            memory_gb=float(figures["memory_gb"]) if "memory_gb" in figures else None,
            watts=float(figures["watts"]) if "watts" in figures else None,
            memory_type=figures.get("memory_type"),
        )

    @classmethod
    def readings(cls, text: str) -> list[Spelling]:
        """How a table's cell may be read: as it is; without a remark in brackets; or, of a machine that names its accelerator as in
        `Desktop (RTX 4090) [GPU]`, the accelerator, also without a digit at its end, which may be a footnote's.
        """
        marked = re.fullmatch(r"(.*)\[([A-Za-z/]+)\]\s*", text.strip(), re.DOTALL)
        if not marked:
            outside = re.sub(r"[(\[]([^()\[\]]*)[)\]]", lambda found: " " if _is_remark(found[1]) else found[0], text[:300])
            return [cls.of(text), *([cls.of(outside)] if outside != text else [])]
        whole, inner = marked[1], re.findall(r"\(([^()]*)\)", marked[1])
        if "GPU" not in marked[2].upper():
            return [cls.of(part) for part in (whole, *inner)]
        parts = [*inner, whole]
        return [cls.of(part) for part in (*parts, *(re.sub(r"(?<=[A-Za-z0-9])1$", "", part) for part in inner))]


def _is_remark(text: str) -> bool:
    """Whether what stands in brackets is only a remark, such as whose machine it was: plain words, none of which may change what is meant."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return not re.search(r"\d", text) and not words & (VARIANTS | FORMS | DOUBTS)


def explained(asked: Spelling, device: Device) -> bool:
    """Whether a text may mean the device: it says nothing that the device is not."""
    return _rank(asked, device) > 0


def choose(asked: Spelling, found: Sequence[Device]) -> list[Device]:
    """Those that a text says whole; where there is none, those of which it says a part."""
    ranks = [_rank(asked, device) for device in found]
    best = max(ranks, default=0)
    return [device for device, rank in zip(found, ranks, strict=True) if rank == best and best > 0]


def certain(asked: Spelling, found: Device) -> bool:
    """Whether the text says all that tells devices apart, known here or not: it leaves open neither the form nor the kind of memory."""
    if _rank(asked, found) == 2:
        return True
    names = [name for name in _names(found.name, found.full_name, *found.aliases) if asked.words <= name.words]
    return any(not (name.words - asked.words) & FORMS and not (name.memory_type and asked.memory_type is None) for name in names)


def common(found: Sequence[Device]) -> Device | None:
    """What is true of all of several devices; None where they differ in memory or bandwidth, without which nothing can be said."""
    first = found[0]
    if not all(_same(first.memory_bytes, one.memory_bytes) or one.memory_varies for one in found):
        return None
    if not all(_same(first.bandwidth_bytes_per_s, one.bandwidth_bytes_per_s) for one in found):
        return None
    names = " or ".join(one.name for one in found)
    return replace(
        first,
        name=names,
        full_name=" or ".join(one.full_name for one in found),
        memory_bytes=first.memory_bytes if all(_same(first.memory_bytes, one.memory_bytes) for one in found) else None,
        peak_flops_per_s=_shared([one.peak_flops_per_s for one in found]),
        measured_flops_per_s={},
        links=first.links if all(one.links == first.links for one in found) else (),
        power_w=first.power_w if all(one.power_w == first.power_w for one in found) else None,
        price=None,
        notes=(f"the text leaves open which of {names}: what they have in common",),
    )


def _shared(rates: Sequence[object]) -> dict[str, float]:
    first, *others = [dict(rate) for rate in rates]  # type: ignore[call-overload]
    return {name: value for name, value in first.items() if all(_same(value, other.get(name)) for other in others)}


def _same(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and abs(one / other - 1) < 0.01)


def _rank(asked: Spelling, device: Device) -> int:
    """2: the text says one of the device's names whole; 1: a part of one, with what identifies it; 0: neither."""
    best = 0
    for name in _names(device.name, device.full_name, *device.aliases):
        if not name.words or not _agree(asked, name, device):
            continue
        if name.words == asked.words and _says_figures_of(asked, name):
            return 2
        missing = name.words - asked.words
        if asked.words <= name.words and not missing & VARIANTS and any(_IDENTIFYING.match(word) for word in asked.words):
            best = 1
    return best


@cache
def _names(*texts: str) -> tuple[Spelling, ...]:
    return tuple(Spelling.of(text) for text in texts)


def _says_figures_of(asked: Spelling, name: Spelling) -> bool:
    """Whether the text says the figures that are part of a name: A100 alone is not A100 80GB."""
    return not (name.memory_gb and asked.memory_gb is None) and not (name.memory_type and asked.memory_type is None)


def _agree(asked: Spelling, name: Spelling, device: Device) -> bool:
    """Whether what the text says of vendor, memory and power is the device's, or is part of this name of it."""
    if asked.vendors and device.vendor not in asked.vendors and device.vendor in VENDORS.values():
        return False
    if asked.memory_gb is not None and asked.memory_gb != name.memory_gb and not _has_memory(device, asked.memory_gb):
        return False
    if asked.watts is not None and asked.watts != name.watts and not (device.power_w and abs(asked.watts / device.power_w - 1) <= 0.05):
        return False
    return asked.memory_type is None or asked.memory_type == name.memory_type or (device.memory_type or "").lower().startswith(asked.memory_type)


def _has_memory(device: Device, memory_gb: float) -> bool:
    """Sold sizes are whole GiB of which the driver takes a part, or GB."""
    if not memory_gb:
        return False
    if device.memory_varies and (device.memory_bytes is None or memory_gb * 2**30 <= device.memory_bytes):
        return True
    return any(abs((device.memory_bytes or 0) / unit / memory_gb - 1) <= 0.07 for unit in (2**30, 10**9))
