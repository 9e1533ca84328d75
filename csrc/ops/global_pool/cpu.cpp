// Bound by memory: every feature element is read (or written) once, in the order it lies there.
#include "ops/global_pool/op.h"

#include <algorithm>
#include <cstring>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/sizes.h"

namespace dla::DLA_ISA {
namespace {

// Sums run in the compute type within a block and in double over the blocks.
constexpr Size kBlock = 1024;  // elements of a plane (NCHW)
constexpr Size kGroup = 8;     // rows added pairwise before they meet the accumulator (channels_last)
constexpr Size kGroups = 32;   // groups in a block (channels_last)
constexpr Size kTile = 256;    // channels of one task, at most (channels_last)

// Lane-wise partial sums of at most kBlock consecutive elements.
template <class T>
inline __attribute__((always_inline)) Vec<Compute<T>> block_sums(const T* x, Size count) {
  using A = Compute<T>;
  constexpr Size lanes = kLanes<A>;
  Vec<A> a{}, b{}, c{}, d{};
  Size i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    a += load(x + i);
    b += load(x + i + lanes);
    c += load(x + i + 2 * lanes);
    d += load(x + i + 3 * lanes);
  }
  for (; i + lanes <= count; i += lanes) a += load(x + i);
  if (i < count) b += load_n(x + i, static_cast<int>(count - i));
  return (a + b) + (c + d);
}

template <class T>
void pool_large_planes(const GlobalPoolForward& args) {
  using A = Compute<T>;
  const T* x = as<T>(args.x);
  auto* out = as<A>(args.out);
  parallel_for(args.threads, args.batch * args.channels, [&](Size plane) {
    const T* p = x + plane * args.area;
    double total = 0;
    for (Size i = 0; i < args.area; i += kBlock)
      total += sum<A>(block_sums(p + i, std::min(kBlock, args.area - i)));
    out[plane] = static_cast<A>(total / static_cast<double>(args.area));
  });
}

// Planes of one block each: the lanes of kLanes planes are summed at once.
template <class T>
void pool_small_planes(const GlobalPoolForward& args) {
  using A = Compute<T>;
  constexpr Size lanes = kLanes<A>;
  const Size planes = args.batch * args.channels;
  const T* x = as<T>(args.x);
  auto* out = as<A>(args.out);
  const A area = static_cast<A>(args.area);
  parallel_for(args.threads, ceil_div(planes, lanes), [&](Size task) {
    const Size first = task * lanes, count = std::min(lanes, planes - first);
    Vec<A> rows[lanes];
    for (Size i = 0; i < count; ++i) rows[i] = block_sums(x + (first + i) * args.area, args.area);
    for (Size i = count; i < lanes; ++i) rows[i] = Vec<A>{};
    fold_lanes<A>(rows);
    store_n(out + first, rows[0] / splat(area), static_cast<int>(count));
  });
}

// Channels [0, width) of `rows` rows: partial[c] += sum over the rows.
template <int rows, class T>
void add_rows(const T* x, Size stride, Size width, Compute<T>* partial) {
  using A = Compute<T>;
  constexpr Size lanes = kLanes<A>;
  const auto add = [&](Size c, auto&& load_row) {
    Vec<A> v[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) v[r] = load_row(x + r * stride + c);
#pragma GCC unroll 3
    for (int half = rows / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int r = 0; r < half; ++r) v[r] += v[r + half];
    store(partial + c, load(partial + c) + v[0]);
  };
  Size c = 0;
  for (; c + lanes <= width; c += lanes) add(c, [](const T* p) { return load(p); });
  if (c < width) add(c, [n = static_cast<int>(width - c)](const T* p) { return load_n(p, n); });
}

// Means of channels [0, width), width <= kTile, of one sample.
template <class T>
void pool_tile(const T* x, Size area, Size stride, Size width, Compute<T>* out) {
  using A = Compute<T>;
  double totals[kTile] = {};
  for (Size block = 0; block < area; block += kGroup * kGroups) {
    alignas(kVectorBytes) A partial[kTile] = {};
    const Size end = std::min(area, block + kGroup * kGroups);
    Size row = block;
    for (; row + kGroup <= end; row += kGroup)
      add_rows<kGroup>(x + row * stride, stride, width, partial);
    for (; row < end; ++row) add_rows<1>(x + row * stride, stride, width, partial);
    for (Size c = 0; c < width; ++c) totals[c] += partial[c];
  }
  for (Size c = 0; c < width; ++c)
    out[c] = static_cast<A>(totals[c] / static_cast<double>(area));
}

// Calls body(sample, first channel, width); narrower tiles where the batch alone cannot occupy the
// threads. A channel's result does not depend on the tile it is in.
template <class Body>
void for_tiles(int threads, Size batch, Size channels, Body&& body) {
  Size tile = kTile;
  const auto tiles = [&] { return ceil_div(channels, tile); };
  while (tile > 32 && batch * tiles() < threads) tile /= 2;
  parallel_for(threads, batch * tiles(), [&](Size task) {
    const Size first = task % tiles() * tile;
    body(task / tiles(), first, std::min(tile, channels - first));
  });
}

template <class T>
void pool_rows(const GlobalPoolForward& args) {
  const T* x = as<T>(args.x);
  auto* out = as<Compute<T>>(args.out);
  for_tiles(args.threads, args.batch, args.channels, [&](Size b, Size first, Size width) {
    pool_tile(x + b * args.area * args.channels + first, args.area, args.channels, width,
              out + b * args.channels + first);
  });
}

template <class T>
T shared_out(Compute<T> grad, Size area) {
  T value;
  from_compute(grad / static_cast<Compute<T>>(area), value);
  return value;
}

template <class T>
void spread_planes(const GlobalPoolBackward& args) {
  const auto* grad = as<Compute<T>>(args.grad);
  T* dx = as<T>(args.dx);
  parallel_for(args.threads, args.batch * args.channels, [&](Size plane) {
    std::fill_n(dx + plane * args.area, args.area, shared_out<T>(grad[plane], args.area));
  });
}

template <class T>
void spread_rows(const GlobalPoolBackward& args) {
  const auto* grad = as<Compute<T>>(args.grad);
  T* dx = as<T>(args.dx);
  for_tiles(args.threads, args.batch, args.channels, [&](Size b, Size first, Size width) {
    T row[kTile];
    for (Size c = 0; c < width; ++c)
      row[c] = shared_out<T>(grad[b * args.channels + first + c], args.area);
    T* to = dx + b * args.area * args.channels + first;
    for (Size i = 0; i < args.area; ++i)
      std::memcpy(to + i * args.channels, row, static_cast<std::size_t>(width) * sizeof(T));
  });
}

}  // namespace

void global_pool_forward(const GlobalPoolForward& args) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.channels_last) return pool_rows<T>(args);
    args.area > kBlock ? pool_large_planes<T>(args) : pool_small_planes<T>(args);
  });
}

void global_pool_backward(const GlobalPoolBackward& args) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.channels_last ? spread_rows<T>(args) : spread_planes<T>(args);
  });
}

}  // namespace dla::DLA_ISA
