// The functions of the CUDA driver that windows need, loaded at run time: no toolkit to build with, none to run with.
// Not run on a GPU.
#pragma once

#include <cstddef>
#include <string>

#include "protocol/compiler.hpp"

namespace fa2a {
namespace cuda {

using Result = int;  // 0: well
using Address = u64;
using Handle = u64;

// What follows has the layout and the numbers of cuda.h; tests/test_cuda_driver.py compares them where there is one.
struct Location {
  int type = 1;  // a device
  int id = 0;
};

enum HandleType : int { kNoHandle = 0, kFileDescriptor = 1, kFabric = 8 };

struct AllocationProperties {
  int type = 1;  // pinned
  int handle_types = kNoHandle;
  Location location;
  void* win32_metadata = nullptr;
  u8 compression = 0;
  u8 gpu_direct_rdma = 0;
  u16 usage = 0;
  u8 reserved[4] = {};
};

struct AccessDescription {
  Location location;
  int flags = 3;  // read and write
};

enum Attribute : int { kHasVirtualMemory = 102, kHasFileDescriptors = 103, kHasFabric = 128 };

// Every driver since CUDA 10.2 has these; each is called by its own name, so a table of fakes can stand in its place.
struct Driver {
  Result (*init)(unsigned flags);
  Result (*get_device)(int* device, int ordinal);
  Result (*get_attribute)(int* value, int attribute, int device);
  Result (*get_granularity)(size_t* num_bytes, const AllocationProperties* properties, int option);
  Result (*reserve)(Address* address, size_t num_bytes, size_t alignment, Address wanted, u64 flags);
  Result (*free_address)(Address address, size_t num_bytes);
  Result (*create)(Handle* handle, size_t num_bytes, const AllocationProperties* properties, u64 flags);
  Result (*release)(Handle handle);
  Result (*map)(Address address, size_t num_bytes, size_t offset, Handle handle, u64 flags);
  Result (*unmap)(Address address, size_t num_bytes);
  Result (*set_access)(Address address, size_t num_bytes, const AccessDescription* access, size_t count);
  Result (*export_handle)(void* to, Handle handle, int type, u64 flags);
  Result (*import_handle)(Handle* handle, void* from, int type);
  Result (*name_error)(Result result, const char** name);
};

// The machine's driver, or nullptr and `why` there is none that will do.
const Driver* load_driver(std::string& why);

// Throws std::runtime_error that names the call and what to look at.
void check(const Driver& driver, Result result, const char* call);

// How windows of this device can be handed to others: across an NVLink domain if the driver can, on a node else.
// Throws std::runtime_error that says what is missing.
HandleType probe_handles(const Driver& driver, int device, bool across_nodes);

}  // namespace cuda
}  // namespace fa2a
