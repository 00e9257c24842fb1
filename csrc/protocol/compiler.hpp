// What differs between compilers: fixed-width integers and function markers that g++, clang, nvcc and NVRTC all accept.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FA2A_HD __host__ __device__ inline
#else
#define FA2A_HD inline
#endif

namespace fa2a {

// NVRTC has no <cstdint>; these widths hold on every target the library supports.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "the wire format needs these widths");

FA2A_HD constexpr u64 round_up(u64 bytes, u64 alignment) { return (bytes + alignment - 1) / alignment * alignment; }

}  // namespace fa2a
