// How one row loop becomes several, one for each instruction set, chosen at load time: wheels travel, so nothing is
// -march=native.
#pragma once

// Sanitizers run before the resolver of a multi-versioned function may, so those builds take the plain one. No AVX-512:
// the loops work on 32-byte vectors, which is what a memory-bound row needs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(FA2A_PLAIN_LOOPS)
#define FA2A_FOR_EACH_ISA __attribute__((target_clones("avx2", "default")))
#else
#define FA2A_FOR_EACH_ISA
#endif

// What a multi-versioned function calls must become part of it: a call of its own would be compiled for the oldest
// machine only.
#define FA2A_PART_OF_LOOP __attribute__((always_inline)) inline
