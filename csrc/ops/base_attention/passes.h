// The passes of base_attention over whole feature maps, with o = sum_t w_t v_t:
//   value            v = DW(x) and the sums of x and v;
//   moments          mean and centred square sum of o;
//   output           out = [x +] drop [relu](scale o + shift);
//   norm gradients   sums of G' and G' o, G' = drop grad_out 1[scale o + shift > 0];
//   mix gradients    g = dL/do, and the sums of g v_t;
//   value gradients  dv, a weighted sum of g and what arrives from later layers; from it dx and the
//                    gradient of DW's weight.
// o is never stored, nor is the layer's own value read: every pass forms them from x and the values
// of the earlier layers, in the compute type.
#pragma once

#include "common/moments.h"
#include "common/stencil.h"
#include "common/units.h"

namespace dla::DLA_ISA {

// What a pass leaves behind: a few sums per strip of each plane, to be added up in double.
template <class A>
struct StripSums {
  A* data;  // [B, strips, fields, C]
  int64_t fields, strip_rows, strips, channels;

  StripSums(A* data, int64_t fields, const Grid<A>& grid)
      : data(data), fields(fields), strip_rows(grid.strip_rows), strips(strips_of(grid)),
        channels(grid.shape.channels) {}
  static int64_t strips_of(const Grid<A>& grid) {
    return ceil_div(grid.shape.height, grid.strip_rows);
  }
  static int64_t elements(int64_t fields, const Grid<A>& grid) {
    return fields * strips_of(grid) * grid.shape.planes();
  }

  A* row(int64_t b, int64_t strip, int64_t field) const {
    return data + ((b * strips + strip) * fields + field) * channels;
  }
  template <class Place>
  void put(const Place& place, int64_t field, Vec<A> v) const {
    store_channel_sums(row(place.b, place.strip.first / strip_rows, field), v, place.grid,
                       place.group);
  }
  Doubles total(int64_t b, int64_t field, const ChannelLanes& c) const {
    Doubles sum{};
    for (int64_t strip = 0; strip < strips; ++strip) sum += c.load(row(b, strip, field));
    return sum;
  }
};

// Calls visit(place, arena) for all strips of all planes, shared out among the threads.
template <bool kPixelLanes, class A, class Visit>
void for_places(int threads, const Grid<A>& grid, const Visit& visit) {
  const Units<A> units(grid);
  parallel_for(threads, units.count(), [&](int64_t unit) {
    thread_local Arena arena;
    for_strips<kPixelLanes>(units, grid, unit, [&](const Place<A, kPixelLanes>& place, int64_t) {
      visit(place, arena);
    });
  });
}

// Calls visit(place, arena) of a pass for all of them.
template <template <class, bool> class Pass, class A, class... Fields>
void visit_places(int threads, const Grid<A>& grid, const Fields&... fields) {
  with_lanes(grid, [&](auto fixed) {
    const Pass<A, fixed> pass{grid, fields...};
    for_places<fixed>(threads, grid, [&](const auto& place, Arena& arena) {
      pass.visit(place, arena);
    });
  });
}

// A weighted sum of maps. The weights are [B, C]; null: 1.
template <class A>
struct Terms {
  std::vector<Feature> maps;
  std::vector<const A*> weights;

  int64_t count() const { return static_cast<int64_t>(maps.size()); }
  void add(Feature map, const A* weight) {
    maps.push_back(map);
    weights.push_back(weight);
  }
};

// Its terms at a place.
template <class A, bool kPixelLanes>
struct PlacedTerms {
  using V = Vec<A>;
  using In = Window<const A, kPixelLanes>;
  int64_t count;
  V* weights;
  In* maps;

  static std::size_t bytes(const Terms<A>& terms, const Grid<A>& grid, int64_t halo) {
    const std::size_t each = Arena::bytes_of<A>(grid.strip_elements(halo));
    return static_cast<std::size_t>(terms.count()) * each + Arena::bytes_of<V>(terms.count()) +
           Arena::bytes_of<In>(terms.count());
  }

  PlacedTerms(const Terms<A>& terms, const Place<A, kPixelLanes>& place, int64_t halo, Arena& arena)
      : count(terms.count()), weights(arena.take<V>(count)), maps(arena.take<In>(count)) {
    const Grid<A>& grid = place.grid;
    const int64_t row = place.b * grid.shape.channels, elements = grid.strip_elements(halo);
    for (std::size_t t = 0; t < terms.maps.size(); ++t) {
      const A* weight = terms.weights[t];
      weights[t] =
          weight == nullptr ? splat(A(1)) : channel_vector(weight + row, grid, place.group);
      maps[t] = place.open(terms.maps[t], halo, arena.take<A>(elements));
    }
  }

  // sum[r] += the terms at row + r.
  template <int R>
  inline __attribute__((always_inline)) void add(int64_t row, int64_t k, Mask<A> own,
                                                 V (&sum)[R]) const {
    for (int64_t t = 0; t < count; ++t) {
      auto rows = maps[t].rows(row, k);
      prefetch_block<R, kPixelLanes>(maps[t].next, row, k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sum[r] += weights[t] * load_masked<A>(rows.next(), own);
    }
  }
};

// A map that a filter is applied to, at a place.
template <class A, bool kPixelLanes>
struct PlacedFilter {
  Filter<A, kPixelLanes> filter;
  Window<const A, kPixelLanes> map;

  static std::size_t bytes(const Grid<A>& grid) {
    return Arena::bytes_of<A>(grid.strip_elements(1));
  }

  PlacedFilter(const A* filters, Feature x, const Place<A, kPixelLanes>& place, Arena& arena)
      : filter(filters, place.group),
        map(place.open_bordered(x, 1, arena.take<A>(place.grid.strip_elements(1)))) {}

  // `vectors` are those of the filter.
  template <int R>
  inline __attribute__((always_inline)) void apply(int64_t row, int64_t k, const Taps<A>& taps,
                                                   const FilterVectors<A>& vectors,
                                                   Vec<A> (&v)[R]) const {
    fill_block(v, Vec<A>{});
    prefetch_block<R, kPixelLanes>(map.next, row, k);
    stencil_block<R, A>(map, row, k, taps, vectors, v);
  }
};

// ---- value -------------------------------------------------------------------------------------

template <class A, bool kPixelLanes>
struct ValuePass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  const Grid<A>& grid;
  Feature x;
  OutFeature v;  // may be null
  const A* v_filters;
  StripSums<A> sums;
  enum { kX, kV, kSums };

  void visit(const Place& place, Arena& arena) const {
    const Mask<A> channels = grid.channel_mask(place.group);
    const int64_t elements = grid.strip_elements(0);
    arena.reserve(PlacedFilter<A, kPixelLanes>::bytes(grid) + Arena::bytes_of<A>(elements));
    const PlacedFilter<A, kPixelLanes> own(v_filters, x, place, arena);
    A* memory = arena.take<A>(elements);
    const typename Place::Out to =
        v ? place.open(v, memory) : place.on_memory(memory, place.strip.first);
    V x_sum = {}, v_sum = {};
    for_filtered_blocks(grid, place.strip.first, place.strip.last, own.filter,
                        [&]<int R>(int64_t row, const FilterVectors<A>& filter) {
                          block<R>(row, filter, channels, own, to, x_sum, v_sum);
                        });
    if (v) place.close(v, memory);
    sums.put(place, kX, x_sum);
    sums.put(place, kV, v_sum);
  }

  template <int R>
  void block(int64_t row, const FilterVectors<A>& filter, Mask<A> channels,
             const PlacedFilter<A, kPixelLanes>& own, const typename Place::Out& to, V& x_sum,
             V& v_sum) const {
    V of_x = {}, of_v = {};  // of this block: short chains of additions keep float sums accurate
    for (int64_t k = 0; k < grid.vectors; ++k) {
      const Taps<A> taps = grid.taps(row, R, k, channels);
      const Mask<A> inside = taps.own();
      V value[R];
      own.template apply<R>(row, k, taps, filter, value);
      store_block<R, A>(to, row, k, inside, value);
      auto x_rows = own.map.rows(row, k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        of_x += load_masked<A>(x_rows.next(), inside);
        of_v += keep<A>(inside, value[r]);
      }
    }
    x_sum += of_x;
    v_sum += of_v;
  }
};

// ---- the weighted sum --------------------------------------------------------------------------

// What o is made of.
template <class A>
struct ValueMix {
  Feature x;
  const A* v_filters;
  const A* own_weight;  // [B, C]
  Terms<A> earlier;
};

// o at a place.
template <class A, bool kPixelLanes>
struct PlacedMix {
  using V = Vec<A>;
  PlacedFilter<A, kPixelLanes> own;
  V own_weight;
  PlacedTerms<A, kPixelLanes> earlier;
  Mask<A> channels;

  static std::size_t bytes(const ValueMix<A>& mixture, const Grid<A>& grid) {
    return PlacedFilter<A, kPixelLanes>::bytes(grid) +
           PlacedTerms<A, kPixelLanes>::bytes(mixture.earlier, grid, 0);
  }

  PlacedMix(const ValueMix<A>& mixture, const Place<A, kPixelLanes>& place, Arena& arena)
      : own(mixture.v_filters, mixture.x, place, arena),
        own_weight(channel_vector(mixture.own_weight + place.b * place.grid.shape.channels,
                                  place.grid, place.group)),
        earlier(mixture.earlier, place, 0, arena),
        channels(place.grid.channel_mask(place.group)) {}

  template <int R>
  inline __attribute__((always_inline)) void apply(int64_t row, int64_t k, const Taps<A>& taps,
                                                   const FilterVectors<A>& filter,
                                                   V (&o)[R]) const {
    own.template apply<R>(row, k, taps, filter, o);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) o[r] *= own_weight;
    earlier.template add<R>(row, k, taps.own(), o);
  }
};

// Per strip: sums of o and of its square, both shifted by the value of o at one pixel. Raw float
// sums of squares lose the variance when the mean is large.
template <class A, bool kPixelLanes>
struct MixMomentsPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  const Grid<A>& grid;
  const ValueMix<A>& mixture;
  StripSums<A> sums;
  enum { kShift, kO, kSquare, kSums };

  void visit(const Place& place, Arena& arena) const {
    arena.reserve(PlacedMix<A, kPixelLanes>::bytes(mixture, grid));
    const PlacedMix<A, kPixelLanes> mix(mixture, place, arena);
    const V shift = first_pixel(mix, place.strip.first);
    V alone = {}, squared = {};
    for_filtered_blocks(grid, place.strip.first, place.strip.last, mix.own.filter,
                        [&]<int R>(int64_t row, const FilterVectors<A>& filter) {
                          block<R>(row, filter, mix, shift, alone, squared);
                        });
    // put() adds the lanes up where they share a plane.
    sums.put(place, kShift, kPixelLanes ? keep<A>(first_lane(), shift) : shift);
    sums.put(place, kO, alone);
    sums.put(place, kSquare, squared);
  }

  static Mask<A> first_lane() {
    return mask_where<A>([](int lane) { return lane == 0; });
  }

  // o at the strip's first pixel, in all lanes that share a plane.
  V first_pixel(const PlacedMix<A, kPixelLanes>& mix, int64_t row) const {
    V o[1];
    mix.template apply<1>(row, 0, grid.taps(row, 1, 0, mix.channels),
                          FilterVectors<A>(mix.own.filter), o);
    return kPixelLanes ? splat<A>(o[0][0]) : o[0];
  }

  template <int R>
  void block(int64_t row, const FilterVectors<A>& filter, const PlacedMix<A, kPixelLanes>& mix,
             V shift, V& alone, V& squared) const {
    V of_o = {}, of_square = {};
    for (int64_t k = 0; k < grid.vectors; ++k) {
      const Taps<A> taps = grid.taps(row, R, k, mix.channels);
      V o[R];
      mix.template apply<R>(row, k, taps, filter, o);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V centred = subtract_masked<A>(o[r], shift, taps.own());
        of_o += centred;
        of_square += centred * centred;
      }
    }
    alone += of_o;
    squared += of_square;
  }
};

// ---- the branch behind o -----------------------------------------------------------------------

// drop [relu](scale o + shift).
template <class A>
struct NormBranch {
  const A *scale, *shift;  // [C]
  const A* drop;           // [B]; null: 1
  bool relu;
};

template <class A>
struct PlacedBranch {
  using V = Vec<A>;
  V scale, shift, drop;
  bool relu;

  template <class Place>
  PlacedBranch(const NormBranch<A>& branch, const Place& place)
      : scale(channel_vector(branch.scale, place.grid, place.group)),
        shift(channel_vector(branch.shift, place.grid, place.group)),
        drop(splat(branch.drop == nullptr ? A(1) : branch.drop[place.b])),
        relu(branch.relu) {}

  V forward(V o) const {
    const V z = scale * o + shift;
    const V rectified = z < A(0) ? V{} : z;  // NaN stays
    return drop * (relu ? rectified : z);
  }
  // Gradient of scale o + shift from that of out.
  V backward(V o, V grad) const {
    const V passed = drop * grad;
    return relu ? (scale * o + shift <= A(0) ? V{} : passed) : passed;
  }
};

template <class A, bool kPixelLanes>
struct OutputPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  const Grid<A>& grid;
  const ValueMix<A>& mixture;
  NormBranch<A> branch;
  bool residual;
  OutFeature out;

  void visit(const Place& place, Arena& arena) const {
    const int64_t elements = grid.strip_elements(0);
    arena.reserve(PlacedMix<A, kPixelLanes>::bytes(mixture, grid) +
                  Arena::bytes_of<A>(elements));
    const PlacedMix<A, kPixelLanes> mix(mixture, place, arena);
    const PlacedBranch<A> end(branch, place);
    A* memory = arena.take<A>(elements);
    const typename Place::Out to = place.open(out, memory);
    for_filtered_blocks(grid, place.strip.first, place.strip.last, mix.own.filter,
                        [&]<int R>(int64_t row, const FilterVectors<A>& filter) {
                          block<R>(row, filter, mix, end, to);
                        });
    place.close(out, memory);
  }

  template <int R>
  void block(int64_t row, const FilterVectors<A>& filter, const PlacedMix<A, kPixelLanes>& mix,
             const PlacedBranch<A>& end, const typename Place::Out& to) const {
    const auto& x = mix.own.map;
    for (int64_t k = 0; k < grid.vectors; ++k) {
      const Taps<A> taps = grid.taps(row, R, k, mix.channels);
      const Mask<A> inside = taps.own();
      V o[R];
      mix.template apply<R>(row, k, taps, filter, o);
      auto x_rows = x.rows(row, k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        o[r] = end.forward(o[r]);
        if (residual) o[r] += load_masked<A>(x_rows.next(), inside);
      }
      store_block<R, A>(to, row, k, inside, o);
    }
  }
};

// Per strip: sums of G' and of G' (o - mean).
template <class A, bool kPixelLanes>
struct NormGradientsPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  const Grid<A>& grid;
  const ValueMix<A>& mixture;
  NormBranch<A> branch;
  Feature grad_out;
  const A* mean;  // [C]
  StripSums<A> sums;
  enum { kG, kGO, kSums };

  void visit(const Place& place, Arena& arena) const {
    const int64_t elements = grid.strip_elements(0);
    arena.reserve(PlacedMix<A, kPixelLanes>::bytes(mixture, grid) +
                  Arena::bytes_of<A>(elements));
    const PlacedMix<A, kPixelLanes> mix(mixture, place, arena);
    const PlacedBranch<A> end(branch, place);
    const typename Place::In grad = place.open(grad_out, 0, arena.take<A>(elements));
    const V centre = channel_vector(mean, grid, place.group);
    V alone = {}, with_o = {};
    for_filtered_blocks(grid, place.strip.first, place.strip.last, mix.own.filter,
                        [&]<int R>(int64_t row, const FilterVectors<A>& filter) {
                          block<R>(row, filter, mix, end, grad, centre, alone, with_o);
                        });
    sums.put(place, kG, alone);
    sums.put(place, kGO, with_o);
  }

  template <int R>
  void block(int64_t row, const FilterVectors<A>& filter, const PlacedMix<A, kPixelLanes>& mix,
             const PlacedBranch<A>& end, const typename Place::In& grad, V centre, V& alone,
             V& with_o) const {
    V of_g = {}, of_product = {};
    for (int64_t k = 0; k < grid.vectors; ++k) {
      const Taps<A> taps = grid.taps(row, R, k, mix.channels);
      V o[R];
      mix.template apply<R>(row, k, taps, filter, o);
      auto grad_rows = grad.rows(row, k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V passed =
            end.backward(o[r], load_masked<A>(grad_rows.next(), taps.own()));
        of_g += passed;
        of_product += passed * (o[r] - centre);
      }
    }
    alone += of_g;
    with_o += of_product;
  }
};

// g = scale G' + o_scale (o - mean) + offset; per strip, the sums of g v_t, the own value's last.
template <class A, bool kPixelLanes>
struct MixGradientsPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  using In = typename Place::In;
  const Grid<A>& grid;
  const ValueMix<A>& mixture;
  NormBranch<A> branch;
  Feature grad_out;
  const A *mean, *o_scale, *offset;  // [C]
  OutFeature g;
  StripSums<A> sums;

  void visit(const Place& place, Arena& arena) const {
    const int64_t elements = grid.strip_elements(0);
    arena.reserve(PlacedMix<A, kPixelLanes>::bytes(mixture, grid) +
                  2 * Arena::bytes_of<A>(elements));
    const PlacedMix<A, kPixelLanes> mix(mixture, place, arena);
    const In grad = place.open(grad_out, 0, arena.take<A>(elements));
    A* memory = arena.take<A>(elements);
    const typename Place::Out to = place.open(g, memory);
    V own_sum = {};
    form(place, mix, grad, to, own_sum);
    const In formed = to;
    for (int64_t t = 0; t < mix.earlier.count; ++t)
      sums.put(place, t, product_sum(place, mix.channels, formed, mix.earlier.maps[t]));
    sums.put(place, mix.earlier.count, own_sum);
    place.close(g, memory);
  }

  void form(const Place& place, const PlacedMix<A, kPixelLanes>& mix, const In& grad,
            const typename Place::Out& to, V& own_sum) const {
    const PlacedBranch<A> end(branch, place);
    const V centre = channel_vector(mean, grid, place.group);
    const V o_factor = channel_vector(o_scale, grid, place.group);
    const V constant = channel_vector(offset, grid, place.group);
    const auto block = [&]<int R>(int64_t row, const FilterVectors<A>& filter) {
      V of_block = {};
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Taps<A> taps = grid.taps(row, R, k, mix.channels);
        const Mask<A> inside = taps.own();
        V own[R], o[R];
        mix.own.template apply<R>(row, k, taps, filter, own);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) o[r] = mix.own_weight * own[r];
        mix.earlier.template add<R>(row, k, inside, o);
        auto grad_rows = grad.rows(row, k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const V passed =
              end.backward(o[r], load_masked<A>(grad_rows.next(), inside));
          o[r] = end.scale * passed + (o_factor * (o[r] - centre) + constant);
          of_block += keep<A>(inside, o[r] * own[r]);
        }
        store_block<R, A>(to, row, k, inside, o);
      }
      own_sum += of_block;
    };
    for_filtered_blocks(grid, place.strip.first, place.strip.last, mix.own.filter, block);
  }

  V product_sum(const Place& place, Mask<A> channels, const In& one, const In& other) const {
    V total = {};
    for_blocks(grid, place.strip.first, place.strip.last, [&]<int R>(int64_t row) {
      V of_block = {};
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Mask<A> inside = grid.own(k, channels);
        auto one_rows = one.rows(row, k), other_rows = other.rows(row, k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          of_block += load_masked<A>(one_rows.next(), inside) *
                      load_masked<A>(other_rows.next(), inside);
      }
      total += of_block;
    });
    return total;
  }
};

// ---- value gradients ---------------------------------------------------------------------------

// dv = the terms + the share of dpooled_v, dx = [grad_out +] DW^T(dv) + that of dpooled_x; per
// strip, the nine correlations of dv with x.
template <class A, bool kPixelLanes>
struct ValueGradientsPass {
  using V = Vec<A>;
  using Place = dla::DLA_ISA::Place<A, kPixelLanes>;
  using In = typename Place::In;
  using Out = typename Place::Out;
  const Grid<A>& grid;
  Feature x, passed;  // passed: what dx receives beside the value's share; may be null
  const Terms<A>& terms;
  const A* v_filters;
  const A *dpooled_v, *dpooled_x;  // [B, C]: gradients of the means; dpooled_v may be null
  A share;                         // of a pixel in a mean
  OutFeature dx;
  StripSums<A> sums;

  void visit(const Place& place, Arena& arena) const {
    const int64_t elements = grid.strip_elements(1);
    arena.reserve(PlacedTerms<A, kPixelLanes>::bytes(terms, grid, 1) +
                  4 * Arena::bytes_of<A>(elements));
    const Mask<A> channels = grid.channel_mask(place.group);
    const In dv = form(place, channels, arena);
    correlate(place, channels, dv, place.open_bordered(x, 1, arena.take<A>(elements)));
    A* passed_memory = arena.take<A>(elements);
    const In shortcut = place.open(passed, 0, passed_memory);
    A* memory = arena.take<A>(elements);
    spread(place, channels, dv, shortcut, place.open(dx, memory));
    place.close(dx, memory);
  }

  V pooling_share(const A* gradient, const Place& place) const {
    return share * channel_vector(gradient + place.b * grid.shape.channels, grid, place.group);
  }

  // dv of the strip and of a row on either side, in memory.
  In form(const Place& place, Mask<A> channels, Arena& arena) const {
    const PlacedTerms<A, kPixelLanes> placed(terms, place, 1, arena);
    const V offset = dpooled_v == nullptr ? V{} : pooling_share(dpooled_v, place);
    const Strip around{std::max<int64_t>(0, place.strip.first - 1),
                       std::min(grid.shape.height, place.strip.last + 1)};
    A* memory = arena.take<A>(grid.strip_elements(1));
    place.clear_border(memory, 1);
    const Out to = place.on_memory(memory, place.strip.first - 1);
    for_blocks(grid, around.first, around.last, [&]<int R>(int64_t row) {
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Mask<A> inside = grid.own(k, channels);
        V dv[R];
        fill_block(dv, offset);
        placed.template add<R>(row, k, inside, dv);
        store_block<R, A>(to, row, k, inside, dv);
      }
    });
    return to;
  }

  void correlate(const Place& place, Mask<A> channels, const In& dv, const In& map) const {
    V products[9];
    fill_block(products, V{});
    for_blocks(grid, place.strip.first, place.strip.last, [&]<int R>(int64_t row) {
      V of_block[9];
      fill_block(of_block, V{});
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Taps<A> taps = grid.taps(row, R, k, channels);
        auto dv_rows = dv.rows(row, k);
        V g[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) g[r] = load_masked<A>(dv_rows.next(), taps.own());
        correlate_block<R, A>(map, row, k, taps, g, of_block);
      }
      for (int tap = 0; tap < 9; ++tap) products[tap] += of_block[tap];
    });
    for (int tap = 0; tap < 9; ++tap) sums.put(place, tap, products[tap]);
  }

  void spread(const Place& place, Mask<A> channels, const In& dv, const In& shortcut,
              const Out& to) const {
    const Filter<A, kPixelLanes> v_filter(v_filters, place.group);
    const V offset = pooling_share(dpooled_x, place);
    const auto block = [&]<int R>(int64_t row, const FilterVectors<A>& filter) {
      for (int64_t k = 0; k < grid.vectors; ++k) {
        const Taps<A> taps = grid.taps(row, R, k, channels);
        V acc[R];
        fill_block(acc, offset);
        stencil_block<R, A>(dv, row, k, taps, filter, acc);
        if (shortcut) add_rows<R, A>(shortcut.rows(row, k), taps.own(), splat(A(1)), acc);
        store_block<R, A>(to, row, k, taps.own(), acc);
      }
    };
    for_filtered_blocks(grid, place.strip.first, place.strip.last, v_filter, block, true);
  }
};

}  // namespace dla::DLA_ISA
