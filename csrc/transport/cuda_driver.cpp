// Finding the driver and its functions.
#include "transport/cuda_driver.hpp"

#include <dlfcn.h>

#include <stdexcept>

namespace fa2a {
namespace cuda {

namespace {

// A driver is never unloaded: it has threads of its own.
template <class Function>
bool find(void* library, const char* name, Function& function, std::string& why) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) why = std::string("the CUDA driver here lacks ") + name + "; install a newer one";
  return function != nullptr;
}

bool find_all(void* library, Driver& d, std::string& why) {
  return find(library, "cuInit", d.init, why) && find(library, "cuDeviceGet", d.get_device, why) &&
         find(library, "cuDeviceGetAttribute", d.get_attribute, why) &&
         find(library, "cuMemGetAllocationGranularity", d.get_granularity, why) &&
         find(library, "cuMemAddressReserve", d.reserve, why) &&
         find(library, "cuMemAddressFree", d.free_address, why) && find(library, "cuMemCreate", d.create, why) &&
         find(library, "cuMemRelease", d.release, why) && find(library, "cuMemMap", d.map, why) &&
         find(library, "cuMemUnmap", d.unmap, why) && find(library, "cuMemSetAccess", d.set_access, why) &&
         find(library, "cuMemExportToShareableHandle", d.export_handle, why) &&
         find(library, "cuMemImportFromShareableHandle", d.import_handle, why) &&
         find(library, "cuGetErrorName", d.name_error, why);
}

bool find_launches(void* library, Driver& d, std::string& why) {
  return find(library, "cuDevicePrimaryCtxRetain", d.retain_context, why) &&
         find(library, "cuCtxSetCurrent", d.set_context, why) &&
         find(library, "cuCtxSynchronize", d.finish_context, why) &&
         find(library, "cuModuleLoadData", d.load_module, why) &&
         find(library, "cuModuleGetFunction", d.get_function, why) && find(library, "cuLaunchKernel", d.launch, why) &&
         find(library, "cuMemAlloc_v2", d.allocate, why) && find(library, "cuMemFree_v2", d.free, why) &&
         find(library, "cuMemsetD8Async", d.fill, why) && find(library, "cuMemcpyHtoDAsync_v2", d.copy_in, why) &&
         find(library, "cuMemcpyDtoHAsync_v2", d.copy_out, why) &&
         find(library, "cuStreamCreate", d.create_stream, why) &&
         find(library, "cuStreamDestroy_v2", d.destroy_stream, why) &&
         find(library, "cuStreamSynchronize", d.finish_stream, why) &&
         find(library, "cuMemHostRegister_v2", d.share, why) && find(library, "cuMemHostUnregister", d.unshare, why) &&
         find(library, "cuMemHostGetDevicePointer_v2", d.shared_address, why) &&
         find(library, "cuThreadExchangeStreamCaptureMode", d.exchange_capture_mode, why);
}

// Throws std::runtime_error where no memory with a fabric handle is to be had.
void try_fabric(const Driver& driver, int device) {
  const AllocationProperties properties = properties_of(device, kFabric);
  Handle handle = 0;
  check(driver, driver.create(&handle, granule_of(driver, properties), &properties, 0), "cuMemCreate");
  FabricHandle exported;
  const Result result = driver.export_handle(&exported, handle, kFabric, 0);
  driver.release(handle);
  check(driver, result, "cuMemExportToShareableHandle");
}

}  // namespace

const Driver* load_driver(std::string& why) {
  static Driver driver;
  static std::string failure;
  static const bool loaded = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      failure = "there is no libcuda.so.1 here; install an NVIDIA driver";
      return false;
    }
    if (!find_all(library, driver, failure) || !find_launches(library, driver, failure)) return false;
    if (driver.init(0) == 0) return true;
    failure = "the CUDA driver does not start (cuInit); look at nvidia-smi";
    return false;
  }();
  why = failure;
  return loaded ? &driver : nullptr;
}

void check(const Driver& driver, Result result, const char* call) {
  if (result == 0) return;
  const char* name = nullptr;
  if (driver.name_error(result, &name) != 0 || name == nullptr) name = "an unknown error";
  throw std::runtime_error(std::string(call) + " failed with " + name +
                           "; look at nvidia-smi for free memory and at dmesg for the device");
}

AllocationProperties properties_of(int device, HandleType type) {
  AllocationProperties properties;
  properties.handle_types = type;
  properties.location.id = device;
  return properties;
}

size_t granule_of(const Driver& driver, const AllocationProperties& properties) {
  size_t granule = 0;
  check(driver, driver.get_granularity(&granule, &properties, /*minimum*/ 0), "cuMemGetAllocationGranularity");
  return granule;
}

std::string why_no_handles(const Driver& driver, int device, HandleType type) {
  // A driver that does not know an attribute is older than what it stands for.
  auto has = [&](Attribute attribute) {
    int value = 0;
    return driver.get_attribute(&value, attribute, device) == 0 && value != 0;
  };
  if (!has(kHasVirtualMemory)) return "this device has no virtual memory management; use another";
  if (type == kFileDescriptor)
    return has(kHasFileDescriptors)
               ? ""
               : "this device exports no memory to other processes; use virtual ranks in one process";
  if (!has(kHasFabric))
    return "this device or its driver exports no fabric handles, which ranks on several hosts need; keep the group on "
           "one host, or use hosts of one NVLink domain";
  try {
    return try_fabric(driver, device), "";
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) +
           ": this process gets no fabric handle, which ranks on several hosts need; look whether IMEX runs "
           "(nvidia-imex-ctl -N) and whether this process sees a channel in /dev/nvidia-caps-imex-channels";
  }
}

void require_handles(const Driver& driver, int device, HandleType type) {
  const std::string why = why_no_handles(driver, device, type);
  if (!why.empty()) throw std::runtime_error(why);
}

}  // namespace cuda
}  // namespace fa2a
