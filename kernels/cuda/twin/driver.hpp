// A CUDA driver whose device is the twin: what speaks to the driver is run in earnest where there is no GPU. Test
// build.
#pragma once

#include "kernels/cuda/twin/gpu.hpp"
#include "transport/cuda_driver.hpp"

namespace fa2a {
namespace twin {

const cuda::Driver& driver();

// Launches of the calling thread are kept instead of run, as by a stream that is captured, and run as often as asked.
void begin_capture();
i32 end_capture();  // which graph of this thread they are
void replay(i32 graph);

// From now on what the calling thread launches waits, as on a chip that is busy, until the thread waits for it. An
// unmap meanwhile is what it is on a chip: nothing that the thread asks afterwards is done, and all of it fails.
void hold_launches(bool holds);

// Of all threads from now on: how long the driver takes to give access to what was mapped, to export a file, and,
// beyond what it waits for, to wait for a context.
void slow_down(i64 access_ms, i64 export_ms, i64 finish_ms);

}  // namespace twin
}  // namespace fa2a
