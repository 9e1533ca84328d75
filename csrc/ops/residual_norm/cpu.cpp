// Bound by memory. Statistics and what follows from them are taken unit by unit where a unit has all
// samples of its channels: forward then reads x and the shortcut and writes out, backward reads grad,
// x and out and writes dx and dshortcut, each element once as far as memory goes.
#include "ops/residual_norm/op.h"

#include "common/branch_norm.h"
#include "common/scratch.h"

namespace dla::DLA_ISA {
namespace {

template <class A>
struct Step {
  MapShape shape;
  Grid<A> grid;
  Units<A> units;
  BranchNorm<A> norm;
  int threads;

  explicit Step(const ResidualNormInputs& args)
      : shape{args.batch, args.channels, args.height, args.width, args.channels_last},
        grid(shape),
        units(Units<A>::of_whole_batches(grid)),
        norm{as<A>(args.weight), as<A>(args.bias), args.eps},
        threads(args.threads) {}

  template <class Body>
  void for_channels(const Body& body) const {
    dla::DLA_ISA::for_channels(threads, shape.channels, body);
  }
  template <class Body>
  void for_units(const Body& body) const {
    with_lanes(grid, [&](auto fixed) {
      parallel_for(threads, units.count(), [&](int64_t unit) { body(fixed, unit); });
    });
  }
};

template <class A>
struct ForwardStep : Step<A> {
  using Step<A>::grid, Step<A>::units;
  const ResidualNormForward& args;

  explicit ForwardStep(const ResidualNormForward& args) : Step<A>(args), args(args) {}

  template <bool kPixelLanes>
  void join(int64_t unit, const A* scale, const A* shift) const {
    thread_local Arena arena;
    const int64_t elements = grid.strip_elements(0);
    arena.reserve(3 * Arena::bytes_of<A>(elements));
    A *memory = arena.take<A>(elements), *other = arena.take<A>(elements);
    A* result = arena.take<A>(elements);
    const OutFeature out = written_once(args.out, args.dtype, this->shape);
    for_strips<kPixelLanes>(
        units, grid, unit, [&](const Place<A, kPixelLanes>& place, int64_t) {
          const auto x = place.open(Feature{args.x, args.dtype}, 0, memory);
          const auto shortcut = place.open(Feature{args.shortcut, args.dtype}, 0, other);
          const auto to = place.open(out, result);
          const Vec<A> factor = channel_vector(scale, grid, place.group);
          const Vec<A> constant = channel_vector(shift, grid, place.group);
          for_strip_vectors(place, [&](int64_t row, int64_t k, Mask<A> own) {
            const Vec<A> sum = factor * load_masked<A>(x.at(row, k), own) +
                               (constant + load_masked<A>(shortcut.at(row, k), own));
            store_at(to, row, k, own, sum < A(0) ? Vec<A>{} : sum);  // NaN stays
          });
          place.close(out, result);
        });
  }

  void run() const {
    const int64_t channels = args.channels, size = BranchStatistics<A>::elements(this->shape);
    Buffers<A> buffers(size + 2 * channels);
    A *sums = buffers.take(size), *scale = buffers.take(channels), *shift = buffers.take(channels);
    const BranchStatistics<A> statistics{grid,  Feature{args.x, args.dtype}, this->norm,
                                         as<A>(args.mean), as<A>(args.var), scale, shift, sums};
    const bool of_batch = args.norm == Norm::batch, at_once = of_batch && units.have_whole_batches();
    if (!of_batch) {
      this->for_channels([&](const ChannelLanes& c) {
        this->norm.coefficients(c, as<A>(args.mean_in), as<A>(args.var_in), scale, shift);
      });
    } else if (!at_once) {
      this->for_units([&](auto fixed, int64_t unit) {
        statistics.template add_planes<fixed>(units, unit);
      });
      this->for_channels([&](const ChannelLanes& c) { statistics.combine(c); });
    }
    this->for_units([&](auto fixed, int64_t unit) {
      if (at_once) statistics.template finish_unit<fixed>(units, unit);
      join<fixed>(unit, scale, shift);
    });
  }
};

template <class A>
struct BackwardStep : Step<A> {
  using Step<A>::grid, Step<A>::units;
  const ResidualNormBackward& args;

  explicit BackwardStep(const ResidualNormBackward& args) : Step<A>(args), args(args) {}

  // The gradient that passes the ReLU, to dshortcut and for now to dx, and its sums.
  template <bool kPixelLanes>
  void rectify(int64_t unit, A* sums) const {
    using V = Vec<A>;
    thread_local Arena arena;
    const int64_t elements = grid.strip_elements(0), planes = grid.shape.planes();
    arena.reserve(5 * Arena::bytes_of<A>(elements));
    A* memory[5];
    for (A*& m : memory) m = arena.take<A>(elements);
    const OutFeature dx{{args.dx, args.dtype}};
    const OutFeature dshortcut = written_once(args.dshortcut, args.dtype, this->shape);
    V totals[kMostTogether][2];
    for_strips<kPixelLanes>(
        units, grid, unit, [&](const Place<A, kPixelLanes>& place, int64_t slot) {
          const auto grad = place.open(Feature{args.grad, args.dtype}, 0, memory[0]);
          const auto out = place.open(Feature{args.out, args.dtype}, 0, memory[1]);
          const auto x = place.open(Feature{args.x, args.dtype}, 0, memory[2]);
          const auto to_x = place.open(dx, memory[3]), to_shortcut = place.open(dshortcut, memory[4]);
          const V mean = channel_vector(as<A>(args.mean), grid, place.group);
          if (place.strip.first == 0) totals[slot][0] = totals[slot][1] = V{};
          V alone{}, with_x{};
          for_strip_vectors(place, [&](int64_t row, int64_t k, Mask<A> own) {
            const V passed = load_masked<A>(out.at(row, k), own) <= A(0)
                                 ? V{}
                                 : load_masked<A>(grad.at(row, k), own);
            store_at(to_x, row, k, own, passed);
            store_at(to_shortcut, row, k, own, passed);
            alone += passed;
            with_x += passed * (load_masked<A>(x.at(row, k), own) - mean);
          });
          place.close(dx, memory[3]);
          place.close(dshortcut, memory[4]);
          totals[slot][0] += alone;
          totals[slot][1] += with_x;
          if (place.strip.last < grid.shape.height) return;
          A* to = sums + place.b * grid.shape.channels;
          for (int i = 0; i < 2; ++i)
            store_channel_sums(to + i * planes, totals[slot][i], grid, place.group);
        });
  }

  void run() const {
    const int64_t sums_size = 2 * this->shape.planes();
    Buffers<A> buffers(BranchGradients<A>::elements(this->shape));
    A *sums = buffers.take(sums_size), *factors = buffers.take(3 * args.channels);
    const BranchGradients<A> gradients{grid,
                                       Feature{args.x, args.dtype},
                                       written_once(args.dx, args.dtype, this->shape),
                                       this->norm,
                                       args.norm == Norm::batch,
                                       as<A>(args.mean),
                                       as<A>(args.var),
                                       as<A>(args.dweight),
                                       as<A>(args.dbias),
                                       sums,
                                       factors};
    const bool at_once = units.have_whole_batches();
    this->for_units([&](auto fixed, int64_t unit) {
      rectify<fixed>(unit, sums);
      if (at_once) gradients.template finish_unit<fixed>(units, unit);
    });
    if (at_once) return;
    this->for_channels([&](const ChannelLanes& c) { gradients.combine(c); });
    this->for_units(
        [&](auto fixed, int64_t unit) { gradients.template write<fixed>(units, unit); });
  }
};

}  // namespace

void residual_norm_forward(const ResidualNormForward& args) {
  with_compute_type(args.dtype, [&](auto zero) { ForwardStep<decltype(zero)>(args).run(); });
}

void residual_norm_backward(const ResidualNormBackward& args) {
  with_compute_type(args.dtype, [&](auto zero) { BackwardStep<decltype(zero)>(args).run(); });
}

}  // namespace dla::DLA_ISA
