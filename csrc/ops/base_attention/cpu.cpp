#include "ops/base_attention/op.h"

#include "common/branch_norm.h"
#include "ops/base_attention/memory.h"
#include "ops/base_attention/passes.h"

namespace dla::DLA_ISA {
namespace {

template <class A>
struct Step {
  const BaseAttentionInputs& args;
  MapShape shape;
  Grid<A> grid;
  FilterBank<A> v_filters;
  int64_t planes;
  LayerMemory<A> memory;

  explicit Step(const BaseAttentionInputs& args)
      : args(args),
        shape{args.batch, args.channels, args.height, args.width, args.channels_last},
        grid(shape),
        v_filters(as<A>(args.v_weight), grid),
        planes(shape.planes()),
        memory(args) {}

  Feature feature(const void* p) const { return {p, args.dtype}; }
  OutFeature feature(void* p) const { return {{p, args.dtype}}; }

  BranchNorm<A> norm() const {
    return {as<A>(args.norm_weight), as<A>(args.norm_bias), args.eps};
  }

  template <class Body>
  void for_channels(const Body& body) const {
    dla::DLA_ISA::for_channels(args.threads, shape.channels, body);
  }

  ValueMix<A> value_mix(const A* weights) const {
    const A* own_weight = weights + memory.layers * planes;
    ValueMix<A> mixture{feature(args.x), v_filters.data(), own_weight, {}};
    for (int64_t t = 0; t < memory.layers; ++t)
      mixture.earlier.add(feature(args.values[static_cast<std::size_t>(t)]), weights + t * planes);
    return mixture;
  }

  // norm(o) = scale o + shift. Backward passes must find the same numbers: the gradient goes where
  // this is positive.
  NormBranch<A> branch(const A* means, const A* vars, A* scale, A* shift) const {
    for_channels([&](const ChannelLanes& c) {
      if (args.norm == Norm::none)
        norm().without_statistics(c, scale, shift);
      else
        norm().coefficients(c, means, vars, scale, shift);
    });
    return {scale, shift, as<A>(args.drop_scale), args.relu};
  }
};

// ---- forward -----------------------------------------------------------------------------------

template <class A>
struct ForwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes, Step<A>::memory;
  using Pooling = ValuePass<A, true>;
  using Moments = MixMomentsPass<A, true>;

  const BaseAttentionForward& args;

  explicit ForwardStep(const BaseAttentionForward& args) : Step<A>(args), args(args) {}

  void make_value(A* table) const {
    const StripSums<A> sums(table, Pooling::kSums, grid);
    visit_places<ValuePass>(args.threads, grid, this->feature(args.x), this->feature(args.v),
                            this->v_filters.data(), sums);
    const double pixels = static_cast<double>(shape.pixels());
    this->for_channels([&](const ChannelLanes& c) {
      for (int64_t b = 0; b < shape.batch; ++b) {
        const int64_t row = b * shape.channels;
        c.store(as<A>(args.pooled_x) + row, sums.total(b, Pooling::kX, c) / pixels);
        if (args.pooled_v != nullptr)
          c.store(as<A>(args.pooled_v) + row, sums.total(b, Pooling::kV, c) / pixels);
      }
    });
  }

  // Mean and biased variance of o over batch and space.
  void batch_statistics(const ValueMix<A>& mixture, A* table) const {
    const StripSums<A> sums(table, Moments::kSums, grid);
    visit_places<MixMomentsPass>(args.threads, grid, mixture, sums);
    this->for_channels([&](const ChannelLanes& c) { merge_strips(sums, c); });
  }

  void merge_strips(const StripSums<A>& sums, const ChannelLanes& c) const {
    RunningMoments moments;
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t strip = 0; strip < sums.strips; ++strip) {
        const int64_t rows = std::min(grid.strip_rows, shape.height - strip * grid.strip_rows);
        const double pixels = static_cast<double>(rows * shape.width);
        const Doubles sum = c.load(sums.row(b, strip, Moments::kO));
        moments.add(c.load(sums.row(b, strip, Moments::kShift)) + sum / pixels,
                    c.load(sums.row(b, strip, Moments::kSquare)) - sum * sum / pixels, pixels);
      }
    }
    c.store(as<A>(args.mean), moments.mean());
    c.store(as<A>(args.var), moments.variance());
  }

  void run() const {
    const int64_t table_size = StripSums<A>::elements(Moments::kSums, grid);
    const int64_t with_own = (memory.layers + 1) * planes;
    Buffers<A> buffers(memory.elements() + with_own + 2 * shape.channels + table_size);
    Recall<A> recall(memory, buffers);
    A* weights = buffers.take(with_own);
    A *scale = buffers.take(shape.channels), *shift = buffers.take(shape.channels);
    A* table = buffers.take(table_size);
    if (args.state_out != nullptr) recall.state = as<A>(args.state_out);
    if (args.keys_out != nullptr) recall.keys = as<A>(args.keys_out);
    if (args.gates_out != nullptr) recall.gates = as<A>(args.gates_out);

    make_value(table);
    memory.recall(as<A>(args.pooled_x), recall);
    memory.score(as<A>(args.pooled_x), recall, as<A>(args.scores));
    memory.weigh(as<A>(args.scores), recall.gates, weights);
    const ValueMix<A> mixture = this->value_mix(weights);
    if (args.norm == Norm::batch) batch_statistics(mixture, table);
    const bool running = args.norm == Norm::running;
    const NormBranch<A> branch = this->branch(as<A>(running ? args.mean_in : args.mean),
                                          as<A>(running ? args.var_in : args.var), scale, shift);
    visit_places<OutputPass>(args.threads, grid, mixture, branch, args.residual,
                             written_once(args.out, args.dtype, shape));
  }
};

// ---- backward ----------------------------------------------------------------------------------

template <class A>
struct BackwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes, Step<A>::memory;
  using NormSums = NormGradientsPass<A, true>;

  const BaseAttentionBackward& args;

  explicit BackwardStep(const BaseAttentionBackward& args) : Step<A>(args), args(args) {}

  // g = scale G' + o_scale (o - mean) + offset; also the gradients of the norm's weight and bias.
  void norm_gradients(const StripSums<A>& sums, const A* scale, A* o_scale, A* offset) const {
    const double count = static_cast<double>(planes / shape.channels * shape.pixels());
    const bool batch_norm = args.norm == Norm::batch;
    this->for_channels([&](const ChannelLanes& c) {
      Doubles dweight{}, dbias{};
      for (int64_t b = 0; b < shape.batch; ++b) {
        dbias += sums.total(b, NormSums::kG, c);
        dweight += sums.total(b, NormSums::kGO, c);
      }
      const Doubles rstd = this->norm().rstd(c, as<A>(args.var)), weight = c.load(scale);
      dweight *= rstd;
      c.store(o_scale, batch_norm ? -weight * rstd * dweight / count : Doubles{});
      c.store(offset, batch_norm ? -weight * dbias / count : Doubles{});
      if (args.dnorm_weight != nullptr) c.store(as<A>(args.dnorm_weight), dweight);
      if (args.dnorm_bias != nullptr) c.store(as<A>(args.dnorm_bias), dbias);
    });
  }

  // g and dweights from the gradient of out.
  void branch_gradients(const A* weights, A* coefficients, A* table, A* dweights) const {
    A *scale = coefficients, *shift = scale + shape.channels, *o_scale = shift + shape.channels;
    A *offset = o_scale + shape.channels, *mean = offset + shape.channels;
    const ValueMix<A> mixture = this->value_mix(weights);
    const NormBranch<A> branch = this->branch(as<A>(args.mean), as<A>(args.var), scale, shift);
    if (args.norm == Norm::none) {
      std::fill_n(o_scale, 3 * shape.channels, A(0));  // also offset and mean
    } else {
      std::copy_n(as<A>(args.mean), shape.channels, mean);
      const StripSums<A> sums(table, NormSums::kSums, grid);
      visit_places<NormGradientsPass>(args.threads, grid, mixture, branch,
                                      this->feature(args.grad_out), mean, sums);
      norm_gradients(sums, scale, o_scale, offset);
    }

    const StripSums<A> products(table, memory.layers + 1, grid);
    visit_places<MixGradientsPass>(args.threads, grid, mixture, branch,
                                   this->feature(args.grad_out), mean, o_scale, offset,
                                   this->feature(args.g), products);
    this->for_channels([&](const ChannelLanes& c) {
      for (int64_t t = 0; t <= memory.layers; ++t)
        for (int64_t b = 0; b < shape.batch; ++b)
          c.store(dweights + t * planes + b * shape.channels, products.total(b, t, c));
    });
  }

  void value_gradients(const A* own_weight, A* dy, A* table) const {
    Terms<A> terms;
    const void* g = args.g;
    if (g != nullptr) terms.add(this->feature(g), own_weight);
    for (std::size_t j = 0; j < args.later_grads.size(); ++j)
      terms.add(this->feature(args.later_grads[j]), as<A>(args.later_weights[j]));
    if (args.grad_v != nullptr) terms.add(this->feature(args.grad_v), nullptr);
    const StripSums<A> products(table, 9, grid);
    const Feature passed = this->feature(args.residual ? args.grad_out : nullptr);
    visit_places<ValueGradientsPass>(args.threads, grid, this->feature(args.x), passed, terms,
                                     this->v_filters.data(), as<A>(args.grad_pooled_v), dy,
                                     A(1) / static_cast<A>(shape.pixels()),
                                     written_once(args.dx, args.dtype, shape), products);
    this->for_channels([&](const ChannelLanes& c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        Doubles total{};
        for (int64_t b = 0; b < shape.batch; ++b) total += products.total(b, tap, c);
        for (int i = 0; i < c.count; ++i)
          as<A>(args.dv_weight)[(c.first + i) * 9 + tap] = static_cast<A>(total[i]);
      }
    });
  }

  void run() const {
    const int64_t fields = std::max<int64_t>(9, memory.layers + 1);
    const int64_t table_size = StripSums<A>::elements(fields, grid);
    const int64_t with_own = (memory.layers + 1) * planes;
    Buffers<A> buffers(2 * memory.elements() + 2 * with_own + planes + 5 * shape.channels +
                       table_size);
    const Recall<A> recall(memory, buffers), grads(memory, buffers);
    A *dweights = buffers.take(with_own), *weights = buffers.take(with_own);
    A* dy = buffers.take(planes);
    A *coefficients = buffers.take(5 * shape.channels), *table = buffers.take(table_size);
    if (args.weights != nullptr) weights = as<A>(args.weights);

    memory.recall(as<A>(args.pooled_x), recall);
    memory.weigh(as<A>(args.scores), recall.gates, weights);
    if (args.grad_out != nullptr) {
      branch_gradients(weights, coefficients, table, dweights);
    } else {
      std::fill_n(dweights, with_own, A(0));
    }
    if (args.grad_pooled_x != nullptr)
      std::copy_n(as<A>(args.grad_pooled_x), planes, dy);
    else
      std::fill_n(dy, planes, A(0));
    memory.backward(args, recall, dweights, grads, dy);
    value_gradients(weights + memory.layers * planes, dy, table);
  }
};

}  // namespace

void base_attention_forward(const BaseAttentionForward& args) {
  with_compute_type(args.dtype, [&](auto zero) { ForwardStep<decltype(zero)>(args).run(); });
}

void base_attention_backward(const BaseAttentionBackward& args) {
  with_compute_type(args.dtype, [&](auto zero) { BackwardStep<decltype(zero)>(args).run(); });
}

}  // namespace dla::DLA_ISA
