// What a member reads of another's control page, the same for whoever reads: records as they were last seen whole, and
// the report made of them.
#pragma once

#include "membership/member_report.hpp"
#include "membership/two_copies.hpp"

namespace fa2a {

// A record of a page as it was last read: a page that has not moved is not read again.
template <class Record>
struct LastRead {
  u64 version = 0;
  Record record;

  // False: there is none yet, or it moved whenever it was read, and what stands here now is half of one.
  bool newest(const TwoCopies<Record>& shared) {
    if (load_acquire(&shared.version) != version && !read_newest(shared, record, version)) version = 0;
    return version != 0;
  }
};

struct PageCopies {
  LastRead<Promise> promise;
  LastRead<StepHold> hold;
  LastRead<Decision> decision;
  LastRead<AcceptorRecord<Decision>> acceptor;
  LastRead<BallotRequest<Decision>> request;
};

// Everything on the page that agreement asks for. What the reader knows by itself (`proven_dead`, `accused`) it must
// have put into the report before: a record that is read once its writer is proven dead will not change any more. Votes
// and requests only where members decide by them. The report points into `copies` and into the page.
inline void read_page(const ControlPage& page, bool by_windows, PageCopies& copies, MemberReport& report) {
  report.beat = load_acquire(&page.process_beat);
  report.progress = load_acquire(&page.progress);
  report.promise = copies.promise.newest(page.promise) ? copies.promise.record : Promise();
  if (copies.hold.newest(page.hold)) report.hold = copies.hold.record;
  report.accusations = page.accusations;
  if (copies.decision.newest(page.decision)) report.decision = &copies.decision.record;
  if (!by_windows) return;
  if (copies.acceptor.newest(page.acceptor)) report.votes = &copies.acceptor.record;
  if (copies.request.newest(page.request)) report.request = &copies.request.record;
}

}  // namespace fa2a
