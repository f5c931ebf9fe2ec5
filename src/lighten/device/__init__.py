"""Stage 3: how long operators take on a measured machine, and the probe that measures it."""

from lighten.device.environment import pinned_environment
from lighten.device.find import find_device
from lighten.device.probe import probe
from lighten.device.profile import (
    ENGINES,
    Bandwidth,
    BlockSample,
    Calibration,
    EngineProfile,
    Machine,
    Profile,
    Sample,
    load_profile,
    merge_profiles,
    profile_from_json,
    profile_path,
    profile_to_json,
    save_profile,
)
from lighten.device.roofline import TimePrediction, predict_peak_memory, predict_time

__all__ = [
    "ENGINES",
    "Bandwidth",
    "BlockSample",
    "Calibration",
    "EngineProfile",
    "Machine",
    "Profile",
    "Sample",
    "TimePrediction",
    "find_device",
    "load_profile",
    "merge_profiles",
    "pinned_environment",
    "predict_peak_memory",
    "predict_time",
    "probe",
    "profile_from_json",
    "profile_path",
    "profile_to_json",
    "save_profile",
]
