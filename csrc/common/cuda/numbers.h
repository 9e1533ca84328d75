// Kernels on small arrays [batch, channels], between passes over maps.
#pragma once

#include "common/cuda/map.h"

namespace dla::cuda {

// A thread for each number, and which it is.
inline Grid grid_of(Size threads) { return {ceil_div(threads, kThreads), kThreads}; }

__device__ inline Size own_number() {
  return static_cast<Size>(blockIdx.x) * kThreads + threadIdx.x;
}

// Where sums go: element i of field f, times a factor.
template <class A>
struct Multiples {
  double factor;
  A* to;  // [fields, size]

  __device__ void put(int field, Size size, Size i, double sum) const {
    to[field * size + i] = static_cast<A>(factor * sum);
  }
};

// Adds up the pieces of partial [fields, size / channels, pieces, channels] to to.put(field, size,
// i, sum), for every i < size.
template <class A, class To>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(Size fields, Size size, Size channels, Size pieces, const A* partial,
                const __grid_constant__ To to) {
  const Size number = own_number();
  if (number >= fields * size) return;
  const A* first = partial + number / channels * pieces * channels + number % channels;
  double sum = 0;
  for (Size piece = 0; piece < pieces; ++piece) sum += first[piece * channels];
  to.put(static_cast<int>(number / size), size, number % size, sum);
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
