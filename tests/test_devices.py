"""Devices: every known one keeps the promises of its type, is found by what people call it, and a user's file is checked to the last key."""

from __future__ import annotations

import argparse
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import devices_from_csv
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lighten.cli import devices as command
from lighten.device import catalog
from lighten.device.bill import Bill, bill_of, cost_usd, energy_joules, parse_tokens, training_run
from lighten.device.catalog import all_devices, match_device, parse_devices, read_device, read_file, with_devices_per_node, with_network, with_price
from lighten.device.device import KINDS, PEAKS, Device, Link
from lighten.errors import ConstraintError, DeviceError, LightenError

DEVICES = all_devices()
each = pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)


# ---- every known device ----


def test_there_are_enough_of_each_kind():
    assert len(DEVICES) >= 60
    kinds = {kind: sum(device.kind == kind for device in DEVICES) for kind in KINDS}
    assert all(kinds[kind] >= 3 for kind in ("gpu", "cpu", "tpu", "npu", "soc", "fpga", "asic"))


@each
def test_a_device_is_named_as_its_file_and_says_where_its_figures_are_from(device):
    assert (catalog.KNOWN / f"{device.name}.toml").is_file()
    assert device.sources["others"]
    assert {key.split(".")[0] for key in device.sources} <= {*Device.__dataclass_fields__, "others"}
    for key, source in device.sources.items():
        assert len(source) > 15, key
        assert "recalled" not in source or "not re-read" in source or "confidence" in source
    if device.memory_bytes is not None and device.kind == "gpu":
        assert "memory_bytes" in device.sources  # GB or GiB: it says which
    if device.links:
        assert "links" in device.sources or "read" in device.sources["others"] or "recalled" in device.sources["others"]


@each
def test_figures_are_in_base_units_and_of_a_possible_size(device):
    assert device.kind in KINDS
    assert set(device.peak_flops_per_s) <= set(PEAKS)
    assert all(1e11 <= rate <= 5e16 for rate in device.peak_flops_per_s.values())
    assert device.bandwidth_bytes_per_s is None or 1e10 <= device.bandwidth_bytes_per_s <= 3e16
    assert device.memory_bytes is None or 2**27 <= device.memory_bytes <= 2**40
    assert device.power_w is None or 1 <= device.power_w <= 30_000
    for name, rate in device.measured_flops_per_s.items():
        assert 0.3 <= rate / device.peak(name) <= 1.25  # boards that run above their rated clock measure more than their data sheet
    if device.price is not None:
        assert 0.02 <= device.price.usd_per_hour <= 30
        assert re.match(r"202\d", device.price.date)
        assert device.price.source


@each
def test_links_go_from_the_inside_outwards(device):
    joined = [link.devices for link in device.links]
    inside = [count for count in joined if count is not None]
    rates = [link.bytes_per_s for link in device.links]
    assert rates == sorted(rates, reverse=True)  # farther is never faster
    assert joined == sorted(inside) + [None] * (len(joined) - len(inside))
    assert len(inside) == len(set(inside))
    assert joined.count(None) <= 1
    assert all(5e8 <= link.bytes_per_s <= 2e12 for link in device.links)
    assert device.devices_per_node == max(inside, default=1)


@each
def test_a_device_is_found_by_each_of_its_names(device):
    for name in (device.name, device.name.upper(), *device.aliases):
        assert read_device(name).name == device.name, name
    found = match_device(device.full_name)
    assert found is not None
    assert found.name == device.name


@each
def test_rates_double_with_half_the_bits_and_are_dense(device):
    rates = device.peak_flops_per_s
    for wide, narrow, ratios in (("tf32", "bfloat16", (2,)), ("int8", "int4", (1, 2)), ("float8", "float4", (2, 2.8, 3, 4))):
        if wide in rates and narrow in rates and device.vendor == "NVIDIA":  # L40S has int4 as fast as int8; Blackwell has several ratios of 4 bit
            assert any(rates[narrow] / rates[wide] == pytest.approx(ratio, rel=0.03) for ratio in ratios)
    if device.vendor == "NVIDIA" and {"bfloat16", "float8"} <= set(rates) and not device.name.startswith("rubin"):
        assert rates["float8"] / rates["bfloat16"] == pytest.approx(2, rel=0.03)  # Hopper, Ada and Blackwell
    if "float16" in rates and "bfloat16" in rates and device.name != "gaudi3" and device.name != "mi100":
        assert rates["float16"] == rates["bfloat16"]


# Dense rates in TFLOP/s from the vendors' own papers, not from the table that the files were made of: NVIDIA A100 white paper (2020), table 1;
# H100 white paper (2022), table 2; Ada white paper v2 (2023), appendix; AMD MI300X data sheet (2023); Google Cloud TPU v5e documentation.
GOLDEN = {
    ("a100-sxm-80gb", "bfloat16"): 312, ("a100-sxm-80gb", "int8"): 624, ("a100-sxm-80gb", "float64"): 9.7, ("h100-sxm", "bfloat16"): 989.4,
    ("h100-sxm", "float8"): 1978.9, ("h100-sxm", "int8"): 1978.9, ("h100-pcie", "bfloat16"): 756, ("rtx-4090", "float16"): 165.2,
    ("rtx-4090", "float16_acc16"): 330.3, ("rtx-4090", "float8"): 330.3, ("mi300x", "float16"): 1307.4, ("mi300x", "float8"): 2614.9,
    ("tpu-v5e", "bfloat16"): 197,
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), GOLDEN)
def test_rates_are_the_dense_ones_of_the_vendors_papers(name, dtype):
    assert read_device(name).peak(dtype) / 1e12 == pytest.approx(GOLDEN[name, dtype], rel=0.005)


# What nvidia-smi prints as total memory, in MiB: thundergolfer.com/blog/nvidia-gpu-memory-capacity.
@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        ("h200-sxm", 143771),
        ("h100-sxm", 81559),
        ("a100-sxm-80gb", 81920),
        ("a100-sxm-40gb", 40960),
        ("a10", 23028),
        ("l40s", 46068),
        ("l4", 23034),
        ("t4", 15360),
    ],
)
def test_memory_is_what_the_driver_shows(name, mebibytes):
    assert read_device(name).memory_bytes == mebibytes * 2**20


def test_a_device_of_which_little_is_known_says_so_when_asked():
    board = read_device("raspberry-pi-5")
    assert board.bandwidth() == pytest.approx(17.07e9, rel=1e-3)
    with pytest.raises(DeviceError, match=r"raspberry-pi-5 has no known rate of bfloat16 products; its known types: none\."):
        board.peak("bfloat16")
    with pytest.raises(DeviceError, match=r"hailo-8: its memory bandwidth is not known\."):
        read_device("hailo-8").bandwidth()
    with pytest.raises(DeviceError, match=r"rtx-4090 has no known rate of float4 products; its known types: float32, tf32, float16"):
        read_device("rtx-4090").peak("float4")
    with pytest.raises(DeviceError, match=r"9 of rtx-4090 cannot talk to each other: PCIe 4 x16 joins 8\."):
        read_device("rtx-4090").link(9)


# ---- spellings ----

SPELLINGS = {
    "H100-SXM-80GB (DGX Cloud)": "h100-sxm", "RTX 4090 [desktop, Windows]": "rtx-4090", "A100-80GB (PCIe)": "a100-pcie-80gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "rtx-4090-laptop", "Quadro RTX 6000": "quadro-rtx-6000", "RTX 3080 12GB": "rtx-3080-12gb",
    "TPU v5e-8": "tpu-v5e", "AMD Ryzen AI MAX+ 395 w/ Radeon 8060S": "ryzen-ai-max-395", "iPhone 15 Pro (A17 Pro)": "a17-pro",
    "MacBook Pro M4 Max 128GB": "m4-max-40", "Radeon VII": "radeon-vii", "AMD Radeon RX 7900 XTX": "rx-7900-xtx", "RTX 4060 Ti 8GB": "rtx-4060-ti",
    "A100-SXM-80GB": "a100-sxm-80gb", "A100-80GB": "a100-sxm-80gb", "A100-SXM-40GB": "a100-sxm-40gb", "A100-PCIe-80GB": "a100-pcie-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb", "NVIDIA A100 80GB PCIe": "a100-pcie-80gb", "A100-SXM-80GB-400W": "a100-sxm-80gb",
    "DGX A100 80GB": "a100-sxm-80gb", "H100-SXM-80GB-700W": "h100-sxm", "NVIDIA H100 80GB HBM3": "h100-sxm", "DGX H100": "h100-sxm",
    "8x H100 SXM5": "h100-sxm", "8xH100-SXM": "h100-sxm", "H100-PCIe-80GB": "h100-pcie", "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl", "NVIDIA H200": "h200-sxm", "H200-SXM-141GB": "h200-sxm", "NVIDIA H200 NVL": "h200-nvl",
    "GH200-480GB": "gh200-96gb", "B200-SXM-180GB": "b200", "NVIDIA B300 SXM6 AC": "b300", "GB200": "gb200", "GB200 NVL72": "gb200",
    "GB300": "gb300", "RTX4090-24GB": "rtx-4090", "NVIDIA GeForce RTX 4090": "rtx-4090", "RTX 4090 24 GB": "rtx-4090",
    "RTX3080Ti-12GB": "rtx-3080-ti", "RTX 3080 Ti": "rtx-3080-ti", "RTX4000Ada-20GB": "rtx-4000-ada",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada", "RTXA6000-48GB": "rtx-a6000", "RTX 5060 Ti": "rtx-5060-ti",
    "RTX 4080 SUPER": "rtx-4080-super", "DGX Spark (GB10)": "dgx-spark", "NVIDIA GB10": "dgx-spark", "Tesla T4": "t4",
    "Tesla V100-SXM2-32GB": "v100-sxm-32gb", "AMD Instinct MI300X": "mi300x", "RX 9070": "rx-9070", "RX 9070 XT": "rx-9070-xt",
    "Apple M1 Max 32-core GPU": "m1-max-32", "Apple M2 Ultra 76-core": "m2-ultra-76", "Apple M4 10-core GPU 16GB": "m4-10",
    "Arc A770": "arc-a770", "TPUv5p": "tpu-v5p", "TPUv7x(Ironwood)": "tpu-v7x", "TPU v5 lite": "tpu-v5e", "TPU v6e": "tpu-v6e",
    "Trainium1(trn1.32xl, NeuronCore)": "trainium1-neuroncore", "Trainium2": "trainium2",
    "Inferentia2 (inf2.48xl) NeuronCores": "inferentia2-neuroncore", "Intel Gaudi 3": "gaudi3", "Gaudi2": "gaudi2",
    "Jetson AGX Orin 64GB": "jetson-agx-orin", "Pi 5 - 8GB [CPU]": "raspberry-pi-5", "Pi 400 - 4GB [CPU]": "raspberry-pi-4",
    "Intel 13900K (Nvidia 4090) [GPU]": "rtx-4090", "Pi CM5 - 16GB (Nvidia RTX 40901) [GPU]": "rtx-4090",
    "Mac Studio (M3 Ultra 512GB) [GPU]": "m3-ultra-80", "Framework Desktop Mainboard (395+) [GPU/CPU]": "ryzen-ai-max-395",
    "Intel Xeon Platinum 8480+": "xeon-8480", "AMD EPYC 9654": "epyc-9654",
}  # fmt: skip
NOT_CERTAIN = [
    "RTX 4090 (mobile)", "H100-SXM-80GB (MIG)", "RTX 4090 (capped)", "RTX 4090 (RTX 3090)", "L40S or similar",
    "GeForce 6800 XT", "GeForce GTX 780M", "Radeon A100 SXM 80GB", "Intel M1 Max 32-core",
    "RTX4090+RTX3090Ti", "H100-80GB (variant not stated)", "H100", "A100", "P100", "NVIDIA GeForce RTX 3070 Laptop GPU",
    "RTX 4080 D", "RTX 6000", "RTX 3060 8GB", "A100-SXM-64GB", "Arc A310", "H20-3e", "Apple Silicon (unspecified in README)",
    "Xeon SPR 48 cores", "Framework Mainboard (128GB) [CPU]", "RX 7900", "RTX 4050", "M1 Max 16-core", "gaudi", "GPU", "", "80GB", "TPU",
    "TPU v5", "H100 SXM 96GB", "H100-SXM-350W", "RTX PRO 6000 Blackwell", "MI300", "H1000", "L40SS", "MI250XX", "two of H100 SXM or A100 SXM",
    "RTX 5090 D v2",
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), SPELLINGS.items())
def test_a_table_s_spelling_is_understood(text, name):
    found = match_device(text)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("text", NOT_CERTAIN)
def test_what_is_not_certain_is_no_device(text):
    assert match_device(text) is None


def test_what_is_sold_with_several_sizes_of_memory_has_the_one_that_is_said():
    assert match_device("Apple M4 10-core GPU 16GB").memory_bytes == 16 * 2**30
    assert read_device("Raspberry Pi 5 8GB").memory_bytes == 8 * 2**30
    assert read_device("m4-10").memory_bytes == 32 * 2**30
    assert match_device("Apple M4 10-core GPU 64GB") is None


def test_a_text_that_leaves_a_choice_gives_what_is_common():
    one = match_device("Apple M1 Max (64GB)")
    assert one.name == "m1-max-24 or m1-max-32"
    assert one.bandwidth_bytes_per_s == 400e9
    assert one.memory_bytes == 64 * 2**30
    assert one.peak_flops_per_s == {}
    with pytest.raises(DeviceError, match=r"no known rate of float16 products; its known types: none"):
        one.peak("float16")
    forty = match_device("A100 40GB")
    assert forty.peak("bfloat16") == 312e12
    assert forty.links == ()


def test_figures_that_are_known_decide_between_devices():
    assert match_device("H100-80GB", bandwidth_bytes_per_s=3.35e12).name == "h100-sxm"
    assert match_device("H100-80GB", bandwidth_bytes_per_s=2.0e12).name == "h100-pcie"
    assert match_device("A100", memory_bytes=80e9, bandwidth_bytes_per_s=1.935e12).name == "a100-pcie-80gb"
    assert match_device("RTX PRO 6000 Blackwell", bandwidth_bytes_per_s=1.792e12).name == "rtx-pro-6000-blackwell-workstation"
    assert match_device("P100", bandwidth_bytes_per_s=549e9).name == "p100-pcie-12gb"
    assert match_device("H800", bandwidth_bytes_per_s=3.35e12).name == "h800-sxm"
    assert match_device("H800", bandwidth_bytes_per_s=2.0e12) is None  # the PCIe card, which is not known here


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_no_text_breaks_the_matching(text):
    assert match_device(text) is None or isinstance(match_device(text), Device)


@given(st.sampled_from(DEVICES), st.sampled_from(["Portable", "Mobile", "Ti", "SUPER", "XT", "D", "9z", "Max-Q", "+ RTX 3050"]))
@settings(max_examples=200)
def test_another_variant_of_a_device_is_not_that_device(device, word):
    assume(not set(re.findall(r"[a-z0-9]+", word.lower())) <= set(device.name.split("-")))
    found = match_device(f"{device.name} {word}")
    assert found is None or found.name != device.name


# ---- by name ----


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100", "'h100' may be any of h100-96gb-hbm2e, h100-nvl, h100-pcie, h100-sxm; say which."),
        ("m1 max", "'m1 max' may be any of m1-max-24, m1-max-32; say which."),
        ("h800", "'h800' leaves open which; the only one known that it may be is h800-sxm."),
        ("/nowhere/at-all", "there is no file /nowhere/at-all."),
        ("h100-smx", "no device is called 'h100-smx'; near it: h100-sxm"),
        ("zzzz", "no device is called 'zzzz'; `lighten devices` lists all"),
        ("nope.toml", "there is no file nope.toml."),
        ("x" * 5000, "no device is called 'xxxx"),
        ("h100-sxm:0", "'h100-sxm:0': '0' is no number of devices; write h100-sxm:8."),
        ("h100-sxm:-8", "'-8' is no number of devices"),
        ("h100-sxm:8.5", "'8.5' is no number of devices"),
        ("h100-sxm:", "'' is no number of devices"),
        ("h100-sxm:999999999999", "is no number of devices"),
        ("h100:8", "'h100' may be any of"),
    ],
)
def test_a_name_that_means_no_one_device_is_one_line(text, says):
    with pytest.raises(DeviceError) as caught:
        parse_devices(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_device_and_its_count():
    assert [(device.name, count) for device, count in map(parse_devices, ("h100-sxm:64", "h100-sxm", "A100-SXM-80GB:8"))] == [
        ("h100-sxm", 64), ("h100-sxm", 1), ("a100-sxm-80gb", 8),
    ]  # fmt: skip


def test_one_device_is_read_without_the_others(monkeypatch):
    catalog._known.cache_clear()
    read = []
    monkeypatch.setattr(catalog, "read_file", lambda path: read.append(path.name) or read_file(path))
    assert read_device("h100-sxm").name == "h100-sxm"
    assert read == ["h100-sxm.toml"]
    catalog._known.cache_clear()


# ---- a device at another price, network, node ----


def test_another_price():
    paid = with_price(read_device("h100-sxm"), "2.10/h")
    assert paid.price.usd_per_hour == 2.10
    assert paid.price.source == "given"
    assert with_price(paid, "$3").price.usd_per_hour == 3
    for text in ("free", "-1", "2.10/day", "1e400", "nan", "2,10", ""):
        with pytest.raises(DeviceError, match=r"is no price of one device; write US dollars for an hour, such as 2\.10/h\."):
            with_price(paid, text)


def test_another_network():
    device = read_device("h100-sxm")
    for text, rate in (
        ("400Gb/s", 50e9),
        ("50GB/s", 50e9),
        ("100Gbps", 12.5e9),
        ("1600Gb/s/node", 25e9),
        ("8x400Gb/s/node", 50e9),
        ("4 x 200Gbps / node", 12.5e9),
    ):
        found = with_network(device, text)
        assert found.link(16).bytes_per_s == rate
        assert found.link(8) == device.link(8)
    for text in ("fast", "400", "400G", "-1Gb/s", "0Gb/s", "400Gb/h", "0x400Gb/s"):
        with pytest.raises(DeviceError, match=r"is no rate of one device; write 400Gb/s, 50GB/s, or of a whole node 8x400Gb/s/node\."):
            with_network(device, text)
    with pytest.raises(DeviceError, match=r"how many raspberry-pi-5 a node has is not known; give the rate of one device\."):
        with_network(read_device("raspberry-pi-5"), "1Gb/s/node")


def test_nodes_of_another_size():
    device = read_device("h100-sxm")
    assert with_devices_per_node(device, 4).link(4).name == "NVLink 4"
    assert with_devices_per_node(device, 4).link(8).devices is None
    assert with_devices_per_node(device, 16).link(16).name == "NVLink 4"
    assert with_devices_per_node(device, 1).link(2).devices is None
    bridged = read_device("h100-nvl")
    assert [(link.name, link.devices) for link in with_devices_per_node(bridged, 4).links] == [("NVLink 4 bridge", 2), ("PCIe 5 x16", 4)]
    assert [(link.name, link.devices) for link in with_devices_per_node(bridged, 2).links] == [("NVLink 4 bridge", 2)]
    with pytest.raises(DeviceError, match=r"0 devices a node: at least 1\."):
        with_devices_per_node(device, 0)
    with pytest.raises(DeviceError, match=r"2 of raspberry-pi-5 in a node: no link inside a node is known of it\."):
        with_devices_per_node(read_device("raspberry-pi-5"), 2)


# ---- a user's file ----

MINE = """
name = "mine-1"
memory_bytes = 17179869184
bandwidth_bytes_per_s = 448e9
power_w = 75
[peak_flops_per_s]
bf16 = 40e12
int8 = 80e12
[[links]]
name = "PCIe"
bytes_per_s = 31e9
devices = 4
[price]
usd_per_hour = 0.4
date = 2026-11-22
source = "our own"
"""


def _file(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_user_s_device_is_read(tmp_path):
    device, count = parse_devices(f"{_file(tmp_path, MINE)}:4")
    assert (device.name, count, device.kind, device.full_name) == ("mine-1", 4, "other", "mine-1")
    assert device.peak("bfloat16") == 40e12
    assert device.link(4).bytes_per_s == 31e9
    assert device.price.date == "2026-11-22"
    least = read_file(Path(_file(tmp_path, 'name = "x"')))
    assert least.peak_flops_per_s == {}
    with pytest.raises(DeviceError, match=r"x has no known rate of float16 products; its known types: none\."):
        least.peak("float16")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("", 'colour = "red"\n'), "has unknown keys 'colour'; known: name, full_name"),
        (('name = "mine-1"', ""), "has no name"),
        (('name = "mine-1"', "name = 5"), "name = 5 is no text"),
        (('name = "mine-1"', 'name = "My Device"'), "name = 'My Device' is not of lower-case letters, digits, '.' and '-'"),
        (("448e9", '"448 GB/s"'), "bandwidth_bytes_per_s = '448 GB/s' is no number; give bytes per second, such as 3.35e12"),
        (("448e9", "448"), "bandwidth_bytes_per_s = 448 is below 1e+06; give bytes per second, such as 3.35e12"),
        (("448e9", "-448e9"), "bandwidth_bytes_per_s = -448000000000.0 is below 1e+06"),
        (("448e9", "nan"), "bandwidth_bytes_per_s = nan is no number"),
        (("448e9", "inf"), "bandwidth_bytes_per_s = inf is no number"),
        (("448e9", "true"), "bandwidth_bytes_per_s = True is no number"),
        (("448e9", "1e30"), "bandwidth_bytes_per_s = 1e+30 is above 1e+17"),
        (("17179869184", "16"), "memory_bytes = 16 is below 1.04858e+06; give bytes, such as 85899345920"),
        (("17179869184", "17179869184.5"), "memory_bytes = 17179869184.5 is no whole number"),
        (("17179869184", "9" * 400), "memory_bytes = 9999"),
        (("bf16 = 40e12", "bf16 = 40"), "peak_flops_per_s.bf16 = 40 is below 1e+09; give FLOP/s, such as 989e12"),
        (("bf16 = 40e12", "int5 = 40e12"), "peak_flops_per_s.int5 is no type of products; known: float64, float32"),
        (("bf16 = 40e12", "bf16 = 40e12\nbfloat16 = 41e12"), "peak_flops_per_s says bfloat16 twice"),
        (("power_w = 75", 'power_w = "75 W"'), "power_w = '75 W' is no number; give watts"),
        (("power_w = 75", 'kind = "toaster"'), "kind = 'toaster' is none of gpu, tpu"),
        (("power_w = 75", "links = 3"), "mine.toml is no TOML"),
        (("devices = 4", "devices = 1"), "links[0].devices = 1 is below 2; give how many devices it joins"),
        (("devices = 4", "devices = 4\nwidth = 3"), "links[0] has unknown keys 'width'; known: name, bytes_per_s, devices, latency_s"),
        (('name = "PCIe"\n', ""), "links[0] has no name"),
        (("date = 2026-11-22", 'date = "yesterday"'), "price.date = 'yesterday' is no day such as 2026-11-22"),
        (('source = "our own"', ""), "price has no source"),
        (("[price]", "[sources]\nheight = 'x'\n[price]"), "sources has unknown keys 'height'"),
        (("[price]", "[[price]]"), "price = [{'usd_per_hour': 0.4"),
        (("power_w = 75", "memory_varies = 1"), "memory_varies = 1 is neither true nor false"),
        (("power_w = 75", 'aliases = "me"'), "aliases = 'me' is no list of texts"),
        (("power_w = 75", "power_w = 75\npower_w = 80"), "mine.toml is no TOML: Cannot overwrite a value"),
        (("devices = 4", "devices = "), "mine.toml is no TOML: Invalid value"),
        (("17179869184", "9" * 5000), "mine.toml is no TOML"),
    ],
)
def test_a_file_with_a_mistake_is_one_line_that_says_it(tmp_path, change, says):
    text = change[1] + MINE if not change[0] else MINE.replace(*change)
    with pytest.raises(DeviceError) as caught:
        read_device(_file(tmp_path, text))
    assert says in str(caught.value)
    assert "mine.toml" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_all_mistakes_are_said_at_once(tmp_path):
    with pytest.raises(DeviceError, match=r"memory_bytes = 16 is below .*; power_w = -1 is below .*; has no name|has no name; .*memory_bytes"):
        read_device(_file(tmp_path, "memory_bytes = 16\npower_w = -1"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00binary", "is no text; a device is a TOML file in UTF-8."),
        (b"name = '" + b"x" * 1_100_000 + b"'", "a device's TOML file has at most 1000000."),
        (b"", "has no name"),
        (MINE[:100].encode(), "no"),
        (b"a = " + b"[" * 3000, "is no TOML"),
    ],
)
def test_what_is_no_device_s_file_is_one_line(tmp_path, content, says):
    with pytest.raises(DeviceError) as caught:
        read_device(_file(tmp_path, content))
    assert says in str(caught.value)


def test_a_folder_and_a_missing_file(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(DeviceError, match=r"folder\.toml is a folder; a device is one TOML file\."):
        read_device(str(tmp_path / "folder.toml"))
    with pytest.raises(DeviceError, match="there is no file"):
        read_device(str(tmp_path / "none.toml"))
    for name in ("a\0b.toml", "x" * 5000 + ".toml"):
        with pytest.raises(DeviceError, match=r"cannot be read|there is no file"):
            read_device(name)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_no_bytes_break_the_reading(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "any.toml"
    path.write_bytes(content)
    with pytest.raises(DeviceError):
        read_file(path)


VALUES = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.just([1]), st.just([[]]))


@given(st.sampled_from(sorted(Device.__dataclass_fields__)), VALUES)
@settings(max_examples=300)
def test_no_value_breaks_the_checks(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("value") / "any.toml"
    said = json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
    path.write_text(("" if key == "name" else 'name = "x"\n') + f"{key} = {said}\n", "utf-8")
    read: Device | str
    try:
        read = read_file(path)
    except DeviceError as error:
        read = str(error)
    assert isinstance(read, Device) or read.startswith("any.toml")


# ---- the table that they were made of ----


def test_a_row_becomes_a_file_that_is_read_back(tmp_path):
    columns = "name,vendor,kind,memory_gb,memory_bw_gbs,memory_type,bf16_tflops,fp8_tflops,tdp_w,confidence,source_repo_or_doc,"
    columns += "source_path_or_section,provenance,note"
    values = 'Q9 SXM 48GB,ACME,GPU,48,1234.5,HBM9,100.5,201,333,medium,"data sheet (recalled, not re-read)",,recalled,"a note, with ""quotes"""'
    empty = [*devices_from_csv.PEAK_COLUMNS, "measured_matmul_bf16_tflops", "intra_node_link", "intra_node_unidir_gbs"]
    (row,) = csv.DictReader([columns, values])
    found = devices_from_csv.document({**dict.fromkeys(empty, ""), **row})
    path = tmp_path / "q9.toml"
    path.write_text(devices_from_csv.to_toml(found), "utf-8")
    device = read_file(path)
    assert (device.name, device.memory_bytes, device.bandwidth_bytes_per_s, device.power_w) == ("q9-sxm-48gb", 48 * 2**30, 1234.5e9, 333)
    assert device.peak_flops_per_s == {"bfloat16": 100.5e12, "float8": 201e12}
    assert "recalled, not re-read; confidence medium" in device.sources["others"]
    assert device.notes == ('a note, with "quotes"',)


# ---- the bill ----


def test_energy_is_power_and_time():
    device = replace(read_device("h100-sxm"), power_w=500.0)
    assert energy_joules(device, 8, 10.0) == 40_000
    assert energy_joules(replace(device, power_w=None), 8, 10.0) is None
    with pytest.raises(DeviceError, match="0 devices: at least 1"):
        energy_joules(device, 0, 1.0)


def test_money_is_price_and_time():
    device = with_price(read_device("rtx-4090"), "0.40/h")
    assert cost_usd(device, 8, 1800.0) == pytest.approx(1.6)
    assert cost_usd(replace(device, price=None), 8, 1800.0) is None
    assert bill_of(replace(device, price=None, power_w=None), 1, 1.0, 10.0) == Bill(seconds=1.0, devices=1, joules=None, usd=None, tokens=10.0)
    assert bill_of(replace(device, price=None), 1, 1.0).usd_per_million_tokens is None


def test_a_published_training_run_is_about_what_was_published():
    """Llama 2 70B took 1,720,320 GPU hours on A100-80GB of 400 W, for 2T tokens: 291.42 t of CO2, so 688 MWh of GPUs at 0.385 kg/kWh and PUE 1.1.

    Source: Touvron et al. 2023 (arXiv:2307.09288), table 2; the factors of arXiv:2302.13971, section 6.
    """
    speed = 2e12 / (1_720_320 * 3600)  # of one device
    run = training_run(read_device("a100-sxm-80gb"), 2048, tokens=parse_tokens("2T"), tokens_per_s=2048 * speed)
    assert run.days == pytest.approx(35, rel=1e-3)
    assert run.megawatt_hours == pytest.approx(291.42e3 / 0.385 / 1.1 / 1e3, rel=0.01)
    assert run.usd == pytest.approx(1_720_320 * 2.79, rel=1e-3)


@pytest.mark.parametrize(("tokens", "speed"), [(0, 1.0), (1.0, 0), (-1, 1), (float("nan"), 1.0)])
def test_a_run_without_tokens_or_speed_is_refused(tokens, speed):
    with pytest.raises(ConstraintError, match="both have to be positive"):
        training_run(read_device("h100-sxm"), 8, tokens=tokens, tokens_per_s=speed)


def test_tokens_as_people_write_them():
    assert [parse_tokens(text) for text in ("2T", "15.6T", "300B", "5M", "1000")] == [2 * 10**12, 15_600_000_000_000, 300 * 10**9, 5 * 10**6, 1000]
    for text in ("many", "-2T", "2TB", "0", "1e30", ""):
        with pytest.raises(ConstraintError, match="tokens: "):
            parse_tokens(text)


# ---- the command ----


def _run(capsys, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


def test_the_list(capsys):
    text = _run(capsys)
    assert len(text.splitlines()) == len(DEVICES) + 4
    assert max(map(len, text.splitlines())) <= 120
    assert re.search(r"h100-sxm +NVIDIA +gpu +79\.65 GiB +3\.35 TB/s +989 TFLOP/s +700 W +6\.88", text)
    assert re.search(r"raspberry-pi-5 .* - ", text)


def test_filters_and_order(capsys):
    found = json.loads(_run(capsys, "--kind", "gpu", "--memory", ">=80GB", "--dtype", "fp8", "--sort", "bandwidth", "--json"))
    assert {"h100-sxm", "mi300x", "b200"} <= {device["name"] for device in found}
    assert all(device["kind"] == "gpu" and device["memory_bytes"] >= 80e9 and "float8" in device["peak_flops_per_s"] for device in found)
    rates = [device["bandwidth_bytes_per_s"] for device in found]
    assert rates == sorted(rates, reverse=True)
    assert {device["vendor"] for device in json.loads(_run(capsys, "--vendor", "apple", "--json"))} == {"Apple"}
    assert "a100-sxm-80gb" in _run(capsys, "--memory", "=80GiB")
    prices = [device["price"] for device in json.loads(_run(capsys, "--sort", "price", "--json"))]
    assert prices[0]["usd_per_hour"] <= prices[1]["usd_per_hour"]
    assert prices[-1] is None


def test_one_device_with_the_source_of_each_figure(capsys):
    text = _run(capsys, "H100 SXM")
    assert "NVIDIA H100 SXM 80GB (h100-sxm), NVIDIA, gpu" in text
    assert re.search(r"memory +79\.65 GiB, HBM3 +\[1\]", text)
    assert re.search(r"bfloat16 products, dense +989 TFLOP/s", text)
    assert "[1] 81559 MiB: " in text
    assert "2026-09-17" in text
    document = json.loads(_run(capsys, "h100-sxm", "--json"))
    assert set(document) == set(Device.__dataclass_fields__)
    assert document["links"][-1] == {"name": "InfiniBand NDR, 400 Gb/s a device", "bytes_per_s": 50e9, "devices": None, "latency_s": None}
    assert json.loads(_run(capsys, "hailo-8", "--json"))["memory_bytes"] is None
    assert re.search(r"memory +not known *\n", _run(capsys, "hailo-8"))


def test_every_device_is_shown(capsys):
    for device in DEVICES:
        assert device.full_name in _run(capsys, device.name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--vendor", "acme"), "--vendor acme: no device is of this vendor; known: AMD, AWS"),
        (("--memory", "lots"), "'lots' is not a number with a unit"),
        (("--memory", ">=<3GB"), "--memory '>=<3GB' is no size"),
        (("--dtype", "fp7"), "--dtype fp7: no device has a known rate of it; known: bfloat16"),
        (("--vendor", "Apple", "--dtype", "fp8"), "no known device is of all that was asked"),
        (("h100-sxm", "--kind", "gpu", "--sort", "price"), "--kind, --sort without effect: one device was asked for, h100-sxm."),
        (("h100",), "'h100' may be any of"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, arguments, says):
    with pytest.raises(LightenError) as caught:
        _run(capsys, *arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_s_latency_is_read(tmp_path):
    device = read_file(Path(_file(tmp_path, MINE.replace("devices = 4", "devices = 4\nlatency_s = 5e-6"))))
    assert device.links == (Link(name="PCIe", bytes_per_s=31e9, devices=4, latency_s=5e-6),)
