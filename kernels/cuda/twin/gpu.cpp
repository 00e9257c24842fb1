// The kernels' sources, and who runs which of them.
#include "kernels/cuda/twin/gpu.hpp"

#include <string.h>

#include "kernels/cuda/combine.cu"
#include "kernels/cuda/dispatch.cu"
#include "kernels/cuda/expand.cu"
#include "kernels/cuda/reduce.cu"
#include "kernels/cuda/twin/idle.hpp"

namespace fa2a {
namespace twin {

namespace {

using device::Kernel;

void run_kernel(const cuda::Launch& launch) {
  const void* args = launch.arguments;
  switch (launch.kernel) {
    case Kernel::dispatch_route:
      return device::dispatch_route(launch.rank, *static_cast<const device::RouteArgs*>(args), launch.handle);
    case Kernel::dispatch_send:
      return device::dispatch_send(launch.rank, *static_cast<const device::SendArgs*>(args), launch.handle);
    case Kernel::dispatch_collect:
      return device::dispatch_collect(launch.rank, *static_cast<const device::ReceivedTensors*>(args), launch.handle);
    case Kernel::dispatch_expand:
      return device::dispatch_expand(launch.rank, *static_cast<const device::ReceivedTensors*>(args), launch.handle);
    case Kernel::combine_answer:
      return device::combine_answer(launch.rank, *static_cast<const device::AnswerArgs*>(args), launch.handle);
    case Kernel::combine_gather:
      return device::combine_gather(launch.rank, *static_cast<const device::GatherArgs*>(args), launch.handle);
    case Kernel::combine_reduce:
      return device::combine_reduce(launch.rank, *static_cast<const device::ReduceTensors*>(args), launch.handle);
  }
}

}  // namespace

bool run(Grid& grid, i32 num_threads, const cuda::Launch& launch) {
  DoorbellIdle idle(*launch.rank->page, launch.rank->tick_ns);
  return grid.run({launch.num_blocks, num_threads}, idle, [&] { run_kernel(launch); });
}

u8* TwinGpu::allocate(u64 num_bytes) {
  // Whole pages: partitions are placed by the line, and what stands in for one must lie as it does.
  memory_.push_back(std::make_unique<u8[]>(num_bytes + kPage));
  u8* memory = memory_.back().get();
  return memory + (kPage - reinterpret_cast<u64>(memory) % kPage) % kPage;
}

void TwinGpu::upload(void* to, const void* from, u64 num_bytes) { memcpy(to, from, num_bytes); }
void TwinGpu::download(void* to, const void* from, u64 num_bytes) { memcpy(to, from, num_bytes); }

void TwinGpu::launch(const cuda::Launch& launch) {
  if (!run(grid_, options_.num_threads, launch)) is_stuck_ = true;
}

}  // namespace twin
}  // namespace fa2a
