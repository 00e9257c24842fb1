// The windows of a GPU against a driver that keeps books: who maps what where, and what is left at the end. No GPU is
// needed, and none is used.
#include <stdio.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "transport/cuda_window.hpp"

using namespace fa2a;
using namespace fa2a::cuda;

namespace {

constexpr u64 kGranule = 2 << 20;
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNotPermitted = 800;

int num_failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++num_failures;
  fprintf(stderr, "%s\n", what);
}

// A driver of one process. Descriptors name memory objects of any process.
struct Books {
  struct Mapping {
    u64 num_bytes;
    u64 memory;
    bool is_open;
  };
  std::map<Address, u64> reserved;
  std::map<Address, Mapping> mapped;
  std::map<Handle, u64> handles;    // handle: memory
  std::map<u64, u64> memory_bytes;  // memory: bytes
  std::map<int, u64> descriptors;   // fd: memory
  std::map<int, int> attributes = {{kHasVirtualMemory, 1}, {kHasFileDescriptors, 1}, {kHasFabric, 0}};
  u64 next = 1;
  int num_creates_left = 1 << 20, num_maps_left = 1 << 20;
  int num_waits = 0;  // for the device
  int attribute_missing = 0;
  bool has_imex = true;

  bool is_live(u64 memory) const {
    for (const auto& [_, mapping] : mapped)
      if (mapping.memory == memory) return true;
    for (const auto& [_, held] : handles)
      if (held == memory) return true;
    return false;
  }
  // Whose memory a store at this address reaches; 0: an access that would end the context.
  u64 memory_at(Address address) const {
    auto after = mapped.upper_bound(address);
    if (after == mapped.begin()) return 0;
    const auto& [begin, mapping] = *std::prev(after);
    return address < begin + mapping.num_bytes && mapping.is_open ? mapping.memory : 0;
  }
};

Books books;

Result fake_attribute(int* value, int attribute, int) {
  *value = books.attributes[attribute];
  return attribute == books.attribute_missing ? kInvalidValue : 0;
}
Result fake_granularity(size_t* num_bytes, const AllocationProperties* properties, int) {
  *num_bytes = kGranule;
  return properties->type == 1 && properties->location.type == 1 ? 0 : kInvalidValue;
}
Result fake_reserve(Address* address, size_t num_bytes, size_t, Address, u64) {
  if (num_bytes == 0 || num_bytes % kGranule != 0) return kInvalidValue;
  *address = (books.next++ << 40);
  books.reserved[*address] = num_bytes;
  return 0;
}
Result fake_free(Address address, size_t num_bytes) {
  const auto found = books.reserved.find(address);
  if (found == books.reserved.end() || found->second != num_bytes) return kInvalidValue;
  const auto first = books.mapped.lower_bound(address);
  if (first != books.mapped.end() && first->first < address + num_bytes) return kInvalidValue;
  books.reserved.erase(found);
  return 0;
}
Result fake_create(Handle* handle, size_t num_bytes, const AllocationProperties* properties, u64) {
  if (num_bytes % kGranule != 0 || properties->handle_types == kNoHandle) return kInvalidValue;
  if (properties->handle_types == kFabric && !books.has_imex) return kNotPermitted;
  if (books.num_creates_left-- == 0) return kOutOfMemory;
  const u64 memory = books.next++;
  books.memory_bytes[memory] = num_bytes;
  books.handles[*handle = books.next++] = memory;
  return 0;
}
Result fake_release(Handle handle) { return books.handles.erase(handle) == 1 ? 0 : kInvalidValue; }
Result fake_map(Address address, size_t num_bytes, size_t offset, Handle handle, u64) {
  const auto held = books.handles.find(handle);
  if (held == books.handles.end() || offset != 0 || books.memory_bytes[held->second] != num_bytes) return kInvalidValue;
  if (books.num_maps_left-- == 0) return kOutOfMemory;
  auto range = books.reserved.upper_bound(address);
  if (range == books.reserved.begin()) return kInvalidValue;
  --range;
  if (address + num_bytes > range->first + range->second) return kInvalidValue;
  const auto next = books.mapped.lower_bound(address);
  if (next != books.mapped.end() && next->first < address + num_bytes) return kInvalidValue;
  if (next != books.mapped.begin() && std::prev(next)->first + std::prev(next)->second.num_bytes > address)
    return kInvalidValue;
  books.mapped[address] = {num_bytes, held->second, false};
  return 0;
}
Result fake_unmap(Address address, size_t num_bytes) {
  const auto found = books.mapped.find(address);
  if (found == books.mapped.end() || found->second.num_bytes != num_bytes) return kInvalidValue;
  books.mapped.erase(found);
  return 0;
}
Result fake_access(Address address, size_t num_bytes, const AccessDescription* access, size_t count) {
  if (count != 1 || access->flags != 3) return kInvalidValue;
  u64 covered = 0;
  for (auto& [at, mapping] : books.mapped) {
    if (at < address || at >= address + num_bytes) continue;
    mapping.is_open = true;
    covered += mapping.num_bytes;
  }
  return covered == num_bytes ? 0 : kInvalidValue;
}
Result fake_export(void* to, Handle handle, int type, u64) {
  const auto held = books.handles.find(handle);
  if (held == books.handles.end()) return kInvalidValue;
  if (type == kFabric) return *static_cast<FabricHandle*>(to) = FabricHandle(), 0;
  const int fd = static_cast<int>(books.next++);
  books.descriptors[fd] = held->second;
  *static_cast<int*>(to) = fd;
  return 0;
}
Result fake_import(Handle* handle, void* from, int type) {
  const auto found = books.descriptors.find(static_cast<int>(reinterpret_cast<i64>(from)));
  if (found == books.descriptors.end() || type != kFileDescriptor) return kInvalidValue;
  books.handles[*handle = books.next++] = found->second;
  return 0;
}
Result fake_name(Result result, const char** name) {
  *name = result == kOutOfMemory    ? "CUDA_ERROR_OUT_OF_MEMORY"
          : result == kNotPermitted ? "CUDA_ERROR_NOT_PERMITTED"
                                    : "CUDA_ERROR_INVALID_VALUE";
  return 0;
}

const Driver driver = {[](unsigned) { return 0; },
                       [](int* device, int ordinal) {
                         *device = ordinal;
                         return 0;
                       },
                       fake_attribute,
                       fake_granularity,
                       fake_reserve,
                       fake_free,
                       fake_create,
                       fake_release,
                       fake_map,
                       fake_unmap,
                       fake_access,
                       fake_export,
                       fake_import,
                       fake_name};

std::string failure_of(void (*call)()) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

Windows windows_of(i32 rank) { return Windows(driver, 0, kFileDescriptor, {rank, 2, 3, 5 << 20}); }

constexpr u64 kLast = (5 << 20) - 1;  // the last byte of a partition

std::mutex calls;

// Nothing runs here: what is asked of one is that there is none without a wait.
struct Quiet {
  std::lock_guard<std::mutex> lock{calls};
  Quiescent witness{lock, [] { ++books.num_waits; }};
  operator const Quiescent&() const { return witness; }
};

void test_a_peer_dies_and_is_replaced() {
  Windows mine = windows_of(0);
  auto peer = std::make_unique<Windows>(windows_of(1));
  mine.plug(1, peer->export_partition(0), Quiet());
  const Address at = mine.outbound(1), own = mine.outbound(0);
  const u64 theirs = books.memory_at(peer->inbound(0));
  expect(own == mine.inbound(0), "a rank stores into its own window where it reads it");
  expect(theirs != 0 && books.memory_at(at) == theirs, "what I store lands in the peer's window");
  expect(books.memory_at(at + kLast) == theirs, "the whole of it");

  peer.reset();
  expect(books.is_live(theirs), "a dead peer's memory stays as long as I map it: a store under way lands somewhere");
  mine.unplug(1, Quiet());
  const u64 dummy = books.memory_at(at);
  expect(dummy != 0 && dummy != theirs, "a dummy lies at the same address");
  for (u64 offset = 0; offset <= kLast; offset += kGranule)
    expect(books.memory_at(at + offset) == dummy, "all over the range");
  expect(books.memory_at(at + kLast) == dummy, "to its end");
  expect(!books.is_live(theirs), "nothing holds the dead peer's memory, so its node can return");

  Windows replacement = windows_of(1);
  mine.plug(1, replacement.export_partition(0), Quiet());
  expect(mine.outbound(1) == at, "the address has not changed");
  expect(books.memory_at(at) == books.memory_at(replacement.inbound(0)), "the replacement's window lies there");
}

void test_a_partition_is_renewed() {
  Windows mine = windows_of(0);
  Windows zombie = windows_of(1);
  zombie.plug(0, mine.export_partition(1), Quiet());
  const Address at = mine.inbound(1);
  const u64 before = books.memory_at(at);
  mine.renew(1, Quiet());
  expect(mine.inbound(1) == at && books.memory_at(at) != before, "fresh memory lies at the same address");
  expect(books.memory_at(zombie.outbound(0)) == before, "what the zombie stores lands in the orphan");
}

std::string failure_of_renewing(Windows& mine) {
  try {
    mine.renew(2, Quiet());
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void test_without_memory_nothing_changes() {
  Windows mine = windows_of(0);
  const u64 before = books.memory_at(mine.inbound(2));
  books.num_creates_left = 0;
  const std::string why = failure_of_renewing(mine);
  books.num_creates_left = 1 << 20;
  expect(why.find("cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY") == 0, "the error names the call and its cause");
  expect(books.memory_at(mine.inbound(2)) == before, "the partition stays as it was");
}

// An address without memory would end the context at the next store, or at the next look of a kernel.
void test_what_cannot_be_mapped_leaves_what_was_there() {
  Windows mine = windows_of(0), peer = windows_of(1);
  mine.plug(1, peer.export_partition(0), Quiet());
  const u64 own = books.memory_at(mine.inbound(2)), theirs = books.memory_at(mine.outbound(1));
  const size_t num_handles = books.handles.size();
  books.num_maps_left = 0;
  expect(failure_of_renewing(mine).find("cuMemMap failed") == 0, "the error names the call");
  expect(books.memory_at(mine.inbound(2)) == own && books.memory_at(mine.inbound(2) + kLast) == own, "as it was");
  books.num_maps_left = 1;  // of the dummy, which takes several: the second one fails
  std::string why;
  try {
    mine.unplug(1, Quiet());
  } catch (const std::exception& error) {
    why = error.what();
  }
  books.num_maps_left = 1 << 20;
  expect(why.find("cuMemMap failed") == 0, "so does this one");
  expect(books.memory_at(mine.outbound(1)) == theirs && books.memory_at(mine.outbound(1) + kLast) == theirs, "as well");
  expect(mine.plugged().has(1), "and counts as mapped, so that it is tried again");
  expect(books.handles.size() == num_handles, "what was not mapped is let go");
}

// Ranks that were never there: there is room for more than construct the group.
void test_no_address_is_ever_without_memory() {
  Windows mine = windows_of(0);
  const u64 dummy = books.memory_at(mine.outbound(1));
  expect(dummy != 0 && books.memory_at(mine.outbound(1) + kLast) == dummy, "a dummy lies there from birth on");
  expect(mine.plugged().empty(), "which is nobody's");
}

void test_nothing_is_swapped_without_a_wait() {
  Windows mine = windows_of(0), peer = windows_of(1);
  const int before = books.num_waits;
  mine.plug(1, peer.export_partition(0), Quiet());
  mine.unplug(1, Quiet());
  mine.renew(1, Quiet());
  expect(books.num_waits == before + 3, "each of the three has waited for the device");
}

void test_refusals() {
  expect(failure_of([] {
           Windows mine = windows_of(0);
           mine.unplug(0, Quiet());
         }).find("own window") != std::string::npos,
         "nobody unplugs itself");
}

bool says(const std::string& text, const char* what) { return text.find(what) != std::string::npos; }

void test_probing() {
  expect(why_no_handles(driver, 0, kFileDescriptor).empty(), "descriptors on a host");
  expect(says(why_no_handles(driver, 0, kFabric), "keep the group on one host"), "no fabric handles, and what to do");
  books.attributes[kHasFabric] = 1;
  books.attribute_missing = kHasFabric;
  expect(says(why_no_handles(driver, 0, kFabric), "or its driver"), "nor by a driver that has never heard of them");
  books.attribute_missing = 0;
  const size_t num_handles = books.handles.size();
  expect(why_no_handles(driver, 0, kFabric).empty(), "fabric handles between hosts");
  books.has_imex = false;
  const std::string why = why_no_handles(driver, 0, kFabric);
  expect(says(why, "CUDA_ERROR_NOT_PERMITTED") && says(why, "imex-channels"), "the device can, this process may not");
  books.has_imex = true;
  expect(books.handles.size() == num_handles, "what was tried out is given back");
  books.attributes[kHasFileDescriptors] = 0;
  expect(says(failure_of([] { require_handles(driver, 0, kFileDescriptor); }), "virtual ranks"),
         "and what runs without");
  books.attributes[kHasVirtualMemory] = 0;
  expect(says(why_no_handles(driver, 0, kFileDescriptor), "use another"), "a device without virtual memory is refused");
}

}  // namespace

int main() {
  test_a_peer_dies_and_is_replaced();
  test_a_partition_is_renewed();
  test_without_memory_nothing_changes();
  test_what_cannot_be_mapped_leaves_what_was_there();
  test_no_address_is_ever_without_memory();
  test_nothing_is_swapped_without_a_wait();
  test_refusals();
  test_probing();
  expect(books.mapped.empty() && books.reserved.empty() && books.handles.empty(), "nothing is left behind");
  std::string why;
  expect(load_driver(why) != nullptr || !why.empty(), "without a driver it says why");
  return num_failures == 0 ? 0 : 1;
}
