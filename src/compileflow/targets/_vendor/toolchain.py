"""A vendor's toolchain: probe it, import it, and turn its errors into ours."""

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
from compileflow.contracts.toolkit import installed_versions, refusal
from compileflow.errors import CompileflowError, SpecError, TargetUnavailableError, first_line

# Folder in which drivers create their devices.
DEVICE_NODES = Path("/dev")


@dataclass(frozen=True)
class VendorToolchain:
    """Modules of a vendor's compiler and runtime, and the vendor's way to install them.

    Attributes:
        compiler: Modules that a compile imports, each with the distributions of which one must be installed.
        runtime: Modules that a loaded component imports, in the same form.
        install: Command that the vendor documents.
        note: One more condition, as a clause; "" for none.
        device: Pattern of the device's node below `DEVICE_NODES`; "" where the CPU suffices.
        device_hint: What to do on a machine without the device.
    """

    compiler: Mapping[str, tuple[str, ...]]
    runtime: Mapping[str, tuple[str, ...]]
    install: str
    note: str = ""
    device: str = ""
    device_hint: str = ""

    def probe(self, *, compile_needs_device: bool = False) -> Availability:
        """Check for distributions, modules and device nodes. Raises nothing, and imports nothing."""
        faults = {**_faults(self.runtime), **_faults(self.compiler)}
        has_device = not self.device or any(DEVICE_NODES.glob(self.device))
        can_run = has_device and not _faults(self.runtime)
        can_compile = not _faults(self.compiler) and (has_device or not compile_needs_device)
        if faults:
            note = f" ({self.note})" if self.note else ""
            return Availability(can_compile, can_run, reason=", ".join(faults.values()) + note, hint=self.install)
        if not has_device:
            reason = f"this machine has no device {DEVICE_NODES}/{self.device}"
            return Availability(can_compile, can_run, reason=reason, hint=self.device_hint)
        return Availability(can_compile, can_run)

    def import_module(self, name: str) -> Any:
        """Import one of the vendor's modules.

        Raises:
            TargetUnavailableError: The module or one of its native libraries is missing.
        """
        try:
            # Some modules set warning filters for the whole process.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(name)
        except Exception as error:
            raise TargetUnavailableError(
                f"{name} cannot be imported: {first_line(error)}.", hint=f"Run: {self.install}"
            ) from error


@contextmanager
def vendor_call(name: str) -> Iterator[None]:
    """Turn any error of a vendor's compiler into one line, and silence its warnings about its own code.

    Args:
        name: Name of the vendor's function.

    Raises:
        CompileError: The compiler refused the model or the options.
    """
    import torch

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except CompileflowError:
        raise
    # Compilers with a command line exit with SystemExit.
    except (Exception, SystemExit) as error:
        hint = "Change the target's options, or try another target; `compileflow targets` lists them."
        raise refusal(name, error, hint=hint) from error


def precision_conflict(target: str, option: str, precision: str, hint: str) -> SpecError:
    """Return the error for an option that would compute in another precision than the requested one."""
    return SpecError(f"{target}: {option} does not compute in {precision}, the requested precision.", hint=hint)


def _faults(modules: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return, for each module that cannot be imported, the reason."""
    faults = {}
    for module, names in modules.items():
        versions = installed_versions(names)
        if not versions:
            faults[module] = f"{names[0]} is not installed"
        elif not _importable(module):
            name, version = next(iter(versions.items()))
            faults[module] = f"{name} {version} is an empty placeholder from PyPI, without the module {module}"
    return faults


def _importable(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
