// The passes of light_attention over whole feature maps. With u = DW_v(x), e = DW_prev(p):
//   moments    per plane: the pooled values, sums and co-moments of u, p, e and their products
//              with arriving gradients. All that statistics and gate gradients need.
//   stencil    o = a u + lam (d p + e), out = [x] + scale o + shift.
//   gradients  g = dL/do formed on the fly, then dx, dp and the correlations that make the weight
//              gradients.
// o is never stored unless asked for; every pass recomputes it from x and p.
#pragma once

#include <vector>

#include "common/parallel.h"
#include "common/stencil.h"
#include "ops/light_attention/plane_table.h"

namespace dla::DLA_ISA {

// Work is cut into units of some planes by some samples, whatever the number of threads: a unit's
// result depends on nothing else, so results are the same for any number of threads.
template <class A>
struct Units {
  int64_t groups_per_unit, samples_per_unit, group_units, batch_units;

  Units(const MapShape& s, const Tiling<A>& t) {
    const int64_t group_bytes = s.pixels() * t.planes * static_cast<int64_t>(sizeof(A));
    groups_per_unit = std::clamp<int64_t>(16 * 1024 / group_bytes, 1, t.groups);
    group_units = ceil_div(t.groups, groups_per_unit);
    // Enough units to share out; few, since each leaves its own partial weight gradients.
    samples_per_unit = ceil_div(s.batch, std::min(s.batch, ceil_div(32, group_units)));
    batch_units = ceil_div(s.batch, samples_per_unit);
  }
  int64_t count() const { return group_units * batch_units; }
};

// Calls body(group, b, next) over all groups and samples of a unit; `next` is the first strip of
// the planes that follow.
template <class A, class Body>
inline void for_planes(const Units<A>& units, const MapShape& s, const Tiling<A>& t, int64_t unit,
                       const Body& body) {
  const int64_t first_sample = unit / units.group_units * units.samples_per_unit;
  const int64_t first_group = unit % units.group_units * units.groups_per_unit;
  const int64_t last_sample = std::min(s.batch, first_sample + units.samples_per_unit);
  const int64_t last_group = std::min(t.groups, first_group + units.groups_per_unit);
  for (int64_t b = first_sample; b < last_sample; ++b) {
    for (int64_t group = first_group; group < last_group; ++group) {
      Strip next{b, group + 1, 0, t.strip_rows};
      if (next.group == last_group) {
        next.group = first_group;
        next.b = std::min(b + 1, last_sample - 1);
      }
      body(group, b, next);
    }
  }
}

// Calls body(strip, following) over the strips of a group of planes, top to bottom.
template <class A, class Body>
inline void for_strips(const MapShape& s, const Tiling<A>& t, int64_t group, int64_t b,
                       const Strip& next_plane, const Body& body) {
  const auto strip_at = [&](int64_t first) {
    return Strip{b, group, first, std::min(s.height, first + t.strip_rows)};
  };
  for (int64_t first = 0; first < s.height; first += t.strip_rows) {
    const Strip strip = strip_at(first);
    body(strip, strip.last < s.height ? strip_at(strip.last) : next_plane);
  }
}

// 3x3 filters of a group's channels: one vector per tap.
template <class A>
inline void load_filter(const A* weight, const MapShape& s, const Tiling<A>& t, int64_t group,
                        Vec<A> (&filter)[9]) {
  const int lanes = t.lanes(s, group);
  for (int tap = 0; tap < 9; ++tap) {
    if (!t.channel_lanes) {
      filter[tap] = splat(weight[group * 9 + tap]);
      continue;
    }
    filter[tap] = Vec<A>{};
    for (int lane = 0; lane < lanes; ++lane)
      filter[tap][lane] = weight[(group * t.planes + lane) * 9 + tap];
  }
}

// ---- moments -----------------------------------------------------------------------------------

template <class A>
struct MomentsPass {
  using V = Vec<A>;
  const MapShape& shape;
  const Tiling<A>& tiling;
  Feature x, p, grad_out, grad_o;
  const A *v_weight, *prev_weight;
  PlaneTable<A> table;

  static std::size_t scratch_bytes(const Tiling<A>& t) {
    return 4 * Arena::bytes_of<A>(t.tile_elements(1));
  }

  template <int R>
  void block(int64_t row, Tile<A> (&tiles)[4], const V (&v_filter)[9], const V (&e_filter)[9],
             const V (&shift)[3], V (&sums)[kSums]) const {
    const int64_t stride = tiling.row_stride;
    for (int k = 0; k < tiling.vectors; ++k) {
      const V mask = tiling.mask(k);
      const A* at[4];
      for (int f = 0; f < 4; ++f) {
        at[f] = tiles[f].row(row) + k * kLanes<A>;
        tiles[f].next.advance(R);
      }
      V u[R] = {}, q[R] = {}, e[R] = {};
      stencil_block<R, A>(at[0], stride, tiling.pixel_stride, v_filter, u);
      // Each sum is formed over the block's rows first: short chains of additions keep float sums
      // over large planes accurate.
      V first = {}, second = {}, third = {}, fourth = {};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        u[r] = (u[r] - shift[0]) * mask;
        first += load(at[0] + r * stride);
        second += u[r];
        third += u[r] * u[r];
      }
      sums[kX] += first, sums[kU] += second, sums[kUU] += third;
      if (p) {
        first = second = third = V{};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          q[r] = (load(at[1] + r * stride) - shift[1]) * mask;
          first += q[r];
          second += q[r] * q[r];
          third += u[r] * q[r];
        }
        sums[kP] += first, sums[kPP] += second, sums[kUP] += third;
      }
      if (prev_weight != nullptr) {
        stencil_block<R, A>(at[1], stride, tiling.pixel_stride, e_filter, e);
        first = second = third = V{};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          e[r] = (e[r] - shift[2]) * mask;
          first += e[r];
          second += e[r] * e[r];
          third += q[r] * e[r];
          fourth += u[r] * e[r];
        }
        sums[kE] += first, sums[kEE] += second, sums[kPE] += third, sums[kUE] += fourth;
      }
      if (grad_out) products<R>(at[2], u, q, e, sums + kG);
      if (grad_o) products<R>(at[3], u, q, e, sums + kD);
    }
  }

  // Adds the sums of grad and of its products with u, p and e.
  template <int R>
  void products(const A* grad, const V (&u)[R], const V (&q)[R], const V (&e)[R], V* sums) const {
    V alone = {}, with_u = {}, with_p = {}, with_e = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V g = load(grad + r * tiling.row_stride);
      alone += g;
      with_u += g * u[r];
      with_p += g * q[r];
      with_e += g * e[r];
    }
    sums[0] += alone, sums[1] += with_u, sums[2] += with_p, sums[3] += with_e;
  }

  // Value of a feature, or of its stencil, at the middle pixel of the strip in the tile.
  V at_middle(const Tile<A>& tile, int64_t row, const V* filter) const {
    const A* at = tile.row(row) + shape.width / 2 * tiling.pixel_stride;
    V value[1] = {};
    if (filter != nullptr)
      stencil_block<1, A>(at, tiling.row_stride, tiling.pixel_stride, filter, value);
    else
      value[0] = load(at);
    return tiling.channel_lanes ? value[0] : splat<A>(value[0][0]);
  }

  void plane(int64_t group, int64_t b, const Strip& next_plane, Tile<A> (&tiles)[4]) const {
    const Feature features[4] = {x, p, grad_out, grad_o};
    V v_filter[9], e_filter[9], shift[3] = {}, total[kSums] = {};
    load_filter(v_weight, shape, tiling, group, v_filter);
    if (prev_weight != nullptr) load_filter(prev_weight, shape, tiling, group, e_filter);
    for_strips(shape, tiling, group, b, next_plane, [&](const Strip& strip, const Strip& next) {
      for (int f = 0; f < 4; ++f)
        if (features[f])
          load_rows(tiles[f], features[f], shape, tiling, strip, f < 2 ? 1 : 0, next);
      if (strip.first == 0) {
        const int64_t middle = strip.last / 2;
        shift[0] = at_middle(tiles[0], middle, v_filter);
        if (p) shift[1] = at_middle(tiles[1], middle, nullptr);
        if (prev_weight != nullptr) shift[2] = at_middle(tiles[1], middle, e_filter);
      }
      V sums[kSums] = {};
      for_row_blocks(strip.first, strip.last, [&]<int R>(int64_t row) {
        block<R>(row, tiles, v_filter, e_filter, shift, sums);
      });
      for (int f = 0; f < kSums; ++f) total[f] += sums[f];
    });
    write(total, shift, table.record(b, group * tiling.planes));
  }

  void write(V (&sums)[kSums], const V (&shift)[3], A* record) const {
    if (tiling.channel_lanes) {
      for (int f = 0; f < kSums; ++f) store(record + f * kLanes<A>, sums[f]);
      for (int f = 0; f < 3; ++f) store(record + (kShiftU + f) * kLanes<A>, shift[f]);
    } else {
      A totals[round_up(kSums, kLanes<A>)] = {};
      lane_sums<A>(sums, grad_o ? kSums : grad_out ? kD : kG, totals);
      for (int f = 0; f < kSums; ++f) record[f * kLanes<A>] = totals[f];
      for (int f = 0; f < 3; ++f) record[(kShiftU + f) * kLanes<A>] = shift[f][0];
    }
  }

  void run(int threads) const {
    const Units<A> units(shape, tiling);
    parallel_for(threads, units.count(), [&](int64_t unit) {
      thread_local Arena arena;
      arena.reserve(scratch_bytes(tiling));
      Tile<A> tiles[4];
      for (Tile<A>& tile : tiles) tile = new_tile(arena, tiling, 1);
      for_planes(units, shape, tiling, unit,
                 [&](int64_t group, int64_t b, const Strip& next) { plane(group, b, next, tiles); });
    });
  }
};

// ---- stencil -----------------------------------------------------------------------------------

// Per-plane coefficients of o = a u + lam (d p + e), arrays [B, C] and lam [C].
template <class A>
struct Mixture {
  const A *v_weight, *prev_weight;  // [C, 3, 3]; prev_weight may be null
  const A *a, *d, *lam;             // d null: 1

  // The two filters of o = x_filter * x + p_filter * p.
  void filters(const MapShape& s, const Tiling<A>& t, int64_t b, int64_t group, bool has_p,
               Vec<A> (&x_filter)[9], Vec<A> (&p_filter)[9]) const {
    load_filter(v_weight, s, t, group, x_filter);
    const Vec<A> scale = channel_vector(a + b * s.channels, s, t, group);
    for (Vec<A>& tap : x_filter) tap *= scale;
    if (!has_p) return;
    const Vec<A> weight = channel_vector(lam, s, t, group);
    if (prev_weight != nullptr) {
      load_filter(prev_weight, s, t, group, p_filter);
      for (Vec<A>& tap : p_filter) tap *= weight;
    } else {
      for (Vec<A>& tap : p_filter) tap = Vec<A>{};
    }
    p_filter[4] += d == nullptr ? weight : weight * channel_vector(d + b * s.channels, s, t, group);
  }
};

template <class A>
struct StencilPass {
  using V = Vec<A>;
  const MapShape& shape;
  const Tiling<A>& tiling;
  Feature x, p;
  OutFeature out, o;  // o may be null
  Mixture<A> mixture;
  const A *scale, *shift;  // [B, C]
  bool residual;

  static std::size_t scratch_bytes(const Tiling<A>& t) {
    return 4 * Arena::bytes_of<A>(t.tile_elements(1));
  }

  template <int R>
  void block(int64_t row, Tile<A> (&tiles)[4], const V (&x_filter)[9], const V (&p_filter)[9],
             V scaled, V shifted) const {
    const int64_t stride = tiling.row_stride;
    for (int k = 0; k < tiling.vectors; ++k) {
      const int64_t offset = k * kLanes<A>;
      const A* x_at = tiles[0].row(row) + offset;
      tiles[0].next.advance(R);
      tiles[1].next.advance(R);
      V acc[R] = {};
      stencil_block<R, A>(x_at, stride, tiling.pixel_stride, x_filter, acc);
      if (p)
        stencil_block<R, A>(tiles[1].row(row) + offset, stride, tiling.pixel_stride, p_filter, acc);
      A* out_at = tiles[2].row(row) + offset;
      A* o_at = tiles[3].row(row) + offset;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V base = residual ? load(x_at + r * stride) + shifted : shifted;
        store(out_at + r * stride, scaled * acc[r] + base);
        if (o) store(o_at + r * stride, acc[r]);
      }
    }
  }

  void plane(int64_t group, int64_t b, const Strip& next_plane, Tile<A> (&tiles)[4]) const {
    V x_filter[9], p_filter[9];
    mixture.filters(shape, tiling, b, group, static_cast<bool>(p), x_filter, p_filter);
    const V scaled = channel_vector(scale + b * shape.channels, shape, tiling, group);
    const V shifted = channel_vector(shift + b * shape.channels, shape, tiling, group);
    for_strips(shape, tiling, group, b, next_plane, [&](const Strip& strip, const Strip& next) {
      load_rows(tiles[0], x, shape, tiling, strip, 1, next);
      if (p) load_rows(tiles[1], p, shape, tiling, strip, 1, next);
      tiles[2].first_row = tiles[3].first_row = strip.first;
      for_row_blocks(strip.first, strip.last, [&]<int R>(int64_t row) {
        block<R>(row, tiles, x_filter, p_filter, scaled, shifted);
      });
      store_rows(tiles[2], out, shape, tiling, strip);
      if (o) store_rows(tiles[3], o, shape, tiling, strip);
    });
  }

  void run(int threads) const {
    const Units<A> units(shape, tiling);
    parallel_for(threads, units.count(), [&](int64_t unit) {
      thread_local Arena arena;
      arena.reserve(scratch_bytes(tiling));
      Tile<A> tiles[4];
      for (Tile<A>& tile : tiles) tile = new_tile(arena, tiling, 1);
      for_planes(units, shape, tiling, unit,
                 [&](int64_t group, int64_t b, const Strip& next) { plane(group, b, next, tiles); });
    });
  }
};

// ---- gradients ---------------------------------------------------------------------------------

template <class A>
struct GradientsPass {
  using V = Vec<A>;
  const MapShape& shape;
  const Tiling<A>& tiling;
  Feature x, p, grad_out, grad_o;
  OutFeature dx, dp;  // dp may be null
  Mixture<A> mixture;
  // g = out_scale grad_out + o_scale o + offset + grad_o; o_scale and offset are null where g does
  // not depend on o.
  const A* out_scale;             // [B, C]
  const A *o_scale, *offset;      // [C]
  const A *x_offset, *p_offset;   // [B, C]: what pooling adds to every pixel of dx and dp
  bool residual;
  A* partial;  // [batch_units, 18, C]: sum_b a R_{g,x} and sum_b R_{g,p}

  enum { kTileX, kTileP, kTileOut, kTileO, kTileG, kTiles };

  static std::size_t scratch_bytes(const Tiling<A>& t, const Units<A>& units) {
    return kTiles * Arena::bytes_of<A>(t.tile_elements(2)) +
           Arena::bytes_of<V>(18 * units.groups_per_unit);
  }

  struct Plane {
    V x_filter[9], p_filter[9];
    V a, out_scale, o_scale, offset, x_offset, p_offset;
  };

  Plane plane_of(int64_t group, int64_t b) const {
    const auto vector = [&](const A* values) {
      return values == nullptr ? V{} : channel_vector(values, shape, tiling, group);
    };
    const int64_t row = b * shape.channels;
    Plane c;
    mixture.filters(shape, tiling, b, group, static_cast<bool>(p), c.x_filter, c.p_filter);
    c.a = vector(mixture.a + row);
    c.out_scale = vector(out_scale + row);
    c.o_scale = vector(o_scale);
    c.offset = vector(offset);
    c.x_offset = vector(x_offset + row);
    c.p_offset = vector(p_offset == nullptr ? nullptr : p_offset + row);
    return c;
  }

  // Every sweep over the strip prefetches one of the next strip's features, so that memory is
  // evenly busy.

  // g of rows [row, row + R), into its tile.
  template <int R>
  void form_g(int64_t row, Tile<A> (&tiles)[kTiles], const Plane& c) const {
    const int64_t stride = tiling.row_stride;
    for (int k = 0; k < tiling.vectors; ++k) {
      const int64_t at = k * kLanes<A>;
      tiles[kTileX].next.advance(R);
      V g[R] = {};
      if (o_scale != nullptr) {
        const V mask = tiling.mask(k);
        stencil_block<R, A>(tiles[kTileX].row(row) + at, stride, tiling.pixel_stride, c.x_filter, g);
        if (p)
          stencil_block<R, A>(tiles[kTileP].row(row) + at, stride, tiling.pixel_stride, c.p_filter,
                              g);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) g[r] = (c.o_scale * g[r] + c.offset) * mask;
      }
      if (grad_out) {
        const A* from = tiles[kTileOut].row(row) + at;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) g[r] += c.out_scale * load(from + r * stride);
      }
      if (grad_o) {
        const A* from = tiles[kTileO].row(row) + at;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) g[r] += load(from + r * stride);
      }
      A* to = tiles[kTileG].row(row) + at;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) store(to + r * stride, g[r]);
    }
  }

  // Adds the correlations of g with a feature over rows [row, row + R).
  template <int R>
  void correlate(int64_t row, const Tile<A>& g_tile, const Tile<A>& feature, Prefetch& prefetch,
                 V (&sums)[9]) const {
    V acc[9];
    std::copy(sums, sums + 9, acc);
    for (int k = 0; k < tiling.vectors; ++k) {
      const int64_t at = k * kLanes<A>;
      prefetch.advance(R);
      V g[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) g[r] = load(g_tile.row(row) + at + r * tiling.row_stride);
      correlate_block<R, A>(feature.row(row) + at, tiling.row_stride, tiling.pixel_stride, g, acc);
    }
    std::copy(acc, acc + 9, sums);
  }

  // Gradient of a feature over rows [row, row + R), in place of the feature itself.
  template <int R>
  void spread(int64_t row, Tile<A> (&tiles)[kTiles], const V (&flipped)[9], V offset,
              bool add_out, const Tile<A>& result) const {
    const int64_t stride = tiling.row_stride;
    for (int k = 0; k < tiling.vectors; ++k) {
      const int64_t at = k * kLanes<A>;
      tiles[kTileO].next.advance(R);
      V acc[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] = offset;
      stencil_block<R, A>(tiles[kTileG].row(row) + at, stride, tiling.pixel_stride, flipped, acc);
      if (add_out) {
        const A* from = tiles[kTileOut].row(row) + at;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] += load(from + r * stride);
      }
      A* to = result.row(row) + at;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) store(to + r * stride, acc[r]);
    }
  }

  void spread_rows(const Strip& strip, Tile<A> (&tiles)[kTiles], const V (&filter)[9],
                   V offset, bool add_out, const Tile<A>& result) const {
    V flipped[9];
    std::reverse_copy(filter, filter + 9, flipped);
    for_row_blocks(strip.first, strip.last, [&]<int R>(int64_t row) {
      spread<R>(row, tiles, flipped, offset, add_out, result);
    });
  }

  // g of a strip and one row above and below it, zero outside the map.
  void form_g_rows(const Strip& strip, Tile<A> (&tiles)[kTiles], const Plane& c) const {
    Tile<A>& g = tiles[kTileG];
    g.first_row = strip.first - 1;
    if (strip.first == 0) detail::zero_row(g.row(-1), tiling);
    if (strip.last == shape.height) detail::zero_row(g.row(strip.last), tiling);
    for_row_blocks(std::max<int64_t>(0, strip.first - 1), std::min(shape.height, strip.last + 1),
                   [&]<int R>(int64_t row) { form_g<R>(row, tiles, c); });
  }

  void plane(int64_t group, int64_t b, const Strip& next_plane, Tile<A> (&tiles)[kTiles],
             V* weight_sums) const {
    const Feature features[4] = {x, p, grad_out, grad_o};
    const Plane c = plane_of(group, b);
    V x_sums[9] = {}, p_sums[9] = {};
    for_strips(shape, tiling, group, b, next_plane, [&](const Strip& strip, const Strip& next) {
      for (int f = 0; f < 4; ++f)
        if (features[f])
          load_rows(tiles[f], features[f], shape, tiling, strip, f < kTileOut ? 2 : 1, next);
      form_g_rows(strip, tiles, c);
      for_row_blocks(strip.first, strip.last, [&]<int R>(int64_t row) {
        correlate<R>(row, tiles[kTileG], tiles[kTileX], tiles[kTileP].next, x_sums);
        if (p) correlate<R>(row, tiles[kTileG], tiles[kTileP], tiles[kTileOut].next, p_sums);
      });
      spread_rows(strip, tiles, c.x_filter, c.x_offset, residual && grad_out, tiles[kTileX]);
      store_rows(tiles[kTileX], dx, shape, tiling, strip);
      if (dp) {
        spread_rows(strip, tiles, c.p_filter, c.p_offset, false, tiles[kTileP]);
        store_rows(tiles[kTileP], dp, shape, tiling, strip);
      }
    });
    for (int tap = 0; tap < 9; ++tap) {
      weight_sums[tap] += c.a * x_sums[tap];
      weight_sums[9 + tap] += p_sums[tap];
    }
  }

  void run(int threads) const {
    const Units<A> units(shape, tiling);
    parallel_for(threads, units.count(), [&](int64_t unit) {
      thread_local Arena arena;
      arena.reserve(scratch_bytes(tiling, units));
      Tile<A> tiles[kTiles];
      for (Tile<A>& tile : tiles) tile = new_tile(arena, tiling, 2);
      V* sums = arena.take<V>(18 * units.groups_per_unit);
      std::fill_n(sums, 18 * units.groups_per_unit, V{});
      const int64_t first_group = unit % units.group_units * units.groups_per_unit;
      for_planes(units, shape, tiling, unit, [&](int64_t group, int64_t b, const Strip& next) {
        plane(group, b, next, tiles, sums + 18 * (group - first_group));
      });
      A* rows = partial + unit / units.group_units * 18 * shape.channels;
      const int64_t last_group = std::min(tiling.groups, first_group + units.groups_per_unit);
      for (int64_t group = first_group; group < last_group; ++group)
        for (int f = 0; f < 18; ++f)
          store_channel_sums(rows + f * shape.channels, sums[18 * (group - first_group) + f], shape,
                             tiling, group);
    });
  }
};

}  // namespace dla::DLA_ISA
