// What a GPU is asked, in the driver's words.
#include "kernels/cuda/host/driver_gpu.hpp"

namespace fa2a {
namespace cuda {

namespace {

thread_local Stream current = nullptr;

Address address(const void* pointer) { return reinterpret_cast<Address>(pointer); }

}  // namespace

void set_stream(u64 stream) { current = reinterpret_cast<Stream>(stream); }

DriverGpu::DriverGpu(const Driver& driver, int device, const std::vector<std::string>& cubins, i32 num_blocks,
                     i32 num_threads)
    : driver_(driver), device_(device), num_blocks_(num_blocks), num_threads_(num_threads) {
  done(driver_.retain_context(&context_, device_), "cuDevicePrimaryCtxRetain");
  done(driver_.set_context(context_), "cuCtxSetCurrent");
  int count = 0;
  done(driver_.get_attribute(&count, kNumMultiprocessors, device_), "cuDeviceGetAttribute");
  if (num_blocks_ == 0) num_blocks_ = count;
  done(driver_.create_stream(&own_, kNonBlocking), "cuStreamCreate");
  find_kernels(cubins);
}

// A process that ends may have lost its context already: nothing here is worth an error.
DriverGpu::~DriverGpu() {
  driver_.set_context(context_);
  driver_.finish_context();
  for (Address memory : memory_) driver_.free(memory);
  for (void* host : shared_) driver_.unshare(host);
  driver_.destroy_stream(own_);
}

void DriverGpu::find_kernels(const std::vector<std::string>& cubins) {
  Result missing = 0;
  for (const std::string& cubin : cubins) {
    Module module = nullptr;
    done(driver_.load_module(&module, cubin.data()), "cuModuleLoadData");
    for (u32 i = 0; i < device::kNumKernels; ++i) {
      if (kernels_[i] != nullptr) continue;
      const Result result = driver_.get_function(&kernels_[i], module, kKernelNames[i]);
      if (result != 0) kernels_[i] = nullptr, missing = result;
    }
  }
  for (u32 i = 0; i < device::kNumKernels; ++i)
    if (kernels_[i] == nullptr) done(missing, kKernelNames[i]);
}

template <class Work>
void DriverGpu::aside(Work work, const char* call) {
  done(driver_.set_context(context_), "cuCtxSetCurrent");
  int mode = kRelaxed;
  done(driver_.exchange_capture_mode(&mode), "cuThreadExchangeStreamCaptureMode");
  const Result result = work();
  driver_.exchange_capture_mode(&mode);
  done(result, call);
}

u8* DriverGpu::allocate(u64 num_bytes) {
  Address memory = 0;
  aside([&] { return driver_.allocate(&memory, num_bytes == 0 ? 1 : num_bytes); }, "cuMemAlloc");
  memory_.push_back(memory);
  aside([&] { return driver_.fill(memory, 0, num_bytes == 0 ? 1 : num_bytes, own_); }, "cuMemsetD8Async");
  aside([&] { return driver_.finish_stream(own_); }, "cuStreamSynchronize");
  return reinterpret_cast<u8*>(memory);
}

void* DriverGpu::share(void* host, u64 num_bytes) {
  Address there = 0;
  aside([&] { return driver_.share(host, num_bytes, kPortable | kDeviceMapped); }, "cuMemHostRegister");
  shared_.push_back(host);
  aside([&] { return driver_.shared_address(&there, host, 0); }, "cuMemHostGetDevicePointer");
  return reinterpret_cast<void*>(there);
}

void DriverGpu::upload(void* to, const void* from, u64 num_bytes) {
  if (num_bytes == 0) return;
  aside([&] { return driver_.copy_in(address(to), from, num_bytes, own_); }, "cuMemcpyHtoDAsync");
  aside([&] { return driver_.finish_stream(own_); }, "cuStreamSynchronize");
}

void DriverGpu::download(void* to, const void* from, u64 num_bytes) {
  if (num_bytes == 0) return;
  aside([&] { return driver_.copy_out(to, address(from), num_bytes, own_); }, "cuMemcpyDtoHAsync");
  aside([&] { return driver_.finish_stream(own_); }, "cuStreamSynchronize");
}

void DriverGpu::launch(const Launch& launch) {
  done(driver_.set_context(context_), "cuCtxSetCurrent");
  Launch copy = launch;
  void* arguments[] = {&copy.rank, const_cast<void*>(launch.arguments), &copy.handle};
  const auto num_blocks = static_cast<unsigned>(launch.num_blocks), num_threads = static_cast<unsigned>(num_threads_);
  done(driver_.launch(kernels_[static_cast<u32>(launch.kernel)], num_blocks, 1, 1, num_threads, 1, 1, 0, current,
                      arguments, nullptr),
       kKernelNames[static_cast<u32>(launch.kernel)]);
}

void DriverGpu::finish() { done(driver_.finish_stream(current), "cuStreamSynchronize"); }

void DriverGpu::finish_all() {
  done(driver_.set_context(context_), "cuCtxSetCurrent");
  done(driver_.finish_context(), "cuCtxSynchronize");
}

}  // namespace cuda
}  // namespace fa2a
