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

HandleType probe_handles(const Driver& driver, int device, bool across_nodes) {
  auto has = [&](Attribute attribute) {
    int value = 0;
    check(driver, driver.get_attribute(&value, attribute, device), "cuDeviceGetAttribute");
    return value != 0;
  };
  if (!has(kHasVirtualMemory)) throw std::runtime_error("this device has no virtual memory management; use another");
  if (across_nodes) {
    if (has(kHasFabric)) return kFabric;
    throw std::runtime_error(
        "this device exports no fabric handles, which ranks on several nodes need; look whether IMEX runs "
        "(nvidia-imex-ctl -N), or keep the group on one node");
  }
  if (has(kHasFileDescriptors)) return kFileDescriptor;
  throw std::runtime_error("this device exports no memory to other processes; use virtual ranks in one process");
}

}  // namespace cuda
}  // namespace fa2a
