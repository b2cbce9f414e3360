"""Devices that budgets can be named after: their RAM, as the vendor states it, and what one may take of it.

Two rules, by the kind of device:

- **Board**: half of the RAM. The other half is for the kernel, the firmware's share, the system's services
  and the page cache that mapped weights are read through; nothing forbids a process more.
- **Phone**: what Android's own configuration for phones of that RAM gives an app's heap
  (`dalvik.vm.heapgrowthlimit`, which `ActivityManager.getMemoryClass` returns as "how hard a memory limit you
  should impose on your application to let the overall system work best"). Native memory is not held to it,
  but an app far above it is what the low-memory killer takes first once it is in the background.
"""

from dataclasses import dataclass

from .errors import UsageError

_MIB, _GIB = 2**20, 2**30
_RASPBERRY_PI = "https://www.raspberrypi.com/documentation/computers/raspberry-pi.html"
_JETSON = "https://developer.nvidia.com/embedded/jetson-modules"
_ANDROID = "https://android.googlesource.com/platform/frameworks/native/+/refs/heads/main/build/"


@dataclass(frozen=True)
class Device:
    """A device profile.

    Attributes:
        name: what `--device` takes.
        title: its name for people.
        ram_bytes: all of its memory.
        budget_bytes: how much of it one process may take.
        rule: where the budget comes from.
        source: URL of the page that states the RAM, or the limit.
    """

    name: str
    title: str
    ram_bytes: int
    budget_bytes: int
    rule: str
    source: str


def _board(name: str, title: str, ram_bytes: int, source: str) -> Device:
    return Device(name, title, ram_bytes, ram_bytes // 2, "half of the RAM", source)


def _phone(ram_gib: int, heap_mib: int, source_gib: int) -> Device:
    return Device(
        f"phone-{ram_gib}gb",
        f"Android phone, {ram_gib} GB",
        ram_gib * _GIB,
        heap_mib * _MIB,
        "Android's heap limit of an app",
        f"{_ANDROID}phone-xhdpi-{source_gib * 1024}-dalvik-heap.mk",
    )


DEVICES = {
    device.name: device
    for device in (
        _board("pi-zero-2w", "Raspberry Pi Zero 2 W", 512 * _MIB, _RASPBERRY_PI),
        _board("pi-3b+", "Raspberry Pi 3 Model B+", _GIB, _RASPBERRY_PI),
        *(
            _board(f"pi-4b-{size}gb", f"Raspberry Pi 4 Model B, {size} GB", size * _GIB, _RASPBERRY_PI)
            for size in (1, 2, 4, 8)
        ),
        *(
            _board(f"pi-5-{size}gb", f"Raspberry Pi 5, {size} GB", size * _GIB, _RASPBERRY_PI)
            for size in (2, 4, 8)
        ),
        _board("jetson-orin-nano-4gb", "NVIDIA Jetson Orin Nano, 4 GB", 4 * _GIB, _JETSON),
        _board("jetson-orin-nano-8gb", "NVIDIA Jetson Orin Nano, 8 GB", 8 * _GIB, _JETSON),
        _phone(2, heap_mib=192, source_gib=2),
        _phone(4, heap_mib=192, source_gib=4),
        # Android's files end at 6 GB.
        _phone(8, heap_mib=256, source_gib=6),
    )
}


def device(name: str) -> Device:
    """The profile of a device.

    Raises:
        UsageError: there is none of this name; the message lists all.
    """
    if name not in DEVICES:
        raise UsageError(f"there is no device {name!r}: it is one of {', '.join(DEVICES)}, or give --budget")
    return DEVICES[name]
