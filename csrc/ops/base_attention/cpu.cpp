#include "ops/base_attention/op.h"

#include "ops/base_attention/memory.h"
#include "ops/base_attention/passes.h"

namespace dla::DLA_ISA {
namespace {

constexpr int64_t kChannelBlock = 32;  // channels of one task of the per-channel loops

template <class A>
struct Step {
  const BaseAttentionInputs& args;
  MapShape shape;
  Grid<A> grid;
  int64_t planes;
  LayerMemory<A> memory;

  explicit Step(const BaseAttentionInputs& args)
      : args(args),
        shape{args.batch, args.channels, args.height, args.width, args.channels_last},
        grid(shape),
        planes(shape.planes()),
        memory(args) {}

  static const A* small(const void* p) { return static_cast<const A*>(p); }
  static A* small(void* p) { return static_cast<A*>(p); }
  Feature feature(const void* p) const { return {p, args.dtype}; }
  OutFeature feature(void* p) const { return {p, args.dtype}; }

  double norm_weight(int64_t c) const {
    return args.norm_weight == nullptr ? 1.0 : static_cast<double>(small(args.norm_weight)[c]);
  }
  double norm_bias(int64_t c) const {
    return args.norm_bias == nullptr ? 0.0 : static_cast<double>(small(args.norm_bias)[c]);
  }
  double rstd(const A* vars, int64_t c) const {
    if (args.norm == Norm::none) return 1.0;
    return 1.0 / std::sqrt(static_cast<double>(vars[c]) + args.eps);
  }

  template <class Body>
  void for_channels(const Body& body) const {
    parallel_for(args.threads, ceil_div(shape.channels, kChannelBlock), [&](int64_t block) {
      const int64_t first = block * kChannelBlock;
      for (int64_t c = first; c < std::min(shape.channels, first + kChannelBlock); ++c) body(c);
    });
  }

  ValueMix<A> value_mix(const A* weights) const {
    const A* own_weight = weights + memory.layers * planes;
    ValueMix<A> mixture{feature(args.x), small(args.v_weight), own_weight, {}};
    for (int64_t t = 0; t < memory.layers; ++t)
      mixture.earlier.add(feature(args.values[static_cast<std::size_t>(t)]), weights + t * planes);
    return mixture;
  }

  // norm(o) = scale o + shift. Backward passes must find the same numbers: the gradient goes where
  // this is positive.
  NormBranch<A> branch(const A* means, const A* vars, A* scale, A* shift) const {
    for_channels([&](int64_t c) {
      const double weight = norm_weight(c) * rstd(vars, c);
      const double mean = args.norm == Norm::none ? 0.0 : static_cast<double>(means[c]);
      scale[c] = static_cast<A>(weight);
      shift[c] = static_cast<A>(norm_bias(c) - weight * mean);
    });
    return {scale, shift, small(args.drop_scale), args.relu};
  }
};

// ---- forward -----------------------------------------------------------------------------------

template <class A>
struct ForwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes, Step<A>::small, Step<A>::memory;
  using Pooling = ValuePass<A, true>;
  using Moments = MixMomentsPass<A, true>;

  const BaseAttentionForward& args;

  explicit ForwardStep(const BaseAttentionForward& args) : Step<A>(args), args(args) {}

  void make_value(A* table) const {
    const StripSums<A> sums(table, Pooling::kSums, grid);
    run_pass<ValuePass>(args.threads, grid, this->feature(args.x), this->feature(args.v),
                        small(args.v_weight), sums);
    const double pixels = static_cast<double>(shape.pixels());
    this->for_channels([&](int64_t c) {
      for (int64_t b = 0; b < shape.batch; ++b) {
        const int64_t i = b * shape.channels + c;
        small(args.pooled_x)[i] = static_cast<A>(sums.total(b, Pooling::kX, c) / pixels);
        if (args.pooled_v != nullptr)
          small(args.pooled_v)[i] = static_cast<A>(sums.total(b, Pooling::kV, c) / pixels);
      }
    });
  }

  // Mean and biased variance of o over batch and space.
  void batch_statistics(const ValueMix<A>& mixture, A* table) const {
    const StripSums<A> sums(table, Moments::kSums, grid);
    run_pass<MixMomentsPass>(args.threads, grid, mixture, sums);
    this->for_channels([&](int64_t c) { merge_strips(sums, c); });
  }

  // By Chan's rule.
  void merge_strips(const StripSums<A>& sums, int64_t c) const {
    double count = 0, centre = 0, square = 0;
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t strip = 0; strip < sums.strips; ++strip) {
        const int64_t rows =
            std::min(grid.strip_rows, shape.height - strip * grid.strip_rows);
        const double n = static_cast<double>(rows * shape.width);
        const double sum = sums.row(b, strip, Moments::kO)[c];
        const double delta = sums.row(b, strip, Moments::kShift)[c] + sum / n - centre;
        square += std::max(0.0, sums.row(b, strip, Moments::kSquare)[c] - sum * sum / n) +
                  delta * delta * n * count / (count + n);
        count += n;
        centre += delta * (n / count);
      }
    }
    small(args.mean)[c] = static_cast<A>(centre);
    small(args.var)[c] = static_cast<A>(square / count);
  }

  void run() const {
    const int64_t table_size = StripSums<A>::elements(Moments::kSums, grid);
    const int64_t with_own = (memory.layers + 1) * planes;
    Buffers<A> buffers(memory.elements() + with_own + 2 * shape.channels + table_size);
    Recall<A> recall(memory, buffers);
    A* weights = buffers.take(with_own);
    A *scale = buffers.take(shape.channels), *shift = buffers.take(shape.channels);
    A* table = buffers.take(table_size);
    if (args.state_out != nullptr) recall.state = small(args.state_out);
    if (args.keys_out != nullptr) recall.keys = small(args.keys_out);
    if (args.gates_out != nullptr) recall.gates = small(args.gates_out);

    make_value(table);
    memory.recall(small(args.pooled_x), recall);
    memory.score(small(args.pooled_x), recall, small(args.scores));
    memory.weigh(small(args.scores), recall.gates, weights);
    const ValueMix<A> mixture = this->value_mix(weights);
    if (args.norm == Norm::batch) batch_statistics(mixture, table);
    const bool running = args.norm == Norm::running;
    const NormBranch<A> branch = this->branch(small(running ? args.mean_in : args.mean),
                                          small(running ? args.var_in : args.var), scale, shift);
    run_pass<OutputPass>(args.threads, grid, mixture, branch, args.residual,
                         this->feature(args.out));
  }
};

// ---- backward ----------------------------------------------------------------------------------

template <class A>
struct BackwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes, Step<A>::small, Step<A>::memory;
  using NormSums = NormGradientsPass<A, true>;

  const BaseAttentionBackward& args;

  explicit BackwardStep(const BaseAttentionBackward& args) : Step<A>(args), args(args) {}

  // g = scale G' + o_scale (o - mean) + offset; also the gradients of the norm's weight and bias.
  void norm_gradients(const StripSums<A>& sums, const A* scale, A* o_scale, A* offset) const {
    const double count = static_cast<double>(planes / shape.channels * shape.pixels());
    this->for_channels([&](int64_t c) {
      double dweight = 0, dbias = 0;
      for (int64_t b = 0; b < shape.batch; ++b) {
        dbias += sums.total(b, NormSums::kG, c);
        dweight += sums.total(b, NormSums::kGO, c);
      }
      const double rstd = this->rstd(small(args.var), c), weight = scale[c];
      dweight *= rstd;
      const bool batch_norm = args.norm == Norm::batch;
      o_scale[c] = batch_norm ? static_cast<A>(-weight * rstd * dweight / count) : A(0);
      offset[c] = batch_norm ? static_cast<A>(-weight * dbias / count) : A(0);
      if (args.dnorm_weight != nullptr) small(args.dnorm_weight)[c] = static_cast<A>(dweight);
      if (args.dnorm_bias != nullptr) small(args.dnorm_bias)[c] = static_cast<A>(dbias);
    });
  }

  // g and dweights from the gradient of out.
  void branch_gradients(const A* weights, A* coefficients, A* table, A* dweights) const {
    A *scale = coefficients, *shift = scale + shape.channels, *o_scale = shift + shape.channels;
    A *offset = o_scale + shape.channels, *mean = offset + shape.channels;
    const ValueMix<A> mixture = this->value_mix(weights);
    const NormBranch<A> branch = this->branch(small(args.mean), small(args.var), scale, shift);
    if (args.norm == Norm::none) {
      std::fill_n(o_scale, 3 * shape.channels, A(0));  // also offset and mean
    } else {
      std::copy_n(small(args.mean), shape.channels, mean);
      const StripSums<A> sums(table, NormSums::kSums, grid);
      run_pass<NormGradientsPass>(args.threads, grid, mixture, branch,
                                  this->feature(args.grad_out), mean, sums);
      norm_gradients(sums, scale, o_scale, offset);
    }

    const StripSums<A> products(table, memory.layers + 1, grid);
    run_pass<MixGradientsPass>(args.threads, grid, mixture, branch, this->feature(args.grad_out),
                               mean, o_scale, offset, this->feature(args.g), products);
    this->for_channels([&](int64_t c) {
      for (int64_t t = 0; t <= memory.layers; ++t)
        for (int64_t b = 0; b < shape.batch; ++b)
          dweights[t * planes + b * shape.channels + c] =
              static_cast<A>(products.total(b, t, c));
    });
  }

  void value_gradients(const A* own_weight, A* dy, A* table) const {
    Terms<A> terms;
    const void* g = args.g;
    if (g != nullptr) terms.add(this->feature(g), own_weight);
    for (std::size_t j = 0; j < args.later_grads.size(); ++j)
      terms.add(this->feature(args.later_grads[j]), small(args.later_weights[j]));
    if (args.grad_v != nullptr) terms.add(this->feature(args.grad_v), nullptr);
    const StripSums<A> products(table, 9, grid);
    const Feature passed = this->feature(args.residual ? args.grad_out : nullptr);
    run_pass<ValueGradientsPass>(args.threads, grid, this->feature(args.x), passed, terms,
                                 small(args.v_weight), small(args.grad_pooled_v), dy,
                                 A(1) / static_cast<A>(shape.pixels()), this->feature(args.dx),
                                 products);
    this->for_channels([&](int64_t c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        double total = 0;
        for (int64_t b = 0; b < shape.batch; ++b) total += products.total(b, tap, c);
        small(args.dv_weight)[c * 9 + tap] = static_cast<A>(total);
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
    if (args.weights != nullptr) weights = small(args.weights);

    memory.recall(small(args.pooled_x), recall);
    memory.weigh(small(args.scores), recall.gates, weights);
    if (args.grad_out != nullptr) {
      branch_gradients(weights, coefficients, table, dweights);
    } else {
      std::fill_n(dweights, with_own, A(0));
      for (void* grad : {args.dnorm_weight, args.dnorm_bias})
        if (grad != nullptr) std::fill_n(small(grad), shape.channels, A(0));
    }
    if (args.grad_pooled_x != nullptr)
      std::copy_n(small(args.grad_pooled_x), planes, dy);
    else
      std::fill_n(dy, planes, A(0));
    memory.backward(args, recall, dweights, grads, dy);
    value_gradients(weights + memory.layers * planes, dy, table);
  }
};

}  // namespace

void base_attention_forward(const BaseAttentionForward& args) {
  args.dtype == DType::f64 ? ForwardStep<double>(args).run() : ForwardStep<float>(args).run();
}

void base_attention_backward(const BaseAttentionBackward& args) {
  args.dtype == DType::f64 ? BackwardStep<double>(args).run() : BackwardStep<float>(args).run();
}

}  // namespace dla::DLA_ISA
