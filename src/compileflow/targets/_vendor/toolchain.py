"""A vendor's toolchain: whether it is here, how to get it, and its errors in one line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow.contracts import Availability
from compileflow.contracts.toolkit import installed_versions
from compileflow.errors import CompileError, CompileflowError, SpecError, TargetUnavailableError, first_line

# Where drivers put their devices.
DEVICE_NODES = Path("/dev")


@dataclass(frozen=True)
class VendorToolchain:
    """What a vendor's compiler and runtime consist of, and how the vendor says to get them.

    Attributes:
        compiler: Modules that a compile imports, each with the distributions that bring it (any one will do).
        runtime: The same for running.
        install: The vendor's documented command.
        note: What else it takes, one clause; "" when nothing.
        device: Pattern of the device's node below `DEVICE_NODES`; "" when the CPU will do.
        device_hint: What to do where there is no such node.
    """

    compiler: Mapping[str, tuple[str, ...]]
    runtime: Mapping[str, tuple[str, ...]]
    install: str
    note: str = ""
    device: str = ""
    device_hint: str = ""

    def probe(self, *, compile_needs_device: bool = False) -> Availability:
        """Look for distributions, modules and device nodes. Never raises, imports nothing."""
        lacks = {**_lacks(self.runtime), **_lacks(self.compiler)}
        has_device = not self.device or any(DEVICE_NODES.glob(self.device))
        can_run = has_device and not _lacks(self.runtime)
        can_compile = not _lacks(self.compiler) and (has_device or not compile_needs_device)
        if lacks:
            note = f" ({self.note})" if self.note else ""
            return Availability(can_compile, can_run, reason=", ".join(lacks.values()) + note, hint=self.install)
        if not has_device:
            reason = f"there is no device {DEVICE_NODES}/{self.device}"
            return Availability(can_compile, can_run, reason=reason, hint=self.device_hint)
        return Availability(can_compile, can_run)

    def import_module(self, name: str) -> Any:
        """Import one of the vendor's modules.

        Raises:
            TargetUnavailableError: it is absent, or its native libraries are.
        """
        try:
            # Some vendors' modules set warning filters for the whole process.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(name)
        except Exception as error:
            raise TargetUnavailableError(
                f"{name} cannot be imported: {first_line(error)}.", hint=f"Run: {self.install}"
            ) from error


@contextmanager
def vendor_call(name: str) -> Iterator[None]:
    """Turn whatever a vendor's compiler raises into one line; its warnings are about its own parts.

    Raises:
        CompileError: the compiler refused the model or its flags.
    """
    import torch

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except CompileflowError:
        raise
    # Compilers that are command lines end with SystemExit.
    except (Exception, SystemExit) as error:
        raise CompileError(
            f"{name} refused the model: {type(error).__name__}: {first_line(error)}.",
            hint="Change the target's options, or try another target; `compileflow targets` lists them.",
        ) from error


def contradiction(target: str, option: str, precision: str, hint: str) -> SpecError:
    """Return the error for options that would compute in another precision than was asked for."""
    return SpecError(f"{target}: {option} is not {precision}, which was asked for.", hint=hint)


def _lacks(modules: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return what is wrong with each module that cannot be imported."""
    found = {}
    for module, names in modules.items():
        versions = installed_versions(names)
        if not versions:
            found[module] = f"{names[0]} is not installed"
        elif not _importable(module):
            name, version = next(iter(versions.items()))
            found[module] = f"{name} {version} is an empty placeholder from PyPI, without the module {module}"
    return found


def _importable(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
