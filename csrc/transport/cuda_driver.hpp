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
using DeviceContext = void*;  // not the Context of the kernels
using Module = void*;
using Function = void*;
using Stream = void*;

// What follows has the layout and the numbers of cuda.h; tests/test_cuda_driver.py compares them where there is one.
struct Location {
  int type = 1;  // a device
  int id = 0;
};

enum HandleType : int { kNoHandle = 0, kFileDescriptor = 1, kFabric = 8 };

// By which other hosts of an NVLink domain import memory.
struct FabricHandle {
  u8 bytes[64] = {};
};

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

enum Attribute : int { kNumMultiprocessors = 16, kHasVirtualMemory = 102, kHasFileDescriptors = 103, kHasFabric = 128 };

constexpr unsigned kNonBlocking = 1;                  // of a stream: it does not meet the default stream
constexpr unsigned kPortable = 1, kDeviceMapped = 2;  // of host memory
enum CaptureMode : int { kRelaxed = 2 };

// Every driver since CUDA 10.2 has these; each is called by its own name, so a table of fakes can stand in its place.
// The first part is what windows need, the second what launches do.
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

  Result (*retain_context)(DeviceContext* context, int device) = nullptr;
  Result (*set_context)(DeviceContext context) = nullptr;
  Result (*finish_context)() = nullptr;
  Result (*load_module)(Module* module, const void* image) = nullptr;
  Result (*get_function)(Function* function, Module module, const char* name) = nullptr;
  Result (*launch)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments,
                   void** extra) = nullptr;
  Result (*allocate)(Address* address, size_t num_bytes) = nullptr;
  Result (*free)(Address address) = nullptr;
  Result (*fill)(Address address, unsigned char value, size_t num_bytes, Stream stream) = nullptr;
  Result (*copy_in)(Address to, const void* from, size_t num_bytes, Stream stream) = nullptr;
  Result (*copy_out)(void* to, Address from, size_t num_bytes, Stream stream) = nullptr;
  Result (*create_stream)(Stream* stream, unsigned flags) = nullptr;
  Result (*destroy_stream)(Stream stream) = nullptr;
  Result (*finish_stream)(Stream stream) = nullptr;
  Result (*share)(void* host, size_t num_bytes, unsigned flags) = nullptr;
  Result (*unshare)(void* host) = nullptr;
  Result (*shared_address)(Address* address, void* host, unsigned flags) = nullptr;
  Result (*exchange_capture_mode)(int* mode) = nullptr;
};

// The machine's driver, or nullptr and `why` there is none that will do.
const Driver* load_driver(std::string& why);

// Throws std::runtime_error that names the call and what to look at.
void check(const Driver& driver, Result result, const char* call);

// Why memory of this device cannot be handed to others by handles of this type; "" if it can. Fabric handles are tried
// out: the attribute says what driver and device know, and not whether IMEX lets this process have any.
std::string why_no_handles(const Driver& driver, int device, HandleType type);

// Throws std::runtime_error with the answer to that, if there is one.
void require_handles(const Driver& driver, int device, HandleType type);

// What an allocation is asked for.
AllocationProperties properties_of(int device, HandleType type);
size_t granule_of(const Driver& driver, const AllocationProperties& properties);

}  // namespace cuda
}  // namespace fa2a
