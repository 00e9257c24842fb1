"""What csrc/transport/cuda_driver.hpp says of the CUDA driver is what cuda.h says, where there is a cuda.h."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

PROGRAM = """
#include <cuda.h>
#include "transport/cuda_driver.hpp"
using namespace fa2a::cuda;
#define SAME_PLACE(ours, mine, theirs, its) \\
  static_assert(offsetof(ours, mine) == offsetof(theirs, its) && \\
                sizeof(ours::mine) == sizeof(static_cast<theirs*>(nullptr)->its), #its)
static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp), "");
SAME_PLACE(AllocationProperties, type, CUmemAllocationProp, type);
SAME_PLACE(AllocationProperties, handle_types, CUmemAllocationProp, requestedHandleTypes);
SAME_PLACE(AllocationProperties, location, CUmemAllocationProp, location);
SAME_PLACE(AllocationProperties, win32_metadata, CUmemAllocationProp, win32HandleMetaData);
SAME_PLACE(AllocationProperties, usage, CUmemAllocationProp, allocFlags.usage);
static_assert(sizeof(AccessDescription) == sizeof(CUmemAccessDesc), "");
SAME_PLACE(AccessDescription, location, CUmemAccessDesc, location);
SAME_PLACE(AccessDescription, flags, CUmemAccessDesc, flags);
SAME_PLACE(Location, id, CUmemLocation, id);
static_assert(AllocationProperties().type == CU_MEM_ALLOCATION_TYPE_PINNED, "");
static_assert(Location().type == CU_MEM_LOCATION_TYPE_DEVICE, "");
static_assert(AccessDescription().flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE, "");
static_assert(kFileDescriptor == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, "");
static_assert(sizeof(FabricHandle) == sizeof(CUmemFabricHandle), "");
static_assert(kFabric == CU_MEM_HANDLE_TYPE_FABRIC, "");
static_assert(kHasVirtualMemory == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "");
static_assert(kHasFileDescriptors == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, "");
static_assert(kHasFabric == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, "");
static_assert(sizeof(Address) == sizeof(CUdeviceptr) && sizeof(Handle) == sizeof(CUmemGenericAllocationHandle), "");
static_assert(CUDA_SUCCESS == 0 && CU_MEM_ALLOC_GRANULARITY_MINIMUM == 0 && sizeof(Result) == sizeof(CUresult), "");
"""


def compiles(program: str, folder: Path) -> bool:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here, and so no cuda.h to compare with")
    source = folder / "layout.cpp"
    source.write_text(program)
    done = subprocess.run([nvcc, "-std=c++17", f"-I{CSRC}", "-c", source, "-o", folder / "layout.o"], timeout=120)
    return done.returncode == 0


def test_layout_and_numbers(tmp_path: Path) -> None:
    assert compiles(PROGRAM, tmp_path)


def test_a_difference_is_found(tmp_path: Path) -> None:
    assert not compiles(PROGRAM + "SAME_PLACE(AccessDescription, flags, CUmemAccessDesc, location);\n", tmp_path)
