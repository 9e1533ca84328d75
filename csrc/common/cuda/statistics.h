// Statistics of batches: per channel mean and (biased) variance of a map over batch and space.
#pragma once

#include <cmath>

#include "common/cuda/map.h"

namespace dla::cuda {

// Mean and centred sum of squares of every piece. The sums are about the plane's first element:
// about 0 they would lose the digits that a large mean takes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(Cut cut, const T* x, Compute<T>* means, Compute<T>* squares) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const auto start = [&](int e) { return to_compute(x[part.start_of(e)]); };
  A starts[kPack<T>];
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) starts[e] = part.width > 0 ? start(e) : A(0);
  Values<T, 2> sums = {};
  for_packs<T, 1>(part, {x}, [&](const Place& place, const Values<T, 1>& values) {
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      const bool exists = e >= place.begin && e < place.end;
      const A centred = exists ? values[0][e] - starts[e] : A(0);
      sums[0][e] += centred;
      sums[1][e] += centred * centred;
    }
  });
  const A pixels =
      static_cast<A>(pixels_of_piece(cut, blockIdx.x % static_cast<unsigned>(cut.chunks)));
  finish_sums<T, 2>(cut, part, sums, [&](Size plane, const A(&totals)[2]) {
    const A mean = totals[0] / pixels, square = totals[1] - totals[0] * mean;
    means[piece_of(cut, plane)] = mean + start(static_cast<int>(plane - part.plane));
    squares[piece_of(cut, plane)] = square < A(0) ? A(0) : square;
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(Cut cut, const A* means, const A* squares, A* mean, A* var) {
  const Size channels = cut.channels, rows = piece_rows(cut);
  const double count = static_cast<double>(cut.planes / channels * cut.area);
  const auto pixels = [&](Size row) {
    return static_cast<double>(pixels_of_piece(cut, row % cut.chunks));
  };
  const double found =
      add_rows(rows, channels, [&](Size row, Size i) { return pixels(row) * means[i]; });
  const double centre = found / count;
  const double square = add_rows(rows, channels, [&](Size row, Size i) {
    const double off = means[i] - centre;
    return squares[i] + pixels(row) * off * off;
  });
  if (!writes_channel(channels)) return;
  mean[own_channel(channels)] = static_cast<A>(centre);
  var[own_channel(channels)] = static_cast<A>(square / count);
}

}  // namespace dla::cuda
