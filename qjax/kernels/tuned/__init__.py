"""Schedules that were measured, by device: how a kernel asks for one, and what it gets.

A kernel asks `schedule_of` with its `Key` and the schedule that its rule of thumb gives. The answer is, in this order:

1. what the user's file has for exactly this key; `FILE`, an environment variable, names it;
2. what the file of the device has, ``<device-kind>.json`` beside this module;
3. of both, what was measured for the nearest shape: same kernel, version, formats, dtype, bucket of tokens and number
   of matrices; nearest by |log(N / N')| + |log(K / K')|, at most log 1.5, the smaller shape if two are equally near;
4. the rule of thumb.

Only a schedule that fits the shape is taken. Nothing is timed here: `qjax.kernels.tuning` measures and writes. A user's
file that is damaged is warned of, once, and passed over. A function that was compiled keeps its schedules.
"""

from qjax.kernels.tuned.files import FILE, Key, Row, file_name, read, shipped, write
from qjax.kernels.tuned.lookup import Found, asked, bucket, forced, look_up, schedule_of

__all__ = [
    "FILE",
    "Found",
    "Key",
    "Row",
    "asked",
    "bucket",
    "file_name",
    "forced",
    "look_up",
    "read",
    "schedule_of",
    "shipped",
    "write",
]
