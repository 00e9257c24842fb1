// Copies of whole rows, through the cache or past it.
//
// Past it: the store does not first fetch the line it overwrites, and the row does not push out of the cache what is
// needed next. That pays when more is written than the cache holds until somebody reads it; when the reader finds the
// row still in a shared cache, it costs. docs/measured.md has the figures.
#pragma once

#include "protocol/compiler.hpp"

namespace fa2a {

// A call that moves at least so many bytes in all streams its rows.
constexpr u64 kStreamedBytes = 16ull << 20;

void copy_row(u8* to, const u8* from, u64 num_bytes);

// Past the cache. These stores are ordered with nothing, not even with a release that follows: WHOEVER calls this calls
// finish_copies() before the word that announces the rows. Full cache lines of `to` go past the cache; a part of one at
// either end is copied plainly, as is everything on machines other than x86-64.
void stream_row(u8* to, const u8* from, u64 num_bytes);

// After the last stream_row of this thread and before its signal. Cheap when there is nothing to finish.
void finish_copies();

}  // namespace fa2a
