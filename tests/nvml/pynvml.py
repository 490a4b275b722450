"""NVML's Python bindings without a driver: the GPUs are those of the JSON file that FAKE_NVML names, read at each init.

Put this folder on PYTHONPATH (or sys.path) and `import pynvml` finds it, in other processes too:

    {"gpus": [{"name": "NVIDIA H100 80GB HBM3", "total": 85899345920, "reserved": 0, "used": 5, "is_divided": false,
               "busy": 7, "compute": [{"pid": 7, "memory": 5}], "graphics": [],
               "errors": {"nvmlDeviceGetName": "GpuIsLost"}}],
     "errors": {"nvmlInit": "DriverNotLoaded"}}

All but `name` and `total` may be left out; `busy` is in percent, and null where the model does not say; a process's
memory may be null, as where NVML cannot tell; `is_divided` is null where the model knows no MIG. Only what Nexus calls
is here, as the real package has it (tests/test_inventory.py compares them), and it is strict: a call before init or
after shutdown fails as there, and so does an unknown key.
"""

import json
import os
from dataclasses import dataclass, field

NVML_DEVICE_MIG_DISABLE = 0
NVML_DEVICE_MIG_ENABLE = 1
nvmlMemory_v2 = 0x02000028
_ERRORS = {
    "Uninitialized": (1, "Uninitialized"),
    "InvalidArgument": (2, "Invalid Argument"),
    "NotSupported": (3, "Not Supported"),
    "NoPermission": (4, "Insufficient Permissions"),
    "DriverNotLoaded": (9, "Driver Not Loaded"),
    "LibraryNotFound": (12, "NVML Shared Library Not Found"),
    "FunctionNotFound": (13, "Function Not Found"),
    "GpuIsLost": (15, "GPU is lost"),
    "LibRmVersionMismatch": (18, "RM has detected an NVML/RM version mismatch."),
}


class NVMLError(Exception):
    def __new__(cls, value):
        error = Exception.__new__(cls)
        error.value = value
        return error

    def __str__(self):
        return next(words for code, words in _ERRORS.values() if code == self.value)


def _class_of(name, code):
    return type(name, (NVMLError,), {"__new__": lambda cls, *arguments: NVMLError.__new__(cls, code)})


globals().update({f"NVMLError_{name}": _class_of(f"NVMLError_{name}", code) for name, (code, _) in _ERRORS.items()})


def _error(name):
    return globals()[f"NVMLError_{name}"]()


@dataclass
class _Process:
    pid: int
    memory: int | None

    @property
    def usedGpuMemory(self):
        return self.memory


@dataclass
class _Memory:
    total: int
    reserved: int
    free: int
    used: int


@dataclass
class _Device:
    name: str
    total: int
    reserved: int = 0
    used: int = 0
    is_divided: bool | None = None
    busy: int | None = 0
    compute: list = field(default_factory=list)
    graphics: list = field(default_factory=list)
    errors: dict = field(default_factory=dict)


@dataclass
class _Machine:
    gpus: list = field(default_factory=list)
    errors: dict = field(default_factory=dict)


_machine = None
_inits = 0


def _fail(errors, function):
    if function in errors:
        raise _error(errors[function])


def _initialised(function):
    if not _inits:
        raise _error("Uninitialized")
    _fail(_machine.errors, function)
    return _machine


def _device(handle, function):
    _initialised(function)
    if not isinstance(handle, _Device):
        raise _error("InvalidArgument")
    _fail(handle.errors, function)
    return handle


def nvmlInit():
    global _machine, _inits
    with open(os.environ["FAKE_NVML"], encoding="utf-8") as file:
        machine = _Machine(**json.load(file))
    machine.gpus = [_Device(**gpu) for gpu in machine.gpus]
    _fail(machine.errors, "nvmlInit")
    _machine = machine
    _inits += 1


def nvmlShutdown():
    global _inits
    _initialised("nvmlShutdown")
    _inits -= 1


def nvmlDeviceGetCount():
    return len(_initialised("nvmlDeviceGetCount").gpus)


def nvmlDeviceGetHandleByIndex(index):
    gpus = _initialised("nvmlDeviceGetHandleByIndex").gpus
    if not 0 <= index < len(gpus):
        raise _error("InvalidArgument")
    return _device(gpus[index], "nvmlDeviceGetHandleByIndex")


def nvmlDeviceGetName(handle):
    return _device(handle, "nvmlDeviceGetName").name


def nvmlDeviceGetMemoryInfo(handle, version=None):
    device = _device(handle, "nvmlDeviceGetMemoryInfo")
    if version != nvmlMemory_v2:  # the older form counts what is reserved as used
        raise _error("InvalidArgument")
    return _Memory(device.total, device.reserved, device.total - device.reserved - device.used, device.used)


def nvmlDeviceGetMigMode(device):
    device = _device(device, "nvmlDeviceGetMigMode")
    if device.is_divided is None:
        raise _error("NotSupported")
    mode = NVML_DEVICE_MIG_ENABLE if device.is_divided else NVML_DEVICE_MIG_DISABLE
    return [mode, mode]


@dataclass
class _Utilization:
    gpu: int
    memory: int


def nvmlDeviceGetUtilizationRates(handle):
    device = _device(handle, "nvmlDeviceGetUtilizationRates")
    if device.busy is None:
        raise _error("NotSupported")
    return _Utilization(device.busy, 0)


def nvmlDeviceGetComputeRunningProcesses_v3(handle):
    return [_Process(**process) for process in _device(handle, "nvmlDeviceGetComputeRunningProcesses_v3").compute]


def nvmlDeviceGetGraphicsRunningProcesses_v3(handle):
    return [_Process(**process) for process in _device(handle, "nvmlDeviceGetGraphicsRunningProcesses_v3").graphics]
