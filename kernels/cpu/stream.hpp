// The words of a stream as one rank stores and reads them: signals of chunks one way, what was taken of them the other.
#pragma once

#include "kernels/cpu/context.hpp"
#include "kernels/cpu/machine.hpp"

namespace fa2a {

// Chunks that `num_rows` make; an empty stream is one empty chunk.
inline i32 num_chunks_of(i32 num_rows, i32 rows_of_chunk) {
  return num_rows <= rows_of_chunk ? 1 : (num_rows + rows_of_chunk - 1) / rows_of_chunk;
}

inline i32 half_of(const Context& c, i32 chunk) { return chunk % c.at.num_halves; }

// The word of `src` that publishes chunk `chunk` to me, and what it says.
u64 load_signal(const Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk);
Reading read_chunk(const Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk);
// Stores the words anew that only streams with `dst` store, where it is time for that.
void freshen_words(Context& c, const OpenRound& open, Verb verb, i32 dst);
// Tells `dst`; `count` rows of the chunk stand in its window.
void signal_chunk(Context& c, const OpenRound& open, Verb verb, i32 dst, i32 chunk, u64 count, bool last);
// Tells `dst` that nothing of this round is coming from here, or nothing more.
void decline(Context& c, const OpenRound& open, Verb verb, i32 dst, i32 chunk);
// Tells `src` that its chunk may be overwritten.
void tell_taken(Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk);
// Tells `src` that I read no more of its stream, so that it waits for no word of mine.
void refuse(Context& c, const OpenRound& open, Verb verb, i32 src, i32 chunk);

// Has the reader made room for the next chunk of my stream to it?
Reading read_room(const Context& c, const OpenRound& open, Verb verb, i32 dst, i32 chunk);

// Where the two verbs can be made to fail while their first chunks go out.
struct FirstPoints {
  Point rows_stored;
  Point half_signalled;
  Point signalled;
};

// What goes without asking, to all peers: as many chunks as a peer's slots hold. First all rows, then all signals.
// `opens(peer)` says whether it gets any and how many chunks its stream has (0: it is declined); `store(peer, chunk)`
// stores the rows of one and returns their number.
template <class Opens, class Store>
void begin_streams(Context& c, OpenRound& open, Verb verb, const FirstPoints& points, Opens opens, Store store) {
  const i32 n = c.shape.num_ranks;
  auto num_first = [&](const OutStream& out) {
    return out.num_chunks < c.at.num_halves ? out.num_chunks : c.at.num_halves;
  };
  open.out.assign(static_cast<size_t>(n), OutStream());
  for (i32 step = 1; step <= n; ++step) {
    const i32 peer = (c.rank + step) % n;
    OutStream& out = open.out[static_cast<size_t>(peer)];
    out.num_chunks = opens(peer);
    for (i32 chunk = 0; chunk < num_first(out); ++chunk) out.first_counts[chunk] = store(peer, chunk);
  }
  c.wire->at(points.rows_stored, open.round);
  for (i32 step = 1; step <= n; ++step) {
    const i32 peer = (c.rank + step) % n;
    OutStream& out = open.out[static_cast<size_t>(peer)];
    if (step == n / 2 + 1) c.wire->at(points.half_signalled, open.round);
    const bool owed = open.active.has(peer) && (verb == Verb::dispatch || guarded(guard_one_answer));
    if (out.num_chunks == 0 && owed) decline(c, open, verb, peer, 0);
    if (out.num_chunks != 0) freshen_words(c, open, verb, peer);
    for (; out.next_chunk < num_first(out); ++out.next_chunk)
      signal_chunk(c, open, verb, peer, out.next_chunk, out.first_counts[out.next_chunk],
                   out.next_chunk + 1 == out.num_chunks);
    out.open = out.next_chunk < out.num_chunks;
  }
  c.wire->at(points.signalled, open.round);
}

// Sends the next chunk to `dst` if its reader has made room. `store(chunk)` stores the rows and returns their number.
// True: something moved.
template <class Store>
bool continue_stream(Context& c, CpuMachine& machine, OpenRound& open, Verb verb, i32 dst, Store store) {
  OutStream& out = open.out[static_cast<size_t>(dst)];
  if (!out.open) return false;
  const Reading room = read_room(c, open, verb, dst, out.next_chunk);
  if (room == Reading::declined || is_suspect(*c.state, dst)) {
    decline(c, open, verb, dst, out.next_chunk);
    out.open = false;
    return true;
  }
  if (room == Reading::absent) return false;
  const u64 count = store(out.next_chunk);
  const bool last = out.next_chunk + 1 == out.num_chunks;
  signal_chunk(c, open, verb, dst, out.next_chunk, count, last);
  ++out.next_chunk;
  out.open = !last;
  machine.advance();
  return true;
}

// Works through everything that can be done without waiting (`pump`: true, something moved), and waits for one peer
// after the other whose word is missing (`awaits`). Time counts against those peers only, and against each from the
// moment on which its word is missing: one that has given all it can give is not late.
template <class Pump, class Awaits, class LookFor>
Status serve_peers(CpuMachine& machine, RankState& state, i32 num_ranks, Pump pump, Awaits awaits, LookFor look_for) {
  auto work = [&] {
    while (pump()) {
    }
    for (i32 peer = 0; peer < num_ranks; ++peer) machine.expect_if(awaits(peer), peer);
  };
  // From the start each time: what one peer sends can make another's stream go on.
  auto first_awaited = [&] {
    for (i32 peer = 0; peer < num_ranks; ++peer)
      if (awaits(peer)) return peer;
    return kNobody;
  };
  work();
  for (i32 peer = first_awaited(); peer != kNobody; peer = first_awaited()) {
    const Waited waited = wait_for(machine, state, peer, [&] {
      work();
      look_for(peer);
      return awaits(peer) ? Reading::absent : Reading::present;
    });
    if (waited != Waited::released) continue;
    machine.expect_nobody();
    return released_status(state);
  }
  machine.expect_nobody();
  return Status::ok;
}

// The rest of a batch that did not fit into the first chunks, one chunk a call. True: something moved.
bool continue_dispatch(Context& c, CpuMachine& machine, OpenRound& open, i32 dst);
bool continue_answer(Context& c, CpuMachine& machine, OpenRound& open, i32 owner);
// Tells every peer that is still to get chunks of mine that no more are coming.
void stop_streams(Context& c, OpenRound& open, Verb verb);
// Ends a dispatch that was never received, so that nobody waits for my chunks or for my `taken`.
void give_up_dispatch(Context& c, OpenRound& open);

}  // namespace fa2a
