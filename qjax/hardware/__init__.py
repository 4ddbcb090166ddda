"""Devices and what running a model on them costs.

    devices       descriptions of accelerators, as data
    advisor       which format to deploy: roofline, memory, recovery (the format study)
    mixpe         cycles, energy and area of arrays of processing elements (MixPE)
    objective     cost of one site in one format, for searches

All of it is arithmetic on shapes; nothing here runs a model.
"""

from qjax.hardware.advisor import Advice, Candidate, advise
from qjax.hardware.calibration import Measured, calibrate, fit, read_measured
from qjax.hardware.devices import Device, device, devices, read_device
from qjax.hardware.objective import Accelerator, cost, stored_bits
from qjax.hardware.roofline import WORKLOADS, Efficiency, Workload, workload
from qjax.hardware.schemes import SCHEMES, Scheme
from qjax.hardware.sizes import ModelSize, size_of

__all__ = [
    "SCHEMES",
    "WORKLOADS",
    "Accelerator",
    "Advice",
    "Candidate",
    "Device",
    "Efficiency",
    "Measured",
    "ModelSize",
    "Scheme",
    "Workload",
    "advise",
    "calibrate",
    "cost",
    "device",
    "devices",
    "fit",
    "read_device",
    "read_measured",
    "size_of",
    "stored_bits",
    "workload",
]
