// The test build's switch for each guard. Production builds have no such word.
#include "protocol/guards.hpp"

#if defined(FA2A_TEST_HOOKS) && FA2A_TEST_HOOKS
namespace fa2a {
u64 guards_off = 0;
}
#endif
