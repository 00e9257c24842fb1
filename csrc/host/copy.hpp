// Copies of whole rows, through the cache or past it.
//
// Past it: the store does not first fetch the line that it overwrites, and the row does not push out of the cache what
// is needed next. That pays when more is written than the caches hold until somebody reads it; a reader who would have
// found the row in a cache pays for it. docs/measured.md has the figures.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

// From so many bytes on, counted over a whole call (rows that nobody reads before the last one is written) and over all
// ranks that share the cache, streaming its rows is faster. Measured; the size of one row does not matter.
constexpr u64 kStreamedBytes = 8ull << 20;

// How far ahead of what is read now the next lines are asked for: a machine stops fetching ahead by itself where a page
// ends, and begins anew with each row. Measured; a half and twice as much are little worse.
constexpr u64 kReadAheadBytes = 1024;

// For rows that are read once, one after another. Behind the last row it asks for what nobody reads; it never faults.
__attribute__((always_inline)) inline void read_ahead(const void* at) {
  __builtin_prefetch(static_cast<const u8*>(at) + kReadAheadBytes, /*rw=*/0, /*locality=*/0);
}

void copy_row(u8* to, const u8* from, u64 num_bytes);

// Past the cache. These stores are ordered with nothing, not even with a release that follows: WHOEVER calls this calls
// finish_copies() before the word that announces the rows. Full cache lines of `to` go past the cache; a part of one at
// either end is copied plainly, as is everything on machines other than x86-64.
void stream_row(u8* to, const u8* from, u64 num_bytes);

// By the thread that called stream_row, after its last one and before its signal (guard `copy_fence`). Cheap when there
// is nothing to finish. Where stores are ordered by a release anyway, nothing.
void finish_copies();

}  // namespace fa2a
