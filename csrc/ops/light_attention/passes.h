// The passes of light_attention over whole feature maps. With u = DW_v(x), e = DW_prev(p):
//   moments    per plane: the pooled values, sums and co-moments of u, p, e and their products
//              with arriving gradients. All that statistics and gate gradients need.
//   stencil    o = a u + lam (d p + e), out = [x] + scale o + shift.
//   gradients  g = dL/do formed on the fly, then dx, dp and the correlations that make the weight
//              gradients.
// o is never stored unless asked for; every pass recomputes it from x and p.
#pragma once

#include "common/branch_norm.h"
#include "common/stencil.h"
#include "common/units.h"
#include "ops/light_attention/plane_table.h"

namespace dla::DLA_ISA {

// ---- joined ------------------------------------------------------------------------------------

// The x of a step: a feature, or with `join` ReLU(scale feature + shift + p), which is formed strip by
// strip wherever it is read and never stored.
template <class A>
struct InputMap {
  Feature feature;
  bool join;
  const A *scale, *shift;  // [C]; null: 1 and 0

  // `p` has been opened with as many rows around the strip.
  template <class Place>
  inline __attribute__((always_inline)) auto open_bordered(const Place& place,
                                                           const typename Place::In& p,
                                                           int64_t halo, A* memory) const {
    if (!join) return place.open_bordered(feature, halo, memory);
    const bool normed = scale != nullptr;
    return place.open_joined(
        feature, p, normed ? channel_vector(scale, place.grid, place.group) : splat(A(1)),
        normed ? channel_vector(shift, place.grid, place.group) : Vec<A>{}, halo, memory);
  }
};

// Means of a joined x and of p where nothing else is to be done with them.
template <class A, bool kPixelLanes>
struct JoinedMeansPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  using In = typename Place::In;
  const Grid<A>& grid;
  InputMap<A> x;
  Feature p;
  A *x_means, *p_means;  // [B, C]; p_means may be null

  V sum(const Place& place, const In& in) const {
    const Mask<A> channels = grid.channel_mask(place.group);
    V total{};
    for (int64_t row = place.strip.first; row < place.strip.last; ++row)
      for_runs(grid.vectors, [&](int64_t first, int64_t last) {
        V of_run{};
        for (int64_t k = first; k < last; ++k)
          of_run += load_masked<A>(in.at(row, k), grid.own(k, channels));
        total += of_run;
      });
    return total;
  }

  void run(int threads) const {
    const Units<A> units(grid);
    const A scale = A(1) / static_cast<A>(grid.shape.pixels());
    parallel_for(threads, units.count(), [&](int64_t unit) {
      thread_local Arena arena;
      const int64_t elements = grid.strip_elements(0);
      arena.reserve(2 * Arena::bytes_of<A>(elements));
      A *x_memory = arena.take<A>(elements), *p_memory = arena.take<A>(elements);
      V x_sums[kMostTogether], p_sums[kMostTogether];
      for_strips<kPixelLanes>(units, grid, unit, [&](const Place& place, int64_t slot) {
        if (place.strip.first == 0) x_sums[slot] = p_sums[slot] = V{};
        In p_in = place.open(p, 0, p_memory);
        x_sums[slot] += sum(place, x.open_bordered(place, p_in, 0, x_memory));
        if (p_means != nullptr) p_sums[slot] += sum(place, p_in);
        if (place.strip.last < grid.shape.height) return;
        const int64_t row = place.b * grid.shape.channels;
        store_channel_sums(x_means + row, x_sums[slot] * scale, grid, place.group);
        if (p_means != nullptr)
          store_channel_sums(p_means + row, p_sums[slot] * scale, grid, place.group);
      });
    });
  }
};

// ---- moments -----------------------------------------------------------------------------------

// What is known of planes before a backward pass, arrays [B, C]: the means of u, p and e. Or, if they are
// not `filtered`, those of x and p alone. Any but the first may be null.
template <class A>
struct PlaneMeans {
  const A *u, *p, *e;
  bool filtered;
};

// Fills the table of PlaneSum, or backward that of GradientSum.
template <class A, bool kPixelLanes, bool kBackward>
struct PlaneSumsPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  using In = typename Place::In;
  static constexpr int kSums = kBackward ? int{kGradientSums} : int{kFeatureSums};
  const Grid<A>& grid;
  InputMap<A> x;
  Feature p, grad_out, grad_o;        // backward, each of the gradients may be null
  const A *v_filters, *prev_filters;  // of a FilterBank; prev_filters may be null
  PlaneMeans<A> means;                // backward
  PlaneTable<A> table;
  const Units<A>& units;
  const BranchStatistics<A>* branch;  // what x takes in its unit before it can be formed; may be null

  struct Plane {
    Filter<A, kPixelLanes> v_filter, e_filter;
    V shift[3], sums[kSums];
    Mask<A> channels;
  };
  enum { kP_, kX_, kOut_, kO_, kInputs };

  void begin(int64_t b, int64_t group, Plane& plane) const {
    plane.v_filter = {v_filters, group};
    if (prev_filters != nullptr) plane.e_filter = {prev_filters, group};
    plane.channels = grid.channel_mask(group);
    fill_block(plane.sums, V{});
    fill_block(plane.shift, V{});
    if constexpr (kBackward) {
      const auto mean = [&](const A* of) {
        return of == nullptr ? V{} : channel_vector(of + b * grid.shape.channels, grid, group);
      };
      plane.shift[0] = mean(means.u), plane.shift[1] = mean(means.p), plane.shift[2] = mean(means.e);
      if (means.filtered) return;
      // The mean of a filtered map is, but for what falls off its edges, the filter's sum times its own.
      plane.shift[0] *= plane.v_filter.sum();
      if (prev_filters != nullptr) plane.shift[2] = plane.shift[1] * plane.e_filter.sum();
    }
  }

  // The value to shift by, half way along the row.
  V inner(V v) const {
    return kPixelLanes ? splat<A>(v[grid.shape.width / 2 % kLanes<A>]) : v;
  }

  // Channel lanes see every pixel of a row.
  template <int R>
  void add_block(int64_t row, const In (&in)[kInputs], Plane& plane) const {
    if constexpr (kPixelLanes) {
      block<R>(row, 0, grid.vectors, in, plane, plane.sums);
    } else {
      for_runs(grid.vectors, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
        V sums[kSums];
        fill_block(sums, V{});
        block<R>(row, first, last, in, plane, sums);
        for (int f = 0; f < kSums; ++f) plane.sums[f] += sums[f];
      });
    }
  }

  template <int R>
  void block(int64_t row, int64_t first, int64_t last, const In (&in)[kInputs], Plane& plane,
             V (&sums)[kSums]) const {
    const int64_t middle = grid.shape.width / 2 / (kPixelLanes ? kLanes<A> : 1);
    const FilterVectors<A> v_filter(plane.v_filter), e_filter(plane.e_filter);
    for (int64_t i = first; i < last; ++i) {
      // From the middle on, where the shifts are taken.
      const int64_t k = i + middle < grid.vectors ? i + middle : i + middle - grid.vectors;
      const Taps<A> taps = grid.taps(row, R, k, plane.channels);
      const Mask<A> own = taps.own();
      if (!grid.foreseen)
        for (const In& w : in)
          if (w) prefetch_block<R, kPixelLanes>(w.next, row, k);
      V u[R], e[R];
      fill_block(u, kBackward ? -plane.shift[0] : V{});
      fill_block(e, kBackward ? -plane.shift[2] : V{});
      stencil_block<R, A>(in[kX_], row, k, taps, v_filter, u);
      if (prev_filters != nullptr) stencil_block<R, A>(in[kP_], row, k, taps, e_filter, e);
      if constexpr (kBackward) {
        if (grad_out) products<R>(in, in[kOut_].rows(row, k), row, k, own, plane, u, e, sums + kG);
        if (grad_o) products<R>(in, in[kO_].rows(row, k), row, k, own, plane, u, e, sums + kD);
      } else {
        if (row == 0 && i == 0) {
          plane.shift[0] = inner(u[R / 2]);
          if (p) plane.shift[1] = inner(load_masked<A>(in[kP_].at(row + R / 2, k), own));
          plane.shift[2] = inner(e[R / 2]);
        }
        features<R>(in, row, k, own, plane, u, e, sums);
      }
    }
  }

  // Shifts u and e; adds the sums of the features and of their products. Each sum is formed over the
  // block's rows first: short chains of additions keep float sums over large planes accurate.
  template <int R>
  inline __attribute__((always_inline)) void features(const In (&in)[kInputs], int64_t row, int64_t k,
                                                      Mask<A> own, const Plane& plane, V (&u)[R],
                                                      V (&e)[R], V (&sums)[kSums]) const {
    const V* shift = plane.shift;
    V of_x{}, of_u{}, uu{}, of_p{}, pp{}, up{}, of_e{}, ee{}, pe{}, ue{};
    auto x_rows = in[kX_].rows(row, k), p_rows = in[kP_].rows(row, k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      u[r] = subtract_masked<A>(u[r], shift[0], own);
      e[r] = subtract_masked<A>(e[r], shift[2], own);
      of_x += load_masked<A>(x_rows.next(), own);
      of_u += u[r];
      uu += u[r] * u[r];
      if (!p) continue;
      const V q = subtract_masked<A>(load_masked<A>(p_rows.next(), own), shift[1], own);
      of_p += q;
      pp += q * q;
      up += u[r] * q;
      of_e += e[r];
      ee += e[r] * e[r];
      pe += q * e[r];
      ue += u[r] * e[r];
    }
    sums[kX] += of_x, sums[kU] += of_u, sums[kUU] += uu;
    sums[kP] += of_p, sums[kPP] += pp, sums[kUP] += up;
    sums[kE] += of_e, sums[kEE] += ee, sums[kPE] += pe, sums[kUE] += ue;
  }

  // Adds the sums of a gradient and of its products with the shifted u, p and e.
  template <int R>
  inline __attribute__((always_inline)) void products(const In (&in)[kInputs],
                                                      RowCursor<const A> gradient, int64_t row,
                                                      int64_t k, Mask<A> own, const Plane& plane,
                                                      const V (&u)[R], const V (&e)[R],
                                                      V* sums) const {
    V alone{}, with_u{}, with_p{}, with_e{};
    auto p_rows = in[kP_].rows(row, k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V g = load_masked<A>(gradient.next(), own);
      alone += g;
      with_u += g * u[r];
      with_e += g * e[r];
      if (p) with_p += g * (load_masked<A>(p_rows.next(), own) - plane.shift[1]);
    }
    sums[0] += alone, sums[1] += with_u, sums[2] += with_p, sums[3] += with_e;
  }

  void write(const Plane& plane, A* record) const {
    if constexpr (!kPixelLanes) {
      for (int f = 0; f < kSums; ++f) store(record + f * kLanes<A>, plane.sums[f]);
      for (int f = 0; f < 3; ++f) store(record + (kSums + f) * kLanes<A>, plane.shift[f]);
    } else {
      A totals[round_up(kSums, kLanes<A>)];
      lane_sums<A>(plane.sums, kSums, totals);
      for (int f = 0; f < kSums; ++f) record[f * kLanes<A>] = totals[f];
      for (int f = 0; f < 3; ++f) record[(kSums + f) * kLanes<A>] = plane.shift[f][0];
    }
  }

  void run(int threads) const {
    parallel_for(threads, units.count(), [&](int64_t unit) {
      if (branch != nullptr) branch->template finish_unit<kPixelLanes>(units, unit);
      thread_local Arena arena;
      const int64_t elements = grid.strip_elements(1);
      arena.reserve(kInputs * Arena::bytes_of<A>(elements));
      A* memory[kInputs];
      for (A*& m : memory) m = arena.take<A>(elements);
      Plane planes[kMostTogether];
      for_strips<kPixelLanes>(units, grid, unit, [&](const Place& place, int64_t slot) {
        const Strip& strip = place.strip;
        Plane& plane = planes[slot];
        if (strip.first == 0) begin(place.b, place.group, plane);
        const In in[kInputs] = {place.open_bordered(p, 1, memory[kP_], prev_filters != nullptr),
                                x.open_bordered(place, in[kP_], 1, memory[kX_]),
                                place.open(grad_out, 0, memory[kOut_]),
                                place.open(grad_o, 0, memory[kO_])};
        for_blocks(grid, strip.first, strip.last,
                   [&]<int R>(int64_t row) { add_block<R>(row, in, plane); });
        if (strip.last == grid.shape.height)
          write(plane, table.record(place.b, place.group * grid.planes));
      });
    });
  }
};

template <class A, bool kPixelLanes>
using MomentsPass = PlaneSumsPass<A, kPixelLanes, false>;
template <class A, bool kPixelLanes>
using GradientSumsPass = PlaneSumsPass<A, kPixelLanes, true>;

// ---- stencil -----------------------------------------------------------------------------------

// Per-plane coefficients of o = a u + lam (d p + e), arrays [B, C] and lam [C].
template <class A>
struct Mixture {
  const A *v_filters, *prev_filters;  // of a FilterBank; prev_filters may be null
  const A *a, *d, *lam;               // d null: 1

  // Whether there is more to p's filter than its centre.
  bool convolves_p() const { return prev_filters != nullptr; }

  // The two filters of o = x_filter * x + p_filter * p.
  template <bool kPixelLanes>
  void filters(const Grid<A>& grid, int64_t b, int64_t group, bool has_p,
               Filter<A, kPixelLanes>& x_filter, Filter<A, kPixelLanes>& p_filter) const {
    using Filter = dla::DLA_ISA::Filter<A, kPixelLanes>;
    const int64_t row = b * grid.shape.channels;
    x_filter.assign(v_filters, group, Filter::number(a + row, grid, group));
    if (!has_p) return;
    const typename Filter::Tap weight = Filter::number(lam, grid, group);
    if (prev_filters != nullptr)
      p_filter.assign(prev_filters, group, weight);
    else
      p_filter = {};
    p_filter.taps[4] += d == nullptr ? weight : weight * Filter::number(d + row, grid, group);
  }
};

template <class A, bool kPixelLanes>
struct StencilPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  using In = typename Place::In;
  using Out = typename Place::Out;
  const Grid<A>& grid;
  InputMap<A> x;
  Feature p;
  OutFeature out, o;  // o may be null
  Mixture<A> mixture;
  const A *scale, *shift;  // [B, C]
  bool residual;
  int64_t part;  // elements of a map to the samples that are next, which are fetched meanwhile; or 0

  struct Plane {
    Filter<A, kPixelLanes> x_filter, p_filter;
    V scale, shift;
    Mask<A> channels;
  };

  void begin(int64_t b, int64_t group, Plane& plane) const {
    mixture.filters(grid, b, group, static_cast<bool>(p), plane.x_filter, plane.p_filter);
    plane.scale = channel_vector(scale + b * grid.shape.channels, grid, group);
    plane.shift = channel_vector(shift + b * grid.shape.channels, grid, group);
    plane.channels = grid.channel_mask(group);
  }

  template <int R>
  void blocks(int64_t first, int64_t last, const Plane& plane, const In& x_in, const In& p_in,
              const Out& to, const Out& o_to, const Upcoming (&later)[2]) const {
    const FilterVectors<A> x_filter(plane.x_filter), p_filter(plane.p_filter);
    for (int64_t row = first; row < last; row += R)
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Taps<A> taps = grid.taps(row, R, k, plane.channels);
        const Mask<A> own = taps.own();
        if (!grid.foreseen) {
          prefetch_block<R, kPixelLanes>(x_in.next, row, k);
          if (p) prefetch_block<R, kPixelLanes>(p_in.next, row, k);
        }
        for (const Upcoming& map : later)
          if (map.origin != nullptr) prefetch_block<R, kPixelLanes>(map, row, k);
        V acc[R];
        fill_block(acc, V{});
        stencil_block<R, A>(x_in, row, k, taps, x_filter, acc);
        if (p) filter_block<R, A>(p_in, row, k, taps, p_filter, mixture.convolves_p(), acc);
        if (o) store_block<R, A>(o_to, row, k, own, acc);
        auto x_rows = x_in.rows(row, k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          V base = plane.shift;
          if (residual) base += load_masked<A>(x_rows.next(), own);
          acc[r] = plane.scale * acc[r] + base;
        }
        store_block<R, A>(to, row, k, own, acc);
      }
  }

  void run(int threads) const {
    const Units<A> units(grid);
    parallel_for(threads, units.count(), [&](int64_t unit) {
      thread_local Arena arena;
      const int64_t elements = grid.strip_elements(1);
      arena.reserve(4 * Arena::bytes_of<A>(elements));
      A* memory[4];
      for (A*& m : memory) m = arena.take<A>(elements);
      Plane planes[kMostTogether];
      for_strips<kPixelLanes>(units, grid, unit, [&](const Place& place, int64_t slot) {
        Plane& plane = planes[slot];
        if (place.strip.first == 0) begin(place.b, place.group, plane);
        const In p_in = place.open_bordered(p, 1, memory[1], mixture.convolves_p());
        const In x_in = x.open_bordered(place, p_in, 1, memory[0]);
        const Out to = place.open(out, memory[2]);
        const Out o_to = o ? place.open(o, memory[3]) : Out{};
        Upcoming later[2] = {};
        if (part != 0) later[0] = place.further_on(x.feature, part);
        if (part != 0 && p) later[1] = place.further_on(p, part);
        for_ranges(grid, place.strip.first, place.strip.last,
                   [&]<int R>(int64_t first, int64_t last) {
                     blocks<R>(first, last, plane, x_in, p_in, to, o_to, later);
                   });
        place.close(out, memory[2]);
        if (o) place.close(o, memory[3]);
      });
    });
  }
};

// ---- gradients ---------------------------------------------------------------------------------

template <class A, bool kPixelLanes>
struct GradientsPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  using In = typename Place::In;
  using Out = typename Place::Out;
  const Grid<A>& grid;
  InputMap<A> x;  // joined: dx is the branch's gradient
  Feature p, grad_out, grad_o;
  OutFeature dx, dp;  // dp may be null
  Mixture<A> mixture;
  // g = out_scale grad_out + o_scale o + offset + grad_o; o_scale and offset are null where g does
  // not depend on o.
  const A* out_scale;             // [B, C]
  const A *o_scale, *offset;      // [C]
  const A *x_offset, *p_offset;   // [B, C]: what pooling adds to every pixel of dx and dp
  bool residual;
  A* partial;  // [batch_units, 18, C]: sum_b a R_{g,x} and sum_b R_{g,p}
  const Units<A>& units;
  const BranchGradients<A>* branch;  // what is to follow where the branch is normed; else null

  enum { kP_, kX_, kOut_, kO_, kInputs };

  // Sums that the gradient of a normed branch needs: of dx, and of dx (z - mean).
  struct BranchSums {
    In z;
    V mean, alone, with_z;
  };

  struct Plane {
    Filter<A, kPixelLanes> x_filter, p_filter;
    V a, out_scale, o_scale, offset, x_offset, p_offset;
    BranchSums branch;
    Mask<A> channels;
  };

  void begin(int64_t b, int64_t group, Plane& c) const {
    const auto vector = [&](const A* values) {
      return values == nullptr ? V{} : channel_vector(values, grid, group);
    };
    const int64_t row = b * grid.shape.channels;
    mixture.filters(grid, b, group, static_cast<bool>(p), c.x_filter, c.p_filter);
    c.a = vector(mixture.a + row);
    c.out_scale = vector(out_scale + row);
    c.o_scale = vector(o_scale);
    c.offset = vector(offset);
    c.x_offset = vector(x_offset + row);
    c.p_offset = vector(p_offset == nullptr ? nullptr : p_offset + row);
    c.branch = {{}, vector(branch == nullptr ? nullptr : branch->mean), V{}, V{}};
    c.channels = grid.channel_mask(group);
  }

  // g of rows [first, last).
  template <int R>
  void form_g(int64_t first, int64_t last, const In (&in)[kInputs], const Plane& c,
              const Out& g_out) const {
    const FilterVectors<A> x_filter(c.x_filter), p_filter(c.p_filter);
    for (int64_t row = first; row < last; row += R)
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Taps<A> taps = grid.taps(row, R, k, c.channels);
        const Mask<A> own = taps.own();
        if (!grid.foreseen)
          for (const In& w : in)
            if (w) prefetch_block<R, kPixelLanes>(w.next, row, k);
        V g[R];
        fill_block(g, V{});
        if (o_scale != nullptr) {
          stencil_block<R, A>(in[kX_], row, k, taps, x_filter, g);
          if (p) filter_block<R, A>(in[kP_], row, k, taps, p_filter, mixture.convolves_p(), g);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) g[r] = c.o_scale * g[r] + c.offset;
        }
        if (grad_out) add_rows<R, A>(in[kOut_].rows(row, k), own, c.out_scale, g);
        if (grad_o) add_rows<R, A>(in[kO_].rows(row, k), own, splat(A(1)), g);
        store_block<R, A>(g_out, row, k, own, g);
      }
  }

  // Adds the correlations of g with a feature over rows [first, last), times a factor.
  template <int R>
  void correlate(int64_t first, int64_t last, const In& g_in, const In& feature,
                 const Plane& c, V factor, V* sums) const {
    V acc[9];
    fill_block(acc, V{});
    for (int64_t row = first; row < last; row += R)
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Taps<A> taps = grid.taps(row, R, k, c.channels);
        auto g_rows = g_in.rows(row, k);
        V g[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) g[r] = load_masked<A>(g_rows.next(), taps.own());
        correlate_block<R, A>(feature, row, k, taps, g, acc);
      }
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) sums[tap] += factor * acc[tap];
  }

  // Gradient of a feature over rows [first, last), through its whole filter or the centre alone: what
  // `passed` holds is added if it is not null; then it is zero where a not null `rectified` is not
  // positive, and joins not null `sums`.
  template <int R>
  void spread(int64_t first, int64_t last, const In& g_in, const Filter<A, kPixelLanes>& filter,
              bool whole, V offset, const In* passed, const In* rectified, BranchSums* sums,
              const Plane& c, const Out& to) const {
    const FilterVectors<A> flipped(filter, true);
    for (int64_t row = first; row < last; row += R)
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Taps<A> taps = grid.taps(row, R, k, c.channels);
        const Mask<A> own = taps.own();
        V acc[R];
        fill_block(acc, offset);
        filter_block<R, A>(g_in, row, k, taps, flipped, whole, acc);
        if (passed != nullptr) add_rows<R, A>(passed->rows(row, k), own, splat(A(1)), acc);
        if (rectified != nullptr) {
          auto x_rows = rectified->rows(row, k);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            acc[r] = load_masked<A>(x_rows.next(), own) <= A(0) ? V{} : acc[r];
        }
        if (sums != nullptr) {
          auto z_rows = sums->z.rows(row, k);
          V alone{}, with_z{};
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const V d = keep<A>(own, acc[r]);
            alone += d;
            with_z += d * (load_masked<A>(z_rows.next(), own) - sums->mean);
          }
          sums->alone += alone;
          sums->with_z += with_z;
        }
        store_block<R, A>(to, row, k, own, acc);
      }
  }

  void spread_rows(const Strip& strip, const In& g, const Filter<A, kPixelLanes>& filter,
                   bool whole, V offset, const In* passed, const In* rectified, BranchSums* sums,
                   const Plane& c, const Out& to) const {
    for_ranges(grid, strip.first, strip.last, [&]<int R>(int64_t first, int64_t last) {
      spread<R>(first, last, g, filter, whole, offset, passed, rectified, sums, c, to);
    });
  }

  struct Memory {
    A *inputs[kInputs], *g, *dx, *dp, *z;
    V* weight_sums;  // [groups of a unit][18]
  };

  Memory reserve(Arena& arena, int64_t groups) const {
    const int64_t elements = grid.strip_elements(2);
    arena.reserve(8 * Arena::bytes_of<A>(elements) + Arena::bytes_of<V>(18 * groups));
    Memory m;
    for (A*& input : m.inputs) input = arena.take<A>(elements);
    m.g = arena.take<A>(elements);
    m.dx = arena.take<A>(elements);
    m.dp = x.join ? arena.take<A>(elements) : m.dx;
    m.z = arena.take<A>(elements);
    m.weight_sums = arena.take<V>(18 * groups);
    std::fill_n(m.weight_sums, 18 * groups, V{});
    return m;
  }

  void visit(const Place& place, Plane& c, const Memory& memory, V* weight_sums) const {
    const Strip& strip = place.strip;
    const In in[kInputs] = {
        place.open_bordered(p, 2, memory.inputs[kP_], mixture.convolves_p()),
        x.open_bordered(place, in[kP_], 2, memory.inputs[kX_]),
        place.open(grad_out, 1, memory.inputs[kOut_]), place.open(grad_o, 1, memory.inputs[kO_])};
    // g is needed one row beyond the strip.
    const Strip around{std::max<int64_t>(0, strip.first - 1),
                       std::min(grid.shape.height, strip.last + 1)};
    place.clear_border(memory.g, 1);
    const Out g_out = place.on_memory(memory.g, strip.first - 1);
    const In g = g_out;
    for_ranges(grid, around.first, around.last, [&]<int R>(int64_t first, int64_t last) {
      form_g<R>(first, last, in, c, g_out);
    });
    for_ranges(grid, strip.first, strip.last, [&]<int R>(int64_t first, int64_t last) {
      correlate<R>(first, last, g, in[kX_], c, c.a, weight_sums);
      if (p && mixture.convolves_p())
        correlate<R>(first, last, g, in[kP_], c, splat(A(1)), weight_sums + 9);
    });
    const Out x_to = place.open(dx, memory.dx);
    const In dx_in = x_to;
    if (branch != nullptr) c.branch.z = place.open(x.feature, 0, memory.z);
    spread_rows(strip, g, c.x_filter, true, c.x_offset,
                residual && grad_out ? &in[kOut_] : nullptr, x.join ? &in[kX_] : nullptr,
                branch == nullptr ? nullptr : &c.branch, c, x_to);
    place.close(dx, memory.dx);
    if (branch != nullptr && strip.last == grid.shape.height) {
      A* sums = branch->sums + place.b * grid.shape.channels;
      store_channel_sums(sums, c.branch.alone, grid, place.group);
      store_channel_sums(sums + grid.shape.planes(), c.branch.with_z, grid, place.group);
    }
    if (!dp) return;
    spread_rows(strip, g, c.p_filter, mixture.convolves_p(), c.p_offset,
                x.join ? &dx_in : nullptr, nullptr, nullptr, c, place.open(dp, memory.dp));
    place.close(dp, memory.dp);
  }

  void run(int threads) const {
    parallel_for(threads, units.count(), [&](int64_t unit) {
      thread_local Arena arena;
      const Memory memory = reserve(arena, units.groups_per_unit);
      const int64_t first_group = units.first_group(unit);
      Plane planes[kMostTogether];
      for_strips<kPixelLanes>(units, grid, unit, [&](const Place& place, int64_t slot) {
        if (place.strip.first == 0) begin(place.b, place.group, planes[slot]);
        visit(place, planes[slot], memory, memory.weight_sums + 18 * (place.group - first_group));
      });
      A* rows = partial + unit / units.group_units * 18 * grid.shape.channels;
      const int64_t last_group = std::min(grid.groups, first_group + units.groups_per_unit);
      for (int64_t group = first_group; group < last_group; ++group)
        for (int f = 0; f < 18; ++f)
          store_channel_sums(rows + f * grid.shape.channels,
                             memory.weight_sums[18 * (group - first_group) + f], grid, group);
      if (branch != nullptr && units.have_whole_batches())
        branch->template finish_unit<kPixelLanes>(units, unit);
    });
  }
};

}  // namespace dla::DLA_ISA
