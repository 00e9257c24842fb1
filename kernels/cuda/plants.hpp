// Bugs that a kernel's author could make, planted by the test build so that the twin is seen to find them.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

#define FA2A_PLANTS(X)                                                                                 \
  X(no_fence)        /* a block reports that its rows are stored, and does not fence them          */  \
  X(no_barrier)      /* a block reports before its threads have stored their rows                  */  \
  X(relaxed_signal)  /* the word that publishes rows publishes nothing that was stored before it   */  \
  X(no_list_barrier) /* a token's list of places is read before it is made                         */  \
  X(view_twice)      /* an answer goes by the newest view, not by the one that its round began with */ \
  X(count_unclamped) /* a peer's count bounds a loop                                               */

enum class Plant : u32 {
#define FA2A_PLANT_NAME(name) name,
  FA2A_PLANTS(FA2A_PLANT_NAME)
#undef FA2A_PLANT_NAME
};

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS && !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
extern u64 planted_bugs;  // one bit a bug; lives in kernels/cuda/twin/grid.cpp
inline bool planted(Plant plant) { return (planted_bugs >> static_cast<u32>(plant) & 1ull) != 0; }
#else
FA2A_HD constexpr bool planted(Plant) { return false; }
#endif

}  // namespace fa2a
