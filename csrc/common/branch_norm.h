// The norm that a residual branch z passes before it is joined with its shortcut. Like the sum it is
// formed where it is read; what there is to do besides are its statistics, forward, and the gradient
// of z, backward. Both are sums over the batch, followed by a pass that needs them: a unit of work with
// all samples of a few channels finds their planes still in the cache.
#pragma once

#include "common/moments.h"
#include "common/stencil.h"
#include "common/units.h"

namespace dla::DLA_ISA {

// scale z + shift, arrays [C].
template <class A>
struct BranchNorm {
  const A *weight, *bias;  // null: 1 and 0
  double eps;

  Doubles scale(const ChannelLanes& c, Doubles rstd) const {
    return weight == nullptr ? rstd : rstd * c.load(weight);
  }
  Doubles rstd(const ChannelLanes& c, const A* var) const {
    return 1.0 / square_root(c.load(var) + eps);
  }
  void coefficients(const ChannelLanes& c, const A* mean, const A* var, A* scales,
                    A* shifts) const {
    const Doubles factor = scale(c, rstd(c, var));
    c.store(scales, factor);
    c.store(shifts, added(c) - factor * c.load(mean));
  }
  // As if mean and variance were 0 and 1.
  void without_statistics(const ChannelLanes& c, A* scales, A* shifts) const {
    c.store(scales, scale(c, splat(1.0)));
    c.store(shifts, added(c));
  }

 private:
  Doubles added(const ChannelLanes& c) const { return bias == nullptr ? Doubles{} : c.load(bias); }
};

// Calls body(channels) for the channels of a unit.
template <class A, class Body>
inline void for_unit_channels(const Units<A>& units, const Grid<A>& grid, int64_t unit,
                              const Body& body) {
  const ChannelRange range = units.channels(grid, unit);
  for (int64_t c = range.first; c < range.last; c += kLanes<double>)
    body(ChannelLanes{c, static_cast<int>(std::min<int64_t>(kLanes<double>, range.last - c))});
}

// Mean and variance of z over batch and space, and what follows from them.
template <class A>
struct BranchStatistics {
  const Grid<A>& grid;
  Feature z;
  BranchNorm<A> norm;
  A *mean, *var, *scale, *shift;  // [C]
  A* sums;                        // working memory [3, B, C]: a value, sums of z - value, its square

  static int64_t elements(const MapShape& s) { return 3 * s.planes(); }

  template <bool kPixelLanes>
  void add_planes(const Units<A>& units, int64_t unit) const {
    using V = Vec<A>;
    thread_local Arena arena;
    arena.reserve(Arena::bytes_of<A>(grid.strip_elements(0)));
    A* memory = arena.take<A>(grid.strip_elements(0));
    V planes[kMostTogether][3];
    for_strips<kPixelLanes>(
        units, grid, unit, [&](const Place<A, kPixelLanes>& place, int64_t slot) {
          const auto in = place.open(z, 0, memory);
          const Mask<A> channels = grid.channel_mask(place.group);
          V(&plane)[3] = planes[slot];
          if (place.strip.first == 0) {
            const V corner = load_masked<A>(in.at(0, 0), grid.own(0, channels));
            fill_block(plane, V{});
            plane[0] = kPixelLanes ? splat<A>(corner[0]) : corner;
          }
          for (int64_t row = place.strip.first; row < place.strip.last; ++row)
            for_runs(grid.vectors, [&](int64_t first, int64_t last) {
              V sum{}, square{};
              for (int64_t k = first; k < last; ++k) {
                const Mask<A> own = grid.own(k, channels);
                const V v = keep<A>(own, load_masked<A>(in.at(row, k), own) - plane[0]);
                sum += v;
                square += v * v;
              }
              plane[1] += sum;
              plane[2] += square;
            });
          if (place.strip.last < grid.shape.height) return;
          A* to = sums + place.b * grid.shape.channels;
          store_channel_vector(to, plane[0], grid, place.group);
          for (int i = 1; i < 3; ++i)
            store_channel_sums(to + i * grid.shape.planes(), plane[i], grid, place.group);
        });
  }

  void combine(const ChannelLanes& c) const {
    const int64_t planes = grid.shape.planes();
    const double pixels = static_cast<double>(grid.shape.pixels());
    RunningMoments moments;
    for (int64_t b = 0; b < grid.shape.batch; ++b) {
      const A* at = sums + b * grid.shape.channels;
      const Doubles sum = c.load(at + planes);
      moments.add(c.load(at) + sum / pixels, c.load(at + 2 * planes) - sum * sum / pixels, pixels);
    }
    c.store(mean, moments.mean());
    c.store(var, moments.variance());
    norm.coefficients(c, mean, var, scale, shift);
  }

  // All of it for a unit that has all samples of its channels.
  template <bool kPixelLanes>
  void finish_unit(const Units<A>& units, int64_t unit) const {
    add_planes<kPixelLanes>(units, unit);
    for_unit_channels(units, grid, unit, [&](const ChannelLanes& c) { combine(c); });
  }
};

// From the gradient of the normed z, which lies in dz, that of z itself.
template <class A>
struct BranchGradients {
  const Grid<A>& grid;
  Feature z;
  OutFeature dz;
  BranchNorm<A> norm;
  bool of_batch;         // whether the statistics depend on z
  const A *mean, *var;   // [C]
  A *dweight, *dbias;    // [C]; null: not wanted
  A* sums;               // working memory [2, B, C]: sums of dz and of dz (z - mean)
  A* factors;            // working memory [3, C]: of dz, of z, and what is added

  static int64_t elements(const MapShape& s) { return 2 * s.planes() + 3 * s.channels; }

  void combine(const ChannelLanes& c) const {
    Doubles alone{}, with_z{};
    for (int64_t b = 0; b < grid.shape.batch; ++b) {
      const A* at = sums + b * grid.shape.channels;
      alone += c.load(at);
      with_z += c.load(at + grid.shape.planes());
    }
    const Doubles rstd = norm.rstd(c, var), scale = norm.scale(c, rstd);
    if (dweight != nullptr) c.store(dweight, rstd * with_z);
    if (dbias != nullptr) c.store(dbias, alone);
    const double count = static_cast<double>(grid.shape.pixels() * grid.shape.batch);
    const Doubles of_z = of_batch ? -scale * rstd * rstd * with_z / count : Doubles{};
    const Doubles added = of_batch ? -scale * alone / count - of_z * c.load(mean) : Doubles{};
    c.store(factors, scale);
    c.store(factors + grid.shape.channels, of_z);
    c.store(factors + 2 * grid.shape.channels, added);
  }

  template <bool kPixelLanes>
  void write(const Units<A>& units, int64_t unit) const {
    using V = Vec<A>;
    thread_local Arena arena;
    const int64_t elements = grid.strip_elements(0);
    arena.reserve(2 * Arena::bytes_of<A>(elements));
    A *z_memory = arena.take<A>(elements), *dz_memory = arena.take<A>(elements);
    for_strips<kPixelLanes>(
        units, grid, unit, [&](const Place<A, kPixelLanes>& place, int64_t) {
          V factor[3];
          for (int i = 0; i < 3; ++i)
            factor[i] = channel_vector(factors + i * grid.shape.channels, grid, place.group);
          const auto z_in = place.open(z, 0, z_memory);
          const auto in = place.open(Feature{dz.data, dz.dtype}, 0, dz_memory);
          const auto out = place.open(dz, dz_memory);
          for_strip_vectors(place, [&](int64_t row, int64_t k, Mask<A> own) {
            const V of_z = factor[1] * load_masked<A>(z_in.at(row, k), own) + factor[2];
            store_at(out, row, k, own, factor[0] * load_masked<A>(in.at(row, k), own) + of_z);
          });
          place.close(dz, dz_memory);
        });
  }

  template <bool kPixelLanes>
  void finish_unit(const Units<A>& units, int64_t unit) const {
    for_unit_channels(units, grid, unit, [&](const ChannelLanes& c) { combine(c); });
    write<kPixelLanes>(units, unit);
  }
};

}  // namespace dla::DLA_ISA
