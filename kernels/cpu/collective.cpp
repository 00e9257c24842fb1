// All-gather of a few bytes, uniform among all who return; the rules are in docs/protocol.md, section 11.
#include "kernels/cpu/collective.hpp"

#include <string.h>

#include "kernels/cpu/machine.hpp"
#include "protocol/collective.hpp"

namespace fa2a {

namespace {

// The members that this rank waits for now, and where each one's words stand in its window.
struct Members {
  u64 epoch = 0;
  RankSet active;
  std::vector<u16> partitions;
};

enum class Turn { returned, next_view, released };

Members members_now(const Context& c) {
  const View& view = newest_view(c.state->ring);
  Members members{view.epoch, view.active, {view.partitions, view.partitions + c.shape.num_ranks}};
  return members;
}

class Gathering {
 public:
  Gathering(Context& c, Collective& mine, const Members& members)
      : c_(c),
        mine_(mine),
        members_(members),
        machine_(c, mine.number, members.partitions, c.state->waiting_in_collective) {}

  Turn run() {
    machine_.enter(Phase::collective);
    contribute();
    Turn turn = wait_for_contributions();
    if (turn == Turn::returned) turn = settle();
    machine_.expect_nobody();
    return turn;
  }

  // Until the membership differs from the one that this turn began with.
  Waited wait_for_view() {
    return wait_for(machine_, *c_.state, kNobody, [&] { return view_changed() ? Reading::present : Reading::absent; });
  }

  void tell_done() {
    i32 num_left = members_.active.size() / 2;
    for (i32 dst = 0; dst < c_.shape.num_ranks; ++dst) {
      if (!members_.active.has(dst)) continue;
      if (num_left-- == 0) c_.wire->at(Point::collective_half_done, mine_.number);
      put_word(dst, /*changing=*/false, /*done=*/true);
    }
  }

  void give_out(const CollectiveArgs& args, CollectiveResult& result) const {
    for (i32 src = 0; src < c_.shape.num_ranks; ++src) {
      u8* to = args.gathered + args.num_bytes * static_cast<u64>(src);
      args.contributed[src] = mine_.has.has(src) ? 1 : 0;
      memset(to, 0, args.num_bytes);
      if (!mine_.has.has(src)) continue;
      if (signal_field::Count::unpack(word_of(src)) != args.num_bytes) result.odd_rank = src;
      memcpy(to, inbound(src) + c_.at.collective_bytes[parity()], args.num_bytes);
    }
    result.epoch = members_.epoch;
  }

 private:
  u32 parity() const { return static_cast<u32>(mine_.number % kNumParities); }
  u8* inbound(i32 src) const { return c_.fabric->inbound(mine_.partitions[static_cast<size_t>(src)]); }
  u64 word_of(i32 src) const { return load_acquire(Context::word(inbound(src), c_.at.collective_word[parity()])); }
  bool view_changed() const { return newest_view(c_.state->ring).epoch != members_.epoch; }

  void put_word(i32 dst, bool changing, bool done = false) {
    const u64 value =
        pack(CollectiveWord{mine_.number, members_.epoch, mine_.version, mine_.bytes.size(), done, changing});
    store_release(&c_.fabric->page(c_.rank).sent[dst].words[static_cast<u32>(WordKind::collective)][parity()], value);
    c_.wire->put_collective(dst, Context::word(c_.fabric->outbound(dst), c_.at.collective_word[parity()]), value);
  }

  // Once to each rank: a later view brings no new members in the midst of a step.
  void contribute() {
    if (mine_.is_contributed) return;
    c_.wire->at(Point::collective_begin, mine_.number);
    i32 num_left = members_.active.size() / 2;
    for (i32 dst = 0; dst < c_.shape.num_ranks; ++dst) {
      if (!members_.active.has(dst)) continue;
      if (num_left-- == 0) c_.wire->at(Point::collective_half_contributed, mine_.number);
      c_.wire->put_collective_bytes(dst, c_.fabric->outbound(dst) + c_.at.collective_bytes[parity()],
                                    mine_.bytes.data(), mine_.bytes.size());
      put_word(dst, /*changing=*/false);
    }
    mine_.is_contributed = true;
    c_.wire->at(Point::collective_contributed, mine_.number);
  }

  Turn wait_for_contributions() {
    if (mine_.is_frozen && guarded(guard_frozen_set)) return Turn::returned;
    for (i32 src = 0; src < c_.shape.num_ranks; ++src)
      if (members_.active.has(src) && !has_contributed(word_of(src), mine_.number)) machine_.expect(src);
    for (i32 src = 0; src < c_.shape.num_ranks; ++src) {
      if (!members_.active.has(src)) continue;
      machine_.look_for(WordKind::collective, 0);
      const Turn turn = wait_until(src, [&] { return has_contributed(word_of(src), mine_.number); });
      if (turn != Turn::returned) return turn;
    }
    // Never taken anew: whoever returned already may have the bytes of a rank that no later view has.
    mine_.has = members_.active;
    mine_.is_frozen = true;
    return Turn::returned;
  }

  // Says what I have until all members have said the same.
  Turn settle() {
    if (!guarded(guard_all_say)) return Turn::returned;
    say();
    for (i32 src = 0; src < c_.shape.num_ranks; ++src) {
      if (!members_.active.has(src)) continue;
      RankSet theirs = mine_.has;
      bool is_done = false;
      const Turn turn = wait_for_set(src, theirs, is_done);
      if (turn != Turn::returned || is_done) return turn;
      if (theirs == mine_.has) continue;  // wait_for_set does not end while it has more
      mine_.has = mine_.has & theirs;
      say();
      src = -1;  // those before it had said more than I have now, and will say less
    }
    return Turn::returned;
  }

  void say() {
    ++mine_.version;
    i32 num_left = members_.active.size() / 2;
    for (i32 dst = 0; dst < c_.shape.num_ranks; ++dst) {
      if (!members_.active.has(dst)) continue;
      if (num_left-- == 0) c_.wire->at(Point::collective_half_said, mine_.number);
      put_word(dst, /*changing=*/true);
      full_fence();  // the mark is seen by whoever sees a word of the new set
      c_.wire->put_collective_set(dst, c_.fabric->outbound(dst) + c_.at.collective_set[parity()], mine_.has);
      put_word(dst, /*changing=*/false);
    }
    c_.wire->at(Point::collective_said, mine_.number);
  }

  // Until it has said a set that is mine, or one with less in it; one with more is no answer, for it will say less. Or
  // until it has returned.
  Turn wait_for_set(i32 src, RankSet& theirs, bool& is_done) {
    u64 awaited = 1;
    machine_.look_for(WordKind::collective, 1);
    return wait_until(src, [&] {
      const u64 word = word_of(src);
      is_done = has_returned(word, mine_.number);
      if (is_done) return true;
      if (has_said(word, mine_.number, members_.epoch) && copy_set(src, word, theirs)) {
        if ((mine_.has & theirs) != mine_.has || theirs == mine_.has) return true;
      }
      // What is awaited is what comes after the word that stands there: the watcher of links must not miss that one.
      if (has_contributed(word, mine_.number) && signal_field::Chunk::unpack(word) + 1 != awaited) {
        awaited = signal_field::Chunk::unpack(word) + 1;
        machine_.look_for(WordKind::collective, static_cast<i32>(awaited & signal_field::Chunk::max));
      }
      return false;
    });
  }

  // False: its writer was changing it.
  bool copy_set(i32 src, u64 word, RankSet& to) const {
    const auto* set = reinterpret_cast<const u64*>(inbound(src) + c_.at.collective_set[parity()]);
    for (i32 i = 0; i < RankSet::kNumWords; ++i) to.words[i] = load_relaxed(set + i);
    full_fence();
    return word_of(src) == word || !guarded(guard_recheck);
  }

  // Unlike in a round, a lost quorum ends the wait: whom this rank waits for may have been told so before it, and is
  // back with its caller. It would be found stalled there, and be voted out once a quorum is back.
  template <class Done>
  Turn wait_until(i32 src, Done is_done) {
    const auto is_over = [&] { return view_changed() || (is_suspended(*c_.state) && guarded(guard_quorum_ends)); };
    const Waited waited = wait_for(machine_, *c_.state, src, [&] {
      return is_done() ? Reading::present : is_over() ? Reading::declined : Reading::absent;
    });
    machine_.expect_no_more(src);  // also of one whose word came while another's was looked at
    if (waited == Waited::present) return Turn::returned;
    return waited == Waited::released ? Turn::released : Turn::next_view;
  }

  Context& c_;
  Collective& mine_;
  const Members& members_;
  CpuMachine machine_;
};

bool same_bytes(const Collective& mine, const CollectiveArgs& args) {
  return mine.bytes.size() == args.num_bytes && memcmp(mine.bytes.data(), args.mine, args.num_bytes) == 0;
}

// Where this rank stands in its rounds: what peers judge it by, once it is out of the collective. A kernel of a GPU
// stores there too, and may have begun another round between the load and the store: what it said must not go back.
void show_rounds_again(Context& c) {
  u64 begun = 0;
  do {
    begun = c.rounds_begun();
    CpuMachine(c, begun == 0 ? 0 : begun - 1).enter(begun == 0 ? Phase::idle : Phase::caller);
    full_fence();
  } while (c.rounds_begun() != begun);
}

}  // namespace

CollectiveResult gather_all(Context& c, const CollectiveArgs& args) {
  CollectiveResult result;
  Collective& mine = c.collective;
  if (mine.is_open && !same_bytes(mine, args)) return {Status::other_bytes, 0, -1};
  if (!mine.is_open) {
    mine = Collective();
    mine.is_open = true;
    mine.number = c.next_collective;
    mine.bytes.assign(args.mine, args.mine + args.num_bytes);
    mine.partitions = members_now(c).partitions;
  }
  for (bool is_done = false; !is_done && result.status == Status::ok;) {
    const Members members = members_now(c);
    Gathering gathering(c, mine, members);
    const Turn turn = gathering.run();
    if (turn == Turn::returned) {
      gathering.give_out(args, result);
      gathering.tell_done();
      is_done = true;
    } else if (turn == Turn::released || gathering.wait_for_view() == Waited::released) {
      result.status = released_status(*c.state);  // ok: quorum came back between two looks
    }
  }
  show_rounds_again(c);
  if (result.status == Status::quorum_lost) return result;
  mine.is_open = false;
  ++c.next_collective;
  c.wire->at(Point::collective_returned, mine.number);
  return result;
}

}  // namespace fa2a
