// Threads. The pool is OpenMP's, which torch uses too: no threads of our own.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace dla::DLA_ISA {

// Calls body(i) for i in [0, count), contiguous ranges of i per thread. A result may depend on i
// but not on the thread: then it does not depend on the number of threads either. What was streamed may
// be read afterwards.
template <class Body>
void parallel_for(int threads, std::int64_t count, Body&& body) {
  if (threads < 2 || count < 2) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return end_streams();
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < count; ++i) body(i);
    end_streams();
  }
}

// One of several loops that share a region.
template <class Body>
struct Loop {
  std::int64_t count;
  Body body;
};

// Calls the bodies of all loops as parallel_for does, one loop after the other.
template <class... Bodies>
void parallel_loops(int threads, const Loop<Bodies>&... loops) {
  parallel_for(threads, (loops.count + ...), [&](std::int64_t i) {
    const auto call = [&](const auto& loop) {
      if (i >= 0 && i < loop.count) loop.body(i);
      i -= loop.count;
    };
    (call(loops), ...);
  });
}

}  // namespace dla::DLA_ISA
