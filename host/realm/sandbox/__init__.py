"""Contains processes that run or compile tenants' code, with what Linux gives to every user."""

from realm.sandbox.ceiling import Ceiling, DataCeiling, NoCeiling
from realm.sandbox.entering import MEMORY_BYTES, Containment, enter, give_way, limit
from realm.sandbox.profiles import COMPILER, WORKER, Profile

__all__ = [
    "COMPILER",
    "MEMORY_BYTES",
    "WORKER",
    "Ceiling",
    "Containment",
    "DataCeiling",
    "NoCeiling",
    "Profile",
    "enter",
    "give_way",
    "limit",
]
