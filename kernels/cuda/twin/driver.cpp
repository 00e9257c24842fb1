// Device memory is host memory, an allocation is a file, and a launch is the twin's.
#include "kernels/cuda/twin/driver.hpp"

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "host/clock.hpp"

namespace fa2a {
namespace twin {

using cuda::Address;
using cuda::Handle;
using cuda::Result;

namespace {

constexpr Result kInvalidValue = 1, kOutOfMemory = 2, kNotFound = 500, kIllegalAddress = 700;
constexpr u64 kGranule = 64 << 10;
constexpr i32 kNumThreads = 64;
constexpr u64 kArgumentBytes = 64;  // more than any kernel takes

// A launch that is kept: everything it names, by value.
struct Kept {
  cuda::Launch launch;
  u8 arguments[kArgumentBytes];
};

struct PerThread {
  Grid grid;
  bool is_captured = false;
  std::vector<std::vector<Kept>> graphs;
  bool holds_launches = false;
  std::vector<Kept> held;
  bool is_lost = false;  // its context
};

struct Slowness {
  std::atomic<i64> access_ms{0}, export_ms{0}, finish_ms{0};
};
Slowness slowness;

void take_time(const std::atomic<i64>& num_ms) {
  if (const i64 ms = num_ms.load(); ms > 0) sleep_ns(ms * kNsPerMs);
}

// Whoever makes a stream has this one, for copies; launches go on torch's current one, which is none here.
char own_stream;

PerThread& mine() {
  thread_local PerThread state;
  return state;
}

void* at(Address address) { return reinterpret_cast<void*>(address); }

// The handle of an allocation is its file, and one more so that it is never 0.
int file_of(Handle handle) { return static_cast<int>(handle) - 1; }

Result map_file(Address address, size_t num_bytes, size_t offset, Handle handle, u64) {
  struct stat file{};
  if (fstat(file_of(handle), &file) != 0 || static_cast<u64>(file.st_size) != num_bytes) return kInvalidValue;
  // Not to be read or written before access is set.
  void* mapped =
      mmap(at(address), num_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_of(handle), static_cast<off_t>(offset));
  return mapped == MAP_FAILED ? kInvalidValue : 0;
}

Result reserve(Address* address, size_t num_bytes, size_t, Address, u64) {
  void* range = mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = reinterpret_cast<Address>(range);
  return range == MAP_FAILED ? kOutOfMemory : 0;
}

Result unmap(Address address, size_t num_bytes) {
  mine().is_lost |= !mine().held.empty();
  void* range = mmap(at(address), num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return range == MAP_FAILED ? kInvalidValue : 0;
}

Result create(Handle* handle, size_t num_bytes, const cuda::AllocationProperties*, u64) {
  const int file = memfd_create("fa2a-twin", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(num_bytes)) != 0) return kOutOfMemory;
  *handle = static_cast<Handle>(file) + 1;
  return 0;
}

Result set_access(Address address, size_t num_bytes, const cuda::AccessDescription*, size_t) {
  take_time(slowness.access_ms);
  return mprotect(at(address), num_bytes, PROT_READ | PROT_WRITE);
}

Result export_file(void* to, Handle handle, int, u64) {
  take_time(slowness.export_ms);
  const int copy = dup(file_of(handle));
  *static_cast<int*>(to) = copy;
  return copy < 0 ? kInvalidValue : 0;
}

Result import_file(Handle* handle, void* from, int) {
  const int copy = dup(static_cast<int>(reinterpret_cast<i64>(from)));
  *handle = static_cast<Handle>(copy) + 1;
  return copy < 0 ? kInvalidValue : 0;
}

Result get_attribute(int* value, int attribute, int) {
  *value = attribute == cuda::kNumMultiprocessors ? 2 : attribute == cuda::kHasFabric ? 0 : 1;
  return 0;
}

// One more than its number, so that no function is null.
Result get_function(cuda::Function* function, cuda::Module, const char* name) {
  for (u64 i = 0; i < device::kNumKernels; ++i) {
    if (strcmp(name, cuda::kKernelNames[i]) != 0) continue;
    *function = reinterpret_cast<cuda::Function>(i + 1);
    return 0;
  }
  return kNotFound;
}

u64 argument_bytes(device::Kernel kernel) {
  switch (kernel) {
    case device::Kernel::dispatch_route:
      return sizeof(device::RouteArgs);
    case device::Kernel::dispatch_send:
    case device::Kernel::stream_open_rows:
    case device::Kernel::stream_send_rows:
      return sizeof(device::SendArgs);
    case device::Kernel::dispatch_collect:
    case device::Kernel::dispatch_expand:
    case device::Kernel::stream_collect:
    case device::Kernel::stream_expand:
      return sizeof(device::ReceivedTensors);
    case device::Kernel::combine_answer:
    case device::Kernel::stream_open_answers:
    case device::Kernel::stream_send_answers:
      return sizeof(device::AnswerArgs);
    case device::Kernel::combine_gather:
    case device::Kernel::stream_gather:
      return sizeof(device::GatherArgs);
    case device::Kernel::combine_reduce:
    case device::Kernel::stream_reduce:
      return sizeof(device::ReduceTensors);
  }
  return 0;
}

Result well_or_lost() { return mine().is_lost ? kIllegalAddress : 0; }

Result run_now(Kept kept, i32 num_threads) {
  if (mine().is_lost) return kIllegalAddress;
  kept.launch.arguments = kept.arguments;
  return run(mine().grid, num_threads, kept.launch) ? 0 : kInvalidValue;
}

Result run_or_hold(const Kept& kept, i32 num_threads) {
  if (!mine().holds_launches) return run_now(kept, num_threads);
  mine().held.push_back(kept);
  return well_or_lost();
}

Result finish() {
  std::vector<Kept> held;
  held.swap(mine().held);
  Result result = well_or_lost();
  for (const Kept& kept : held)
    if (result == 0) result = run_now(kept, kNumThreads);
  return result;
}

Result finish_context() {
  take_time(slowness.finish_ms);
  return finish();
}

Result launch(cuda::Function function, unsigned grid_x, unsigned, unsigned, unsigned block_x, unsigned, unsigned,
              unsigned, cuda::Stream, void** arguments, void**) {
  Kept kept{};
  kept.launch.kernel = static_cast<device::Kernel>(reinterpret_cast<u64>(function) - 1);
  kept.launch.num_blocks = static_cast<i32>(grid_x);
  kept.launch.rank = *static_cast<device::DeviceRank**>(arguments[0]);
  kept.launch.handle = *static_cast<device::DeviceHandle**>(arguments[2]);
  memcpy(kept.arguments, arguments[1], argument_bytes(kept.launch.kernel));
  if (!mine().is_captured) return run_or_hold(kept, static_cast<i32>(block_x));
  mine().graphs.back().push_back(kept);
  return 0;
}

Result finish_stream(cuda::Stream stream) { return stream == &own_stream ? well_or_lost() : finish(); }

Result allocate(Address* address, size_t num_bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kPage, num_bytes) != 0) return kOutOfMemory;
  memset(memory, 0xa5, num_bytes);  // as on a chip: whatever was there before
  *address = reinterpret_cast<Address>(memory);
  return 0;
}

Result fill(Address address, unsigned char value, size_t num_bytes, cuda::Stream) {
  memset(at(address), value, num_bytes);
  return well_or_lost();
}
Result copy_in(Address to, const void* from, size_t num_bytes, cuda::Stream) {
  memcpy(at(to), from, num_bytes);
  return well_or_lost();
}
Result copy_out(void* to, Address from, size_t num_bytes, cuda::Stream) {
  memcpy(to, at(from), num_bytes);
  return well_or_lost();
}

cuda::Driver make_driver() {
  cuda::Driver d{};
  d.init = [](unsigned) { return 0; };
  d.get_device = [](int* device, int ordinal) { return *device = ordinal, 0; };
  d.get_attribute = get_attribute;
  d.get_granularity = [](size_t* num_bytes, const cuda::AllocationProperties*, int) {
    return *num_bytes = kGranule, 0;
  };
  d.reserve = reserve;
  d.free_address = [](Address address, size_t num_bytes) { return munmap(at(address), num_bytes); };
  d.create = create;
  d.release = [](Handle handle) { return close(file_of(handle)); };
  d.map = map_file;
  d.unmap = unmap;
  d.set_access = set_access;
  d.export_handle = export_file;
  d.import_handle = import_file;
  d.name_error = [](Result, const char** name) { return *name = "an error of the twin's driver", 0; };
  d.retain_context = [](cuda::DeviceContext*, int) { return 0; };
  d.set_context = [](cuda::DeviceContext) { return 0; };
  d.finish_context = finish_context;
  d.load_module = [](cuda::Module*, const void*) { return 0; };
  d.get_function = get_function;
  d.launch = launch;
  d.allocate = allocate;
  d.free = [](Address address) { return ::free(at(address)), 0; };
  d.fill = fill;
  d.copy_in = copy_in;
  d.copy_out = copy_out;
  d.create_stream = [](cuda::Stream* stream, unsigned) { return *stream = &own_stream, 0; };
  d.destroy_stream = [](cuda::Stream) { return 0; };
  d.finish_stream = finish_stream;
  d.share = [](void* host, size_t, unsigned) { return reinterpret_cast<u64>(host) % kPage == 0 ? 0 : kInvalidValue; };
  d.unshare = [](void*) { return 0; };
  d.shared_address = [](Address* address, void* host, unsigned) {
    return *address = reinterpret_cast<Address>(host), 0;
  };
  d.exchange_capture_mode = [](int*) { return 0; };
  return d;
}

}  // namespace

const cuda::Driver& driver() {
  static const cuda::Driver table = make_driver();
  return table;
}

void begin_capture() {
  mine().graphs.emplace_back();
  mine().is_captured = true;
}

i32 end_capture() {
  mine().is_captured = false;
  return static_cast<i32>(mine().graphs.size()) - 1;
}

void replay(i32 graph) {
  for (const Kept& kept : mine().graphs.at(static_cast<size_t>(graph))) run_or_hold(kept, kNumThreads);
}

void slow_down(i64 access_ms, i64 export_ms, i64 finish_ms) {
  slowness.access_ms = access_ms;
  slowness.export_ms = export_ms;
  slowness.finish_ms = finish_ms;
}

void hold_launches(bool holds) { mine().holds_launches = holds; }

}  // namespace twin
}  // namespace fa2a

#endif
