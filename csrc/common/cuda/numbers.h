// Kernels on small arrays [batch, channels], between passes over maps.
#pragma once

#include "common/cuda/map.h"

namespace dla::cuda {

// A thread for each number, and which it is.
inline Grid grid_of(Size threads) { return {ceil_div(threads, kThreads), kThreads}; }

__device__ inline Size own_number() {
  return static_cast<Size>(blockIdx.x) * kThreads + threadIdx.x;
}

// A filter along the channels of a sample, with zeros around these. Channel c of it is line(c).
template <class A>
struct LineFilter {
  const A* weight;  // [taps], odd
  int taps, channels;

  template <class Line>
  __device__ A apply(int c, const Line& line) const {
    return sum(c, 1, line);
  }
  // What reaches channel c of the sample from the gradients line of what the filter made.
  template <class Line>
  __device__ A transposed(int c, const Line& line) const {
    return sum(c, -1, line);
  }

 private:
  template <class Line>
  __device__ A sum(int c, int direction, const Line& line) const {
    A sum = 0;
    for (int t = 0; t < taps; ++t) {
      const int from = c + direction * (t - taps / 2);
      if (from >= 0 && from < channels) sum += weight[t] * line(from);
    }
    return sum;
  }
};

}  // namespace dla::cuda
