// Stores past the cache, with the widest registers that the machine has; chosen once, when the module is loaded.
#include "host/copy.hpp"

#include <string.h>

#include "protocol/guards.hpp"
#include "protocol/layout.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fa2a {

void copy_row(u8* to, const u8* from, u64 num_bytes) { memcpy(to, from, num_bytes); }

#if defined(__x86_64__)

namespace {

// `to` stands on a line; whole lines only. A line is stored at one go: half a line in the write-combining buffer,
// pushed out by another one, costs a transfer of its own.
void stream_lines_sse2(u8* to, const u8* from, u64 num_lines) {
  for (; num_lines > 0; --num_lines, to += kLine, from += kLine) {
    read_ahead(from);
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32));
    const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 48));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), a);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + 16), b);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + 32), c);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + 48), d);
  }
}

__attribute__((target("avx"))) void stream_lines_avx(u8* to, const u8* from, u64 num_lines) {
  for (; num_lines > 0; --num_lines, to += kLine, from += kLine) {
    read_ahead(from);
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), b);
  }
}

__attribute__((target("avx512f"))) void stream_lines_avx512(u8* to, const u8* from, u64 num_lines) {
  for (; num_lines > 0; --num_lines, to += kLine, from += kLine) {
    read_ahead(from);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
}

using StreamLines = void (*)(u8*, const u8*, u64);

StreamLines widest() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return stream_lines_avx512;
  if (__builtin_cpu_supports("avx")) return stream_lines_avx;
  return stream_lines_sse2;
}

const StreamLines stream_lines = widest();

}  // namespace

void stream_row(u8* to, const u8* from, u64 num_bytes) {
  const u64 to_line = (kLine - reinterpret_cast<u64>(to) % kLine) % kLine;
  const u64 num_before = to_line < num_bytes ? to_line : num_bytes;
  const u64 num_lines = (num_bytes - num_before) / kLine;
  const u64 num_streamed = num_before + num_lines * kLine;
  memcpy(to, from, num_before);
  stream_lines(to + num_before, from + num_before, num_lines);
  memcpy(to + num_streamed, from + num_streamed, num_bytes - num_streamed);
}

void finish_copies() {
  if (guarded(guard_copy_fence)) _mm_sfence();
}

#else

void stream_row(u8* to, const u8* from, u64 num_bytes) { memcpy(to, from, num_bytes); }

void finish_copies() {}

#endif

}  // namespace fa2a
