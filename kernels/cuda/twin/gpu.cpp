// The kernels' sources, and who runs which of them.
#include "kernels/cuda/twin/gpu.hpp"

#include <string.h>

#include "kernels/cuda/combine.cu"
#include "kernels/cuda/dispatch.cu"
#include "kernels/cuda/expand.cu"
#include "kernels/cuda/reduce.cu"
#include "kernels/cuda/stream_expand.cu"
#include "kernels/cuda/stream_reduce.cu"
#include "kernels/cuda/stream_send.cu"
#include "kernels/cuda/twin/idle.hpp"

namespace fa2a {
namespace twin {

namespace {

using device::Kernel;

template <class Args, class Function>
void run_with(Function kernel, const cuda::Launch& launch) {
  kernel(launch.rank, *static_cast<const Args*>(launch.arguments), launch.handle);
}

void run_kernel(const cuda::Launch& launch) {
  switch (launch.kernel) {
    case Kernel::dispatch_route:
      return run_with<device::RouteArgs>(device::dispatch_route, launch);
    case Kernel::dispatch_send:
      return run_with<device::SendArgs>(device::dispatch_send, launch);
    case Kernel::dispatch_collect:
      return run_with<device::ReceivedTensors>(device::dispatch_collect, launch);
    case Kernel::dispatch_expand:
      return run_with<device::ReceivedTensors>(device::dispatch_expand, launch);
    case Kernel::combine_answer:
      return run_with<device::AnswerArgs>(device::combine_answer, launch);
    case Kernel::combine_gather:
      return run_with<device::GatherArgs>(device::combine_gather, launch);
    case Kernel::combine_reduce:
      return run_with<device::ReduceTensors>(device::combine_reduce, launch);
    case Kernel::stream_open_rows:
      return run_with<device::SendArgs>(device::stream_open_rows, launch);
    case Kernel::stream_send_rows:
      return run_with<device::SendArgs>(device::stream_send_rows, launch);
    case Kernel::stream_collect:
      return run_with<device::ReceivedTensors>(device::stream_collect, launch);
    case Kernel::stream_expand:
      return run_with<device::ReceivedTensors>(device::stream_expand, launch);
    case Kernel::stream_open_answers:
      return run_with<device::AnswerArgs>(device::stream_open_answers, launch);
    case Kernel::stream_send_answers:
      return run_with<device::AnswerArgs>(device::stream_send_answers, launch);
    case Kernel::stream_gather:
      return run_with<device::GatherArgs>(device::stream_gather, launch);
    case Kernel::stream_reduce:
      return run_with<device::ReduceTensors>(device::stream_reduce, launch);
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
